//! A secret, and every form in which it could get out.

use base64::Engine;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::general_purpose::{GeneralPurpose, NO_PAD};

pub(crate) struct Canary {
    name: &'static str,
    forms: Vec<Vec<u8>>,
}

impl Canary {
    pub(crate) fn new(name: &'static str, secret: &[u8]) -> Canary {
        assert!(secret.len() >= 12, "{name} is too short: what looks like it would be found");
        let hex = |digits: &dyn Fn(&u8) -> String| secret.iter().map(digits).collect::<String>();
        // As `{:?}` shows bytes.
        let list = format!("{secret:?}");
        let mut forms = vec![
            secret.to_vec(),
            hex(&|byte| format!("{byte:02x}")).into_bytes(),
            hex(&|byte| format!("{byte:02X}")).into_bytes(),
            list.trim_matches(['[', ']']).as_bytes().to_vec(),
        ];
        for alphabet in [STANDARD, URL_SAFE] {
            let engine = GeneralPurpose::new(&alphabet, NO_PAD);
            forms.extend((0..3).map(|before| inside_base64(&engine, secret, before)));
        }
        Canary { name, forms }
    }

    /// What an answer shows in base64: known by its text and by its bytes.
    pub(crate) fn encoded(name: &'static str, text: &str) -> Canary {
        // What is no base64 is too short below.
        let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap_or_default();
        let mut canary = Canary::new(name, &bytes);
        canary.forms.extend(Canary::new(name, text.as_bytes()).forms);
        canary
    }

    pub(crate) fn is_in(&self, bytes: &[u8]) -> bool {
        let text = String::from_utf8_lossy(bytes);
        self.forms.iter().any(|form| match std::str::from_utf8(form) {
            // The search in text is the fast one.
            Ok(form) => text.contains(form),
            Err(_) => bytes.windows(form.len()).any(|window| window == form),
        })
    }
}

/// What the base64 of something that holds `secret`, `before` bytes behind a multiple of three, shows of it.
fn inside_base64(engine: &GeneralPurpose, secret: &[u8], before: usize) -> Vec<u8> {
    let text = engine.encode([&[0; 3][..before], secret].concat());
    // The letters at both ends hold bits of the neighbours as well.
    let first = (before * 8).div_ceil(6);
    let last = (before + secret.len()) * 8 / 6;
    text.as_bytes()[first..last].to_vec()
}

/// # Panics
/// When one of them is there, with its name.
pub(crate) fn assert_clean(canaries: &[Canary], place: &str, bytes: &[u8]) {
    for canary in canaries {
        assert!(!canary.is_in(bytes), "{} is in {place}", canary.name);
    }
}

#[test]
fn a_canary_is_found_in_each_of_its_forms_and_nowhere_else() {
    let secret = b"a-secret-of-20-bytes";
    let canary = Canary::new("it", secret);
    let engine = base64::engine::general_purpose::STANDARD;
    for text in [
        "a-secret-of-20-bytes".to_owned(),
        "x 612d7365637265742d6f662d32302d6279746573".to_owned(),
        "612D7365637265742D6F662D32302D6279746573".to_owned(),
        format!("{:?}", [&secret[..], &[7]].concat()),
        engine.encode(secret),
        engine.encode([b"x", &secret[..]].concat()),
        engine.encode([b"xy", &secret[..], b"z"].concat()),
    ] {
        assert!(canary.is_in(text.as_bytes()), "{text}");
    }
    assert!(Canary::encoded("it", &engine.encode(secret)).is_in(secret));
    assert!(Canary::new("bytes", &[200; 12]).is_in(&[200; 13]));
    for text in ["a-secret-of-20-bytez", "612d7365637265742d6f662d32302d62797465"] {
        assert!(!canary.is_in(text.as_bytes()), "{text}");
    }
}
