//! What a vault says that it has counted is what the module in front of the token has seen, call by call.

use crate::cases::pattern;
use crate::isolated;
use crate::shim::Shim;
use crate::token::{TestToken, eventually};
use kms_core::secret::SecretBytes;
use kms_hsm::{Circuit, Vault, VaultError};
use pkcs11_shim::Function;
use std::collections::BTreeMap;
use uuid::Uuid;

type Counts = BTreeMap<String, u64>;

pub(crate) async fn every_call_is_counted(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = shim.open();
    // The making of the token, in this process, went past the module.
    let (said, seen) = (said(&vault).await, shim.counts.all());
    use_everything(&vault, &shim).await;
    let mut counted = self::said(&vault).await;
    for (function, before) in said {
        *counted.entry(function).or_default() -= before;
    }
    counted.retain(|_, count| *count > 0);
    assert_eq!(counted, names(shim.counts.since(&seen)));
}

/// A worker counts from its start, and loses nothing when it connects again.
pub(crate) async fn every_call_of_a_worker_is_counted(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = isolated::open(shim.settings.clone());
    use_everything(&vault, &shim).await;
    let counted = said(&vault).await;
    assert_eq!(counted, names(shim.counts.all()));
    for function in ["C_Initialize", "C_Finalize", "C_Login", "C_OpenSession", "C_CloseSession"] {
        assert!(counted.contains_key(function), "{function} is not in {counted:?}");
    }
}

/// Whether requests are let through is told with its name, also where no statistics can be had.
pub(crate) async fn the_circuit_is_told(token: TestToken) {
    let shim = Shim::before(&token);
    let vaults: [&dyn Vault; 2] = [&shim.open(), &isolated::open(shim.settings.clone())];
    for vault in vaults {
        let told = async |circuit| {
            eventually("the circuit is told", async || vault.circuit() == circuit).await;
        };
        told(Circuit::Closed).await;
        shim.order("token gone");
        assert!(vault.probe().await.is_err());
        told(Circuit::Open).await;
        shim.order("");
        eventually("the token is found", async || vault.probe().await.is_ok()).await;
        told(Circuit::Closed).await;
        shim.order("sessions die\nfail C_Login CKR_PIN_INCORRECT");
        assert!(matches!(vault.probe().await, Err(VaultError::Credential(_))));
        told(Circuit::Refused).await;
        shim.order("");
    }
}

async fn use_everything(vault: &impl Vault, shim: &Shim) {
    let (made, brought, signing) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let dek = || pattern(32);
    vault.create_version(made).await.unwrap();
    vault.import_version(brought, SecretBytes::new(vec![7; 32])).await.unwrap();
    vault.make_signing_key(signing).await.unwrap();
    vault.sign(signing, b"d").await.unwrap();
    let wrapped = vault.wrap(made, b"c", dek()).await.unwrap();
    vault.unwrap(made, b"c", wrapped).await.unwrap();
    let sealed = vault.wrap_gcm(brought, b"c", dek()).await.unwrap();
    vault.unwrap_gcm(brought, b"c", sealed).await.unwrap();
    vault.random(32).await.unwrap();
    vault.check_value(made).await.unwrap();
    vault.probe().await.unwrap();
    assert_eq!(vault.wrap(Uuid::new_v4(), b"c", dek()).await, Err(VaultError::NotFound));
    assert_eq!(vault.versions().await.unwrap().len(), 2);
    vault.destroy_version(made).await.unwrap();
    // Failures are calls too: of a session, of the device, and of something that is only refused.
    for fault in [
        "sessions die",
        "fail C_Encrypt CKR_DEVICE_ERROR times=1",
        "fail C_FindObjects CKR_DEVICE_ERROR times=1",
        "fail C_Encrypt CKR_GENERAL_ERROR times=1",
        "fail C_OpenSession CKR_SESSION_COUNT after=1 times=1\nsessions die",
    ] {
        shim.order(fault);
        let _ = vault.wrap(brought, b"c", dek()).await;
        let _ = vault.versions().await;
        shim.order("");
        eventually(fault, async || vault.probe().await.is_ok()).await;
    }
}

/// How many calls of each function the vault has timed.
async fn said(vault: &impl Vault) -> Counts {
    let functions = vault.statistics().await.unwrap().functions;
    functions.into_iter().map(|(name, times)| (name, times.counts.iter().sum())).collect()
}

fn names(seen: Vec<(Function, u64)>) -> Counts {
    seen.into_iter().map(|(function, count)| (function.name().to_owned(), count)).collect()
}
