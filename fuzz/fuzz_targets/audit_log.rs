//! Any bytes as an audit log: each line is judged, what is taken for a record reads the same once it is written again,
//! and no anchor that nobody signed is believed.
#![no_main]

use kms_core::audit::anchor::{Anchor, PublicKey};
use kms_core::audit::verify::Verifier;
use kms_core::audit::{Content, Hash, Link, parse};
use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;

/// A modulus that nobody has factors of.
static KEY: OnceLock<[PublicKey; 1]> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let keys = KEY.get_or_init(|| {
        [PublicKey::from_parts(&[0xd5; 256], &[1, 0, 1]).expect("an odd number of 2048 bits")]
    });
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = PublicKey::parse_pem(text);
        let _ = Hash::parse(text);
    }
    let witness = data.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let witness = Anchor::parse_line(witness).ok().map(Anchor::into_owned);
    let mut verifier = Verifier::new(keys, witness);
    let mut found = Vec::new();
    for line in data.split(|byte| *byte == b'\n') {
        let before = found.len();
        verifier.line(line, &mut found);
        let Ok(read) = parse(line) else {
            assert!(found.len() > before, "what is no record is told");
            continue;
        };
        let link = Link { seq: read.seq - 1, hash: read.prev };
        let (again, next) = link.extend(&read.content).expect("it was short enough to be read");
        let again = &again[..again.len() - 1];
        assert_eq!(link.follow(again), Ok(next));
        assert_eq!(parse(again).expect("what was written is read").content, read.content);
        if let Content::Anchor(anchor) = &read.content {
            assert_eq!(again, line, "an anchor has one form");
            assert!(!anchor.is_signed_by(&keys[0]));
        }
    }
    let (summary, _) = verifier.finish();
    assert_eq!(summary.anchored, 0, "nobody signed anything");
});
