//! Sealing and opening, and every way in which a value must not open.

use proptest::prelude::*;

use super::*;

const WDEK: &[u8] = b"eyJjaXBoZXJ0ZXh0IjoiIn0=";

fn dek() -> Dek {
    Dek::from_bytes([7; 32])
}

fn sealed(len_bytes: u8, payload: &[u8]) -> Vec<u8> {
    let (dek, iv) = (dek(), [9; 16]);
    seal(&Seal { dek: &dek, kp_version: 1, wdek: WDEK, len_bytes, iv, payload }).unwrap()
}

/// A value as another plug-in writes it: no code, the fill is `fill`.
fn foreign(prefix: &[u8], payload: &[u8], fill: &[u8]) -> Envelope {
    let mut blocks = [prefix, payload, fill].concat();
    encrypt(&dek(), [9; 16], &mut blocks).unwrap();
    let (wdek, wdek_sha256) = (WDEK.to_vec(), sha256(WDEK));
    Envelope { kp_version: 1, wdek, wdek_sha256, iv: [9; 16], blocks, canonical: true }
}

/// What `change` makes of the inner struct, encoded again.
fn rewritten(text: &[u8], change: impl FnOnce(&mut Secret)) -> Vec<u8> {
    let mut secret = gob::decode(&STANDARD.decode(text).unwrap()).unwrap();
    change(&mut secret);
    STANDARD.encode(gob::encode(&secret)).into_bytes()
}

fn open(text: &[u8]) -> Result<Vec<u8>, OpenError> {
    let opened = Envelope::decode(text).unwrap().open(&dek(), 4, false)?;
    assert!(opened.authenticated);
    Ok(opened.payload.into_vec())
}

#[test]
fn the_seeds_64_bytes_stay_64_bytes() {
    let envelope = Envelope::decode(&sealed(4, &[3; 32])).unwrap();
    assert_eq!(envelope.cipher_len(), 64);
    assert_eq!(envelope.kp_version(), 1);
    assert_eq!(envelope.wdek(), WDEK);
}

#[test]
fn the_code_has_12_to_27_bytes() {
    for len in 0..64 {
        let blocks = sealed_len(4, len);
        assert_eq!(blocks % BLOCK, 0);
        assert!((12..=27).contains(&(blocks - 4 - len)), "{len}");
    }
}

#[test]
fn the_health_check_of_kube_apiserver_comes_back() {
    assert_eq!(open(&sealed(4, b"ping")).unwrap(), b"ping");
    assert_eq!(open(&sealed(4, b"")).unwrap(), b"");
}

#[test]
fn a_changed_num_len_bytes_makes_nothing_unreadable() {
    for written in LEN_BYTES {
        let envelope = Envelope::decode(&sealed(written, &[3; 32])).unwrap();
        for read in LEN_BYTES {
            let opened = envelope.open(&dek(), read, false).unwrap();
            assert_eq!(opened.payload.as_slice(), [3; 32], "written {written}, read {read}");
        }
    }
}

#[test]
fn inputs_that_no_reader_would_take_back_are_refused() {
    let (dek, iv) = (dek(), [0; 16]);
    let payload = vec![0; 256];
    let input = Seal { dek: &dek, kp_version: 1, wdek: WDEK, len_bytes: 1, iv, payload: &payload };
    assert_eq!(seal(&input), Err(SealError::PayloadTooLong { len: 256, max: 255 }));
    assert!(seal(&Seal { payload: &payload[1..], ..input }).is_ok());
    for len_bytes in [0, 9, 255] {
        assert_eq!(seal(&Seal { len_bytes, ..input }), Err(SealError::LenBytes(len_bytes)));
    }
    assert_eq!(seal(&Seal { wdek: b"", len_bytes: 4, ..input }), Err(SealError::NoWdek));
    let long = vec![0; MAX_PAYLOAD + 1];
    assert_eq!(
        seal(&Seal { payload: &long, len_bytes: 4, ..input }),
        Err(SealError::PayloadTooLong { len: MAX_PAYLOAD + 1, max: MAX_PAYLOAD })
    );
    let wdek = vec![b'w'; 10_000];
    assert!(matches!(
        seal(&Seal { payload: &long[1..], wdek: &wdek, len_bytes: 4, ..input }),
        Err(SealError::CiphertextTooLong { max: 65_535, .. })
    ));
}

#[test]
fn the_longest_payload_fits_beside_a_wdek_of_the_usual_size() {
    let payload = vec![1; MAX_PAYLOAD];
    let (dek, iv) = (dek(), [0; 16]);
    let wdek = [b'w'; 512];
    let input = Seal { dek: &dek, kp_version: 1, wdek: &wdek, len_bytes: 4, iv, payload: &payload };
    assert_eq!(open(&seal(&input).unwrap()).unwrap(), payload);
}

#[test]
fn every_changed_field_is_not_authentic() {
    let text = sealed(4, &[3; 32]);
    let changes: [fn(&mut Secret); 3] = [
        |secret| secret.kp_version = 2,
        |secret| secret.wrapped_dek.push(b'='),
        |secret| {
            let mut cipher = STANDARD.decode(&secret.cipher).unwrap();
            cipher[5] ^= 1; // the IV: changes the length prefix and nothing else
            secret.cipher = STANDARD.encode(cipher);
        },
    ];
    for change in changes {
        assert_eq!(open(&rewritten(&text, change)), Err(OpenError::NotAuthentic));
    }
    let other = Dek::from_bytes([8; 32]);
    let envelope = Envelope::decode(&text).unwrap();
    assert_eq!(envelope.open(&other, 4, false).unwrap_err(), OpenError::NotAuthentic);
    assert_eq!(envelope.open(&dek(), 0, false).unwrap_err(), OpenError::LenBytes(0));
}

