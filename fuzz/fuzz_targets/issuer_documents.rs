//! Any bytes as what another issuer writes: a discovery document, a key set, a token. Understood or refused, never a
//! panic; no key of a secret kind, and no address that is not HTTPS. The plug-in and the server find the same end in a token.
#![no_main]

use kms_api::token::expiry;
use kms_server::issuers::document::{Claims, Header, Keys, jwks_uri};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(uri) = jwks_uri(data, "https://issuer.test") {
        assert!(uri.starts_with("https://"));
    }
    if let Ok(keys) = Keys::parse(data) {
        for name in ["HS256", "HS384", "HS512", "none"] {
            assert!(!keys.find("k").is_some_and(|key| key.names(name)));
        }
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = Header::of(text);
    let end = expiry(text);
    if let Some(claims) = Claims::of(text) {
        let _ = claims.names_one_subject();
        assert!(end.is_none_or(|end| end == claims.exp));
    }
});
