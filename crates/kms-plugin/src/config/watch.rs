//! Notices that the configuration has changed: by looking every few seconds, and at once on SIGHUP.
//!
//! A configuration with a mistake changes nothing; it is reported once, and the old one keeps running.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use kms_daemon::lifecycle::Shutdown;
use kms_daemon::settings::Mistakes;
use tokio::sync::Notify;

use super::{Config, Source, read_file};
use crate::metrics::Metrics;

/// Three small files are read this often; a change of an API key or a CRK is never more urgent than SIGHUP.
const INTERVAL: Duration = Duration::from_secs(5);

type Fingerprint = Vec<u8>;

/// Calls `take_over` with the old and each new configuration, until the shutdown. If it finds a mistake of its own,
/// the old one stays.
pub async fn watch(
    source: Source,
    mut running: Config,
    reload: Arc<Notify>,
    shutdown: Shutdown,
    metrics: Metrics,
    mut take_over: impl FnMut(&Config, &Config) -> Result<(), Mistakes>,
) {
    let mut seen = fingerprint(&source, &running);
    loop {
        let asked = tokio::select! {
            () = tokio::time::sleep(INTERVAL) => false,
            () = reload.notified() => true,
            () = shutdown.requested() => return,
        };
        let now = fingerprint(&source, &running);
        if now == seen && !asked {
            continue;
        }
        seen = now;
        let result = source.read().and_then(|new| take_over(&running, &new).map(|()| new));
        metrics.config_reload(result.is_ok());
        match result {
            Ok(new) => {
                running = new;
                // It may name other files than before.
                seen = fingerprint(&source, &running);
                tracing::info!("The configuration was read again and is in use.");
            }
            Err(Mistakes(mistakes)) => {
                for mistake in mistakes {
                    tracing::error!("Configuration: {mistake}");
                }
                tracing::error!("The changed configuration is refused, the old one keeps running.");
            }
        }
    }
}

/// Changes whenever one of the files does, or comes, or goes.
fn fingerprint(source: &Source, config: &Config) -> Fingerprint {
    let mut digest = Context::new(&SHA256);
    let paths = source.path.as_deref().into_iter().chain(config.files());
    for path in paths {
        add(&mut digest, path);
    }
    digest.finish().as_ref().to_vec()
}

fn add(digest: &mut Context, path: &Path) {
    match read_file(path).map(zeroize::Zeroizing::new) {
        Ok(content) => {
            digest.update(&[1]);
            digest.update(aws_lc_rs::digest::digest(&SHA256, &content).as_ref());
        }
        Err(_) => digest.update(&[0]),
    }
}
