//! Sealing and opening, and every way in which a ciphertext must not open.

use proptest::prelude::*;

use super::*;

const WDEK: &[u8] = b"eyJjaXBoZXJ0ZXh0IjoiIn0=";

fn dek() -> Dek {
    Dek::from_bytes([7; 32])
}

fn key_id(version: &str) -> KeyId {
    KeyId::new("instance", "crk", version).unwrap()
}

fn sealed(payload: &[u8]) -> Vec<u8> {
    seal(&dek(), &key_id("v1"), 1, WDEK, Some([9; 12]), payload).unwrap()
}

fn open(ciphertext: &[u8]) -> Result<Vec<u8>, OpenError> {
    let envelope = Envelope::decode(ciphertext).unwrap();
    envelope.open(&dek(), &key_id("v1")).map(SecretBytes::into_vec)
}

#[test]
fn a_seed_of_kube_apiserver_comes_back() {
    let ciphertext = sealed(&[3; 32]);
    let envelope = Envelope::decode(&ciphertext).unwrap();
    assert_eq!((envelope.kp_version(), envelope.wdek()), (1, WDEK));
    assert_eq!(envelope.cipher_len(), 12 + 32 + 16);
    assert_eq!(open(&ciphertext).unwrap(), [3; 32]);
}

#[test]
fn ends_exactly_where_kube_apiserver_ends() {
    let room = (0..).find(|len| seal_len(*len).is_none()).unwrap() - 1;
    assert_eq!(seal_len(room), Some(MAX_V2_CIPHERTEXT));
    let error =
        seal(&dek(), &key_id("v1"), 1, WDEK, Some([9; 12]), &vec![0; room + 1]).unwrap_err();
    assert_eq!(error, SealError::CiphertextTooLong { len: 1025, max: 1024 });
    assert_eq!(open(&sealed(&vec![5; room])).unwrap(), vec![5; room]);
}

fn seal_len(payload: usize) -> Option<usize> {
    let payload = vec![0; payload];
    seal(&dek(), &key_id("v1"), 1, WDEK, Some([9; 12]), &payload).ok().map(|sealed| sealed.len())
}

#[test]
fn without_a_wdek_nothing_is_sealed() {
    let sealed = seal(&dek(), &key_id("v1"), 1, b"", Some([9; 12]), b"x");
    assert_eq!(sealed, Err(SealError::NoWdek));
}

#[test]
fn key_id_version_wdek_and_dek_are_all_bound() {
    let envelope = Envelope::decode(&sealed(&[3; 32])).unwrap();
    let not_authentic = |envelope: &Envelope, dek: &Dek, key_id: &KeyId| {
        assert_eq!(envelope.open(dek, key_id).unwrap_err(), OpenError::NotAuthentic);
    };
    not_authentic(&envelope, &dek(), &key_id("v2"));
    not_authentic(&envelope, &Dek::from_bytes([8; 32]), &key_id("v1"));
    let mut other = envelope.clone();
    other.wire.kp_version = 2;
    not_authentic(&other, &dek(), &key_id("v1"));
    let mut other = envelope.clone();
    other.wire.wdek.push(b'=');
    let other = Envelope::decode(&other.wire.to_ciphertext()).unwrap();
    not_authentic(&other, &dek(), &key_id("v1"));
}

#[test]
fn every_single_bit_flip_is_refused() {
    let ciphertext = sealed(&[3; 32]);
    for bit in 0..ciphertext.len() * 8 {
        let mut changed = ciphertext.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let opened = Envelope::decode(&changed)
            .is_ok_and(|envelope| envelope.open(&dek(), &key_id("v1")).is_ok());
        assert!(!opened, "bit {bit}");
    }
}

#[test]
fn every_truncation_is_refused() {
    let ciphertext = sealed(&[3; 32]);
    for end in 0..ciphertext.len() {
        let opened = Envelope::decode(&ciphertext[..end])
            .is_ok_and(|envelope| envelope.open(&dek(), &key_id("v1")).is_ok());
        assert!(!opened, "{end} bytes");
    }
}

#[test]
fn bytes_of_another_form_are_named() {
    let good = sealed(&[3; 32]);
    let with = |change: fn(&mut Wire)| {
        let mut wire = Wire::decode(&good[1..]).unwrap();
        change(&mut wire);
        wire.to_ciphertext()
    };
    let cases = [
        (Vec::new(), FormatError::FormatByte),
        (b"PP+BAwEB".to_vec(), FormatError::FormatByte),
        (vec![FORMAT; 1025], FormatError::TooLong { len: 1025, max: 1024 }),
        (vec![FORMAT, 0xff], FormatError::Protobuf),
        (vec![FORMAT], FormatError::NoWdek),
        // The message with an unknown field after it, which protobuf readers step over.
        ([good.as_slice(), &[0x28, 0x01]].concat(), FormatError::NotCanonical),
        (with(|wire| wire.wdek.clear()), FormatError::NoWdek),
        (with(|wire| wire.nonce.truncate(11)), FormatError::Lengths),
        (with(|wire| wire.sealed.truncate(15)), FormatError::Lengths),
    ];
    for (ciphertext, error) in cases {
        assert_eq!(Envelope::decode(&ciphertext).unwrap_err(), error);
    }
}

#[test]
fn a_nonce_that_the_module_draws_changes_nothing_but_the_nonce() {
    let seal = |nonce| seal(&dek(), &key_id("v1"), 1, WDEK, nonce, b"payload").unwrap();
    let (one, other) = (seal(None), seal(None));
    let [one_nonce, other_nonce] =
        [&one, &other].map(|sealed| Envelope::decode(sealed).unwrap().nonce);
    assert_ne!(one_nonce, other_nonce);
    assert_eq!([one, other], [seal(Some(one_nonce)), seal(Some(other_nonce))]);
}

proptest! {
    #[test]
    fn what_is_sealed_opens(
        dek: [u8; 32], nonce: Option<[u8; 12]>, kp_version: i64, version in "[a-z0-9-]{1,40}",
        wdek in proptest::collection::vec(any::<u8>(), 1..400),
        payload in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        let (dek, key_id) = (Dek::from_bytes(dek), key_id(&version));
        let ciphertext = seal(&dek, &key_id, kp_version, &wdek, nonce, &payload).unwrap();
        let envelope = Envelope::decode(&ciphertext).unwrap();
        prop_assert_eq!(envelope.kp_version(), kp_version);
        prop_assert_eq!(envelope.wdek(), wdek);
        prop_assert_eq!(envelope.open(&dek, &key_id).unwrap().into_vec(), payload);
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 1..300)) {
        let _ = Envelope::decode(&bytes);
        bytes[0] = FORMAT;
        let _ = Envelope::decode(&bytes);
    }
}
