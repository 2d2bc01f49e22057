//! The open file of the log: read from its end, written at its end, each write synced before anybody hears of it.
//!
//! A file is on disk only when its folder is, so the folder is synced before the first line of a file counts. What is in
//! a file is never changed here, but for what follows the last durable line.

use super::node::beside;
use super::past::{Past, trace};
use super::{AuditError, Outcome, Record};
use kms_core::audit::anchor::Anchor;
use kms_core::audit::{BEGUN, Content, DONE, Event, Link, PAST_MISSING, UNANSWERED, parse};
use kms_core::clock::Clock;
use prometheus_client::metrics::histogram::Histogram;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// How much of the end of a log is checked when it is opened.
const TAIL: u64 = 256 * 1024;
/// A crash tears no more than one write, which is some megabytes where the most records that may wait are in it.
const MOST_TORN: u64 = 64 * 1024 * 1024;

/// What becomes one line.
#[derive(Debug)]
pub(super) enum Entry {
    Record(Record),
    /// With its own time, which is signed.
    Anchor(Anchor<'static>),
}

/// Syncs, counted and timed.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) syncs: AtomicU64,
    /// How often a file, or the beginning of one, was found to be gone.
    pub(super) losses: AtomicU64,
    /// Where the times are shown, once somebody shows them.
    pub(super) seconds: OnceLock<Histogram>,
}

/// An open log, whole to its last byte.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    node: String,
    disk: Arc<Disk>,
    file: File,
    /// Up to here everything is durable.
    pub(super) len: u64,
    pub(super) link: Link,
}

/// The time in the last whole record of the log at `path`; `None` where there is none.
pub(super) fn last_time(path: &Path) -> Option<OffsetDateTime> {
    let mut file = File::open(path).ok()?;
    let size = file.metadata().ok()?.len();
    let end = last_lines(&mut file, size).ok()??;
    let mut lines = end.rsplit(|byte| *byte == b'\n');
    let last = lines.find_map(|line| parse(line).ok())?;
    OffsetDateTime::parse(last.at(), &Rfc3339).ok()
}

