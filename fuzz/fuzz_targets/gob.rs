//! Any stream: read without a panic, and what was read survives being written again.
#![no_main]

use kms_core::cipher::gob::{decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(secret) = decode(data) {
        assert_eq!(decode(&encode(&secret)), Ok(secret));
    }
});
