//! Any token: as text, and as claims and header under a genuine signature. Nothing is taken for a token but what names a
//! caller, was made for this service, and is of this time.
#![no_main]

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kms_core::clock::{Clock, ManualClock};
use kms_hsm::Vault;
use kms_hsm::memory::MemoryVault;
use kms_server::store::SigningKey;
use kms_server::token::Issuer;
use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};
use tokio::runtime::{Builder, Runtime};
use uuid::Uuid;

const URL: &str = "https://tokens.test/identity";
const KEY: Uuid = Uuid::from_u128(7);

struct Service {
    runtime: Runtime,
    vault: MemoryVault,
    issuer: Issuer,
}

static SERVICE: OnceLock<Service> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let service = SERVICE.get_or_init(service);
    if let Ok(text) = std::str::from_utf8(data) {
        assert!(service.issuer.verify(text).is_err(), "nobody signed it");
    }
    let header = format!(r#"{{"alg":"RS256","kid":"{}","typ":"JWT"}}"#, KEY.hyphenated());
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(data));
    let signature = service.runtime.block_on(service.vault.sign(KEY, signed.as_bytes()));
    let signature = URL_SAFE_NO_PAD.encode(signature.expect("a key in memory signs"));
    if service.issuer.verify(&format!("{signed}.{signature}")).is_ok() {
        let claims: serde_json::Value = serde_json::from_slice(data).expect("claims are JSON");
        assert_eq!(claims["iss"], URL);
    }
    assert!(service.issuer.verify(&format!("{signed}.{}", URL_SAFE_NO_PAD.encode(data))).is_err());
});

fn service() -> Service {
    let runtime = Builder::new_current_thread().build().expect("a runtime can be built");
    let vault = MemoryVault::new();
    let public = runtime.block_on(vault.make_signing_key(KEY)).expect("a key in memory");
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let clock: Arc<dyn Clock> = Arc::new(ManualClock::at(start));
    let key = SigningKey { id: KEY, public, created_at: start.into() };
    let issuer = Issuer::new(URL.into(), Duration::from_secs(3600), key, clock);
    Service { runtime, vault, issuer }
}
