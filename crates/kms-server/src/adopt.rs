//! `kms-server adopt`: gives a version that the HSM holds, and a restored database does not know or knows as one that is
//! being made, back to its key.
//!
//! Only against proof: a wrapped DEK that opens with this version, because its code covers the ids of instance, key and
//! version. An adopted version unwraps and never wraps: the restored key has wrapped with an older one since, and a
//! version that was left behind must not come back into use. Only a key that was being made itself when it was backed up
//! has nothing else to wrap with.

use crate::audit::{Audit, AuditError, Outcome, Record};
use crate::ops::unwrap::open_with;
use crate::store::{Adopted, KnownVersion, Store, StoreError};
use kms_core::wdek::{Wdek, mac_context};
use kms_hsm::{Vault, VaultError};
use time::OffsetDateTime;
use uuid::Uuid;

/// What is to be adopted, and by what that is proved.
#[derive(Debug)]
pub struct Adopt {
    pub key: Uuid,
    pub version: Uuid,
    /// Wrapped by this version.
    pub ciphertext: String,
    /// What was given with it when it was wrapped.
    pub aad: Vec<String>,
}

/// The operator: nothing was adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    #[error(
        "the database knows no key {0}: it was made after the backup. A version is adopted by the key that it belongs to"
    )]
    NoKey(Uuid),
    #[error("the database knows version {0} already")]
    Known(Uuid),
    #[error("the HSM holds no version {0}; `kms-server check` shows what it holds as `extra`")]
    NotHeld(Uuid),
    #[error("this is no wrapped DEK")]
    NoWdek,
    #[error(
        "this wrapped DEK does not open with that version for that key. The audit log says which version belongs to which \
         key: kmsctl audit query FILE --action rotate_key, and create_key for the first one"
    )]
    Unproven,
    #[error("HSM: {0}")]
    Vault(VaultError),
    #[error("database: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Audit(#[from] AuditError),
}

/// Proves it, records it, and puts the version behind those that the key has.
///
/// # Errors
/// [`AdoptError`].
pub async fn adopt(
    vault: &dyn Vault,
    store: &dyn Store,
    audit: &Audit,
    asked: Adopt,
    now: OffsetDateTime,
) -> Result<(), AdoptError> {
    let Adopt { key, version, ciphertext, aad } = asked;
    let known = store.known_versions().await?;
    // One that is being made in a copy of the database was made, and has wrapped since, if it opens what is shown here.
    let is_new = |one: &KnownVersion| one.version != version || (one.pending && one.key == key);
    if !known.iter().all(is_new) {
        return Err(AdoptError::Known(version));
    }
    let of_key = known.iter().find(|one| one.key == key);
    let instance = of_key.ok_or(AdoptError::NoKey(key))?.instance;
    let wdek = Wdek::decode(&ciphertext).map_err(|_| AdoptError::NoWdek)?;
    if wdek.handle.is_some_and(|handle| handle != version) {
        return Err(AdoptError::Unproven);
    }
    let context = mac_context(&instance.to_string(), &key.to_string(), &version.to_string(), &aad);
    match open_with(vault, version, &context, &wdek).await {
        Ok(_dek) => {}
        Err(VaultError::NotFound) => return Err(AdoptError::NotHeld(version)),
        Err(VaultError::NotAuthentic | VaultError::BadInput(_)) => {
            return Err(AdoptError::Unproven);
        }
        Err(other) => return Err(AdoptError::Vault(other)),
    }
    let check_value = vault.check_value(version).await.map_err(AdoptError::Vault)?;
    audit.record(record(instance, key, version, Outcome::Begun)).await?;
    store.adopt_version(&Adopted { key, version, check_value, at: now }).await?;
    audit.record(record(instance, key, version, Outcome::Done)).await?;
    Ok(())
}

fn record(instance: Uuid, key: Uuid, version: Uuid, outcome: Outcome) -> Record {
    Record {
        instance: Some(instance),
        target: Some(key),
        version: Some(version),
        ..Record::new("adopt_version", outcome)
    }
}
