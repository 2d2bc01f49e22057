//! Any KMS v2 ciphertext, with and without the format byte in front: nothing opens.
#![no_main]

use kms_core::cipher::v2::Envelope;
use kms_core::key_id::KeyId;
use kms_core::secret::Dek;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(key_id) = KeyId::new("instance", "crk", "version") else { return };
    for ciphertext in [data, &[&[2], data].concat()] {
        if let Ok(envelope) = Envelope::decode(ciphertext) {
            assert!(envelope.open(&Dek::from_bytes([7; 32]), &key_id).is_err());
        }
    }
});
