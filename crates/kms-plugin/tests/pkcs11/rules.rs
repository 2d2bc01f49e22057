//! The provider over a vault in memory: which version wraps, which ones are read, and what becomes of held DEKs when
//! the HSM says no, says nothing, or has lost a key.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use kms_core::clock::ManualClock;
use kms_core::secret::{SecretBytes, SecretText};
use kms_core::wdek::{Wdek, WdekVersion};
use kms_hsm::memory::{Fault, MemoryVault};
use kms_hsm::pkcs11::Pin;
use kms_hsm::{Vault, VaultError};
use kms_plugin::dek_cache::CrkName;
use kms_plugin::keys::{Crk, InstallError, Keys, NotAdopted, Policy, Ring};
use kms_plugin::metrics::Metrics;
use kms_plugin::probe::probe;
use kms_plugin::provider::guard::{Guard, Patience, Tools};
use kms_plugin::provider::pkcs11::{Hsm, Pkcs11Crk};
use kms_plugin::provider::{Error, KeyService};
use kms_plugin::random::Random;
use kms_plugin::sealer::{Call, Refusal, Sealed, Sealer, SealerError};
use uuid::Uuid;

use crate::policy::{HOUR, policy};

const A: Uuid = Uuid::from_u128(0xa);
const B: Uuid = Uuid::from_u128(0xb);
/// Not in the HSM.
const C: Uuid = Uuid::from_u128(0xc);

/// An HSM that holds the versions A and B.
struct World {
    vault: Arc<MemoryVault>,
    hsm: Arc<Hsm>,
    clock: Arc<ManualClock>,
    policy: Policy,
}

impl World {
    async fn new() -> World {
        let vault = Arc::new(MemoryVault::new());
        vault.create_version(A).await.unwrap();
        vault.create_version(B).await.unwrap();
        let hsm = {
            let vault = vault.clone();
            Arc::new(Hsm::new(pin(), move || Ok(vault.clone() as Arc<dyn Vault>)))
        };
        World { vault, hsm, clock: Arc::new(ManualClock::new()), policy: policy() }
    }

    fn service(&self, crk: &str, version: Option<Uuid>) -> Pkcs11Crk {
        Pkcs11Crk::new(self.hsm.clone(), "instance".into(), crk.into(), version)
    }

    fn ring(&self, version: Uuid) -> Ring {
        self.ring_of_entry(1, version)
    }

    /// The other entries have the same CRK.
    fn ring_of_entry(&self, kp_version: i64, version: Uuid) -> Ring {
        let entry = |kp_version, version| {
            let name = CrkName { instance: "instance".into(), crk: "crk".into() };
            let patience = Patience { max_retries: 0, timeout: None };
            let service = Arc::new(self.service("crk", version));
            let service = Guard::new(service, patience, self.tools());
            Arc::new(Crk { name, kp_version, service })
        };
        let others = (1..=4).filter(|other| *other != kp_version);
        let previous = others.map(|kp_version| entry(kp_version, None)).collect();
        Ring { current: entry(kp_version, Some(version)), previous }
    }

    fn tools(&self) -> Tools {
        let metrics = Metrics::unregistered();
        Tools { clock: self.clock.clone(), random: Random::system(), metrics }
    }

    /// A plug-in that wraps with A.
    async fn started(&self) -> Sealer {
        let sealer = Sealer::new(self.ring(A), self.policy, self.tools());
        assert!(probe(&sealer).await);
        sealer
    }

    fn fail(&self, error: VaultError) {
        self.vault.set_fault(Some(Fault::Fail(error)));
    }
}

fn call() -> Call {
    Call { uid: "uid".into(), trace: None, deadline: Duration::from_secs(3) }
}

async fn seal(sealer: &Sealer) -> Result<Sealed, SealerError> {
    sealer.encrypt_v2(SecretBytes::new(b"payload".to_vec()), call()).await
}

async fn open(sealer: &Sealer, sealed: &Sealed) -> Result<Vec<u8>, SealerError> {
    let key_id = sealed.key_id.as_str();
    sealer.decrypt_v2(&sealed.ciphertext, key_id, call()).await.map(SecretBytes::into_vec)
}

