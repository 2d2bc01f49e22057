//! Any key_id that kube-apiserver may hand back: refused, or kept exactly as it is.
#![no_main]

use kms_core::key_id::KeyId;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(id) = KeyId::parse(text) {
        assert_eq!(id.as_str(), text);
        assert_eq!(KeyId::new(id.instance(), id.crk(), id.version()), Ok(id));
    }
});
