//! Any stored value: told apart and taken apart without a panic.
#![no_main]

use kms_core::etcd::object::{V1Body, V2Object};
use kms_core::etcd::prefix::{StoredValue, classify};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = V2Object::decode(data);
    let _ = V1Body::decode(data);
    match classify(data) {
        Ok(StoredValue::KmsV1 { provider, body }) => {
            let _ = V1Body::decode(body);
            assert!(!provider.is_empty());
        }
        Ok(StoredValue::KmsV2 { provider, body }) => {
            let _ = V2Object::decode(body);
            assert!(!provider.contains(':'));
        }
        _ => {}
    }
});
