//! What one client sends, frame by frame (RFC 9113, 4 and 6.2): everything goes on byte for byte as it comes, only a
//! header block waits until it is complete, because [`hpack`](super::hpack) must see it whole.
//!
//! Input that breaks the standard is never repaired and never refused here: from that byte on everything goes
//! through untouched, and the HTTP/2 stack behind says what is wrong. No more than [`MAX_BLOCK`] is ever held.

use super::hpack::{Malformed, Rewriter};

/// Most bytes of one header block, its frames included, that are held. The HTTP/2 stack takes 16 KiB.
pub const MAX_BLOCK: usize = 64 * 1024;
/// SETTINGS_MAX_FRAME_SIZE as long as the server announces none larger, which ours does not.
const MAX_PAYLOAD: usize = 16 * 1024;
/// Buffers above this are given back after the block that needed them.
const KEEP: usize = 4 * 1024;
const HEAD: usize = 9;
const PRIORITY_BYTES: usize = 5;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const HEADERS: u8 = 0x1;
const PUSH_PROMISE: u8 = 0x5;
const CONTINUATION: u8 = 0x9;

const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// Follows one connection from its first byte.
#[derive(Debug)]
pub struct Follower {
    state: State,
    /// The frame header that is being collected or whose frame is open.
    head: Vec<u8>,
    /// The frames of the open header block as they came.
    held: Vec<u8>,
    /// Their fragments, joined.
    block: Vec<u8>,
    opened: Option<Opening>,
    rewriter: Rewriter,
    rewritten: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Preface { matched: usize },
    Head,
    Pass { left: usize },
    Hold { left: usize, frame: Frame },
    Lost,
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    length: usize,
    kind: u8,
    flags: u8,
    stream: [u8; 4],
}

/// What a rewritten block must begin with: of the first frame, all but padding.
#[derive(Debug)]
struct Opening {
    stream: [u8; 4],
    flags: u8,
    priority: Vec<u8>,
}

impl Default for Follower {
    fn default() -> Follower {
        Follower::new()
    }
}

impl Follower {
    pub fn new() -> Follower {
        Follower {
            state: State::Preface { matched: 0 },
            head: Vec::with_capacity(HEAD),
            held: Vec::new(),
            block: Vec::new(),
            opened: None,
            rewriter: Rewriter::new(),
            rewritten: Vec::new(),
        }
    }

