//! Any KMS v1 cipher, whole and as the inside of a well-formed one: nothing proves itself authentic.
#![no_main]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_core::cipher::gob::{Secret, encode};
use kms_core::cipher::v1::Envelope;
use kms_core::secret::Dek;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let inside = Secret { kp_version: 1, wrapped_dek: vec![b'w'], cipher: STANDARD.encode(data) };
    for text in [data, STANDARD.encode(encode(&inside)).as_bytes()] {
        let Ok(envelope) = Envelope::decode(text) else { continue };
        let dek = Dek::from_bytes([7; 32]);
        assert!(envelope.open(&dek, 4, false).is_err());
        for len_bytes in 0..=9 {
            let opened = envelope.open(&dek, len_bytes, true);
            assert!(!opened.is_ok_and(|opened| opened.authenticated));
        }
    }
});