impl Disk {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Disk {
        let (syncs, losses) = (AtomicU64::new(0), AtomicU64::new(0));
        Disk { clock, syncs, losses, seconds: OnceLock::new() }
    }

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
    /// continues it, any other must end with it or have gone on from it. Where it begins only behind it, that is recorded.
    pub(super) fn open(
        path: &Path,
        node: &str,
        disk: &Arc<Disk>,
        known: Option<Link>,
        now: OffsetDateTime,
    ) -> Result<Log, AuditError> {
        let failed = |cause| open_error(path, cause);
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
        if file.metadata().map_err(failed)?.len() == 0 {
            // Also where it was there already: whoever made it may have been killed before its folder was synced.
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
        let (torn, elsewhere) = log.read_end(known)?;
        // Before anything is changed: what others know to be durable was not torn by a crash.
        match known {
            Some(known) if log.link.seq < known.seq => {
                let what = format!("it ends with record {}, not {}", log.link.seq, known.seq);
                return Err(log.broken(what));
            }
            _ => {}
        }
        if !torn.is_empty() {
            log.set_aside(&torn, now)?;
        }
        if let Some(place) = elsewhere {
            log.note_loss(PAST_MISSING, Some(place), now)?;
        }
        Ok(log)
    }

    /// Follows the chain through the end of the file, and from there back to `known`; returns what stands after the last
    /// whole line, and where the file begins if that is behind `known`.
    fn read_end(&mut self, known: Option<Link>) -> Result<(Vec<u8>, Option<String>), AuditError> {
        let (size, end) = self.end()?;
        let mut rest = end.as_slice();
        let begins = size - u64::try_from(rest.len()).unwrap_or(size);
        let elsewhere = self.check_past(rest, begins, known)?;
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
        Ok((rest.to_vec(), elsewhere))
    }

    /// What is behind `known` goes on from it, where the end of the log, which begins at byte `begins`, does not show it;
    /// or the file begins behind it, which cannot be told from here: then what was looked for, and what is there.
    fn check_past(
        &self,
        end: &[u8],
        begins: u64,
        known: Option<Link>,
    ) -> Result<Option<String>, AuditError> {
        let first = line_feed(end).and_then(|feed| parse(&end[..feed]).ok());
        let (Some(known), Some(first)) = (known, first) else { return Ok(None) };
        if first.seq <= known.seq {
            return Ok(None);
        }
        let before = Link { seq: first.seq - 1, hash: first.prev };
        match trace(&self.file, begins, before, known) {
            Ok(Past::Known) => Ok(None),
            Ok(Past::Before { first }) => {
                tracing::warn!(
                    "The audit log {} begins with record {first}; record {}, up to which the database knows it, is in a \
                     file that was moved away. Check both: kmsctl audit verify.",
                    self.path.display(),
                    known.seq
                );
                Ok(Some(format!("record {} before record {first}", known.seq)))
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
    fn end(&mut self) -> Result<(u64, Vec<u8>), AuditError> {
        let mut read = || {
            let size = self.file.metadata()?.len();
            Ok((size, last_lines(&mut self.file, size)?))
        };
        let (size, end) = read().map_err(|cause| open_error(&self.path, cause))?;
        let none = || self.broken("there is no whole record in its last 64 MiB".to_owned());
        Ok((size, end.ok_or_else(none)?))
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

    /// Writes that a file of this chain, or the beginning of one, is not where it was left.
    pub(super) fn note_loss(
        &mut self,
        action: &'static str,
        detail: Option<String>,
        now: OffsetDateTime,
    ) -> Result<(), AuditError> {
        self.disk.losses.fetch_add(1, Ordering::Relaxed);
        self.note(action, detail, now)
    }

    /// Writes what the log says of itself.
    fn note(
        &mut self,
        action: &'static str,
        detail: Option<String>,
        now: OffsetDateTime,
    ) -> Result<(), AuditError> {
        let entry =
            Entry::Record(Record { correlation: detail, ..Record::new(action, Outcome::Done) });
        self.append([(&entry, now)].into_iter()).map(drop)
    }

    /// Writes all entries and syncs once; returns the link after each.
    pub(super) fn append<'e>(
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
    pub(super) fn is_at_its_path(&self) -> bool {
        let (Ok(ours), Ok(there)) = (self.file.metadata(), std::fs::metadata(&self.path)) else {
            return false;
        };
        ours.dev() == there.dev() && ours.ino() == there.ino() && there.len() == self.len
    }

    /// It was deleted, or what it held was.
    pub(super) fn is_removed(&self) -> bool {
        self.file.metadata().is_ok_and(|file| file.nlink() == 0 || file.len() < self.len)
    }

    /// A part of it was cut off where it is. Nothing that rotates logs does that.
    ///
    /// # Errors
    /// `Broken`, until somebody has moved it away.
    pub(super) fn check_whole(&self) -> Result<(), AuditError> {
        let (Ok(ours), Ok(there)) = (self.file.metadata(), std::fs::metadata(&self.path)) else {
            return Ok(());
        };
        let same = ours.dev() == there.dev() && ours.ino() == there.ino();
        if same && (1..self.len).contains(&there.len()) {
            return Err(self.broken(format!(
                "it was cut to {} of {} bytes while it was in use",
                there.len(),
                self.len
            )));
        }
        Ok(())
    }

    fn broken(&self, what: String) -> AuditError {
        AuditError::Broken { path: self.path.clone(), what }
    }

    fn write_error(&self, cause: io::Error) -> AuditError {
        AuditError::Write { path: self.path.clone(), cause: Arc::new(cause) }
    }
}

impl Entry {
    /// What is recorded once more of an entry that became durable when nobody waited for it any longer: whoever asked
    /// over a connection was told that it could not be done.
    pub(super) fn unanswered(&self) -> Option<Entry> {
        match self {
            Entry::Record(record)
                if record.peer.is_some() && record.outcome != Outcome::Unanswered =>
            {
                Some(Entry::Record(Record { outcome: Outcome::Unanswered, ..record.clone() }))
            }
            _ => None,
        }
    }

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
                Outcome::Unanswered => UNANSWERED.into(),
                Outcome::Refused(code) => code.into(),
            },
            caller: record.caller.as_deref().map(Into::into),
            api_key: record.api_key,
            instance: record.instance,
            target: record.target,
            version: record.version,
            rewrapped: record.rewrapped,
            service_id: record.service_id,
            grant: record.grant.as_deref().map(Into::into),
            correlation: record.correlation.as_deref().map(Into::into),
            peer: record.peer.map(|peer| peer.to_string().into()),
            count: record.count,
        }))
    }
}

pub(super) fn open_error(path: &Path, cause: io::Error) -> AuditError {
    AuditError::Open { path: path.to_owned(), cause: Arc::new(cause) }
}

/// The last lines of a file of this size, the first of them whole and a record; `None` where there is no such record far
/// and wide.
fn last_lines(file: &mut File, size: u64) -> io::Result<Option<Vec<u8>>> {
    let mut reach = TAIL;
    loop {
        let from = size.saturating_sub(reach);
        file.seek(SeekFrom::Start(from))?;
        let mut end = Vec::new();
        (&*file).take(size - from).read_to_end(&mut end)?;
        if from == 0 {
            return Ok(Some(end));
        }
        // Reading began somewhere in a line, or in what a crash left of the last write: then the lines before that count.
        if let Some(feed) = line_feed(&end).filter(|feed| !end[..*feed].contains(&0)) {
            end.drain(..=feed);
            if line_feed(&end).is_some_and(|feed| parse(&end[..feed]).is_ok()) {
                return Ok(Some(end));
            }
        }
        if reach >= MOST_TORN {
            return Ok(None);
        }
        reach *= 4;
    }
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
