//! The audit log: one record for each use of a key, each token and each change of who may do what.
//!
//! A record is durable when [`Audit::record`] returns; nobody answers before that. Each line holds the hash of the line
//! before it (`kms_core::audit`); one thread writes, and many records that wait share one sync to disk (`sink`); an HSM
//! key signs now and then how far the chain goes (`anchors`). Secrets have no place in a [`Record`]: keys, tokens and
//! API keys are named by their ids.

pub mod anchors;
mod log;
pub mod node;
mod past;
mod sink;

use kms_core::audit::Link;
use kms_core::audit::anchor::Anchor;
use kms_core::clock::Clock;
use log::Entry;
use prometheus_client::metrics::histogram::Histogram;
use sink::Sink;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;
use uuid::Uuid;

/// A disk that takes longer than this for one record counts as lost, unless the configuration says otherwise. The caller
/// hears of it within a second.
pub const DEADLINE: Duration = Duration::from_millis(800);

/// What happened. Never holds key material, tokens or API keys: they are named by their ids.
#[derive(Debug, Clone)]
pub struct Record {
    /// Name of the action (`crate::policy::Action::name`), or `issue_token`, `init`, `renew_key`, `adopt_version`, `restore`, and what the log says of itself:
    /// `audit_recovered`, `audit_resumed`, `audit_file_missing`, `audit_file_removed`, `audit_past_missing`.
    pub action: &'static str,
    pub outcome: Outcome,
    /// `iam-ServiceId-<uuid>`.
    pub caller: Option<String>,
    pub api_key: Option<Uuid>,
    pub instance: Option<Uuid>,
    /// What the action was done to: a key; for management, the service ID, API key or instance.
    pub target: Option<Uuid>,
    pub version: Option<Uuid>,
    /// The version that an unwrapped DEK was wrapped with again: one more use of a key.
    pub rewrapped: Option<Uuid>,
    /// Whose policy, API key or profile `target` is.
    pub service_id: Option<Uuid>,
    /// What it lets them do, or whom it trusts.
    pub grant: Option<String>,
    /// What the caller sent as `Correlation-Id`.
    pub correlation: Option<String>,
    /// The other end of the connection; `None` for what the log says of itself and for what is done on the host.
    pub peer: Option<SocketAddr>,
    /// So many times, where one record stands for several: refused logins, tokens and requests.
    pub count: Option<u64>,
}

