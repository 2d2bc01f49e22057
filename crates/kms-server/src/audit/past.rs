//! Follows the chain of a log back to a record that somebody else remembers.
//!
//! The end of a log is checked whenever it is opened; what the database knows is the place of the last anchor, which may
//! be far before that. Whoever rewrote the file while the server was down had to compute every hash from there on anew:
//! without this look the next anchor would sign it. From the end backwards, since the end is near; in blocks, so that
//! memory is bounded whatever the file holds.

use kms_core::audit::{Line, Link, parse};
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

/// How much is read at once. Longer than any line.
const BLOCK: u64 = 256 * 1024;

/// What the file says of the record that is remembered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Past {
    /// All from there to the end goes on from it.
    Known,
    /// The file begins behind it: it is in one that was moved away.
    Before { first: u64 },
    /// It is another one than what is remembered, or the lines do not lead to it.
    Other(String),
}

/// Looks for `known` in what `file` holds before `end`, where the line begins that names `before` as the one before it.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn trace(file: &File, end: u64, before: Link, known: Link) -> io::Result<Past> {
    let (mut end, mut wanted) = (end, before);
    while end > 0 {
        let from = end.saturating_sub(BLOCK);
        let mut block = vec![0; usize::try_from(end - from).unwrap_or(0)];
        file.read_exact_at(&mut block, from)?;
        let lines = match block.iter().position(|byte| *byte == b'\n') {
            Some(_) if from == 0 => &block[..],
            // Reading began somewhere in a line, which is read with the next block.
            Some(feed) if feed + 1 < block.len() => &block[feed + 1..],
            _ => return Ok(Past::Other(format!("record {} is no whole line", wanted.seq))),
        };
        for line in lines.split_inclusive(|byte| *byte == b'\n').rev() {
            match step(line, wanted, known) {
                ControlFlow::Continue(before) => wanted = before,
                ControlFlow::Break(past) => return Ok(past),
            }
        }
        end -= u64::try_from(lines.len()).unwrap_or(end);
    }
    // The first line names the hash of the last record in the file before.
    Ok(differs(wanted, known).unwrap_or(if wanted == known {
        Past::Known
    } else {
        Past::Before { first: wanted.seq + 1 }
    }))
}

/// From `line`, which must be the record `wanted`, to the one before it, unless it is the one that is looked for.
fn step(line: &[u8], wanted: Link, known: Link) -> ControlFlow<Past, Link> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    if let Some(other) = differs(wanted, known) {
        return ControlFlow::Break(other);
    }
    let Ok(Line { seq, prev, .. }) = parse(line) else {
        return ControlFlow::Break(Past::Other("a line is no audit record".to_owned()));
    };
    if Link::join(line) != Ok(wanted) {
        let after = wanted.seq + 1;
        let what = format!("record {after} does not follow from the record before it");
        return ControlFlow::Break(Past::Other(what));
    }
    if wanted == known {
        return ControlFlow::Break(Past::Known);
    }
    ControlFlow::Continue(Link { seq: seq - 1, hash: prev })
}

fn differs(wanted: Link, known: Link) -> Option<Past> {
    let other = wanted.seq == known.seq && wanted != known;
    other.then(|| Past::Other(format!("record {} is not the one written", known.seq)))
}
