//! One header block in, the same header block out, except that an `:authority` which the HTTP/2 stack would
//! refuse is replaced by one that it takes (RFC 7541).
//!
//! The replacement has the same decoded length. So the client's dynamic table and the server's keep the same entry
//! sizes, evict at the same moment, and every later index means the same entry on both sides. For the same reason
//! this module follows the table, but only as far as it must: the size of each entry and whether its name is
//! `:authority`. No name or value is kept here, and nothing waits.

use std::collections::VecDeque;

use http::uri::Authority;
use httlib_huffman::DecoderSpeed;

/// SETTINGS_HEADER_TABLE_SIZE as long as the server announces none, which ours does not (RFC 9113, 6.5.2).
const TABLE_LIMIT: usize = 4096;
/// What an entry costs beyond its name and value (RFC 7541, 4.1).
const ENTRY_OVERHEAD: usize = 32;
const AUTHORITY: &[u8] = b":authority";
/// Length of each name in the static table, from index 1 on (RFC 7541, appendix A).
const STATIC_NAMES: [u8; 61] = [
    10, 7, 7, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, // :authority, :method, :path, :scheme, :status
    14, 15, 15, 13, 6, 27, 3, 5, 13, 13, 19, 16, 16, 14, 16, 13, // accept-charset ..= content-range
    12, 6, 4, 4, 6, 7, 4, 4, 8, 17, 13, 8, 19, 13, 4, 8, 12, // content-type ..= max-forwards
    18, 19, 5, 7, 7, 11, 6, 10, 25, 17, 10, 4, 3, 16, // proxy-authenticate ..= www-authenticate
];
const STATIC_AUTHORITY: usize = 1;

/// The block does not follow RFC 7541. What the tables hold is unknown from here on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// Follows one client's encoder through all header blocks of its connection.
#[derive(Debug)]
pub(super) struct Rewriter {
    table: Table,
    text: Vec<u8>,
}

impl Rewriter {
    pub(super) fn new() -> Rewriter {
        Rewriter { table: Table::new(), text: Vec::new() }
    }

    /// Walks one complete block. `out` comes back empty if the block may go on as it is, else it holds the block
    /// to send instead.
    ///
    /// Fails where the block breaks RFC 7541; this rewriter must then not be used any more.
    pub(super) fn rewrite(&mut self, block: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
        out.clear();
        let mut copied = 0;
        let mut fields = Reader { bytes: block, at: 0 };
        while let Some(first) = fields.peek() {
            match first {
                0b1000_0000.. => self.indexed(&mut fields)?,
                0b0010_0000..=0b0011_1111 => self.table.resize(fields.integer(5)?)?,
                _ => {
                    let Some(replaced) = self.literal(first, &mut fields)? else { continue };
                    out.extend_from_slice(&block[copied..replaced.value_at]);
                    write_plain(&replaced.value, out);
                    copied = fields.at;
                }
            }
        }
        if copied > 0 {
            out.extend_from_slice(&block[copied..]);
        }
        Ok(())
    }

    /// An indexed field needs nothing: where its entry was refused, the replacement is what the server stored.
    fn indexed(&self, fields: &mut Reader<'_>) -> Result<(), Malformed> {
        let index = fields.integer(7)?;
        self.table.name(index).map(drop)
    }

    fn literal(
        &mut self,
        first: u8,
        fields: &mut Reader<'_>,
    ) -> Result<Option<Replacement>, Malformed> {
        let with_indexing = first & 0b0100_0000 != 0;
        let index = fields.integer(if with_indexing { 6 } else { 4 })?;
        let name = match index {
            0 => Name::of(self.decoded(fields.string()?)?),
            _ => self.table.name(index)?,
        };
        let value_at = fields.at;
        let value = fields.string()?;
        if !name.is_authority && !with_indexing {
            return Ok(None);
        }
        let value = self.decoded(value)?;
        let length = value.len();
        let replacement = if name.is_authority { acceptable(value) } else { None };
        if with_indexing {
            self.table.insert(name, length);
        }
        Ok(replacement.map(|value| Replacement { value_at, value }))
    }

    fn decoded<'a>(&'a mut self, text: Text<'a>) -> Result<&'a [u8], Malformed> {
        if !text.huffman {
            return Ok(text.bytes);
        }
        self.text.clear();
        httlib_huffman::decode(text.bytes, &mut self.text, DecoderSpeed::FourBits)
            .map_err(|_| Malformed)?;
        Ok(&self.text)
    }
}

