//! Hand-made streams of what gob allows and forbids, then arbitrary ones. The original's bytes are in
//! `tests/golden.rs`, Go itself in `tests/go_gob.rs`.

use proptest::prelude::*;

use super::types::{BOOL, COMPLEX, FLOAT, INTERFACE, UINT};
use super::*;

fn secret(kp_version: i64, wrapped_dek: &[u8], cipher: &str) -> Secret {
    Secret { kp_version, wrapped_dek: wrapped_dek.to_vec(), cipher: cipher.into() }
}

/// A message of what `fill` writes.
fn message(fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut body = Vec::new();
    fill(&mut body);
    let mut message = Vec::new();
    put_bytes(&mut message, &body);
    message
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_unsigned(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// `CommonType`: name and id.
fn put_common(out: &mut Vec<u8>, id: i64) {
    out.extend_from_slice(b"\x01\x01\x01T\x01");
    put_signed(out, id);
    out.push(0);
}

/// The definition of struct `id` with these fields.
fn structure(id: i64, fields: &[(&str, i64)]) -> Vec<u8> {
    message(|out| {
        put_signed(out, -id);
        out.push(3);
        put_common(out, id);
        out.push(1);
        put_unsigned(out, fields.len() as u64);
        for (name, id) in fields {
            out.push(1);
            put_bytes(out, name.as_bytes());
            out.push(1);
            put_signed(out, *id);
            out.push(0);
        }
        out.extend_from_slice(&[0, 0]);
    })
}

/// The definition of a type of another kind, with up to two numbers.
fn definition(id: i64, kind: u8, numbers: &[i64]) -> Vec<u8> {
    message(|out| {
        put_signed(out, -id);
        out.push(kind + 1);
        put_common(out, id);
        for number in numbers {
            out.push(1);
            put_signed(out, *number);
        }
        out.extend_from_slice(&[0, 0]);
    })
}

fn value(id: i64, fields: &[u8]) -> Vec<u8> {
    message(|out| {
        put_signed(out, id);
        out.extend_from_slice(fields);
    })
}

const OURS: [(&str, i64); 3] = [("KpVersion", INT), ("WrappedDEK", BYTES), ("Cipher", STRING)];

#[test]
fn zero_fields_are_left_out_and_come_back() {
    let empty = encode(&Secret::default());
    assert_eq!(empty[DEFINITION.len()..], [3, 0xff, 0x82, 0]);
    assert_eq!(decode(&empty), Ok(Secret::default()));

    let only_cipher = encode(&secret(0, b"", "c"));
    assert_eq!(only_cipher[DEFINITION.len()..], *b"\x06\xff\x82\x03\x01c\0");
    assert_eq!(decode(&only_cipher), Ok(secret(0, b"", "c")));
}

#[test]
fn any_type_id_and_field_order_is_read() {
    for id in [9, 64, 67, 128, 70_000, i64::MAX] {
        let fields = [("Cipher", STRING), ("WrappedDEK", BYTES), ("KpVersion", INT)];
        let stream = [structure(id, &fields), value(id, b"\x01\x01c\x01\x01d\x01\x05\0")].concat();
        assert_eq!(decode(&stream), Ok(secret(-3, b"d", "c")), "type {id}");
    }
}

#[test]
fn fields_of_any_other_type_are_stepped_over() {
    let fields = [
        ("Bool", BOOL),
        ("Uint", UINT),
        ("Float", FLOAT),
        ("Bytes", BYTES),
        ("Text", STRING),
        ("Complex", COMPLEX),
        ("Any", INTERFACE),
        ("Nil", INTERFACE),
        ("Self", 66),
        ("Slice", 67),
        ("Map", 68),
        ("Array", 69),
        ("Inner", 70),
        ("Cipher", STRING),
    ];
    let stream = [
        definition(66, 4, &[]),
        definition(67, 1, &[STRING]),
        definition(68, 3, &[STRING, 67]),
        definition(69, 0, &[BOOL, 2]),
        structure(70, &[("A", INT), ("B", 67)]),
        structure(65, &fields),
        value(
            65,
            b"\x01\x01\x01\x05\x01\xfe\xf0\x3f\x01\x02xy\x01\x01z\x01\x01\x02\
              \x01\x03int\x04\x02\0\x08\x01\0\x01\x02\xff\xff\x01\x02\x01a\x01b\
              \x01\x01\x01k\x01\x01v\x01\x02\x01\x01\x01\x02\x01\x01x\0\x01\x01c\0",
        ),
    ]
    .concat();
    assert_eq!(decode(&stream), Ok(secret(0, b"", "c")));
}

#[test]
fn structs_that_are_not_ours_are_refused_by_name() {
    let wrong = [("KpVersion", UINT), ("Cipher", STRING)];
    let cases: [(&[(&str, i64)], GobError); 4] = [
        (&[("Version", INT)], GobError::NoField),
        (&[], GobError::NoField),
        (&wrong, GobError::FieldType("KpVersion")),
        (&[("Cipher", STRING), ("Cipher", STRING)], GobError::Definition),
    ];
    for (fields, error) in cases {
        let stream = [structure(65, fields), value(65, &[0])].concat();
        assert_eq!(decode(&stream), Err(error), "{fields:?}");
    }
    let map = [definition(65, 3, &[STRING, STRING]), value(65, &[0, 0])].concat();
    assert_eq!(decode(&map), Err(GobError::NotAStruct));
    assert_eq!(decode(&value(INT, &[0, 2])), Err(GobError::NotAStruct));
    assert_eq!(decode(&value(65, &[0])), Err(GobError::UnknownType(65)));
}

#[test]
fn broken_streams_are_refused_with_the_cause() {
    let ours = structure(65, &OURS);
    let with = |fields: &[u8]| [ours.clone(), value(65, fields)].concat();
    assert_eq!(decode(&with(b"\x04\x01x\0")), Err(GobError::Number), "a fourth field");
    assert_eq!(decode(&with(b"\x02\x7fx\0")), Err(GobError::Truncated), "a length beyond the end");
    assert_eq!(decode(&with(b"\x01\xf6\0")), Err(GobError::Number), "a number of ten bytes");
    assert_eq!(decode(&with(b"\x03\x01\xff\0")), Err(GobError::NotText), "no UTF-8");
    assert_eq!(decode(&with(b"\0x")), Err(GobError::LeftOver), "bytes after the last field");
    assert_eq!(decode(&[with(b"\0"), vec![0]].concat()), Err(GobError::LeftOver), "a second value");
    assert_eq!(decode(&[ours.clone(), with(b"\0")].concat()), Err(GobError::Definition), "twice");
    assert_eq!(decode(&vec![0; MAX_GOB + 1]), Err(GobError::TooLong(MAX_GOB + 1)));
    let both_kinds = b"\x06\xff\x81\x02\0\x01\0\0";
    assert_eq!(decode(both_kinds), Err(GobError::Definition), "slice and struct at once");
}

#[test]
fn a_type_that_holds_itself_ends_at_the_depth_limit() {
    let stream = [
        structure(66, &[("Next", 66)]),
        structure(65, &[("Cipher", STRING), ("List", 66)]),
        value(65, &[vec![2], vec![1; 10_000]].concat()),
    ]
    .concat();
    assert_eq!(decode(&stream), Err(GobError::TooDeep));
}

#[test]
fn a_count_beyond_the_bytes_is_refused_before_counting() {
    let stream = [
        definition(66, 1, &[BOOL]),
        structure(65, &[("Cipher", STRING), ("Flags", 66)]),
        value(65, b"\x02\xf8\x7f\xff\xff\xff\xff\xff\xff\xff\0"),
    ]
    .concat();
    assert_eq!(decode(&stream), Err(GobError::Truncated));
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        kp_version: i64,
        wrapped_dek in proptest::collection::vec(any::<u8>(), 0..600),
        cipher in "\\PC{0,300}",
    ) {
        let secret = Secret { kp_version, wrapped_dek, cipher };
        prop_assert_eq!(decode(&encode(&secret)), Ok(secret));
    }

    #[test]
    fn numbers_come_back(unsigned: u64, signed: i64, shift in 0..64) {
        let (unsigned, signed) = (unsigned >> shift, signed >> shift);
        let mut bytes = Vec::new();
        put_unsigned(&mut bytes, unsigned);
        put_signed(&mut bytes, signed);
        let mut reader = Reader::new(&bytes);
        prop_assert_eq!(reader.unsigned(), Ok(unsigned));
        prop_assert_eq!(reader.signed(), Ok(signed));
        prop_assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn a_part_of_a_stream_is_refused(wrapped_dek in proptest::collection::vec(any::<u8>(), 0..200)) {
        let stream = encode(&secret(1, &wrapped_dek, "c"));
        for end in 0..stream.len() {
            prop_assert!(decode(&stream[..end]).is_err());
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode(&bytes);
    }

    /// Reaches further into the decoder than arbitrary bytes do.
    #[test]
    fn damaged_streams_never_panic(
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut stream = [
            definition(66, 3, &[STRING, 65]),
            structure(65, &[("Cipher", STRING), ("Inner", 66), ("Any", INTERFACE)]),
            value(65, b"\x01\x01c\x01\x01\x01k\x02\0\x01\x03int\x04\x02\0\x08\0"),
        ]
        .concat();
        for (at, byte) in damage {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let _ = decode(&stream);
    }
}
