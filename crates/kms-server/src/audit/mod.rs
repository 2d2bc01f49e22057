//! The audit log: one record for each use of a key, each token and each change of who may do what.
//!
//! A record is durable when [`Audit::record`] returns; nobody answers before that.

use kms_core::clock::Clock;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// What happened. Never holds key material, tokens or API keys: they are named by their ids.
#[derive(Debug, Clone)]
pub struct Record {
    /// Name of the action (`crate::policy::Action::name`), or `issue_token`, `init`.
    pub action: &'static str,
    pub outcome: Outcome,
    /// `iam-ServiceId-<uuid>`.
    pub caller: Option<String>,
    pub api_key: Option<Uuid>,
    pub instance: Option<Uuid>,
    pub key: Option<Uuid>,
    pub version: Option<Uuid>,
    /// What the caller sent as `Correlation-Id`.
    pub correlation: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The reason code of the refusal.
    Refused(&'static str),
}

#[derive(Debug)]
pub struct Audit {
    file: Arc<Mutex<File>>,
    path: PathBuf,
    clock: Arc<dyn Clock>,
}

impl Audit {
    /// Opens the log at `path`, creating it where there is none.
    ///
    /// # Errors
    /// When the file cannot be opened for appending.
    pub fn open(path: &Path, clock: Arc<dyn Clock>) -> Result<Audit, AuditError> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(|cause| AuditError::Open { path: path.to_owned(), cause })?;
        Ok(Audit { file: Arc::new(Mutex::new(file)), path: path.to_owned(), clock })
    }

    /// Returns when `record` is on disk.
    ///
    /// # Errors
    /// When it cannot be written: the caller must not answer then.
    pub async fn record(&self, record: Record) -> Result<(), AuditError> {
        let line = line(&record, OffsetDateTime::from(self.clock.wall()));
        let file = self.file.clone();
        let written = tokio::task::spawn_blocking(move || {
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            file.write_all(line.as_bytes())?;
            file.sync_data()
        })
        .await;
        let cause = match written {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(cause)) => cause,
            Err(cause) => std::io::Error::other(cause),
        };
        Err(AuditError::Write { path: self.path.clone(), cause })
    }
}

fn line(record: &Record, at: OffsetDateTime) -> String {
    let outcome = match record.outcome {
        Outcome::Done => "done",
        Outcome::Refused(code) => code,
    };
    let value = serde_json::json!({
        "at": at.format(&Rfc3339).unwrap_or_default(),
        "action": record.action,
        "outcome": outcome,
        "caller": record.caller,
        "api_key": record.api_key.map(|id| id.to_string()),
        "instance": record.instance.map(|id| id.to_string()),
        "key": record.key.map(|id| id.to_string()),
        "version": record.version.map(|id| id.to_string()),
        "correlation": record.correlation,
    });
    format!("{value}\n")
}

/// For the operator: the log cannot be written, so nothing is answered.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("cannot open the audit log {}: {cause}", path.display())]
    Open { path: PathBuf, cause: std::io::Error },
    #[error("cannot write the audit log {}: {cause}", path.display())]
    Write { path: PathBuf, cause: std::io::Error },
}