fn reported(sealer: &Sealer) -> Uuid {
    sealer.status().unwrap().key_id.version().parse().unwrap()
}

fn away() -> VaultError {
    VaultError::Unavailable { cause: "CKR_DEVICE_REMOVED".into() }
}

#[tokio::test]
async fn a_wdek_is_the_key_service_s_and_names_its_version() {
    let world = World::new().await;
    let (crk, other) = (world.service("crk", Some(A)), world.service("other", Some(A)));
    let new = crk.wrap_new(&call()).await.unwrap();
    let wdek = Wdek::decode(std::str::from_utf8(&new.wdek).unwrap()).unwrap();
    assert_eq!((wdek.version, wdek.handle), (WdekVersion::V2_1_0, Some(A)));
    assert_eq!(new.version, A.to_string());
    let again = crk.unwrap(&new.wdek, &call()).await.unwrap();
    assert_eq!(again.dek.as_bytes(), new.dek.as_bytes());
    assert_eq!(again.active_version, None);
    let error = other.unwrap(&new.wdek, &call()).await.unwrap_err();
    assert_eq!(error, Error::NotAuthentic, "it is bound to its CRK");

    let newer = world.service("crk", Some(B));
    let old = newer.unwrap(&new.wdek, &call()).await.unwrap();
    assert_eq!(old.active_version, Some(B.to_string()));
    let only_opens = world.service("crk", None);
    assert!(only_opens.unwrap(&new.wdek, &call()).await.is_ok());
    assert!(only_opens.wrap_new(&call()).await.is_err());
}

#[tokio::test]
async fn whatever_this_token_did_not_wrap_is_not_authentic() {
    let world = World::new().await;
    let crk = world.service("crk", Some(A));
    let new = crk.wrap_new(&call()).await.unwrap();
    let wdek = Wdek::decode(std::str::from_utf8(&new.wdek).unwrap()).unwrap();
    let mut forged = wdek.clone();
    forged.hash[0] ^= 1;
    let other_version = Wdek { handle: Some(B), ..wdek.clone() };
    let no_version = Wdek { version: WdekVersion::V2_0_0, handle: None, ..wdek };
    let texts = [forged, other_version, no_version].map(|wdek| wdek.encode().into_bytes());
    for text in texts.iter().map(Vec::as_slice).chain([&b""[..], b"?", &[0xff]]) {
        let error = crk.unwrap(text, &call()).await.unwrap_err();
        assert_eq!(error, Error::NotAuthentic, "{}", String::from_utf8_lossy(text));
    }
}

#[tokio::test]
async fn every_answer_of_the_hsm_says_what_becomes_of_the_deks() {
    let world = World::new().await;
    let crk = world.service("crk", Some(A));
    let new = crk.wrap_new(&call()).await.unwrap();
    // (held DEKs go, the HSM counts as away, the metrics' word)
    for (error, expected) in [
        (away(), (false, true, "unreachable")),
        (VaultError::TimedOut, (false, true, "timed_out")),
        (VaultError::Busy, (false, true, "overloaded")),
        (VaultError::Capacity("full".into()), (false, true, "unusable")),
        (VaultError::Policy("no".into()), (false, true, "unusable")),
        (VaultError::Credential("CKR_PIN_LOCKED".into()), (false, true, "unusable")),
    ] {
        world.fail(error.clone());
        for failed in [
            crk.wrap_new(&call()).await.unwrap_err(),
            crk.unwrap(&new.wdek, &call()).await.unwrap_err(),
        ] {
            let kinds = (failed.withdrawn().is_some(), failed.is_outage(), failed.outcome());
            assert_eq!(kinds, expected, "{error}");
        }
    }
}

