//! Ctrl-C, SIGTERM and SIGHUP end every child before they end this process.

use std::process::ExitCode;

use keelson_e2e::{Error, Result, process};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// From now on, an interrupt kills what was started, says so and exits with 130.
///
/// # Errors
/// When signals cannot be watched.
pub(crate) fn watch() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(Error::machine("start a runtime"))?;
    let guard = runtime.enter();
    let listen = |kind| signal(kind).map_err(Error::machine("watch signals"));
    let signals = [
        listen(SignalKind::interrupt())?,
        listen(SignalKind::terminate())?,
        listen(SignalKind::hangup())?,
    ];
    drop(guard);
    std::thread::spawn(move || {
        runtime.block_on(any_of(signals));
        process::kill_all();
        eprintln!("\ninterrupted: every process that was started is ended");
        std::process::exit(130);
    });
    Ok(())
}

/// After an interrupt, failures are only its echo: the watching thread has the last word.
pub(crate) fn stay_until_exit() -> ExitCode {
    loop {
        std::thread::park();
    }
}

async fn any_of([mut interrupt, mut terminate, mut hangup]: [Signal; 3]) {
    tokio::select! {
        _ = interrupt.recv() => (),
        _ = terminate.recv() => (),
        _ = hangup.recv() => (),
    }
}
