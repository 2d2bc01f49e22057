//! One header block in, the same header block out, except that an `:authority` which the HTTP/2 stack would
//! refuse is replaced by one that it takes (RFC 7541).
//!
//! The replacement has the same decoded length. So the client's dynamic table and the server's keep the same entry
//! sizes, evict at the same moment, and every later index means the same entry on both sides. No name or value is kept
//! here, nothing is decoded but an authority, and what breaks RFC 7541 is left to the stack to refuse.

use httlib_huffman::DecoderSpeed;
use http::uri::Authority;

/// Index of the field in the static table that is named `:authority` (RFC 7541, appendix A).
const AUTHORITY_INDEX: usize = 1;
const AUTHORITY: &[u8] = b":authority";
/// The same text in the only Huffman coding that it has (RFC 7541, 5.2 and appendix B).
const AUTHORITY_HUFFMAN: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
const FIRST_DYNAMIC: usize = 62;

/// The block cannot be told apart into fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// Follows one client's encoder through all header blocks of its connection.
#[derive(Debug)]
pub(super) struct Rewriter {
    names: Names,
}

impl Rewriter {
    pub(super) fn new() -> Rewriter {
        Rewriter { names: Names(0) }
    }

    /// Walks one complete block. `out` comes back empty if the block may go on as it is, else it holds the block
    /// to send instead.
    ///
    /// Fails where the block has no fields to walk; this rewriter must then not be used any more.
    pub(super) fn rewrite(&mut self, block: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
        out.clear();
        let mut copied = 0;
        let mut fields = Reader { bytes: block, at: 0 };
        while let Some(first) = fields.peek() {
            match first {
                // An indexed field needs no help: what the stack once stored, it takes again.
                0b1000_0000.. => fields.integer(7).map(drop)?,
                0b0010_0000..=0b0011_1111 => fields.integer(5).map(drop)?,
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

    fn literal(
        &mut self,
        first: u8,
        fields: &mut Reader<'_>,
    ) -> Result<Option<Replacement>, Malformed> {
        let with_indexing = first & 0b0100_0000 != 0;
        let is_authority = match fields.integer(if with_indexing { 6 } else { 4 })? {
            0 => fields.string()?.is_authority(),
            index => self.names.is_authority(index),
        };
        if with_indexing {
            self.names.insert(is_authority);
        }
        let value_at = fields.at;
        let value = fields.string()?;
        if !is_authority {
            return Ok(None);
        }
        let replacement = acceptable(value.decoded()?);
        Ok(replacement.map(|value| Replacement { value_at, value }))
    }
}

/// All that must be known of the dynamic table: which of the newest 128 entries are named `:authority`, the newest in
/// the lowest bit.
///
/// More than 128 there cannot be, as each entry counts 32 bytes or more of the 4096 that the table may have (RFC 7541,
/// 4.1; the server announces no other size). Indexes count from the newest entry, so an entry that was evicted or
/// never fitted does no harm here: no index reaches it, and one that does is refused by the stack.
#[derive(Debug)]
struct Names(u128);

impl Names {
    fn insert(&mut self, is_authority: bool) {
        self.0 = self.0 << 1 | u128::from(is_authority);
    }

    /// Whether the name at an index of the combined address space is `:authority` (RFC 7541, 2.3.3).
    fn is_authority(&self, index: usize) -> bool {
        let Some(position) = index.checked_sub(FIRST_DYNAMIC) else {
            return index == AUTHORITY_INDEX;
        };
        u32::try_from(position)
            .is_ok_and(|position| self.0.checked_shr(position).is_some_and(|names| names & 1 == 1))
    }
}

struct Replacement {
    value_at: usize,
    value: Vec<u8>,
}

/// What to send instead of `value`, or nothing if the HTTP/2 stack takes it. The stack's own parser is asked, so
/// the two cannot come to disagree. An empty value cannot be helped: no authority is empty.
fn acceptable(mut value: Vec<u8>) -> Option<Vec<u8>> {
    if value.is_empty() || Authority::try_from(value.as_slice()).is_ok() {
        return None;
    }
    for byte in &mut value {
        if !byte.is_ascii_alphanumeric() && !matches!(byte, b'.' | b'_') {
            *byte = b'-';
        }
    }
    Some(value)
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

struct Text<'a> {
    bytes: &'a [u8],
    huffman: bool,
}

impl Text<'_> {
    fn is_authority(&self) -> bool {
        self.bytes == if self.huffman { AUTHORITY_HUFFMAN } else { AUTHORITY }
    }

    fn decoded(&self) -> Result<Vec<u8>, Malformed> {
        if !self.huffman {
            return Ok(self.bytes.to_vec());
        }
        let mut text = Vec::new();
        httlib_huffman::decode(self.bytes, &mut text, DecoderSpeed::FourBits)
            .map_err(|_| Malformed)?;
        Ok(text)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(rewriter: &mut Rewriter, block: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut out = Vec::new();
        rewriter.rewrite(block, &mut out)?;
        Ok(if out.is_empty() { block.to_vec() } else { out })
    }

    #[test]
    fn the_requests_of_rfc_7541_appendix_c_pass() {
        let plain: [&[u8]; 3] = [
            b"\x82\x86\x84\x41\x0fwww.example.com",
            b"\x82\x86\x84\xbe\x58\x08no-cache",
            b"\x82\x87\x85\xbf\x40\x0acustom-key\x0ccustom-value",
        ];
        let huffman: [&[u8]; 3] = [
            b"\x82\x86\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff",
            b"\x82\x86\x84\xbe\x58\x86\xa8\xeb\x10\x64\x9c\xbf",
            b"\x82\x87\x85\xbf\x40\x88\x25\xa8\x49\xe9\x5b\xa9\x7d\x7f\x89\x25\xa8\x49\xe9\x5b\xb8\xe8\xb4\xbf",
        ];
        for blocks in [plain, huffman] {
            let mut rewriter = Rewriter::new();
            for block in blocks {
                assert_eq!(rewritten(&mut rewriter, block).as_deref(), Ok(block));
            }
        }
    }

    #[test]
    fn only_the_refused_value_changes_and_keeps_its_length() {
        let mut rewriter = Rewriter::new();
        let block = b"\x83\x41\x08%2Fa/b.c\x40\x01x\x03%2F\x84";
        assert_eq!(
            rewritten(&mut rewriter, block).unwrap(),
            b"\x83\x41\x08-2Fa-b.c\x40\x01x\x03%2F\x84"
        );
    }

    #[test]
    fn the_name_may_come_from_the_dynamic_table() {
        let mut rewriter = Rewriter::new();
        let stored = b"\x40\x0a:authority\x01a\x40\x01x\x01y";
        assert_eq!(rewritten(&mut rewriter, stored).unwrap(), stored);
        // 63 is the authority now, 62 the field "x".
        assert_eq!(rewritten(&mut rewriter, b"\x7f\x00\x01/").unwrap(), b"\x7f\x00\x01-");
        assert_eq!(rewritten(&mut rewriter, b"\x7f\x00\x01/").unwrap(), b"\x7f\x00\x01/");
    }

    #[test]
    fn the_huffman_form_of_the_name_is_the_only_one() {
        let mut coded = Vec::new();
        httlib_huffman::encode(AUTHORITY, &mut coded).unwrap();
        assert_eq!(coded, AUTHORITY_HUFFMAN);
    }

    #[test]
    fn every_byte_survives_huffman_coding() {
        let text: Vec<u8> = (0..=u8::MAX).chain((0..=u8::MAX).rev()).collect();
        let mut bytes = Vec::new();
        httlib_huffman::encode(&text, &mut bytes).unwrap();
        assert_eq!(Text { bytes: &bytes, huffman: true }.decoded(), Ok(text));
    }

    #[test]
    fn what_cannot_be_walked_is_said_so() {
        let broken: [&[u8]; 5] = [
            b"\xff\xff\xff\xff\xff\x00", // integer of five continuation bytes
            b"\xff",                     // integer cut short
            b"\x41\x05%",                // value cut short
            b"\x40",                     // no name
            b"\x41\x84\xff\xff\xff\xff", // Huffman code of EOS
        ];
        for block in broken {
            assert_eq!(rewritten(&mut Rewriter::new(), block), Err(Malformed), "{block:?}");
        }
    }
}
