//! The one thread that writes the log, and the queue before it.
//!
//! While the thread waits for the disk, records gather; the next sync takes them all. After any failure the file is
//! cut back to what was durable, closed, and opened anew for the next record: so a disk that has room again is used
//! again, and a file that was rotated away is followed by a new one that continues the chain.
//!
//! A disk that hangs cannot be told from a slow one, and what waits for it cannot be taken back. So whoever waits gives
//! up in time, and as long as the thread has not come back from the disk nobody else begins to wait. What becomes durable
//! afterwards is followed by a record that says that nobody was answered.

use super::log::{Disk, Entry, Log, open_error};
use super::{AuditError, Lag};
use kms_core::audit::{FILE_MISSING, FILE_REMOVED, Link};
use kms_core::clock::Clock;
use prometheus_client::metrics::histogram::Histogram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::{Notify, oneshot};

/// More records than this wait only when the disk does not answer.
const MOST_WAITING: usize = 10_000;

pub(super) type Written = oneshot::Receiver<Result<Link, AuditError>>;

/// Takes records; a thread of its own makes them durable.
#[derive(Debug)]
pub(super) struct Sink {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    node: String,
    /// The last record that is durable.
    head: Mutex<Link>,
    /// Up to this record an anchor proves what was written.
    covered: AtomicU64,
    /// A file was begun.
    begun: Notify,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    disk: Arc<Disk>,
    /// The last batch was not written, or does not come back from the disk.
    failed: AtomicBool,
}

#[derive(Debug, Default)]
struct Inbox {
    waiting: Vec<Pending>,
    /// What the thread has taken and not answered yet: how many, and since when the first of them waits.
    at_work: Option<(usize, Duration)>,
    /// Somebody has waited in vain while the thread was at work, and it has not come back since.
    stuck: bool,
    closed: bool,
}

#[derive(Debug)]
struct Pending {
    entry: Entry,
    at: OffsetDateTime,
    since: Duration,
    /// Who waits; nobody for what the log owes of somebody who gave up.
    answer: Option<oneshot::Sender<Result<Link, AuditError>>>,
}

