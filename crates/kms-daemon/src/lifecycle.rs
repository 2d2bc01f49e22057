//! How a daemon ends and when it looks at its configuration again.
//!
//! Nothing here exits the process: whoever serves hears of the request, drains and returns.

use std::io;
use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};

/// The request to end. Every clone hears it, also one that asks later.
#[derive(Debug, Clone)]
pub struct Shutdown(Arc<watch::Sender<bool>>);

impl Shutdown {
    pub fn new() -> Shutdown {
        Shutdown(Arc::new(watch::Sender::new(false)))
    }

    pub fn request(&self) {
        self.0.send_replace(true);
    }

    pub fn is_requested(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once the end was requested.
    pub async fn requested(&self) {
        // The sender lives in self, so waiting cannot fail.
        let _ = self.0.subscribe().wait_for(|requested| *requested).await;
    }
}

impl Default for Shutdown {
    fn default() -> Shutdown {
        Shutdown::new()
    }
}

/// From now on SIGTERM and SIGINT request the shutdown, and SIGHUP wakes `reload`.
///
/// # Errors
/// If the operating system refuses a signal handler.
pub fn watch_signals(shutdown: Shutdown, reload: Arc<Notify>) -> io::Result<()> {
    let signals = Signals::install()?;
    tracing::info!("SIGTERM signal handler started.  Watching for SIGTERM signals.");
    tokio::spawn(signals.obey(shutdown, reload));
    Ok(())
}

/// From now on the signals of [`watch_signals`] do nothing here: the process that started this one hears them too, and
/// tells this one when its time has come. Call it in a runtime.
///
/// # Errors
/// If the operating system refuses a signal handler.
pub fn leave_signals_to_the_parent() -> io::Result<()> {
    // A handler stays when nobody listens to it any more.
    Signals::install().map(drop)
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn install() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn obey(mut self, shutdown: Shutdown, reload: Arc<Notify>) {
        loop {
            tokio::select! {
                Some(()) = self.terminate.recv() => stop("SIGTERM", &shutdown),
                Some(()) = self.interrupt.recv() => stop("SIGINT", &shutdown),
                Some(()) = self.hangup.recv() => reload.notify_one(),
                else => return,
            }
        }
    }
}

fn stop(name: &str, shutdown: &Shutdown) {
    tracing::info!("{name} received: finishing the requests that are running.");
    shutdown.request();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everyone_hears_the_request_also_latecomers() {
        let shutdown = Shutdown::new();
        let waiting = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.requested().await }
        });
        assert!(!shutdown.is_requested());
        shutdown.request();
        waiting.await.unwrap();
        shutdown.clone().requested().await;
        assert!(shutdown.is_requested());
    }
}
