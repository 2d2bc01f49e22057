//! Reads the lines of one node's log, oldest first, and says of each what is wrong at it.
//!
//! After a finding the reading goes on from what is there, so that one tampering is one or two findings and all places
//! are found. Memory is bounded whatever the log holds.

use super::anchor::{Anchor, PublicKey};
use super::{
    Content, Event, FILE_MISSING, FILE_REMOVED, Hash, Line, Link, NotARecord, PAST_MISSING, parse,
};
use serde::Serialize;
use std::borrow::Cow;
use std::collections::VecDeque;
use thiserror::Error;

/// How far an anchor may stand behind the last record that it covers: the records that come while an HSM signs.
pub const MAX_ANCHOR_DELAY: usize = 1 << 16;

/// kms-server signs within a minute; half of one more is for a slow HSM and clock.
pub const MAX_UNANCHORED_SECONDS: u64 = 90;

/// What is wrong at a line.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Finding {
    #[error("this is no audit record: the line was changed, or never written by kms-server")]
    NotARecord,
    #[error("{} before this record", gone(*from, *to))]
    Missing { from: u64, to: u64 },
    #[error(
        "record {found} stands where record {wanted} must be: it was inserted, moved or repeated"
    )]
    Misplaced { found: u64, wanted: u64 },
    #[error(
        "this record does not follow from the one before it: record {} was changed, or this one was put in its place",
        seq.saturating_sub(1)
    )]
    Changed { seq: u64 },
    #[error("this record is of node {found:?}, in the log of node {wanted:?}")]
    OtherNode { found: String, wanted: String },
    #[error("this anchor is not signed by the key that was given")]
    BadSignature,
    #[error(
        "the signed anchor here says otherwise of record {head}: it or a record before it was changed, and the chain \
         computed anew"
    )]
    Rewritten { head: u64 },
    #[error("this anchor covers record {head}, which no record before it is")]
    AnchorOutOfPlace { head: u64 },
    #[error("the last line is not whole: a crash, or a cut")]
    Torn,
    #[error("{} at the end: the anchor that was given covers them", gone(*from, *to))]
    Cut { from: u64, to: u64 },
}

fn gone(from: u64, to: u64) -> String {
    if from == to {
        format!("record {from} is missing")
    } else {
        format!("records {from} to {to} are missing")
    }
}

/// What was read, and how much of it stands on more than the chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    pub node: Option<String>,
    /// Numbers of the first and the last record.
    pub first: u64,
    pub last: u64,
    pub records: u64,
    pub anchors: u64,
    /// The last record that an anchor covers whose signature is good; 0 without one.
    pub anchored: u64,
    pub anchored_at: Option<String>,
    /// How often records waited for an anchor for more than [`MAX_UNANCHORED_SECONDS`]. That is no tampering: the HSM or
    /// the server was away. But so long whoever could write the file could compute the chain anew.
    pub late: u64,
    /// The one of them that took longest.
    pub longest: Option<Unanchored>,
    /// How often the log says of itself that a file was gone. That is no tampering where the file was moved away and is
    /// read, too: then all its records are there.
    pub losses: u64,
    /// The last of them.
    pub last_loss: Option<Loss>,
}

/// A file, or the beginning of one, that a server did not find where it was left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// The number of the record that says so.
    pub record: u64,
    pub at: String,
    pub action: String,
    /// What was looked for, where it is said.
    pub detail: Option<String>,
}

/// Records that waited for their anchor, by what they and the anchor say themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unanchored {
    pub from: u64,
    pub to: u64,
    pub since: String,
    /// The time of the anchor; of the last record, where none came.
    pub until: String,
    pub seconds: u64,
}

/// The state after the lines that were read.
#[derive(Debug)]
pub struct Verifier<'k> {
    keys: &'k [PublicKey],
    /// An anchor that was kept elsewhere, not yet met.
    witness: Option<Anchor<'static>>,
    link: Option<Link>,
    /// The next line's link cannot be checked: the line before it is gone.
    blind: bool,
    /// The hashes of the last records, the newest at the back.
    recent: VecDeque<Hash>,
    /// The next line is the first of a file.
    file_begins: bool,
    /// The first record that no anchor covers yet, and its time.
    waiting: Option<(u64, String)>,
    last_at: String,
    summary: Summary,
}

