//! Every return code of PKCS#11 at every call that the vault makes: the answer is the one of the code's class, the
//! vault serves on, and nothing is left half-made.

use crate::cases::pattern;
use crate::shim::{Shim, long_run};
use crate::token::{TestToken, eventually};
use kms_core::secret::SecretBytes;
use kms_hsm::pkcs11::Pkcs11Vault;
use kms_hsm::{Vault, VaultError, Wrapped};
use pkcs11_shim::{CODES, Function};
use uuid::Uuid;

/// What the caller sees of a code that is returned once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// His input is refused.
    Data,
    /// Nothing: the vault has repaired what was lost, and has tried again.
    Repaired,
    /// The token is full.
    Capacity,
    /// The PIN, which only a login can be refused for.
    Credential,
    /// The token does not do this.
    Refused,
}

/// The classes of the codes, from the experience of brokers in production.
fn class(code: &str) -> Class {
    match code {
        "CKR_DATA_INVALID" | "CKR_DATA_LEN_RANGE" | "CKR_ENCRYPTED_DATA_INVALID"
        | "CKR_ENCRYPTED_DATA_LEN_RANGE" | "CKR_AEAD_DECRYPT_FAILED" | "CKR_SIGNATURE_INVALID"
        | "CKR_SIGNATURE_LEN_RANGE" | "CKR_WRAPPED_KEY_INVALID" | "CKR_WRAPPED_KEY_LEN_RANGE"
        // Ambiguous ones, here beside a canary that sings.
        | "CKR_GENERAL_ERROR" | "CKR_FUNCTION_FAILED" | "CKR_VENDOR_DEFINED" => Class::Data,

        "CKR_OBJECT_HANDLE_INVALID" | "CKR_KEY_HANDLE_INVALID"
        | "CKR_UNWRAPPING_KEY_HANDLE_INVALID" | "CKR_WRAPPING_KEY_HANDLE_INVALID"
        | "CKR_SESSION_HANDLE_INVALID" | "CKR_SESSION_CLOSED" | "CKR_USER_NOT_LOGGED_IN"
        | "CKR_OPERATION_ACTIVE" | "CKR_OPERATION_NOT_INITIALIZED" | "CKR_CANCEL"
        | "CKR_FUNCTION_CANCELED" | "CKR_OPERATION_CANCEL_FAILED" | "CKR_PENDING"
        | "CKR_DEVICE_ERROR" | "CKR_DEVICE_REMOVED" | "CKR_TOKEN_NOT_PRESENT"
        | "CKR_TOKEN_NOT_RECOGNIZED" | "CKR_TOKEN_NOT_INITIALIZED" | "CKR_SLOT_ID_INVALID"
        | "CKR_CRYPTOKI_NOT_INITIALIZED" | "CKR_MUTEX_BAD" | "CKR_MUTEX_NOT_LOCKED"
        | "CKR_FIPS_SELF_TEST_FAILED" | "CKR_LIBRARY_LOAD_FAILED" => Class::Repaired,

        "CKR_SESSION_COUNT" | "CKR_DEVICE_MEMORY" | "CKR_HOST_MEMORY"
        | "CKR_TOKEN_RESOURCE_EXCEEDED" => Class::Capacity,

        "CKR_PIN_INCORRECT" | "CKR_PIN_INVALID" | "CKR_PIN_LEN_RANGE" | "CKR_PIN_EXPIRED"
        | "CKR_PIN_LOCKED" | "CKR_PIN_TOO_WEAK" | "CKR_NEW_PIN_MODE" | "CKR_NEXT_OTP"
        | "CKR_USER_PIN_NOT_INITIALIZED" => Class::Credential,

        _ => Class::Refused,
    }
}

/// One code of each class, where the whole table would take minutes.
const ONE_OF_EACH: [&str; 9] = [
    "CKR_ENCRYPTED_DATA_INVALID",
    "CKR_GENERAL_ERROR",
    "CKR_OBJECT_HANDLE_INVALID",
    "CKR_SESSION_HANDLE_INVALID",
    "CKR_DEVICE_ERROR",
    "CKR_DEVICE_MEMORY",
    "CKR_TOKEN_NOT_PRESENT",
    "CKR_PIN_EXPIRED",
    "CKR_FUNCTION_NOT_SUPPORTED",
];

/// A verb, and what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Wrap,
    /// With a session that has no random bytes yet.
    FirstWrap,
    Unwrap,
    Random,
    Sign,
    Probe,
    Versions,
    Find,
    Create,
    Destroy,
    Import,
    MakeSigningKey,
}

/// What the verbs work on.
struct Scene {
    shim: Shim,
    vault: Pkcs11Vault,
    id: Uuid,
    signing: Uuid,
    wrapped: Wrapped,
}

pub(crate) async fn every_code_at_every_call_of_a_use(token: TestToken) {
    let scene = Scene::set(&token).await;
    let mut cases = 0;
    for verb in [
        Verb::Wrap,
        Verb::FirstWrap,
        Verb::Unwrap,
        Verb::Random,
        Verb::Sign,
        Verb::Probe,
        Verb::Find,
    ] {
        cases += scene.every_call(verb, &names()).await;
    }
    assert!(cases >= 104 * 20, "only {cases} cases");
    scene.is_unharmed().await;
}