impl Sink {
    /// `known` is where the chain was left, as somebody else remembers it.
    pub(super) fn open(
        path: &Path,
        node: &str,
        known: Option<Link>,
        clock: Arc<dyn Clock>,
    ) -> Result<Sink, AuditError> {
        let now = OffsetDateTime::from(clock.wall());
        let disk = Arc::new(Disk::new(clock));
        let mut log = Log::open(path, node, &disk, known, now)?;
        if let (0, Some(known)) = (log.len, known) {
            tracing::warn!(
                "There is no audit log {}; a new one continues after record {}.",
                path.display(),
                known.seq
            );
            log.note_loss(FILE_MISSING, None, now)?;
        }
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            node: node.to_owned(),
            head: Mutex::new(log.link),
            // What the database knows of a chain is the place of its last anchor.
            covered: AtomicU64::new(known.map_or(0, |known| known.seq)),
            begun: Notify::new(),
            inbox: Mutex::default(),
            arrived: Condvar::new(),
            disk,
            failed: AtomicBool::new(false),
        });
        let writer = std::thread::Builder::new().name("audit".into()).spawn({
            let shared = shared.clone();
            move || write_all(&shared, log)
        });
        let writer = writer.map_err(|cause| open_error(path, cause))?;
        Ok(Sink { shared, writer: Some(writer) })
    }

    /// Hands an entry over; the receiver is answered when it is durable or lost.
    ///
    /// # Errors
    /// At once, while it is known that the disk hangs.
    pub(super) fn submit(&self, entry: Entry, at: OffsetDateTime) -> Result<Written, AuditError> {
        let (answer, written) = oneshot::channel();
        let mut inbox = self.shared.inbox();
        if inbox.stuck || inbox.waiting.len() >= MOST_WAITING {
            return Err(AuditError::TimedOut { path: self.shared.path.clone() });
        }
        let since = self.shared.disk.clock.now();
        // At work, it looks again by itself; and whoever came first has woken it.
        let sleeps = inbox.at_work.is_none() && inbox.waiting.is_empty();
        inbox.waiting.push(Pending { entry, at, since, answer: Some(answer) });
        drop(inbox);
        if sleeps {
            self.shared.arrived.notify_one();
        }
        Ok(written)
    }

    /// True from a failure until the next record that is written.
    pub(super) fn has_failed(&self) -> bool {
        self.shared.failed.load(Ordering::Relaxed)
    }

    /// Somebody has waited in vain: the disk did not answer in time.
    pub(super) fn give_up(&self) {
        self.shared.failed.store(true, Ordering::Relaxed);
        let mut inbox = self.shared.inbox();
        inbox.stuck = inbox.at_work.is_some();
    }

    pub(super) fn path(&self) -> &Path {
        &self.shared.path
    }

    pub(super) fn node(&self) -> &str {
        &self.shared.node
    }

    pub(super) fn head(&self) -> Link {
        *self.shared.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when a file was begun that nobody was told of yet.
    pub(super) async fn begun(&self) {
        self.shared.begun.notified().await;
    }

    pub(super) fn syncs(&self) -> u64 {
        self.shared.disk.syncs.load(Ordering::Relaxed)
    }

    /// From now on `seconds` gets how long each sync takes.
    pub(super) fn show_times(&self, seconds: Histogram) {
        // Whoever came first shows them.
        let _ = self.shared.disk.seconds.set(seconds);
    }

    pub(super) fn lag(&self) -> Lag {
        let inbox = self.shared.inbox();
        let (at_work, taken) = inbox.at_work.unzip();
        let oldest = taken.or_else(|| inbox.waiting.first().map(|pending| pending.since));
        let waiting = inbox.waiting.len() + at_work.unwrap_or(0);
        drop(inbox);
        let now = self.shared.disk.clock.now();
        let covered = self.shared.covered.load(Ordering::Relaxed);
        Lag {
            waiting,
            oldest: oldest.map_or(Duration::ZERO, |since| now.saturating_sub(since)),
            unanchored: self.head().seq.saturating_sub(covered),
            losses: self.shared.disk.losses.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Sink {
    /// What was handed over is still written.
    fn drop(&mut self) {
        self.shared.inbox().closed = true;
        self.shared.arrived.notify_one();
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has answered nobody; there is nothing left to do.
            let _ = writer.join();
        }
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that waits; empty only at the end.
    fn batch(&self) -> Vec<Pending> {
        let idle = |inbox: &mut Inbox| inbox.waiting.is_empty() && !inbox.closed;
        let inbox = self.arrived.wait_while(self.inbox(), idle);
        let mut inbox = inbox.unwrap_or_else(PoisonError::into_inner);
        let batch = std::mem::take(&mut inbox.waiting);
        inbox.begin(&batch);
        batch
    }
}

impl Inbox {
    fn begin(&mut self, batch: &[Pending]) {
        self.at_work = batch.first().map(|first| (batch.len(), first.since));
    }

    fn end(&mut self) {
        self.at_work = None;
        self.stuck = false;
    }
}

fn write_all(shared: &Shared, log: Log) {
    let mut open = Some(log);
    let mut owed = Vec::new();
    loop {
        let batch = shared.batch();
        let last = batch.is_empty();
        // What the disk did not take before goes first.
        owed.extend(batch);
        owed = settle(shared, &mut open, owed);
        // The disk is there: nothing waits for the next caller.
        if !owed.is_empty() && open.is_some() {
            shared.inbox().begin(&owed);
            owed = settle(shared, &mut open, owed);
        }
        if last {
            return;
        }
    }
}

/// Makes a batch durable and answers it; returns what the log owes then.
fn settle(shared: &Shared, open: &mut Option<Log>, batch: Vec<Pending>) -> Vec<Pending> {
    let Some(first) = batch.first() else { return batch };
    let outcome = commit(shared, open, first.at, &batch);
    shared.failed.store(outcome.is_err(), Ordering::Relaxed);
    shared.inbox().end();
    match outcome {
        Ok(links) => {
            let answered = batch.into_iter().zip(links);
            answered.filter_map(|(pending, link)| answer(shared, pending, link)).collect()
        }
        Err(error) => {
            tracing::error!("{error}");
            let refuse = |pending: Pending| match pending.answer {
                Some(answer) => {
                    // Whoever does not wait any more has not answered its caller either.
                    let _ = answer.send(Err(error.clone()));
                    None
                }
                None => Some(pending),
            };
            batch.into_iter().filter_map(refuse).collect()
        }
    }
}

/// What is owed where nobody waits any more, and so nobody was answered.
fn answer(shared: &Shared, pending: Pending, link: Link) -> Option<Pending> {
    if pending.answer?.send(Ok(link)).is_ok() {
        return None;
    }
    let clock = &shared.disk.clock;
    let (at, since) = (clock.wall().into(), clock.now());
    Some(Pending { entry: pending.entry.unanswered()?, at, since, answer: None })
}

/// Makes a whole batch durable. On failure `open` is left empty, so that the next batch opens the file anew.
fn commit(
    shared: &Shared,
    open: &mut Option<Log>,
    now: OffsetDateTime,
    batch: &[Pending],
) -> Result<Vec<Link>, AuditError> {
    let mut log = match open.take() {
        Some(log) if log.is_at_its_path() => log,
        Some(log) if let Err(cut) = log.check_whole() => {
            *open = Some(log);
            return Err(cut);
        }
        // The old file is closed first: it may be the same one, and is locked.
        before => reopen(shared, before.is_some_and(|log| log.is_removed()), now)?,
    };
    let links = log.append(batch.iter().map(|pending| (&pending.entry, pending.at)))?;
    for (pending, link) in batch.iter().zip(&links) {
        if let Entry::Anchor(anchor) = &pending.entry {
            // Its own line proves itself.
            let head = anchor.head().seq;
            let covered = if head + 1 == link.seq { link.seq } else { head };
            shared.covered.store(covered, Ordering::Relaxed);
        }
    }
    *shared.head.lock().unwrap_or_else(PoisonError::into_inner) = log.link;
    *open = Some(log);
    Ok(links)
}

fn reopen(shared: &Shared, removed: bool, now: OffsetDateTime) -> Result<Log, AuditError> {
    let head = *shared.head.lock().unwrap_or_else(PoisonError::into_inner);
    let mut log = Log::open(&shared.path, &shared.node, &shared.disk, Some(head), now)?;
    if log.len == 0 {
        shared.begun.notify_one();
    }
    if removed {
        tracing::error!(
            "The audit log {} was removed while it was in use; a new one continues after record {}.",
            shared.path.display(),
            head.seq
        );
        log.note_loss(FILE_REMOVED, None, now)?;
    }
    Ok(log)
}
