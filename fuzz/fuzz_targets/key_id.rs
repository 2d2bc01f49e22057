//! Any key_id that kube-apiserver may hand back: refused, or kept exactly as it is.
#![no_main]

use kms_core::key_id::KeyId;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(id) = KeyId::parse(text) {
        assert_eq!(id.as_str(), text);
        let made = KeyId::of_entry(id.instance(), id.crk(), id.version(), id.kp_version());
        assert_eq!(made, Ok(id));
    }
});