pub(crate) async fn every_code_at_every_call_of_a_listing(token: TestToken) {
    let scene = Scene::set(&token).await;
    let cases = scene.every_call(Verb::Versions, &names()).await;
    assert!(cases >= 104 * 5, "only {cases} cases");
    scene.is_unharmed().await;
}

pub(crate) async fn every_class_at_every_call_of_a_change(token: TestToken) {
    let scene = Scene::set(&token).await;
    let codes = if long_run() { names() } else { ONE_OF_EACH.to_vec() };
    let fewer = if long_run() { names() } else { ONE_OF_EACH[3..6].to_vec() };
    let mut cases = 0;
    for (verb, codes) in [
        (Verb::Create, &codes),
        (Verb::Destroy, &codes),
        (Verb::Import, &fewer),
        (Verb::MakeSigningKey, &fewer),
    ] {
        cases += scene.every_call(verb, codes).await;
    }
    assert!(cases >= 200, "only {cases} cases");
    scene.is_unharmed().await;
}

fn names() -> Vec<&'static str> {
    CODES.iter().map(|(name, _)| *name).collect()
}

impl Scene {
    async fn set(token: &TestToken) -> Self {
        let shim = Shim::before(token);
        let vault = shim.open();
        let (id, signing) = (Uuid::new_v4(), Uuid::new_v4());
        vault.create_version(id).await.unwrap();
        vault.make_signing_key(signing).await.unwrap();
        let wrapped = vault.wrap(id, b"c", pattern(32)).await.unwrap();
        vault.sign(signing, b"d").await.unwrap();
        Self { shim, vault, id, signing, wrapped }
    }

    /// Lets each of `codes` be returned once at each call that `verb` makes; returns how many cases that were.
    async fn every_call(&self, verb: Verb, codes: &[&str]) -> usize {
        let before = self.counts_of(verb).await;
        let mut cases = 0;
        // Making keys takes its time: the short run lets each function of a maker fail as it begins and once later.
        let most = match verb {
            _ if long_run() => u64::MAX,
            Verb::Import | Verb::MakeSigningKey => 1,
            Verb::Create | Verb::Destroy => 2,
            _ => u64::MAX,
        };
        for (function, calls) in before {
            for nth in 0..calls.min(most) {
                for code in codes {
                    self.one(verb, function, nth, code).await;
                    cases += 1;
                }
            }
        }
        cases
    }

    /// Which functions `verb` calls, and how often.
    async fn counts_of(&self, verb: Verb) -> Vec<(Function, u64)> {
        self.shim.order("");
        let id = self.prepare(verb).await;
        let before = self.shim.counts.all();
        assert_eq!(self.run(verb, id).await, Ok(()), "{verb:?} without faults");
        let mut called = self.shim.counts.since(&before);
        // A session fetches the random bytes of many wraps at once: whether this one does is a matter of luck, except
        // for the first.
        let fetches = |function| function == Function::C_GenerateRandom;
        match verb {
            Verb::Wrap => called.retain(|(function, _)| !fetches(*function)),
            Verb::FirstWrap => called.retain(|(function, _)| fetches(*function)),
            _ => {}
        }
        called
    }

    async fn one(&self, verb: Verb, function: Function, nth: u64, code: &str) {
        self.shim.order("");
        let id = self.prepare(verb).await;
        self.shim.order(&format!("fail {} {code} after={nth} times=1", function.name()));
        let answer = self.run(verb, id).await;
        let what = format!("{verb:?}: {code} at {} {nth}", function.name());
        assert!(fits(verb, function, code, &answer), "{what}: {answer:?}");
        self.shim.order("");
        if verb == Verb::Destroy && answer.is_err() {
            assert_eq!(self.vault.destroy_version(id).await, Ok(()), "{what}: not even later");
        }
        if verb == Verb::Create || verb == Verb::Import {
            assert_eq!(self.vault.incomplete().await, Ok(vec![]), "{what}: a part is left");
            let made = self.vault.versions().await.unwrap().contains(&id);
            assert_eq!(made, answer.is_ok(), "{what}: {answer:?}");
            // Listings take longer with every key.
            assert_eq!(self.vault.destroy_version(id).await.is_ok(), made, "{what}");
        }
    }

    async fn prepare(&self, verb: Verb) -> Uuid {
        match verb {
            Verb::Create | Verb::Import | Verb::MakeSigningKey => Uuid::new_v4(),
            Verb::Destroy => {
                let id = Uuid::new_v4();
                self.vault.create_version(id).await.unwrap();
                id
            }
            // A handle that was never used is found in the token first.
            Verb::Find => Uuid::new_v4(),
            Verb::Random | Verb::Versions => self.id,
            Verb::FirstWrap => {
                self.shim.order("sessions die");
                assert_eq!(self.vault.probe().await, Ok(()));
                self.shim.order("");
                self.id
            }
            Verb::Wrap | Verb::Unwrap | Verb::Sign | Verb::Probe => {
                let id = if verb == Verb::Sign { self.signing } else { self.id };
                // A repair before has dropped the handles.
                assert_eq!(self.run(verb, id).await, Ok(()));
                id
            }
        }
    }

