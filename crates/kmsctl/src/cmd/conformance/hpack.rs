//! Header blocks, as far as the frame client needs them (RFC 7541): requests are written in the plainest form there
//! is, and of answers only what gRPC says with them is read. The client forbids the dynamic table (size 0), so every
//! block can be read alone; one that refers to the table is malformed.

use httlib_huffman::DecoderSpeed;

/// `:status`, by its places in the static table (RFC 7541, appendix A).
const STATUS_AT: std::ops::RangeInclusive<usize> = 8..=14;
const STATUS: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
const FIRST_DYNAMIC: usize = 62;

/// What an answer says in its headers and trailers.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Said {
    pub http_status: Option<u16>,
    pub grpc_status: Option<u32>,
    pub grpc_message: String,
}

/// The block breaks RFC 7541, or uses the table that it may not use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// Adds to `said` what one complete header block of an answer says.
///
/// # Errors
/// The block cannot be told apart into fields. What came before is in `said`.
pub fn read(block: &[u8], said: &mut Said) -> Result<(), Malformed> {
    let mut fields = Reader { bytes: block };
    while let Some(&first) = fields.bytes.first() {
        match first {
            0b1000_0000.. => said.indexed(fields.integer(7)?)?,
            0b0010_0000..=0b0011_1111 => fields.integer(5).map(drop)?,
            0b0100_0000.. => said.literal(6, &mut fields)?,
            _ => said.literal(4, &mut fields)?,
        }
    }
    Ok(())
}

/// Appends a field to a request's header block: a literal that enters no table, without Huffman coding.
pub(super) fn write(name: &str, value: &str, block: &mut Vec<u8>) {
    block.push(0);
    for text in [name, value] {
        write_length(text.len(), block);
        block.extend_from_slice(text.as_bytes());
    }
}

impl Said {
    fn indexed(&mut self, index: usize) -> Result<(), Malformed> {
        match index {
            0 | FIRST_DYNAMIC.. => return Err(Malformed),
            _ if STATUS_AT.contains(&index) => {
                self.http_status = STATUS.get(index - STATUS_AT.start()).copied();
            }
            _ => {}
        }
        Ok(())
    }

    fn literal(&mut self, bits: u32, fields: &mut Reader<'_>) -> Result<(), Malformed> {
        let name = match fields.integer(bits)? {
            0 => fields.string()?,
            index if STATUS_AT.contains(&index) => b":status".to_vec(),
            FIRST_DYNAMIC.. => return Err(Malformed),
            _ => Vec::new(),
        };
        let value = String::from_utf8_lossy(&fields.string()?).into_owned();
        match name.as_slice() {
            b":status" => self.http_status = value.parse().ok(),
            b"grpc-status" => self.grpc_status = value.parse().ok(),
            b"grpc-message" => self.grpc_message = percent_decoded(&value),
            _ => {}
        }
        Ok(())
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    /// RFC 7541, 5.1: in the low `bits` of the first byte, or continued behind it.
    fn integer(&mut self, bits: u32) -> Result<usize, Malformed> {
        let most = (1_usize << bits) - 1;
        let mut value = usize::from(self.byte()?) & most;
        if value < most {
            return Ok(value);
        }
        // Three bytes more are two million; no index or length here is so large.
        for shift in [0, 7, 14] {
            let byte = usize::from(self.byte()?);
            value += (byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    fn string(&mut self) -> Result<Vec<u8>, Malformed> {
        let huffman = self.bytes.first().ok_or(Malformed)? & 0x80 != 0;
        let length = self.integer(7)?;
        let (text, rest) = self.bytes.split_at_checked(length).ok_or(Malformed)?;
        self.bytes = rest;
        if !huffman {
            return Ok(text.to_vec());
        }
        let mut decoded = Vec::new();
        httlib_huffman::decode(text, &mut decoded, DecoderSpeed::FourBits)
            .map_err(|_| Malformed)?;
        Ok(decoded)
    }

    fn byte(&mut self) -> Result<u8, Malformed> {
        let (&first, rest) = self.bytes.split_first().ok_or(Malformed)?;
        self.bytes = rest;
        Ok(first)
    }
}

fn write_length(length: usize, block: &mut Vec<u8>) {
    let mut rest = match length.checked_sub(0x7f) {
        None => return block.push(low_byte(length)),
        Some(rest) => rest,
    };
    block.push(0x7f);
    while rest >= 0x80 {
        block.push(low_byte(rest & 0x7f | 0x80));
        rest >>= 7;
    }
    block.push(low_byte(rest));
}

fn low_byte(number: usize) -> u8 {
    number.to_le_bytes()[0]
}

/// gRPC writes what is no printable ASCII in its message as `%` and two hex digits. Anything else stays as it is.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        let escaped = behind.split_at_checked(2).filter(|_| first == b'%');
        match escaped.and_then(|(digits, behind)| Some((hex(digits)?, behind))) {
            Some((byte, behind)) => {
                bytes.push(byte);
                rest = behind;
            }
            None => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex(digits: &[u8]) -> Option<u8> {
    let digits = std::str::from_utf8(digits).ok()?;
    u8::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn said(block: &[u8]) -> Result<Said, Malformed> {
        let mut said = Said::default();
        read(block, &mut said).map(|()| said)
    }

    #[test]
    fn every_form_of_a_field_is_read() {
        let mut block = vec![0x20, 0x88, 0x5f, 2, b'a', b'b'];
        write("grpc-message", "caf%C3%A9 100%25 50% %zz", &mut block);
        // Huffman-coded name and value, with indexing.
        block.push(0x40);
        for text in ["grpc-status", "12"] {
            let mut coded = Vec::new();
            httlib_huffman::encode(text.as_bytes(), &mut coded).unwrap();
            block.push(0x80 | u8::try_from(coded.len()).unwrap());
            block.extend(coded);
        }
        let grpc_message = "café 100% 50% %zz".to_owned();
        let expected = Said { http_status: Some(200), grpc_status: Some(12), grpc_message };
        assert_eq!(said(&block), Ok(expected));
    }

    #[test]
    fn a_status_that_has_no_place_of_its_own_is_a_literal() {
        assert_eq!(said(b"\x08\x03415").unwrap().http_status, Some(415));
    }

    #[test]
    fn the_forbidden_table_and_cut_blocks_are_refused() {
        let blocks: [&[u8]; 6] =
            [&[0xbe], &[0x80], &[0x7e, 1, b'a'], &[0x00, 5, b'a'], &[0x00], &[0xff, 0x80, 0x80]];
        for block in blocks {
            assert_eq!(said(block), Err(Malformed), "{block:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(text in "[ -$&-~]{0,400}") {
            let mut block = Vec::new();
            write("x-other", &text, &mut block);
            write("grpc-message", &text, &mut block);
            prop_assert_eq!(said(&block).unwrap().grpc_message, text);
        }

        #[test]
        fn any_bytes_are_read_or_refused(block: Vec<u8>) {
            if let Ok(said) = said(&block) {
                prop_assert!(said.grpc_message.len() <= block.len() * 8);
            }
        }
    }
}