struct Replacement {
    value_at: usize,
    value: Vec<u8>,
}

/// What to send instead of `value`, or nothing if the HTTP/2 stack takes it. The stack's own parser is asked, so
/// the two cannot come to disagree. An empty value cannot be helped: no authority is empty.
fn acceptable(value: &[u8]) -> Option<Vec<u8>> {
    if value.is_empty() || Authority::try_from(value).is_ok() {
        return None;
    }
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_');
    Some(value.iter().map(|&byte| if unreserved(byte) { byte } else { b'-' }).collect())
}

/// A string literal without Huffman coding (RFC 7541, 5.2): seven bits of length, then continuation bytes.
fn write_plain(value: &[u8], out: &mut Vec<u8>) {
    let [length, ..] = value.len().min(0x7f).to_le_bytes();
    out.push(length);
    if let Some(mut rest) = value.len().checked_sub(0x7f) {
        while rest > 0x7f {
            let [low, ..] = rest.to_le_bytes();
            out.push(low | 0x80);
            rest >>= 7;
        }
        let [low, ..] = rest.to_le_bytes();
        out.push(low);
    }
    out.extend_from_slice(value);
}

#[derive(Debug, Clone, Copy)]
struct Name {
    length: usize,
    is_authority: bool,
}

impl Name {
    fn of(name: &[u8]) -> Name {
        Name { length: name.len(), is_authority: name == AUTHORITY }
    }
}

/// The dynamic table, newest entry first (RFC 7541, 2.3.2). Never more than 128 entries: each costs 32 bytes of 4096.
#[derive(Debug)]
struct Table {
    entries: VecDeque<Entry>,
    size: usize,
    limit: usize,
}

#[derive(Debug)]
struct Entry {
    name: Name,
    size: usize,
}

impl Table {
    fn new() -> Table {
        Table { entries: VecDeque::new(), size: 0, limit: TABLE_LIMIT }
    }

    /// The name at an index of the combined address space (RFC 7541, 2.3.3).
    fn name(&self, index: usize) -> Result<Name, Malformed> {
        let position = index.checked_sub(1).ok_or(Malformed)?;
        if let Some(&length) = STATIC_NAMES.get(position) {
            return Ok(Name { length: length.into(), is_authority: index == STATIC_AUTHORITY });
        }
        self.entries.get(position - STATIC_NAMES.len()).map(|entry| entry.name).ok_or(Malformed)
    }

    /// An entry larger than the table empties it and is not added (RFC 7541, 4.4).
    fn insert(&mut self, name: Name, value_length: usize) {
        let size = name.length + value_length + ENTRY_OVERHEAD;
        self.evict(self.limit.saturating_sub(size));
        if size <= self.limit {
            self.entries.push_front(Entry { name, size });
            self.size += size;
        }
    }

    fn resize(&mut self, limit: usize) -> Result<(), Malformed> {
        if limit > TABLE_LIMIT {
            return Err(Malformed);
        }
        self.limit = limit;
        self.evict(limit);
        Ok(())
    }

    fn evict(&mut self, room: usize) {
        while self.size > room
            && let Some(oldest) = self.entries.pop_back()
        {
            self.size -= oldest.size;
        }
    }
}

#[derive(Clone, Copy)]
struct Text<'a> {
    bytes: &'a [u8],
    huffman: bool,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn byte(&mut self) -> Result<u8, Malformed> {
        let byte = self.peek().ok_or(Malformed)?;
        self.at += 1;
        Ok(byte)
    }

    /// An integer whose first byte has `bits` low bits for it (RFC 7541, 5.1). Four more bytes are allowed, as the
    /// HTTP/2 stack allows: that is 2^28, far above any block.
    fn integer(&mut self, bits: u32) -> Result<usize, Malformed> {
        let mask = usize::from(u8::MAX) >> (8 - bits);
        let mut value = usize::from(self.byte()?) & mask;
        if value < mask {
            return Ok(value);
        }
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    fn string(&mut self) -> Result<Text<'a>, Malformed> {
        let huffman = self.peek().ok_or(Malformed)? & 0x80 != 0;
        let length = self.integer(7)?;
        let end = self.at.checked_add(length).ok_or(Malformed)?;
        let bytes = self.bytes.get(self.at..end).ok_or(Malformed)?;
        self.at = end;
        Ok(Text { bytes, huffman })
    }
}
