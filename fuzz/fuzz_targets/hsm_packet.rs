//! Any packet between the service and the process of the HSM's library: what is read is written as it was.
#![no_main]

use kms_hsm::process::wire::{FromWorker, ToWorker};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(message) = ToWorker::decode(data) {
        assert_eq!(message.encode().as_slice(), data);
    }
    if let Ok(message) = FromWorker::decode(data) {
        assert_eq!(message.encode().as_slice(), data);
    }
});
