//! Any file an operator may give to `kmsctl inspect`: recognised or refused, never a panic.
#![no_main]

use kms_core::etcd::prefix::classify;
use kmsctl::source::input::recognise;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(stored) = recognise(data) {
        let _ = classify(&stored.value);
    }
});
