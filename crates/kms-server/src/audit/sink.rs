//! The file behind the log, and the one thread that writes to it.
//!
//! While the thread waits for the disk, records gather; the next sync takes them all. After any failure the file is
//! cut back to what was durable, closed, and opened anew for the next record: so a disk that has room again is used
//! again, and a file that was rotated away is followed by a new one that continues the chain.

use super::node::beside;
use super::past::{Past, trace};
use super::{AuditError, Lag, Outcome, Record};
use kms_core::audit::anchor::Anchor;
use kms_core::audit::{BEGUN, Content, DONE, Event, Link, parse};
use kms_core::clock::Clock;
use prometheus_client::metrics::histogram::Histogram;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{Notify, oneshot};

/// How much of the end of a log is checked when it is opened.
const TAIL: u64 = 256 * 1024;
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
    closed: bool,
}

#[derive(Debug)]
struct Pending {
    entry: Entry,
    at: OffsetDateTime,
    since: Duration,
    answer: oneshot::Sender<Result<Link, AuditError>>,
}

/// What becomes one line.
#[derive(Debug)]
pub(super) enum Entry {
    Record(Record),
    /// With its own time, which is signed.
    Anchor(Anchor<'static>),
}

/// Syncs, counted and timed.
#[derive(Debug)]
struct Disk {
    clock: Arc<dyn Clock>,
    syncs: AtomicU64,
    /// Where the times are shown, once somebody shows them.
    seconds: OnceLock<Histogram>,
}

/// An open log, whole to its last byte.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    node: String,
    disk: Arc<Disk>,
    file: File,
    /// Up to here everything is durable.
    len: u64,
    link: Link,
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
        let disk = Arc::new(Disk { clock, syncs: AtomicU64::new(0), seconds: OnceLock::new() });
        let mut log = Log::open(path, node, &disk, known, now)?;
        if let (0, Some(known)) = (log.len, known) {
            tracing::warn!(
                "There is no audit log {}; a new one continues after record {}.",
                path.display(),
                known.seq
            );
            log.note("audit_file_missing", None, now)?;
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
    pub(super) fn submit(&self, entry: Entry, at: OffsetDateTime) -> Result<Written, AuditError> {
        let (answer, written) = oneshot::channel();
        let mut inbox = self.shared.inbox();
        if inbox.waiting.len() >= MOST_WAITING {
            return Err(AuditError::TimedOut { path: self.shared.path.clone() });
        }
        let since = self.shared.disk.clock.now();
        // At work, it looks again by itself; and whoever came first has woken it.
        let sleeps = inbox.at_work.is_none() && inbox.waiting.is_empty();
        inbox.waiting.push(Pending { entry, at, since, answer });
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

    /// The disk did not answer in time.
    pub(super) fn note_failure(&self) {
        self.shared.failed.store(true, Ordering::Relaxed);
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
        inbox.at_work = batch.first().map(|first| (batch.len(), first.since));
        batch
    }
}

/// The time in the last whole record of the log at `path`; `None` where there is none.
pub(super) fn last_time(path: &Path) -> Option<OffsetDateTime> {
    let mut file = File::open(path).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL))).ok()?;
    let mut end = Vec::new();
    (&file).take(TAIL).read_to_end(&mut end).ok()?;
    let whole = end.iter().rposition(|byte| *byte == b'\n')?;
    let line = parse(end[..whole].rsplit(|byte| *byte == b'\n').next()?).ok()?;
    OffsetDateTime::parse(line.at(), &Rfc3339).ok()
}

fn write_all(shared: &Shared, log: Log) {
    let mut open = Some(log);
    loop {
        let batch = shared.batch();
        let Some(first) = batch.first() else { return };
        let outcome = commit(shared, &mut open, first.at, &batch);
        shared.failed.store(outcome.is_err(), Ordering::Relaxed);
        shared.inbox().at_work = None;
        let answers: Vec<_> = match outcome {
            Ok(links) => links.into_iter().map(Ok).collect(),
            Err(error) => {
                tracing::error!("{error}");
                batch.iter().map(|_| Err(error.clone())).collect()
            }
        };
        for (pending, answer) in batch.into_iter().zip(answers) {
            // Whoever does not wait any more has not answered its caller either.
            let _ = pending.answer.send(answer);
        }
    }
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
        log.note("audit_file_removed", None, now)?;
    }
    Ok(log)
}

impl Disk {
    fn sync(&self, file: &File) -> io::Result<()> {
        let began = self.clock.now();
        let synced = file.sync_data();
        self.syncs.fetch_add(1, Ordering::Relaxed);
        if let Some(seconds) = self.seconds.get() {
            seconds.observe(self.clock.now().saturating_sub(began).as_secs_f64());
        }
        synced
    }
}