impl Record {
    /// Of something that was done on the host; what else is known of it is for whoever knows.
    #[must_use]
    pub fn new(action: &'static str, outcome: Outcome) -> Record {
        Record {
            action,
            outcome,
            caller: None,
            api_key: None,
            instance: None,
            target: None,
            version: None,
            rewrapped: None,
            service_id: None,
            grant: None,
            correlation: None,
            peer: None,
            count: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Begun,
    Done,
    /// The same record, with another outcome, became durable too late: the caller was told that it could not be done, or
    /// had gone.
    Unanswered,
    /// The reason code of the refusal.
    Refused(&'static str),
}

/// How far the log is behind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lag {
    /// Records that are not durable yet; whoever asked for them waits.
    pub waiting: usize,
    /// How long the first of them has waited.
    pub oldest: Duration,
    /// Durable records that no anchor covers yet.
    pub unanchored: u64,
    /// How often a file of the chain, or the beginning of one, was not where it was left, since this process began.
    pub losses: u64,
}

/// The log of this server. One process at a time writes to a file.
#[derive(Debug)]
pub struct Audit {
    sink: Sink,
    clock: Arc<dyn Clock>,
    deadline: Duration,
    told: Mutex<Told>,
    last: Option<OffsetDateTime>,
}

/// What the database was told of this chain.
#[derive(Debug)]
struct Told {
    kept: Option<Link>,
    /// It may have been kept: the answer is what was lost.
    tried: Option<Link>,
}

impl Told {
    /// Whether the database can say so when nobody but this server told it. Less is from a backup of the database.
    fn may_be(&self, there: Link) -> bool {
        let mut ours = [self.kept, self.tried].into_iter().flatten();
        ours.any(|link| link == there || there.seq < link.seq)
    }
}

impl Audit {
    /// Opens the log at `path`, creating it where there is none, and continues the chain of `node`. `known` is where the
    /// database says that this chain was: the log must go on from there.
    ///
    /// What a crash left of a last line is moved into a file beside it, and that is recorded.
    ///
    /// # Errors
    /// When the file cannot be opened, belongs to another process or node, or its last lines do not follow one another.
    pub fn open(
        path: &Path,
        node: &str,
        known: Option<Link>,
        clock: Arc<dyn Clock>,
    ) -> Result<Audit, AuditError> {
        let last = log::last_time(path);
        let sink = Sink::open(path, node, known, clock.clone())?;
        let told = Mutex::new(Told { kept: known, tried: None });
        Ok(Audit { sink, clock, deadline: DEADLINE, told, last })
    }

    /// The same log, whose disk has `deadline` for each record.
    #[must_use]
    pub fn within(self, deadline: Duration) -> Audit {
        Audit { deadline, ..self }
    }

    /// Where it is; what belongs to it lies beside it.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.sink.path()
    }

    /// Returns when `record` is on disk.
    ///
    /// # Errors
    /// When it cannot be written, or not in time: the caller must not answer then. The next record is tried anew, but is
    /// refused at once while the disk has not come back to whoever was too late. Where such a record becomes durable after
    /// all, one more says that nobody was answered ([`Outcome::Unanswered`]).
    pub async fn record(&self, record: Record) -> Result<(), AuditError> {
        self.write(Entry::Record(record)).await.map(drop)
    }

    async fn anchor(&self, anchor: Anchor<'static>) -> Result<Link, AuditError> {
        self.write(Entry::Anchor(anchor)).await
    }

    async fn write(&self, entry: Entry) -> Result<Link, AuditError> {
        let mut written = self.sink.submit(entry, OffsetDateTime::from(self.clock.wall()))?;
        let in_time = match tokio::time::timeout(self.deadline, &mut written).await {
            // Without one where the writer has ended.
            Ok(outcome) => outcome.ok(),
            Err(_) => {
                // From here on the writer knows that nobody waits. What it has said until now counts.
                written.close();
                written.try_recv().ok()
            }
        };
        in_time.unwrap_or_else(|| {
            self.sink.give_up();
            Err(AuditError::TimedOut { path: self.sink.path().to_owned() })
        })
    }

    /// Whether records can be written: the last one was, or one that says that the log goes on is written now.
    ///
    /// # Errors
    /// As [`Audit::record`].
    pub async fn probe(&self) -> Result<(), AuditError> {
        if !self.sink.has_failed() {
            return Ok(());
        }
        self.record(Record::new("audit_resumed", Outcome::Done)).await
    }

    /// The last record that is durable.
    #[must_use]
    pub fn head(&self) -> Link {
        self.sink.head()
    }

    fn told<T>(&self, with: impl FnOnce(&mut Told) -> T) -> T {
        with(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// When the last record was written that the log held as it was opened.
    #[must_use]
    pub fn last(&self) -> Option<OffsetDateTime> {
        self.last
    }

    /// How many times records were synced to disk so far. Far fewer than records when many wait at once.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.sink.syncs()
    }

    /// From now on `seconds` gets how long each sync takes.
    pub fn show_sync_times(&self, seconds: Histogram) {
        self.sink.show_times(seconds);
    }

    /// How far disk and HSM are behind at this moment.
    #[must_use]
    pub fn lag(&self) -> Lag {
        self.sink.lag()
    }
}

/// For the operator: the log cannot be written, so nothing is answered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AuditError {
    #[error("cannot open the audit log {}: {cause}", path.display())]
    Open { path: PathBuf, cause: Arc<std::io::Error> },
    #[error("cannot open the audit log {}: another process writes to it", path.display())]
    InUse { path: PathBuf },
    #[error(
        "the audit log {} was changed or damaged: {what}. Keep the file for examination and move it away; \
         a new one is begun",
        path.display()
    )]
    Broken { path: PathBuf, what: String },
    #[error(
        "the audit log {} is of node {found:?}, and this server is node {own:?}: set NODE_ID to the former, or move the \
         file away; a new one is begun",
        path.display()
    )]
    OtherNode { path: PathBuf, found: String, own: String },
    #[error("cannot write the audit log {}: {cause}", path.display())]
    Write { path: PathBuf, cause: Arc<std::io::Error> },
    #[error("cannot write the audit log {}: the disk does not answer", path.display())]
    TimedOut { path: PathBuf },
}

#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod tests;