/// Whoever is on call must not look for a service that there is not.
#[tokio::test(start_paused = true)]
async fn every_message_names_the_hsm_and_no_key_service() {
    let world = World::new().await;
    let sealer = Sealer::new(world.ring(A), world.policy, world.tools());
    let mut said = vec![sealer.status().unwrap_err().to_string()];
    for error in [away(), VaultError::TimedOut, VaultError::Busy, VaultError::NotFound] {
        world.fail(error);
        assert!(!probe(&sealer).await);
        said.push(sealer.status().unwrap_err().to_string());
        said.push(seal(&sealer).await.unwrap_err().to_string());
    }
    world.vault.set_fault(Some(Fault::Hang));
    said.push(seal(&sealer).await.unwrap_err().to_string());
    for text in said {
        assert!(text.contains("HSM") && !text.contains("key service"), "{text}");
    }
}

#[tokio::test]
async fn a_named_version_is_reported_after_it_has_wrapped_and_comes_back_under_another_entry_only()
{
    let world = World::new().await;
    let sealer = world.started().await;
    let mut before = A;
    let mut all = vec![seal(&sealer).await.unwrap()];
    for (kp_version, named) in [(1, B), (3, A), (4, B)] {
        let ring = world.ring_of_entry(kp_version, named);
        sealer.install(ring, world.policy).unwrap();
        assert_eq!(reported(&sealer), before, "not before it has wrapped");
        assert!(probe(&sealer).await);
        assert_eq!(reported(&sealer), named);
        let sealed = seal(&sealer).await.unwrap();
        assert_eq!(sealed.key_id, sealer.status().unwrap().key_id);
        assert!(all.iter().all(|old| old.key_id != sealed.key_id), "{}", sealed.key_id);
        all.push(sealed);
        before = named;
        let back = sealer.install(world.ring(A), world.policy);
        assert!(matches!(back, Err(InstallError::UsedBefore { kp_version: 1, .. })), "{back:?}");
    }
    let restarted = Sealer::new(world.ring_of_entry(4, B), world.policy, world.tools());
    for sealed in &all {
        assert_eq!(open(&restarted, sealed).await.unwrap(), b"payload");
    }
}

#[tokio::test]
async fn an_answer_of_a_version_that_is_named_no_longer_is_not_reported() {
    let world = World::new().await;
    let mut keys = Keys::new(world.ring(A), world.policy);
    let asked = keys.to_probe();
    let new = asked.crk.service.wrap_new(&call()).await.unwrap();
    keys.install(world.ring(B), world.policy, Duration::ZERO).unwrap();
    let late = keys.adopt(&asked, &new, Duration::ZERO);
    assert!(matches!(late, Err(NotAdopted::Stale)), "{late:?}");
    let asked = keys.to_probe();
    let new = asked.crk.service.wrap_new(&call()).await.unwrap();
    assert!(keys.adopt(&asked, &new, Duration::ZERO).unwrap().changed);
}

#[tokio::test]
async fn a_version_that_the_token_lacks_stops_nothing_for_as_long_as_a_dek_may_live() {
    for new_dek in [false, true] {
        let mut world = World::new().await;
        world.policy.new_dek = new_dek;
        let sealer = world.started().await;
        let old = seal(&sealer).await.unwrap();
        sealer.install(world.ring(C), world.policy).unwrap();
        assert!(!probe(&sealer).await);
        let cause = sealer.ready().unwrap_err();
        assert_eq!(cause.to_string(), format!("the HSM holds no CRK version {C}"));
        for _ in 0..167 {
            world.clock.advance(HOUR);
            probe(&sealer).await;
        }
        let sealed = seal(&sealer).await.unwrap();
        assert_eq!(sealed.key_id, old.key_id);
        assert_eq!(sealer.status().unwrap().key_id, old.key_id);
        world.clock.advance(HOUR);
        probe(&sealer).await;
        assert_eq!(sealer.status().unwrap_err(), cause);
        assert_eq!(seal(&sealer).await.unwrap_err(), cause);
        assert_eq!(open(&sealer, &old).await.unwrap(), b"payload");

        world.vault.create_version(C).await.unwrap();
        assert!(probe(&sealer).await);
        assert_eq!(reported(&sealer), C);
        assert_eq!(open(&sealer, &sealed).await.unwrap(), b"payload");
    }
}

