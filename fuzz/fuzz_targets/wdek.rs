//! Any wrapped DEK, as text and as the JSON beneath: what is read survives being written again.
#![no_main]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_core::wdek::{Look, Wdek};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for text in [String::from_utf8_lossy(data).as_ref(), &STANDARD.encode(data)] {
        if let Ok(wdek) = Wdek::decode(text) {
            assert!(Look::of(text).is_ok());
            assert_eq!(Wdek::decode(&wdek.encode()), Ok(wdek));
        }
    }
});
