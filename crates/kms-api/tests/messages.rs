//! The bytes of all twelve messages, written by hand from the field numbers: whatever the generator does, this is what
//! kube-apiserver sends and reads.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly, as tests do")]

use std::fmt::Debug;

use kms_api::grpc::{v1beta1, v2};
use prost::Message;

/// A field that no version has: number 100, two bytes.
const UNKNOWN: &[u8] = b"\xa2\x06\x02??";
/// No UTF-8: a lone continuation byte.
const NOT_UTF8: &[u8] = b"\x80";

/// Encodes to `golden`, and is read from it, also with an unknown field before and behind.
fn is(message: &(impl Message + PartialEq + Default + Debug), golden: &[u8]) {
    assert_eq!(message.encode_to_vec(), golden, "{message:?}");
    for bytes in [golden.to_vec(), [UNKNOWN, golden].concat(), [golden, UNKNOWN].concat()] {
        assert_eq!(reads_like(message, &bytes), *message);
    }
    // Cut anywhere, nothing is made up: what is left is whole fields, or an error.
    for end in 0..golden.len() {
        let read = decode_like(message, &golden[..end]);
        assert!(read.is_none_or(|read| read.encoded_len() == end), "{message:?} cut to {end}");
    }
}

/// The same message with `field` (number and length byte) holding what is no UTF-8 is refused.
fn refuses_in<M: Message + Default + Debug>(fields: &[u8]) {
    for field in fields {
        let bytes = [&[*field << 3 | 2, 1], NOT_UTF8].concat();
        let read = M::decode(&*bytes);
        assert!(read.is_err(), "field {field}: {read:?}");
        let good = [*field << 3 | 2, 1, b'x'];
        assert!(M::decode(&good[..]).is_ok(), "field {field} is a string");
    }
}

fn decode_like<M: Message + Default>(_: &M, bytes: &[u8]) -> Option<M> {
    M::decode(bytes).ok()
}

fn reads_like<M: Message + Default>(like: &M, bytes: &[u8]) -> M {
    decode_like(like, bytes).unwrap()
}

#[test]
fn case_01_v1_messages_are_these_bytes() {
    let version = || "v1beta1".to_owned();
    is(&v1beta1::VersionRequest { version: version() }, b"\x0a\x07v1beta1");
    let names = (String::from("name"), String::from("1.2"));
    let (runtime_name, runtime_version) = names;
    let answer = v1beta1::VersionResponse { version: version(), runtime_name, runtime_version };
    is(&answer, b"\x0a\x07v1beta1\x12\x04name\x1a\x031.2");
    let encrypt = v1beta1::EncryptRequest { version: version(), plain: b"ping".to_vec() };
    is(&encrypt, b"\x0a\x07v1beta1\x12\x04ping");
    is(&v1beta1::EncryptResponse { cipher: b"\0\xff".to_vec() }, b"\x0a\x02\0\xff");
    let decrypt = v1beta1::DecryptRequest { version: version(), cipher: b"\0\xff".to_vec() };
    is(&decrypt, b"\x0a\x07v1beta1\x12\x02\0\xff");
    is(&v1beta1::DecryptResponse { plain: b"ping".to_vec() }, b"\x0a\x04ping");
}

#[test]
fn case_01_v2_messages_are_these_bytes() {
    is(&v2::StatusRequest {}, b"");
    let status =
        v2::StatusResponse { version: "v2".into(), healthz: "ok".into(), key_id: "k/1".into() };
    is(&status, b"\x0a\x02v2\x12\x02ok\x1a\x03k/1");
    let encrypt = v2::EncryptRequest { plaintext: b"seed".to_vec(), uid: "u".into() };
    is(&encrypt, b"\x0a\x04seed\x12\x01u");
    let annotations = || [("a.b".to_owned(), b"\x01".to_vec())].into_iter().collect();
    let sealed = v2::EncryptResponse {
        ciphertext: b"\0\xff".to_vec(),
        key_id: "k/1".into(),
        annotations: annotations(),
    };
    is(&sealed, b"\x0a\x02\0\xff\x12\x03k/1\x1a\x08\x0a\x03a.b\x12\x01\x01");
    let decrypt = v2::DecryptRequest {
        ciphertext: b"\0\xff".to_vec(),
        uid: "u".into(),
        key_id: "k/1".into(),
        annotations: annotations(),
    };
    is(&decrypt, b"\x0a\x02\0\xff\x12\x01u\x1a\x03k/1\x22\x08\x0a\x03a.b\x12\x01\x01");
    is(&v2::DecryptResponse { plaintext: b"seed".to_vec() }, b"\x0a\x04seed");
}

#[test]
fn case_01_text_that_is_no_utf8_is_refused() {
    refuses_in::<v1beta1::VersionRequest>(&[1]);
    refuses_in::<v1beta1::VersionResponse>(&[1, 2, 3]);
    refuses_in::<v1beta1::EncryptRequest>(&[1]);
    refuses_in::<v1beta1::DecryptRequest>(&[1]);
    refuses_in::<v2::StatusResponse>(&[1, 2, 3]);
    refuses_in::<v2::EncryptRequest>(&[2]);
    refuses_in::<v2::EncryptResponse>(&[2]);
    refuses_in::<v2::DecryptRequest>(&[2, 3]);
    // The name of an annotation.
    assert!(v2::EncryptResponse::decode(&b"\x1a\x06\x0a\x01\x80\x12\x01x"[..]).is_err());
    assert!(v2::DecryptRequest::decode(&b"\x22\x06\x0a\x01\x80\x12\x01x"[..]).is_err());
}
