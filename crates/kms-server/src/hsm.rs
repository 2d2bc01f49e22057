//! The vault of the running service: in a worker process, unless the operator wants the library in this one.
//!
//! The worker is this same program under a name that nobody else needs. It reads no configuration: what it must know
//! of the log is in its arguments, and everything else comes through its socket.

use crate::config::{Config, Isolation};
use crate::init::vault_settings;
use kms_core::clock::{Clock, SystemClock};
use kms_core::secret::SecretText;
use kms_daemon::lifecycle::{Shutdown, leave_signals_to_the_parent};
use kms_daemon::memory;
use kms_daemon::settings::read_secret;
use kms_daemon::telemetry::{self, LogLevel};
use kms_hsm::pkcs11::{Pin, Pkcs11Vault, Settings};
use kms_hsm::process::{self, Isolated, Program};
use kms_hsm::{Vault, VaultError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The command of a worker.
pub const WORKER: &str = "hsm-worker";

/// How often a file with a PIN is looked at.
const PIN_INTERVAL: Duration = Duration::from_secs(2);

/// The vault that the configuration names, which logs in with `pin`. Blocks until the first attempt to reach the HSM
/// has ended.
///
/// # Errors
/// The library cannot be used.
pub fn open(config: &Config, pin: &Pin) -> Result<Arc<dyn Vault>, VaultError> {
    let settings = vault_settings(&config.hsm, config.operations.wdek_version);
    let settings = Settings { pin: pin.clone(), ..settings };
    match config.hsm.isolation {
        Isolation::None => Ok(Arc::new(Pkcs11Vault::open(settings)?)),
        Isolation::Process => Ok(Arc::new(Isolated::open(settings, program(config.log))?)),
    }
}

/// Takes over what is written into `file`, until the shutdown. A file that cannot be used changes nothing.
pub async fn watch_pin(pin: Pin, file: PathBuf, shutdown: Shutdown) {
    let mut told: Option<String> = None;
    loop {
        tokio::select! {
            () = shutdown.requested() => return,
            () = tokio::time::sleep(PIN_INTERVAL) => {}
        }
        let (pin, path) = (pin.clone(), file.clone());
        // On a thread of its own: a file system may hang, and a PIN that was refused before is known by a slow hash.
        let read = tokio::task::spawn_blocking(move || take_over(&pin, &path)).await;
        let cause = match read {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            // The panic is in the log already.
            Err(_) => continue,
        };
        if let Some(cause) = cause.as_ref().filter(|cause| told.as_ref() != Some(cause)) {
            tracing::error!(
                "The PIN before stays in use, {} is of no use: {cause}",
                file.display()
            );
        }
        told = cause;
    }
}

fn take_over(pin: &Pin, file: &Path) -> io::Result<()> {
    let mut text = read_secret(file)?;
    if pin.replace(SecretText::new(std::mem::take(&mut *text))) {
        tracing::info!("The HSM's PIN is another one; the next login is made with it.");
    }
    Ok(())
}

/// The worker's whole life.
///
/// # Errors
/// Somebody else than the service has started it, or the operating system refuses what it needs.
#[tokio::main(flavor = "current_thread")]
pub async fn work(log_level: &str, log_all_values: bool) -> io::Result<()> {
    let level = LogLevel::parse(log_level).ok_or(io::ErrorKind::InvalidInput)?;
    let clock = SystemClock::new();
    telemetry::init(telemetry::Settings { level, log_all_values }, Arc::new(move || clock.wall()))
        .map_err(io::Error::other)?;
    leave_signals_to_the_parent()?;
    // What cannot be locked here could not be locked in the service either, which has said so.
    let _ = memory::protect();
    process::serve().await
}

fn program(log: telemetry::Settings) -> Program {
    Program {
        // Not the path of the program: an upgrade puts another one there, which may speak otherwise.
        path: PathBuf::from("/proc/self/exe"),
        name: "kms-server".into(),
        args: [WORKER, log.level.name(), if log.log_all_values { "true" } else { "false" }]
            .map(Into::into)
            .to_vec(),
    }
}