    async fn run(&self, verb: Verb, id: Uuid) -> Result<(), VaultError> {
        let vault = &self.vault;
        match verb {
            Verb::Wrap | Verb::FirstWrap => vault.wrap(id, b"c", pattern(32)).await.map(|_| ()),
            Verb::Unwrap => vault.unwrap(id, b"c", self.wrapped.clone()).await.map(|dek| {
                assert_eq!(dek.as_slice(), pattern(32).as_slice());
            }),
            Verb::Random => vault.random(32).await.map(|_| ()),
            Verb::Sign => vault.sign(id, b"d").await.map(|_| ()),
            Verb::Probe => vault.probe().await,
            Verb::Versions => vault.versions().await.map(|_| ()),
            Verb::Find => match vault.wrap(id, b"c", pattern(32)).await {
                Err(VaultError::NotFound) => Ok(()),
                other => other.map(|_| ()),
            },
            Verb::Create => vault.create_version(id).await,
            Verb::Destroy => vault.destroy_version(id).await,
            Verb::Import => vault.import_version(id, SecretBytes::new(vec![7; 32])).await,
            Verb::MakeSigningKey => vault.make_signing_key(id).await.map(|_| ()),
        }
    }

    /// The key is there, and nothing else of what was tried is in pieces.
    async fn is_unharmed(&self) {
        self.shim.order("");
        assert_eq!(self.run(Verb::Unwrap, self.id).await, Ok(()));
        assert_eq!(self.vault.incomplete().await, Ok(vec![]));
        assert_eq!(self.shim.counts.open_sessions(), 3);
        assert!(self.shim.counts.most_sessions() <= 3);
    }
}

/// Whether `answer` is what a caller may hear when `code` was returned once by `function`.
fn fits(verb: Verb, function: Function, code: &str, answer: &Result<(), VaultError>) -> bool {
    let tolerated =
        ["CKR_BUFFER_TOO_SMALL", "CKR_ATTRIBUTE_SENSITIVE", "CKR_ATTRIBUTE_TYPE_INVALID"];
    if function == Function::C_GetAttributeValue && tolerated.contains(&code) {
        // They say that some value cannot be shown: a key is refused for that, a listing passes over the object.
        return matches!(answer, Ok(()) | Err(VaultError::Policy(_)));
    }
    if function == Function::C_FindObjectsFinal || verb == Verb::Probe {
        // A search that was answered is over whatever its end returns; a canary that fails is tried once more.
        return answer.is_ok();
    }
    match class(code) {
        Class::Repaired => answer.is_ok(),
        Class::Capacity => matches!(answer, Err(VaultError::Capacity(_))),
        // Of a login it would be final.
        Class::Credential => matches!(answer, Err(VaultError::Unavailable { .. })),
        Class::Refused => matches!(answer, Err(VaultError::Policy(_))),
        Class::Data => match verb {
            Verb::Unwrap => *answer == Err(VaultError::NotAuthentic),
            Verb::Create | Verb::Import | Verb::MakeSigningKey => {
                matches!(answer, Err(VaultError::Policy(_)))
            }
            _ => matches!(answer, Err(VaultError::BadInput(_))),
        },
    }
}

/// While the vault connects again, any failure is answered, and does not last.
pub(crate) async fn every_class_at_every_call_of_a_reconnection(token: TestToken) {
    let shim = Shim::before(&token);
    let mut vault = shim.open();
    let before = shim.counts.all();
    shim.order("sessions die");
    assert_eq!(vault.probe().await, Ok(()));
    let calls = shim.counts.since(&before);
    assert!(calls.iter().any(|(function, _)| *function == Function::C_Login), "{calls:?}");
    for (function, calls) in calls {
        for (nth, code) in (0..calls).flat_map(|nth| ONE_OF_EACH.map(|code| (nth, code))) {
            let what = format!("{code} at {} {nth}", function.name());
            let logins = shim.logins();
            shim.order(&format!(
                "sessions die\nfail {} {code} after={nth} times=1",
                function.name()
            ));
            let first = vault.probe().await;
            if function == Function::C_Login && class(code) == Class::Credential {
                assert!(matches!(first, Err(VaultError::Credential(_))), "{what}: {first:?}");
            }
            if matches!(first, Err(VaultError::Credential(_))) {
                assert_eq!(vault.probe().await, first, "{what}");
                assert!(shim.logins() <= logins + 1, "{what}: more than one login");
                drop(vault);
                shim.order("");
                vault = shim.open();
            }
            eventually(&what, async || vault.probe().await.is_ok()).await;
            assert!(shim.counts.most_sessions() <= 3, "{what}");
        }
    }
    drop(vault);
    assert_eq!(shim.counts.open_sessions(), 0);
}