#[tokio::test]
async fn a_version_that_is_lost_while_in_use_is_withdrawn_at_once() {
    let world = World::new().await;
    let sealer = world.started().await;
    let sealed = seal(&sealer).await.unwrap();
    world.vault.lose_version(A);
    assert!(!probe(&sealer).await);
    let text = format!("the HSM no longer holds CRK version {A}");
    let gone = SealerError::Refused { refusal: Refusal::NoSuchKey, text };
    assert_eq!(seal(&sealer).await.unwrap_err(), gone);
    assert_eq!(open(&sealer, &sealed).await.unwrap_err(), gone);
    assert_eq!(sealer.status().unwrap_err(), gone);
}

#[tokio::test]
async fn a_value_that_names_a_lost_version_withdraws_nothing() {
    let world = World::new().await;
    let sealer = world.started().await;
    let old = seal(&sealer).await.unwrap();
    let sealer = Sealer::new(world.ring(B), world.policy, world.tools());
    assert!(probe(&sealer).await);
    world.vault.lose_version(A);
    let text = format!("the HSM holds no CRK version {A}");
    let lost = SealerError::Refused { refusal: Refusal::Request, text };
    assert_eq!(open(&sealer, &old).await.unwrap_err(), lost);
    world.fail(away());
    assert_eq!(seal(&sealer).await.unwrap().key_id.version(), B.to_string(), "from memory");
}

#[tokio::test]
async fn an_outage_lets_deks_live_until_they_expire_and_its_end_needs_no_restart() {
    let world = World::new().await;
    let sealer = world.started().await;
    let sealed = seal(&sealer).await.unwrap();
    world.fail(away());
    assert!(!probe(&sealer).await);
    assert_eq!(open(&sealer, &sealed).await.unwrap(), b"payload");
    assert_eq!(sealer.status().unwrap().key_id, sealed.key_id);
    world.clock.advance(HOUR);
    probe(&sealer).await;
    let text = "Unavailable: the HSM is not available: CKR_DEVICE_REMOVED";
    let unavailable = SealerError::Unavailable { text: text.into() };
    assert_eq!(seal(&sealer).await.unwrap_err(), unavailable);
    assert_eq!(open(&sealer, &sealed).await.unwrap_err(), unavailable);
    assert_eq!(sealer.status().unwrap_err(), unavailable);
    world.vault.set_fault(None);
    world.clock.advance(Duration::from_secs(6));
    assert!(probe(&sealer).await);
    assert_eq!(open(&sealer, &sealed).await.unwrap(), b"payload");
}

fn pin() -> Pin {
    Pin::new(SecretText::new("1234".into()))
}

/// Counts how often it is opened.
fn counted(
    answer: impl Fn(usize) -> Result<Arc<dyn Vault>, VaultError> + Send + Sync + 'static,
) -> (Hsm, Arc<AtomicUsize>) {
    let opened = Arc::new(AtomicUsize::new(0));
    let hsm = {
        let opened = opened.clone();
        Hsm::new(pin(), move || answer(opened.fetch_add(1, Ordering::Relaxed)))
    };
    (hsm, opened)
}

fn vault() -> Arc<dyn Vault> {
    Arc::new(MemoryVault::new())
}

#[tokio::test]
async fn a_library_that_is_not_there_yet_is_loaded_when_it_is() {
    let missing = || VaultError::Unavailable { cause: "/opt/secret/path.so: no such file".into() };
    let (hsm, opened) =
        counted(move |attempt| if attempt == 0 { Err(missing()) } else { Ok(vault()) });
    let error = hsm.vault().await.unwrap_err();
    assert!(!error.to_string().contains("/opt"), "no path: {error}");
    while hsm.vault().await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(opened.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_caller_who_leaves_does_not_lead_to_a_second_login() {
    let (go, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let (hsm, opened) = counted(move |_| {
        wait.lock().unwrap().recv().unwrap();
        Ok(vault())
    });
    let first = tokio::time::timeout(Duration::from_millis(1), hsm.vault()).await;
    assert!(first.is_err(), "it is not open yet");
    go.send(()).unwrap();
    assert!(hsm.vault().await.is_ok());
    assert_eq!(opened.load(Ordering::Relaxed), 1);
}
