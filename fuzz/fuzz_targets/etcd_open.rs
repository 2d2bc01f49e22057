//! Any body under any key: an object or an error, never a panic; and without the key never an authentic object.
#![no_main]

use kms_core::etcd::object::{V1Body, V2Object};
use kms_core::etcd::open;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&[u8], &[u8], &[u8])| {
    let (body, key, etcd_key) = input;
    let _ = open::aescbc(body, key);
    let _ = open::secretbox(body, key);
    let _ = open::aesgcm(body, key, etcd_key);
    if let Ok(body) = V1Body::decode(body) {
        let _ = open::kms_v1(&body, key, etcd_key);
    }
    if let Ok(object) = V2Object::decode(body) {
        let _ = open::kms_v2(&object, key, etcd_key);
    }
});
