//! Header blocks of whatever answers on a socket that `kmsctl conformance` judges: read or refused, never a panic.
#![no_main]

use kmsctl::hpack::{Said, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = read(data, &mut Said::default());
});