    /// Takes what came from the client and appends to `out` what the server may have of it now.
    pub fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while !input.is_empty() {
            let taken = match self.state {
                State::Preface { matched } => self.preface(matched, input, out),
                State::Head => self.head(input, out),
                State::Pass { left } => self.pass(left, input, out),
                State::Hold { left, frame } => self.hold(left, frame, input, out),
                State::Lost => {
                    out.extend_from_slice(input);
                    return;
                }
            };
            input = &input[taken..];
        }
    }

    /// The client will send no more: gives up what is still held, for the server to make of it what it can.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        self.lose(out);
    }

    /// Whether everything that follows goes through untouched, so that there is no need to feed it.
    pub fn is_lost(&self) -> bool {
        matches!(self.state, State::Lost)
    }

    fn preface(&mut self, matched: usize, input: &[u8], out: &mut Vec<u8>) -> usize {
        let expected = &PREFACE[matched..];
        let taken = expected.len().min(input.len());
        if input[..taken] != expected[..taken] {
            self.lose(out);
            return 0;
        }
        out.extend_from_slice(&input[..taken]);
        let matched = matched + taken;
        self.state =
            if matched == PREFACE.len() { State::Head } else { State::Preface { matched } };
        taken
    }

    fn head(&mut self, input: &[u8], out: &mut Vec<u8>) -> usize {
        let taken = (HEAD - self.head.len()).min(input.len());
        self.head.extend_from_slice(&input[..taken]);
        if let [l2, l1, l0, kind, flags, s3, s2, s1, s0] = self.head[..] {
            let length = usize::from(l2) << 16 | usize::from(l1) << 8 | usize::from(l0);
            self.begin(Frame { length, kind, flags, stream: [s3, s2, s1, s0] }, out);
        }
        taken
    }

    fn begin(&mut self, frame: Frame, out: &mut Vec<u8>) {
        let expected = match (&self.opened, frame.kind) {
            (None, HEADERS) => true,
            (Some(opened), CONTINUATION) => opened.stream == frame.stream,
            (Some(_), _) | (None, CONTINUATION | PUSH_PROMISE) => false,
            (None, _) => {
                out.append(&mut self.head);
                self.state = match frame.length {
                    0 => State::Head,
                    left => State::Pass { left },
                };
                return;
            }
        };
        if !expected || self.held.len() + HEAD + frame.length > MAX_BLOCK {
            return self.lose(out);
        }
        self.held.append(&mut self.head);
        self.state = State::Hold { left: frame.length, frame };
        if frame.length == 0 {
            self.held_whole(frame, out);
        }
    }

    fn pass(&mut self, left: usize, input: &[u8], out: &mut Vec<u8>) -> usize {
        let taken = left.min(input.len());
        out.extend_from_slice(&input[..taken]);
        self.state = if taken == left { State::Head } else { State::Pass { left: left - taken } };
        taken
    }

    fn hold(&mut self, left: usize, frame: Frame, input: &[u8], out: &mut Vec<u8>) -> usize {
        let taken = left.min(input.len());
        self.held.extend_from_slice(&input[..taken]);
        self.state = State::Hold { left: left - taken, frame };
        if taken == left {
            self.held_whole(frame, out);
        }
        taken
    }

    fn held_whole(&mut self, frame: Frame, out: &mut Vec<u8>) {
        self.state = State::Head;
        let done = match self.join(frame) {
            Ok(()) if frame.flags & END_HEADERS == 0 => return,
            Ok(()) => self.rewriter.rewrite(&self.block, &mut self.rewritten),
            Err(malformed) => Err(malformed),
        };
        match (done, self.opened.take()) {
            (Ok(()), Some(opened)) if !self.rewritten.is_empty() => {
                write_frames(&opened, &self.rewritten, out);
            }
            (Ok(()), _) => out.extend_from_slice(&self.held),
            (Err(Malformed), _) => self.lose(out),
        }
        for buffer in [&mut self.held, &mut self.block, &mut self.rewritten] {
            buffer.clear();
            buffer.shrink_to(KEEP);
        }
    }

    /// Adds the fragment of the frame that `held` ends with to `block`.
    fn join(&mut self, frame: Frame) -> Result<(), Malformed> {
        let payload = &self.held[self.held.len() - frame.length..];
        if frame.kind == CONTINUATION {
            self.block.extend_from_slice(payload);
            return Ok(());
        }
        let unpadded = if frame.flags & PADDED == 0 { payload } else { without_padding(payload)? };
        let priority = if frame.flags & PRIORITY == 0 { 0 } else { PRIORITY_BYTES };
        let (priority, fragment) = unpadded.split_at_checked(priority).ok_or(Malformed)?;
        self.block.extend_from_slice(fragment);
        self.opened = Some(Opening {
            stream: frame.stream,
            flags: frame.flags & (END_STREAM | PRIORITY),
            priority: priority.to_vec(),
        });
        Ok(())
    }

    /// Stops following. What was held goes on as it came.
    fn lose(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.held);
        out.append(&mut self.head);
        self.state = State::Lost;
    }
}

fn without_padding(payload: &[u8]) -> Result<&[u8], Malformed> {
    let (&padding, rest) = payload.split_first().ok_or(Malformed)?;
    let end = rest.len().checked_sub(padding.into()).ok_or(Malformed)?;
    Ok(&rest[..end])
}

/// The block as one HEADERS frame, and as many CONTINUATION frames as its growth made necessary.
fn write_frames(opened: &Opening, block: &[u8], out: &mut Vec<u8>) {
    let (mut fragment, mut rest) = split(block, MAX_PAYLOAD - opened.priority.len());
    let flags = opened.flags | last(rest);
    write_head(opened.priority.len() + fragment.len(), HEADERS, flags, opened.stream, out);
    out.extend_from_slice(&opened.priority);
    out.extend_from_slice(fragment);
    while !rest.is_empty() {
        (fragment, rest) = split(rest, MAX_PAYLOAD);
        write_head(fragment.len(), CONTINUATION, last(rest), opened.stream, out);
        out.extend_from_slice(fragment);
    }
}

fn split(bytes: &[u8], at: usize) -> (&[u8], &[u8]) {
    bytes.split_at(at.min(bytes.len()))
}

fn last(rest: &[u8]) -> u8 {
    if rest.is_empty() { END_HEADERS } else { 0 }
}

fn write_head(length: usize, kind: u8, flags: u8, stream: [u8; 4], out: &mut Vec<u8>) {
    let [l2, l1, l0, ..] = length.to_le_bytes();
    out.extend_from_slice(&[l0, l1, l2, kind, flags]);
    out.extend_from_slice(&stream);
}
