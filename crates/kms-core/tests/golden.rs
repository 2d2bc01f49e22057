//! Bytes that may never change: the original's dump, and values of ours computed by other programs.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_core::cipher::{FormatError, OpenError, gob, v1, v2};
use kms_core::etcd::object::V1Body;
use kms_core::etcd::prefix::{StoredValue, classify};
use kms_core::key_id::KeyId;
use kms_core::secret::Dek;
use kms_core::wdek::{Wdek, WdekVersion};

const DUMP: &str = include_str!("data/golden-secret1.hexdump");

/// The bytes of a `hexdump -C`.
fn dumped() -> Vec<u8> {
    let hex = DUMP.lines().flat_map(|line| line[10..58].split_whitespace());
    hex.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

/// The value in the golden dump, without etcdctl's key line and last newline.
fn golden_value() -> Vec<u8> {
    let dumped = dumped();
    let value = dumped.strip_prefix(b"/registry/secrets/default/secret1\n").unwrap();
    value.strip_suffix(b"\n").unwrap().to_vec()
}

fn golden_cipher() -> Vec<u8> {
    let value = golden_value();
    let Ok(StoredValue::KmsV1 { provider: "KmsPlugin", body }) = classify(&value) else {
        panic!("not a KMS v1 value of KmsPlugin");
    };
    let body = V1Body::decode(body).unwrap();
    assert_eq!(body.body.len(), 144);
    body.encrypted_dek.to_vec()
}

#[test]
fn the_seeds_dump_decodes_completely() {
    let cipher = golden_cipher();
    assert_eq!(cipher.len(), 628);
    let secret = gob::decode(&STANDARD.decode(&cipher).unwrap()).unwrap();
    assert_eq!(secret.kp_version, 1);
    assert_eq!(secret.wrapped_dek.len(), 308);
    assert_eq!(secret.cipher.len(), 88);
    assert_eq!(STANDARD.decode(&secret.cipher).unwrap().len(), 64);

    let wdek = Wdek::decode(std::str::from_utf8(&secret.wrapped_dek).unwrap()).unwrap();
    assert_eq!(wdek.version, WdekVersion::V2_0_0);
    assert_eq!((wdek.ciphertext.len(), wdek.hash.len(), wdek.iv.len()), (48, 64, 16));
    assert_eq!(wdek.handle, None);
}

#[test]
fn encoding_gives_the_seeds_628_bytes_again() {
    let cipher = golden_cipher();
    let secret = gob::decode(&STANDARD.decode(&cipher).unwrap()).unwrap();
    assert_eq!(STANDARD.encode(gob::encode(&secret)).as_bytes(), cipher);

    let text = std::str::from_utf8(&secret.wrapped_dek).unwrap();
    assert_eq!(Wdek::decode(text).unwrap().encode(), text);
}

#[test]
fn the_seeds_cipher_has_no_code_of_ours() {
    let envelope = v1::Envelope::decode(&golden_cipher()).unwrap();
    assert_eq!((envelope.kp_version(), envelope.cipher_len()), (1, 64));
    let opened = envelope.open(&Dek::from_bytes([0; 32]), 4, false);
    assert_eq!(opened.unwrap_err(), OpenError::NotAuthentic);
}

#[test]
fn each_api_refuses_the_others_values() {
    assert_eq!(v2::Envelope::decode(&golden_cipher()).unwrap_err(), FormatError::FormatByte);
    let (dek, key_id) = golden_key();
    let ciphertext = v2::seal(&dek, &key_id, 1, b"wdek", Some([0; 12]), b"payload").unwrap();
    assert_eq!(v1::Envelope::decode(&ciphertext).unwrap_err(), FormatError::Base64);
}

/// Written by a Python program from the description in `cipher/v1.rs`, with IV 10..1f, a payload of
/// 20..3f and NUM_LEN_BYTES 4.
const GOLDEN_V1: &str = "PP+BAwEBBlNlY3JldAH/ggABAwEJS3BWZXJzaW9uAQQAAQpXcmFwcGVkREVLAQoAAQZDaXBoZXIBD\
    AAAAGX/ggECAQR3ZGVrAVhFQkVTRXhRVkZoY1lHUm9iSEIwZUgxd0VsNGZmYlRGYnkzbHlZS01sYUtLUFJHd0J3T1NmSG10dWZI\
    dWRSTkUvam1KYXBWNlZ4ZXl5ZHBoQUNFaWMydz09AA==";

#[test]
fn a_v1_cipher_is_what_its_description_says() {
    let (dek, _) = golden_key();
    let (iv, payload) = (counting(0x10), counting::<32>(0x20));
    let input =
        v1::Seal { dek: &dek, kp_version: 1, wdek: b"wdek", len_bytes: 4, iv, payload: &payload };
    assert_eq!(v1::seal(&input).unwrap(), GOLDEN_V1.as_bytes());

    let opened = v1::Envelope::decode(GOLDEN_V1.as_bytes()).unwrap().open(&dek, 4, false).unwrap();
    assert_eq!(opened.payload.as_slice(), payload);
}

/// Likewise from `cipher/v2.rs`, with nonce 40..4b.
const GOLDEN_V2: &[u8] = b"\x02\x08\x01\x12\x04wdek\x1a\x0c@ABCDEFGHIJK\x22\x30\
    \xfe\x1f\x97\x20\xe1\x36\x7e\x13\xac\xbd\xa5\xe0\xdb\x1c\x07\x56\
    \x42\xbc\x6c\x76\x94\x2e\xc2\xd4\xfa\x05\x04\xae\x2d\x8b\x20\x0b\
    \x87\xb0\xb4\x76\xb2\x83\x39\x3f\x32\x77\xce\x6f\xeb\x8f\x42\x91";

#[test]
fn a_v2_ciphertext_is_what_its_description_says() {
    let (dek, key_id) = golden_key();
    let payload = counting::<32>(0x20);
    let ciphertext = v2::seal(&dek, &key_id, 1, b"wdek", Some(counting(0x40)), &payload).unwrap();
    assert_eq!(ciphertext, GOLDEN_V2);

    let opened = v2::Envelope::decode(GOLDEN_V2).unwrap().open(&dek, &key_id).unwrap();
    assert_eq!(opened.as_slice(), payload);
}

/// 00..1f, for a well-known CRK version.
fn golden_key() -> (Dek, KeyId) {
    (Dek::from_bytes(counting(0)), KeyId::new("instance", "crk", "version").unwrap())
}

fn counting<const LEN: usize>(first: u8) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    (first..).zip(&mut bytes).for_each(|(count, byte)| *byte = count);
    bytes
}
