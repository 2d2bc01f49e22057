//! The chain: each line of the log names its number and the SHA-256 of the line before it.
//!
//! Pure: bytes in, bytes out. Whoever changes, drops, swaps or inserts a line breaks every link after it; a cut at the
//! end is seen only by someone who knows how long the log was.

use super::{Outcome, Record};
use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// The end of a chain: what the next line must name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    /// The number of the last line; 0 before the first.
    pub(super) seq: u64,
    hash: String,
}

/// Why a line does not continue a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("a line is no audit record")]
    NotARecord,
    #[error("record {found} stands where record {wanted} must be")]
    WrongNumber { found: u64, wanted: u64 },
    #[error("record {seq} does not follow from the record before it")]
    WrongHash { seq: u64 },
}

/// One line. The order of the members is part of what is hashed; readers go by name.
#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    prev: &'a str,
    at: String,
    action: &'a str,
    outcome: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    caller: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    api_key: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation: Option<&'a str>,
}

/// What a reader needs of a line.
#[derive(Deserialize)]
struct Head {
    seq: u64,
    prev: String,
}

impl Link {
    /// Before the first line there is nothing to hash.
    pub(super) fn start() -> Link {
        Link { seq: 0, hash: "0".repeat(64) }
    }

    /// The line for `record`, with its line feed, and the link after it.
    ///
    /// # Errors
    /// When the record cannot be written as JSON, which no record of ours meets.
    pub(super) fn extend(
        &self,
        record: &Record,
        at: OffsetDateTime,
    ) -> Result<(Vec<u8>, Link), std::io::Error> {
        let seq = self.seq + 1;
        let line = Line {
            seq,
            prev: &self.hash,
            at: at.format(&Rfc3339).map_err(std::io::Error::other)?,
            action: record.action,
            outcome: match record.outcome {
                Outcome::Done => "done",
                Outcome::Refused(code) => code,
            },
            caller: record.caller.as_deref(),
            api_key: record.api_key,
            instance: record.instance,
            target: record.target,
            version: record.version,
            correlation: record.correlation.as_deref(),
        };
        let mut bytes = serde_json::to_vec(&line)?;
        let link = Link { seq, hash: sha256(&bytes) };
        bytes.push(b'\n');
        Ok((bytes, link))
    }

    /// The link after `line` (without its line feed), if that follows from this one.
    pub(super) fn follow(&self, line: &[u8]) -> Result<Link, Broken> {
        let head = head(line)?;
        let wanted = self.seq + 1;
        if head.seq != wanted {
            return Err(Broken::WrongNumber { found: head.seq, wanted });
        }
        if head.prev != self.hash {
            return Err(Broken::WrongHash { seq: head.seq });
        }
        Ok(Link { seq: head.seq, hash: sha256(line) })
    }

    /// The link after `line`, trusting what it says of the lines before it: where reading begins in the middle.
    pub(super) fn join(line: &[u8]) -> Result<Link, Broken> {
        Ok(Link { seq: head(line)?.seq, hash: sha256(line) })
    }
}

fn head(line: &[u8]) -> Result<Head, Broken> {
    serde_json::from_slice(line).map_err(|_| Broken::NotARecord)
}

fn sha256(line: &[u8]) -> String {
    let mut hex = String::with_capacity(64);
    for byte in digest(&SHA256, line).as_ref() {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(action: &'static str) -> Record {
        Record {
            action,
            outcome: Outcome::Done,
            caller: Some("iam-ServiceId-1".into()),
            api_key: None,
            instance: Some(Uuid::from_u128(7)),
            target: None,
            version: None,
            correlation: Some("line\nfeed \"quoted\"".into()),
        }
    }

    fn lines(count: usize) -> Vec<Vec<u8>> {
        let mut link = Link::start();
        let mut lines = Vec::new();
        for _ in 0..count {
            let (mut line, next) =
                link.extend(&record("wrap"), OffsetDateTime::UNIX_EPOCH).unwrap();
            assert_eq!(line.pop(), Some(b'\n'));
            lines.push(line);
            link = next;
        }
        lines
    }

    fn check(lines: &[Vec<u8>]) -> Result<Link, Broken> {
        lines.iter().try_fold(Link::start(), |link, line| link.follow(line))
    }

    #[test]
    fn a_line_is_one_json_object_with_what_happened() {
        let (line, _) = Link::start().extend(&record("wrap"), OffsetDateTime::UNIX_EPOCH).unwrap();
        let zeros = "0".repeat(64);
        let expected = format!(
            "{{\"seq\":1,\"prev\":\"{zeros}\",\"at\":\"1970-01-01T00:00:00Z\",\"action\":\"wrap\",\"outcome\":\"done\",\
             \"caller\":\"iam-ServiceId-1\",\"instance\":\"00000000-0000-0000-0000-000000000007\",\
             \"correlation\":\"line\\nfeed \\\"quoted\\\"\"}}\n"
        );
        assert_eq!(String::from_utf8(line).unwrap(), expected);
    }

    #[test]
    fn a_chain_that_was_written_is_followed() {
        assert_eq!(check(&lines(20)).unwrap().seq, 20);
    }

    #[test]
    fn dropped_swapped_and_repeated_lines_are_found() {
        let written = lines(5);
        let without = |gone: usize| {
            let mut lines = written.clone();
            lines.remove(gone);
            check(&lines)
        };
        assert_eq!(without(0), Err(Broken::WrongNumber { found: 2, wanted: 1 }));
        assert_eq!(without(2), Err(Broken::WrongNumber { found: 4, wanted: 3 }));
        let mut swapped = written.clone();
        swapped.swap(1, 2);
        assert_eq!(check(&swapped), Err(Broken::WrongNumber { found: 3, wanted: 2 }));
        let mut repeated = written.clone();
        repeated.insert(1, written[0].clone());
        assert_eq!(check(&repeated), Err(Broken::WrongNumber { found: 1, wanted: 2 }));
    }

    proptest! {
        #[test]
        fn every_changed_byte_before_the_last_line_is_found(
            line in 0usize..9,
            at in any::<prop::sample::Index>(),
            change in 1u8..,
        ) {
            let mut lines = lines(10);
            let at = at.index(lines[line].len());
            lines[line][at] ^= change;
            prop_assert!(check(&lines).is_err());
        }

        #[test]
        fn no_line_is_too_strange_to_be_refused(line in any::<Vec<u8>>()) {
            prop_assert_eq!(Link::start().follow(&line), Err(Broken::NotARecord));
            prop_assert_eq!(Link::join(&line), Err(Broken::NotARecord));
        }
    }
}
