//! The audit log as bytes: one JSON object a line, each with its number and the SHA-256 of the line before it.
//!
//! Whoever changes, drops, swaps or inserts a line breaks a link after it. Whoever can also compute the hashes anew is
//! found by an [`anchor`]: a line that an HSM key has signed. `kms-server` writes this form, [`verify`] checks it.

pub mod anchor;
pub mod verify;

use crate::cipher::sha256;
use crate::limits::MAX_AUDIT_LINE;
use anchor::Anchor;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;
use thiserror::Error;
use uuid::Uuid;

/// What stands in `action` of an anchor, and of nothing else.
pub const ANCHOR: &str = "anchor";
/// What stands in `outcome` of everything that was not refused.
pub const DONE: &str = "done";
/// The outcome of a change that is about to be made. The record of how it ended follows; where it does not, whoever reads
/// must look whether the change was made.
pub const BEGUN: &str = "begun";
/// The outcome in the second record of what became durable too late: whoever asked was told that it could not be done, or
/// had gone. What was done was done all the same.
pub const UNANSWERED: &str = "unanswered";
/// What the log says of itself where a file of its chain, or the beginning of one, was not where it was left: removed while
/// it was used, missing at the start, begun behind the record that was looked for. Whoever moved it away has it; else it is
/// lost.
pub const FILE_REMOVED: &str = "audit_file_removed";
pub const FILE_MISSING: &str = "audit_file_missing";
pub const PAST_MISSING: &str = "audit_past_missing";

/// A number that databases can hold too, and that has a successor.
const MAX_SEQ: u64 = i64::MAX.unsigned_abs();

/// The SHA-256 of a line, without its line feed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hash([u8; 32]);

/// The end of a chain: what the next line must name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// The number of the last line; 0 before the first.
    pub seq: u64,
    pub hash: Hash,
}

/// What happened, without its place in the chain. Names of things only, never a secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event<'a> {
    /// Which server wrote this: each has a chain of its own.
    pub node: Cow<'a, str>,
    /// RFC 3339, UTC.
    pub at: Cow<'a, str>,
    pub action: Cow<'a, str>,
    /// [`BEGUN`], [`DONE`], [`UNANSWERED`], or the reason code of the refusal.
    pub outcome: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key: Option<Uuid>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Uuid>,
    /// What the action was done to: a key; for management, the service ID, API key or instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Uuid>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<Uuid>,
    /// The newer version that an unwrapped DEK was wrapped with again: one more use of a key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewrapped: Option<Uuid>,
    /// Whose policy, API key or profile the target is: those are deleted, and then nothing else tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_id: Option<Uuid>,
    /// What a policy lets them do, or whom a profile trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant: Option<Cow<'a, str>>,
    /// The caller's `Correlation-Id`: from the plug-in, the uid that kube-apiserver gave its call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation: Option<Cow<'a, str>>,
    /// The other end of the connection, as `address:port`: a proxy where there is one. Logs of before have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Cow<'a, str>>,
    /// So many times, where one record stands for several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
}

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line<'a> {
    pub seq: u64,
    pub prev: Hash,
    pub content: Content<'a>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content<'a> {
    Event(Event<'a>),
    Anchor(Anchor<'a>),
}

/// Bytes that this log never holds as a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("this is no audit record")]
pub struct NotARecord;

/// Why a line does not continue a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Broken {
    #[error("a line is no audit record")]
    NotARecord,
    #[error("record {found} stands where record {wanted} must be")]
    WrongNumber { found: u64, wanted: u64 },
    #[error("record {seq} does not follow from the record before it")]
    WrongHash { seq: u64 },
}

impl Line<'_> {
    #[must_use]
    pub fn node(&self) -> &str {
        match &self.content {
            Content::Event(event) => &event.node,
            Content::Anchor(anchor) => anchor.node(),
        }
    }

    /// RFC 3339, UTC.
    #[must_use]
    pub fn at(&self) -> &str {
        match &self.content {
            Content::Event(event) => &event.at,
            Content::Anchor(anchor) => anchor.at(),
        }
    }
}

impl Link {
    /// Before the first line there is nothing to hash.
    #[must_use]
    pub fn start() -> Link {
        Link { seq: 0, hash: Hash([0; 32]) }
    }

