//! A client's half of HTTP/2, written by hand: every form in which RFC 7541 and RFC 9113 let a client write a header
//! block, so that the tests need not hope that some client uses it.

use std::collections::VecDeque;

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub(crate) const DATA: u8 = 0x0;
pub(crate) const HEADERS: u8 = 0x1;
pub(crate) const SETTINGS: u8 = 0x4;
pub(crate) const CONTINUATION: u8 = 0x9;
pub(crate) const END_STREAM: u8 = 0x1;
pub(crate) const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// As much of the static table as the tests use.
const STATIC: [(usize, &[u8], &[u8]); 6] = [
    (1, b":authority", b""),
    (3, b":method", b"POST"),
    (4, b":path", b"/"),
    (6, b":scheme", b"http"),
    (31, b"content-type", b""),
    (58, b"user-agent", b""),
];
const FIRST_DYNAMIC: usize = 62;

/// How a field that is no indexed field is written (RFC 7541, 6.2).
#[derive(Debug, Clone, Copy)]
pub(crate) enum Form {
    Indexing,
    Without,
    Never,
}

#[derive(Debug, Clone)]
pub(crate) struct Field {
    pub(crate) name: Vec<u8>,
    pub(crate) value: Vec<u8>,
    pub(crate) form: Form,
    /// Refer to the tables where they have the field or its name.
    pub(crate) by_index: bool,
    pub(crate) huffman: (bool, bool),
}

impl Field {
    /// As Go's client writes it: in the table, by index where possible, Huffman-coded.
    pub(crate) fn usual(name: &str, value: &[u8]) -> Field {
        Field {
            name: name.into(),
            value: value.into(),
            form: Form::Indexing,
            by_index: true,
            huffman: (true, true),
        }
    }
}

/// The client's encoder with its own dynamic table.
pub(crate) struct Encoder {
    table: VecDeque<(Vec<u8>, Vec<u8>)>,
    limit: usize,
}

impl Encoder {
    pub(crate) fn new() -> Encoder {
        Encoder { table: VecDeque::new(), limit: 4096 }
    }

    pub(crate) fn resize(&mut self, limit: usize, block: &mut Vec<u8>) {
        self.limit = limit;
        self.evict();
        integer(0b0010_0000, 5, limit, block);
    }

    pub(crate) fn field(&mut self, field: &Field, block: &mut Vec<u8>) {
        if field.by_index
            && let Some(index) = self.find(|name, value| name == field.name && value == field.value)
        {
            return integer(0b1000_0000, 7, index, block);
        }
        let (pattern, bits) = match field.form {
            Form::Indexing => (0b0100_0000, 6),
            Form::Without => (0b0000_0000, 4),
            Form::Never => (0b0001_0000, 4),
        };
        match self.find(|name, _| field.by_index && name == field.name) {
            Some(index) => integer(pattern, bits, index, block),
            None => {
                integer(pattern, bits, 0, block);
                string(&field.name, field.huffman.0, block);
            }
        }
        string(&field.value, field.huffman.1, block);
        if let Form::Indexing = field.form {
            self.table.push_front((field.name.clone(), field.value.clone()));
            self.evict();
        }
    }

    fn find(&self, fits: impl Fn(&[u8], &[u8]) -> bool) -> Option<usize> {
        let dynamic = self.table.iter().position(|(name, value)| fits(name, value));
        dynamic.map(|position| FIRST_DYNAMIC + position).or_else(|| {
            STATIC.iter().find(|(_, name, value)| fits(name, value)).map(|(index, ..)| *index)
        })
    }

    fn evict(&mut self) {
        let size = |(name, value): &(Vec<u8>, Vec<u8>)| name.len() + value.len() + 32;
        while self.table.iter().map(size).sum::<usize>() > self.limit {
            self.table.pop_back();
        }
    }
}

fn integer(pattern: u8, bits: u32, value: usize, out: &mut Vec<u8>) {
    let most = (1 << bits) - 1;
    if value < most {
        return out.push(pattern | u8::try_from(value).unwrap());
    }
    out.push(pattern | u8::try_from(most).unwrap());
    let mut rest = value - most;
    while rest >= 128 {
        out.push(u8::try_from(rest % 128 + 128).unwrap());
        rest /= 128;
    }
    out.push(u8::try_from(rest).unwrap());
}

fn string(text: &[u8], huffman: bool, out: &mut Vec<u8>) {
    if !huffman {
        integer(0, 7, text.len(), out);
        return out.extend_from_slice(text);
    }
    let mut coded = Vec::new();
    httlib_huffman::encode(text, &mut coded).unwrap();
    integer(0b1000_0000, 7, coded.len(), out);
    out.extend_from_slice(&coded);
}

/// How a block is cut into frames.
#[derive(Debug, Clone, Default)]
pub(crate) struct Framing {
    pub(crate) padding: Option<u8>,
    pub(crate) priority: bool,
    /// Length of each fragment but the last, cut short where the block ends.
    pub(crate) fragments: Vec<usize>,
    pub(crate) end_stream: bool,
}

pub(crate) fn write_block(stream: u32, mut block: &[u8], framing: &Framing, out: &mut Vec<u8>) {
    let mut kind = HEADERS;
    let mut cuts = framing.fragments.iter();
    loop {
        let cut = cuts.next().map_or(block.len(), |&length| length.min(block.len()));
        let (fragment, rest) = block.split_at(cut);
        let mut flags = if rest.is_empty() && cuts.len() == 0 { END_HEADERS } else { 0 };
        let mut payload = Vec::new();
        if kind == HEADERS {
            flags |= if framing.end_stream { END_STREAM } else { 0 };
            flags |= if framing.padding.is_some() { PADDED } else { 0 };
            flags |= if framing.priority { PRIORITY } else { 0 };
            payload.extend(framing.padding);
            payload.extend_from_slice(if framing.priority { &[0, 0, 0, 0, 7] } else { &[] });
        }
        payload.extend_from_slice(fragment);
        if kind == HEADERS {
            payload.resize(payload.len() + usize::from(framing.padding.unwrap_or(0)), 0);
        }
        write_frame(kind, flags, stream, &payload, out);
        if flags & END_HEADERS != 0 {
            return;
        }
        (kind, block) = (CONTINUATION, rest);
    }
}

pub(crate) fn write_frame(kind: u8, flags: u8, stream: u32, payload: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}
