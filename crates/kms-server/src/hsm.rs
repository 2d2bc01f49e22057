//! The vault of the running service: in a worker process, unless the operator wants the library in this one.
//!
//! The worker is this same program under a name that nobody else needs. It reads no configuration: what it must know
//! of the log is in its arguments, and everything else comes through its socket.

use crate::config::{Config, Isolation};
use crate::init::{open_vault, vault_settings};
use kms_core::clock::{Clock, SystemClock};
use kms_daemon::lifecycle::leave_signals_to_the_parent;
use kms_daemon::memory;
use kms_daemon::telemetry::{self, LogLevel};
use kms_hsm::process::{self, Isolated, Program};
use kms_hsm::{Vault, VaultError};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// The command of a worker.
pub const WORKER: &str = "hsm-worker";

/// The vault that the configuration names. Blocks until the first attempt to reach the HSM has ended.
///
/// # Errors
/// Library or PIN cannot be used.
pub fn open(config: &Config) -> Result<Arc<dyn Vault>, VaultError> {
    let wdek_version = config.operations.wdek_version;
    match config.hsm.isolation {
        Isolation::None => Ok(Arc::new(open_vault(&config.hsm, wdek_version)?)),
        Isolation::Process => {
            let settings = vault_settings(&config.hsm, wdek_version);
            Ok(Arc::new(Isolated::open(settings, program(config.log))?))
        }
    }
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