impl<'k> Verifier<'k> {
    /// `keys`: with which anchors may be signed; without any, signatures are not checked. `witness`: the last anchor,
    /// as it was kept where nobody could cut it off.
    #[must_use]
    pub fn new(keys: &'k [PublicKey], witness: Option<Anchor<'static>>) -> Verifier<'k> {
        Verifier {
            keys,
            witness,
            link: None,
            blind: false,
            recent: VecDeque::new(),
            file_begins: true,
            waiting: None,
            last_at: String::new(),
            summary: Summary::default(),
        }
    }

    /// The first record must be number `seq`: 1, or the one after what was checked before.
    #[must_use]
    pub fn begin_at(mut self, seq: u64) -> Verifier<'k> {
        self.link = Some(Link { seq: seq.saturating_sub(1), ..Link::start() });
        self.blind = seq > 1;
        self
    }

    /// The lines after this are of the next file.
    pub fn next_file(&mut self) {
        self.file_begins = true;
    }

    /// Reads one line, without its line feed; `found` gets what is wrong at it.
    pub fn line(&mut self, line: &[u8], found: &mut Vec<Finding>) {
        let Ok(read) = parse(line) else {
            found.push(self.no_record());
            return;
        };
        let file_begins = std::mem::take(&mut self.file_begins);
        if !self.follows(&read, file_begins, found) {
            return;
        }
        let link = Link { seq: read.seq, hash: Hash::of(line) };
        self.note(&read, found);
        self.summary.last = link.seq;
        if self.summary.records == 0 {
            self.summary.first = link.seq;
        }
        self.summary.records += 1;
        self.link = Some(link);
        // Before it is one too many: the room for it would be doubled.
        if self.recent.len() >= MAX_ANCHOR_DELAY {
            self.recent.pop_front();
        }
        self.recent.push_back(link.hash);
        self.meet_witness(link, found);
    }

    /// What the anchor that was kept elsewhere says of the end, and the summary.
    #[must_use]
    pub fn finish(mut self) -> (Summary, Option<Finding>) {
        let last = self.summary.last;
        let until = std::mem::take(&mut self.last_at);
        self.cover(last, &until);
        let cut = self.witness.take().map(|anchor| anchor.head().seq).filter(|&head| head > last);
        (self.summary, cut.map(|to| Finding::Cut { from: last + 1, to }))
    }

    fn no_record(&mut self) -> Finding {
        // It stood for one record, most likely: then only its successor's link is lost.
        if let Some(link) = &mut self.link {
            link.seq += 1;
            self.recent.clear();
        }
        self.blind = true;
        Finding::NotARecord
    }

    /// Whether the chain goes on with this line.
    fn follows(&mut self, read: &Line<'_>, file_begins: bool, found: &mut Vec<Finding>) -> bool {
        let blind = std::mem::take(&mut self.blind);
        let Some(link) = self.link else { return true };
        let wanted = link.seq + 1;
        if read.seq < wanted && !(blind && read.seq == link.seq) {
            found.push(Finding::Misplaced { found: read.seq, wanted });
            self.blind = blind;
            // A file that begins so is another branch, and whole files are read to their end.
            if file_begins {
                self.recent.clear();
            }
            return file_begins;
        }
        if read.seq > wanted {
            found.push(Finding::Missing { from: wanted, to: read.seq - 1 });
            self.recent.clear();
        } else if !blind && read.prev != link.hash {
            found.push(Finding::Changed { seq: read.seq });
        }
        true
    }

    fn note(&mut self, read: &Line<'_>, found: &mut Vec<Finding>) {
        let node = read.node();
        match &self.summary.node {
            None => self.summary.node = Some(node.to_owned()),
            Some(known) if known != node => {
                let (found_node, wanted) = (node.to_owned(), known.clone());
                found.push(Finding::OtherNode { found: found_node, wanted });
            }
            Some(_) => {}
        }
        match &read.content {
            Content::Anchor(anchor) => self.anchor(anchor, read.seq, found),
            Content::Event(event) => {
                self.note_loss(event, read.seq);
                self.waiting.get_or_insert_with(|| (read.seq, event.at.clone().into_owned()));
            }
        }
        self.last_at.clear();
        self.last_at.push_str(read.at());
    }

    fn note_loss(&mut self, event: &Event<'_>, record: u64) {
        if ![FILE_REMOVED, FILE_MISSING, PAST_MISSING].contains(&&*event.action) {
            return;
        }
        self.summary.losses += 1;
        self.summary.last_loss = Some(Loss {
            record,
            at: event.at.clone().into_owned(),
            action: event.action.clone().into_owned(),
            detail: event.correlation.clone().map(Cow::into_owned),
        });
    }

    fn anchor(&mut self, anchor: &Anchor<'_>, seq: u64, found: &mut Vec<Finding>) {
        self.summary.anchors += 1;
        if !self.keys.is_empty() && !self.keys.iter().any(|key| anchor.is_signed_by(key)) {
            found.push(Finding::BadSignature);
            return;
        }
        let head = anchor.head();
        match self.known(head.seq, seq) {
            Known::Hash(hash) if hash != head.hash => {
                found.push(Finding::Rewritten { head: head.seq });
            }
            Known::Never => found.push(Finding::AnchorOutOfPlace { head: head.seq }),
            Known::Hash(_) => {
                self.cover(head.seq, anchor.at());
                if self.waiting.is_none() && head.seq + 1 < seq {
                    // They came while the HSM signed.
                    self.waiting = Some((head.seq + 1, anchor.at().to_owned()));
                }
                if !self.keys.is_empty() {
                    self.summary.anchored = head.seq;
                    self.summary.anchored_at = Some(anchor.at().to_owned());
                }
            }
            // Nothing was compared, so nothing is proved.
            Known::NotRead => {}
        }
    }

    /// The records up to `to` wait for an anchor no longer than `until`.
    fn cover(&mut self, to: u64, until: &str) {
        let Some((from, since)) = self.waiting.take_if(|(from, _)| *from <= to) else { return };
        let times = seconds(&since).zip(seconds(until));
        let took = times.and_then(|(since, until)| u64::try_from(until - since).ok()).unwrap_or(0);
        if took <= MAX_UNANCHORED_SECONDS {
            return;
        }
        self.summary.late += 1;
        if self.summary.longest.as_ref().is_none_or(|longest| longest.seconds < took) {
            let until = until.to_owned();
            self.summary.longest = Some(Unanchored { from, to, since, until, seconds: took });
        }
    }

    /// What the lines before record `here` told of record `seq`.
    fn known(&self, seq: u64, here: u64) -> Known {
        let Some(back) = here.checked_sub(seq).filter(|back| *back > 0) else {
            return Known::Never;
        };
        let back = usize::try_from(back).unwrap_or(usize::MAX);
        match self.recent.len().checked_sub(back).and_then(|at| self.recent.get(at)) {
            Some(hash) => Known::Hash(*hash),
            // kms-server signs anew rather than be so late: this one was moved here.
            None if back > MAX_ANCHOR_DELAY => Known::Never,
            None => Known::NotRead,
        }
    }

    fn meet_witness(&mut self, link: Link, found: &mut Vec<Finding>) {
        let Some(head) = self.witness.as_ref().map(Anchor::head) else { return };
        if link.seq < head.seq {
            return;
        }
        self.witness = None;
        if link.seq == head.seq && link.hash != head.hash {
            found.push(Finding::Rewritten { head: head.seq });
        }
    }
}

enum Known {
    Hash(Hash),
    /// It was before what was read, or behind a finding.
    NotRead,
    /// There was no such record.
    Never,
}

/// Seconds since 1970, of the form that kms-server writes; `None` for what is no such time.
fn seconds(at: &str) -> Option<i64> {
    let number = |from: usize, to: usize| at.get(from..to)?.parse::<i64>().ok();
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    // Counted from March on, the day that a leap year has more is the last one.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // The first of March of the year 0 was 719,468 days before 1970.
    let days = year * 365 + leap_days + (153 * month + 2) / 5 + day - 1 - 719_468;
    Some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

impl<'a> Anchor<'a> {
    /// From a line of the log, as it was kept elsewhere.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn parse_line(line: &'a [u8]) -> Result<Anchor<'a>, NotARecord> {
        match parse(line)?.content {
            Content::Anchor(anchor) => Ok(anchor),
            Content::Event(_) => Err(NotARecord),
        }
    }
}
