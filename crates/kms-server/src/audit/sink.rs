//! The file behind the log, and the one thread that writes to it.
//!
//! While the thread waits for the disk, records gather; the next sync takes them all. After any failure the file is
//! cut back to what was durable, closed, and opened anew for the next record: so a disk that has room again is used
//! again, and a file that was rotated away is followed by a new one that continues the chain.

use super::chain::Link;
use super::{AuditError, Outcome, Record};
use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use time::OffsetDateTime;
use tokio::sync::oneshot;

/// How much of the end of a log is checked when it is opened.
const TAIL: u64 = 256 * 1024;
/// More records than this wait only when the disk does not answer.
const MOST_WAITING: usize = 10_000;

pub(super) type Written = oneshot::Receiver<Result<(), AuditError>>;

/// Takes records; a thread of its own makes them durable.
#[derive(Debug)]
pub(super) struct Sink {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    syncs: AtomicU64,
}

#[derive(Debug, Default)]
struct Inbox {
    waiting: Vec<Pending>,
    closed: bool,
}

#[derive(Debug)]
struct Pending {
    record: Record,
    at: OffsetDateTime,
    answer: oneshot::Sender<Result<(), AuditError>>,
}

/// An open log, whole to its last byte.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    /// Up to here everything is durable.
    len: u64,
    link: Link,
}

impl Sink {
    pub(super) fn open(path: &Path, now: OffsetDateTime) -> Result<Sink, AuditError> {
        let log = Log::open(path, None, now)?;
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            inbox: Mutex::default(),
            arrived: Condvar::new(),
            syncs: AtomicU64::new(0),
        });
        let writer = std::thread::Builder::new().name("audit".into()).spawn({
            let shared = shared.clone();
            move || write_all(&shared, log)
        });
        let writer = writer.map_err(|cause| open_error(path, cause))?;
        Ok(Sink { shared, writer: Some(writer) })
    }

    /// Hands a record over; the receiver is answered when it is durable or lost.
    pub(super) fn submit(&self, record: Record, at: OffsetDateTime) -> Result<Written, AuditError> {
        let (answer, written) = oneshot::channel();
        let mut inbox = self.shared.inbox();
        if inbox.waiting.len() >= MOST_WAITING {
            return Err(AuditError::TimedOut { path: self.shared.path.clone() });
        }
        inbox.waiting.push(Pending { record, at, answer });
        drop(inbox);
        self.shared.arrived.notify_one();
        Ok(written)
    }

    pub(super) fn path(&self) -> &Path {
        &self.shared.path
    }

    pub(super) fn syncs(&self) -> u64 {
        self.shared.syncs.load(Ordering::Relaxed)
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
        std::mem::take(&mut inbox.unwrap_or_else(PoisonError::into_inner).waiting)
    }
}

fn write_all(shared: &Shared, log: Log) {
    let mut link = log.link.clone();
    let mut open = Some(log);
    loop {
        let batch = shared.batch();
        let Some(first) = batch.first() else { return };
        let outcome = commit(&shared.path, &mut open, &link, first.at, &batch);
        match &outcome {
            Ok(()) => {
                shared.syncs.fetch_add(1, Ordering::Relaxed);
                link = open.as_ref().map_or(link, |log| log.link.clone());
            }
            Err(error) => tracing::error!("{error}"),
        }
        for pending in batch {
            // Whoever does not wait any more has not answered its caller either.
            let _ = pending.answer.send(outcome.clone());
        }
    }
}

/// Makes a whole batch durable. On failure `open` is left empty, so that the next batch opens the file anew.
fn commit(
    path: &Path,
    open: &mut Option<Log>,
    link: &Link,
    now: OffsetDateTime,
    batch: &[Pending],
) -> Result<(), AuditError> {
    // The old file is closed first: it may be the same one, and is locked.
    let mut log = match open.take().filter(Log::is_at_its_path) {
        Some(log) => log,
        None => Log::open(path, Some(link), now)?,
    };
    let records = batch.iter().map(|pending| (&pending.record, pending.at));
    log.append(records)?;
    *open = Some(log);
    Ok(())
}

impl Log {
    /// Opens the file, checks its end, sets a torn last line aside. `known` is where this process left the chain: an
    /// empty file continues it, any other must end with it or have gone on from it.
    fn open(path: &Path, known: Option<&Link>, now: OffsetDateTime) -> Result<Log, AuditError> {
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
        let start = known.cloned().unwrap_or_else(Link::start);
        let mut log = Log { path: path.to_owned(), file, len: 0, link: start };
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

    /// Follows the chain through the end of the file; returns what stands after the last whole line.
    fn read_end(&mut self, known: Option<&Link>) -> Result<Vec<u8>, AuditError> {
        let (size, end) = self.end().map_err(|cause| open_error(&self.path, cause))?;
        let mut rest = end.as_slice();
        let mut last: Option<Link> = None;
        while let Some(feed) = line_feed(rest) {
            let line = &rest[..feed];
            let next = match &last {
                Some(link) => link.follow(line),
                None => Link::join(line),
            };
            let next = match next {
                Ok(next) => next,
                // Blocks of the last, unfinished write that never reached the disk read as zeros.
                Err(_) if rest.contains(&0) => break,
                Err(why) => return Err(self.broken(why.to_string())),
            };
            if known.is_some_and(|known| known.seq == next.seq && *known != next) {
                return Err(self.broken(format!("record {} is not the one written", next.seq)));
            }
            last = Some(next);
            rest = &rest[feed + 1..];
        }
        self.len = size - u64::try_from(rest.len()).unwrap_or(size);
        if let Some(last) = last {
            self.link = last;
        }
        Ok(rest.to_vec())
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
        let mut name = OsString::from(&self.path);
        name.push(format!(".torn-{}", self.link.seq + 1));
        let aside = PathBuf::from(name);
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
        let record = Record {
            action: "audit_recovered",
            outcome: Outcome::Done,
            caller: None,
            api_key: None,
            instance: None,
            target: None,
            version: None,
            correlation: aside.file_name().map(|name| name.to_string_lossy().into_owned()),
        };
        self.append([(&record, now)].into_iter())
    }

    /// Writes all records and syncs once.
    fn append<'a>(
        &mut self,
        records: impl Iterator<Item = (&'a Record, OffsetDateTime)>,
    ) -> Result<(), AuditError> {
        let mut link = self.link.clone();
        let mut bytes = Vec::new();
        for (record, at) in records {
            let (line, next) = link.extend(record, at).map_err(|cause| self.write_error(cause))?;
            bytes.extend_from_slice(&line);
            link = next;
        }
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        if let Err(cause) = written {
            // Where the disk refuses even this, the next opening finds the torn line.
            let _ = self.file.set_len(self.len).and_then(|()| self.file.sync_data());
            return Err(self.write_error(cause));
        }
        self.len += u64::try_from(bytes.len()).unwrap_or(0);
        self.link = link;
        Ok(())
    }

    /// False when the file was moved, removed, replaced, or changed in length by somebody else.
    fn is_at_its_path(&self) -> bool {
        let (Ok(ours), Ok(there)) = (self.file.metadata(), std::fs::metadata(&self.path)) else {
            return false;
        };
        ours.dev() == there.dev() && ours.ino() == there.ino() && there.len() == self.len
    }

    fn broken(&self, what: String) -> AuditError {
        AuditError::Broken { path: self.path.clone(), what }
    }

    fn write_error(&self, cause: io::Error) -> AuditError {
        AuditError::Write { path: self.path.clone(), cause: Arc::new(cause) }
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