    /// The line for `content`, with its line feed, and the link after it.
    ///
    /// # Errors
    /// When it is longer than a line may be, or the numbers are used up: no record of ours meets that.
    pub fn extend(&self, content: &Content<'_>) -> Result<(Vec<u8>, Link), NotARecord> {
        let seq = self.seq.checked_add(1).filter(|seq| *seq <= MAX_SEQ).ok_or(NotARecord)?;
        let mut bytes = encode(seq, self.hash, content)?;
        let link = Link { seq, hash: Hash::of(&bytes) };
        bytes.push(b'\n');
        Ok((bytes, link))
    }

    /// The link after `line` (without its line feed), if that follows from this one.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn follow(&self, line: &[u8]) -> Result<Link, Broken> {
        let Line { seq, prev, .. } = parse(line).map_err(|NotARecord| Broken::NotARecord)?;
        let wanted = self.seq + 1;
        if seq != wanted {
            return Err(Broken::WrongNumber { found: seq, wanted });
        }
        if prev != self.hash {
            return Err(Broken::WrongHash { seq });
        }
        Ok(Link { seq, hash: Hash::of(line) })
    }

    /// The link after `line`, trusting what it says of the lines before it: where reading begins in the middle.
    ///
    /// # Errors
    /// [`Broken::NotARecord`].
    pub fn join(line: &[u8]) -> Result<Link, Broken> {
        let Line { seq, .. } = parse(line).map_err(|NotARecord| Broken::NotARecord)?;
        Ok(Link { seq, hash: Hash::of(line) })
    }
}

/// Reads one line, without its line feed. Members that a later version adds are passed over.
///
/// # Errors
/// When it is anything else, or longer than [`MAX_AUDIT_LINE`].
pub fn parse(line: &[u8]) -> Result<Line<'_>, NotARecord> {
    if line.len() > MAX_AUDIT_LINE {
        return Err(NotARecord);
    }
    let place: Place<'_> = serde_json::from_slice(line).map_err(|_| NotARecord)?;
    let prev = Hash::parse(&place.prev).ok_or(NotARecord)?;
    if !(1..=MAX_SEQ).contains(&place.seq) {
        return Err(NotARecord);
    }
    let content = if place.action == ANCHOR {
        Content::Anchor(serde_json::from_slice(line).map_err(|_| NotARecord)?)
    } else {
        Content::Event(serde_json::from_slice(line).map_err(|_| NotARecord)?)
    };
    // The chain does not yet protect its last line. An anchor protects itself, so each of its bytes must be known.
    if matches!(content, Content::Anchor(_)) && encode(place.seq, prev, &content)? != line {
        return Err(NotARecord);
    }
    Ok(Line { seq: place.seq, prev, content })
}

fn encode(seq: u64, prev: Hash, content: &Content<'_>) -> Result<Vec<u8>, NotARecord> {
    let bytes = match content {
        Content::Event(event) => serde_json::to_vec(&Placed { seq, prev, content: event }),
        Content::Anchor(anchor) => serde_json::to_vec(&Placed { seq, prev, content: anchor }),
    };
    bytes.ok().filter(|bytes| bytes.len() <= MAX_AUDIT_LINE).ok_or(NotARecord)
}

/// The order of the members is part of what is hashed; readers go by name.
#[derive(Serialize)]
struct Placed<'a, C> {
    seq: u64,
    prev: Hash,
    #[serde(flatten)]
    content: &'a C,
}

/// What every line has, whatever else it says.
#[derive(Deserialize)]
struct Place<'a> {
    seq: u64,
    #[serde(borrow)]
    prev: Cow<'a, str>,
    #[serde(borrow)]
    action: Cow<'a, str>,
}

impl Hash {
    pub(crate) fn of(line: &[u8]) -> Hash {
        let mut hash = Hash([0; 32]);
        hash.0.copy_from_slice(sha256(line).as_ref());
        hash
    }

    /// From 64 lower-case hexadecimal digits: one text for one hash.
    #[must_use]
    pub fn parse(text: &str) -> Option<Hash> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let mut hash = Hash([0; 32]);
        if text.len() != 64 {
            return None;
        }
        for (byte, pair) in hash.0.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(hash)
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = String::with_capacity(64);
        for byte in self.0 {
            text.push(char::from(DIGITS[usize::from(byte >> 4)]));
            text.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
        f.write_str(&text)
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Hash, D::Error> {
        let text = Cow::<str>::deserialize(from)?;
        Hash::parse(&text).ok_or_else(|| serde::de::Error::custom("not a SHA-256 in hexadecimal"))
    }
}

#[cfg(test)]
mod tests;