#[test]
fn every_single_bit_flip_is_refused() {
    let text = sealed(4, &[3; 32]);
    for bit in 0..text.len() * 8 {
        let mut changed = text.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let opened = Envelope::decode(&changed)
            .is_ok_and(|envelope| envelope.open(&dek(), 4, false).is_ok());
        assert!(!opened, "bit {bit}");
    }
}

#[test]
fn every_single_bit_flip_beneath_the_base64_is_refused() {
    let stream = STANDARD.decode(sealed(4, &[3; 32])).unwrap();
    for bit in 0..stream.len() * 8 {
        let mut changed = stream.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let opened = Envelope::decode(STANDARD.encode(changed).as_bytes())
            .is_ok_and(|envelope| envelope.open(&dek(), 4, false).is_ok());
        assert!(!opened, "bit {bit}");
    }
}

#[test]
fn every_truncation_is_refused() {
    let text = sealed(4, &[3; 32]);
    for end in 0..text.len() {
        assert!(Envelope::decode(&text[..end]).is_err(), "{end} bytes");
    }
    // Whole blocks off the end of the encrypted part, well encoded.
    let shorter = rewritten(&text, |secret| {
        let cipher = STANDARD.decode(&secret.cipher).unwrap();
        secret.cipher = STANDARD.encode(&cipher[..48]);
    });
    assert_eq!(open(&shorter), Err(OpenError::NotAuthentic));
}

#[test]
fn values_of_others_open_only_when_asked_for_and_in_either_byte_order() {
    let payload = [3; 32];
    for prefix in [[0, 0, 0, 32], [32, 0, 0, 0]] {
        let envelope = foreign(&prefix, &payload, &[0; 12]);
        assert_eq!(envelope.open(&dek(), 4, false).unwrap_err(), OpenError::NotAuthentic);
        let opened = envelope.open(&dek(), 4, true).unwrap();
        assert_eq!(opened.payload.as_slice(), payload);
        assert!(!opened.authenticated);
    }
}

#[test]
fn values_of_others_with_a_senseless_length_do_not_open() {
    for prefix in [[0, 0, 0, 45], [0, 0, 0, 27], [0xff; 4], [0, 1, 0, 0]] {
        let envelope = foreign(&prefix, &[3; 32], &[0; 12]);
        assert_eq!(envelope.open(&dek(), 4, true).unwrap_err(), OpenError::NotAuthentic);
    }
}

#[test]
fn bytes_of_another_form_are_named() {
    let text = sealed(4, &[3; 32]);
    let cases = [
        (b"\x02\x08\x01".to_vec(), FormatError::Base64),
        (vec![b'A'; MAX_V1_CIPHER + 1], FormatError::TooLong { len: 65_536, max: 65_535 }),
        (rewritten(&text, |secret| secret.wrapped_dek.clear()), FormatError::NoWdek),
        (rewritten(&text, |secret| secret.cipher.clear()), FormatError::Blocks),
        (rewritten(&text, |secret| secret.cipher = STANDARD.encode([0; 16])), FormatError::Blocks),
        (rewritten(&text, |secret| secret.cipher = STANDARD.encode([0; 33])), FormatError::Blocks),
    ];
    for (text, error) in cases {
        assert_eq!(Envelope::decode(&text).unwrap_err(), error);
    }
    assert!(matches!(Envelope::decode(b"AAAA").unwrap_err(), FormatError::Gob(_)));
}

proptest! {
    #[test]
    fn what_is_sealed_opens(
        dek: [u8; 32], iv: [u8; 16], kp_version: i64, len_bytes in LEN_BYTES,
        wdek in proptest::collection::vec(any::<u8>(), 1..400),
        payload in proptest::collection::vec(any::<u8>(), 0..255),
    ) {
        let dek = Dek::from_bytes(dek);
        let input =
            Seal { dek: &dek, kp_version, wdek: &wdek, len_bytes, iv, payload: &payload };
        let envelope = Envelope::decode(&seal(&input).unwrap()).unwrap();
        prop_assert_eq!(envelope.kp_version(), kp_version);
        prop_assert_eq!(envelope.wdek(), wdek);
        let opened = envelope.open(&dek, len_bytes, false).unwrap();
        prop_assert!(opened.authenticated);
        prop_assert_eq!(opened.payload.as_slice(), payload);
    }

    #[test]
    fn arbitrary_text_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Envelope::decode(&bytes);
        let _ = Envelope::decode(STANDARD.encode(&bytes).as_bytes());
    }

    #[test]
    fn arbitrary_blocks_never_panic_nor_prove_themselves(
        iv: [u8; 16], blocks in 1..8_usize, seed: [u8; 16], len_bytes: u8, accept: bool,
    ) {
        let wdek = WDEK.to_vec();
        let blocks = seed.repeat(blocks);
        let wdek_sha256 = sha256(&wdek);
        let envelope =
            Envelope { kp_version: 1, wdek, wdek_sha256, iv, blocks, canonical: true };
        let opened = envelope.open(&dek(), len_bytes, accept);
        prop_assert!(!opened.is_ok_and(|opened| opened.authenticated));
    }
}