impl Log {
    /// Opens the file, checks its end, sets a torn last line aside. `known` is where the chain was left: an empty file
    /// continues it, any other must end with it or have gone on from it.
    fn open(
        path: &Path,
        node: &str,
        disk: &Arc<Disk>,
        known: Option<Link>,
        now: OffsetDateTime,
    ) -> Result<Log, AuditError> {
        let failed = |cause| open_error(path, cause);
        let created = !path.exists();
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(AuditError::InUse { path: path.to_owned() });
            }
            Err(TryLockError::Error(cause)) => return Err(failed(cause)),
        }
        if created {
            sync_folder(path).map_err(failed)?;
        }
        let start = known.unwrap_or_else(Link::start);
        let mut log = Log {
            path: path.to_owned(),
            node: node.to_owned(),
            disk: disk.clone(),
            file,
            len: 0,
            link: start,
        };
        let torn = log.read_end(known)?;
        if !torn.is_empty() {
            log.set_aside(&torn, now)?;
        }
        match known {
            Some(known) if log.link.seq < known.seq => {
                let what = format!("it ends with record {}, not {}", log.link.seq, known.seq);
                Err(log.broken(what))
            }
            _ => Ok(log),
        }
    }

    /// Follows the chain through the end of the file, and from there back to `known`; returns what stands after the last
    /// whole line.
    fn read_end(&mut self, known: Option<Link>) -> Result<Vec<u8>, AuditError> {
        let (size, end) = self.end().map_err(|cause| open_error(&self.path, cause))?;
        let mut rest = end.as_slice();
        let begins = size - u64::try_from(rest.len()).unwrap_or(size);
        self.check_past(rest, begins, known)?;
        let mut last: Option<(Link, &[u8])> = None;
        while let Some(feed) = line_feed(rest) {
            let line = &rest[..feed];
            let next = match &last {
                Some((link, _)) => link.follow(line),
                None => Link::join(line),
            };
            let next = match next {
                Ok(next) => next,
                // Blocks of the last, unfinished write that never reached the disk read as zeros.
                Err(_) if rest.contains(&0) => break,
                Err(why) => return Err(self.broken(why.to_string())),
            };
            if known.is_some_and(|known| known.seq == next.seq && known != next) {
                return Err(self.broken(format!("record {} is not the one written", next.seq)));
            }
            last = Some((next, line));
            rest = &rest[feed + 1..];
        }
        self.len = size - u64::try_from(rest.len()).unwrap_or(size);
        if let Some((link, line)) = last {
            self.check_node(line)?;
            self.link = link;
        }
        Ok(rest.to_vec())
    }

    /// What is behind `known` goes on from it, where the end of the log, which begins at byte `begins`, does not show it.
    fn check_past(&self, end: &[u8], begins: u64, known: Option<Link>) -> Result<(), AuditError> {
        let first = line_feed(end).and_then(|feed| parse(&end[..feed]).ok());
        let (Some(known), Some(first)) = (known, first) else { return Ok(()) };
        if first.seq <= known.seq {
            return Ok(());
        }
        let before = Link { seq: first.seq - 1, hash: first.prev };
        match trace(&self.file, begins, before, known) {
            Ok(Past::Known) => Ok(()),
            Ok(Past::Before { first }) => {
                tracing::warn!(
                    "The audit log {} begins with record {first}; record {}, up to which the database knows it, is in a \
                     file that was moved away. Check both: kmsctl audit verify.",
                    self.path.display(),
                    known.seq
                );
                Ok(())
            }
            Ok(Past::Other(what)) => Err(self.broken(what)),
            Err(cause) => Err(open_error(&self.path, cause)),
        }
    }

    /// Two servers must not continue one chain, each from where it left it.
    fn check_node(&self, line: &[u8]) -> Result<(), AuditError> {
        match parse(line) {
            Ok(line) if line.node() != self.node => Err(AuditError::OtherNode {
                path: self.path.clone(),
                found: line.node().to_owned(),
                own: self.node.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// The size of the file, and its last lines; the first of them whole.
    fn end(&mut self) -> io::Result<(u64, Vec<u8>)> {
        let size = self.file.metadata()?.len();
        let from = size.saturating_sub(TAIL);
        let mut end = Vec::new();
        self.file.seek(SeekFrom::Start(from))?;
        (&self.file).take(size - from).read_to_end(&mut end)?;
        if from > 0 {
            // Reading began somewhere in a line. Without a line feed all of it is one torn line.
            end.drain(..line_feed(&end).map_or(0, |feed| feed + 1));
        }
        Ok((size, end))
    }

    /// Moves what a crash left of a line into a file of its own, and records that. Nobody was answered on its strength.
    fn set_aside(&mut self, torn: &[u8], now: OffsetDateTime) -> Result<(), AuditError> {
        let aside = beside(&self.path, &format!("torn-{}", self.link.seq + 1));
        let kept = File::create(&aside).and_then(|mut file| {
            file.write_all(torn)?;
            file.sync_all()?;
            sync_folder(&aside)?;
            self.file.set_len(self.len)
        });
        kept.map_err(|cause| open_error(&aside, cause))?;
        tracing::warn!(
            "The audit log {} ended in {} bytes of an unfinished record; they are in {}.",
            self.path.display(),
            torn.len(),
            aside.display()
        );
        let name = aside.file_name().map(|name| name.to_string_lossy().into_owned());
        self.note("audit_recovered", name, now)
    }

    /// Writes what the log says of itself.
    fn note(
        &mut self,
        action: &'static str,
        detail: Option<String>,
        now: OffsetDateTime,
    ) -> Result<(), AuditError> {
        let entry = Entry::Record(Record { correlation: detail, ..Record::of_log(action) });
        self.append([(&entry, now)].into_iter()).map(drop)
    }

    /// Writes all entries and syncs once; returns the link after each.
    fn append<'e>(
        &mut self,
        entries: impl Iterator<Item = (&'e Entry, OffsetDateTime)>,
    ) -> Result<Vec<Link>, AuditError> {
        let mut links = Vec::new();
        let mut bytes = Vec::new();
        for (entry, at) in entries {
            let before = links.last().copied().unwrap_or(self.link);
            let content = entry.content(&self.node, at).map_err(|cause| self.write_error(cause))?;
            let (line, next) = before
                .extend(&content)
                .map_err(|cause| self.write_error(io::Error::other(cause)))?;
            bytes.extend_from_slice(&line);
            links.push(next);
        }
        let written = self.file.write_all(&bytes).and_then(|()| self.disk.sync(&self.file));
        if let Err(cause) = written {
            // Where the disk refuses even this, the next opening finds the torn line.
            let _ = self.file.set_len(self.len).and_then(|()| self.file.sync_data());
            return Err(self.write_error(cause));
        }
        self.len += u64::try_from(bytes.len()).unwrap_or(0);
        self.link = links.last().copied().unwrap_or(self.link);
        Ok(links)
    }

    /// False when the file was moved, removed, replaced, or changed in length by somebody else.
    fn is_at_its_path(&self) -> bool {
        let (Ok(ours), Ok(there)) = (self.file.metadata(), std::fs::metadata(&self.path)) else {
            return false;
        };
        ours.dev() == there.dev() && ours.ino() == there.ino() && there.len() == self.len
    }

    fn is_removed(&self) -> bool {
        self.file.metadata().is_ok_and(|file| file.nlink() == 0)
    }

    fn broken(&self, what: String) -> AuditError {
        AuditError::Broken { path: self.path.clone(), what }
    }

    fn write_error(&self, cause: io::Error) -> AuditError {
        AuditError::Write { path: self.path.clone(), cause: Arc::new(cause) }
    }
}

impl Entry {
    fn content<'e>(&'e self, node: &'e str, at: OffsetDateTime) -> io::Result<Content<'e>> {
        let record = match self {
            Entry::Anchor(anchor) => return Ok(Content::Anchor(anchor.clone())),
            Entry::Record(record) => record,
        };
        Ok(Content::Event(Event {
            node: node.into(),
            at: at.format(&Rfc3339).map_err(io::Error::other)?.into(),
            action: record.action.into(),
            outcome: match record.outcome {
                Outcome::Begun => BEGUN.into(),
                Outcome::Done => DONE.into(),
                Outcome::Refused(code) => code.into(),
            },
            caller: record.caller.as_deref().map(Into::into),
            api_key: record.api_key,
            instance: record.instance,
            target: record.target,
            version: record.version,
            correlation: record.correlation.as_deref().map(Into::into),
            peer: record.peer.map(|peer| peer.to_string().into()),
            count: record.count,
        }))
    }
}

fn open_error(path: &Path, cause: io::Error) -> AuditError {
    AuditError::Open { path: path.to_owned(), cause: Arc::new(cause) }
}

/// A new file is on disk only when its folder is.
fn sync_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

fn line_feed(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|byte| *byte == b'\n')
}
