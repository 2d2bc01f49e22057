//! What the key service or the token service may answer with an error status: a bounded text, never a panic.
#![no_main]

use http::StatusCode;
use kms_api::client::Error;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|answer: (u16, &[u8])| {
    let (status, body) = answer;
    let status = StatusCode::from_u16(400 + status % 200).unwrap_or(StatusCode::BAD_GATEWAY);
    for error in [
        Error::from_key_service("key service", status, body),
        Error::from_token_service("token service", status, body),
    ] {
        assert!(error.to_string().len() < 2048);
        assert!(!(error.is_refusal() && error.is_outage()));
    }
});
