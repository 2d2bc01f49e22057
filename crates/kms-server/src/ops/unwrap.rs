//! Unwraps a WDEK with the CRK version that made it, however old.
//!
//! The code over the WDEK is checked inside the vault before anything is decrypted, and every WDEK that fails it gets
//! the same answer.

use super::wrap::{mac_context, wrap_with};
use super::{Call, Error, Subject, living_key, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::{Key, KeyState, Version};
use kms_core::secret::SecretBytes;
use kms_core::wdek::Wdek;
use kms_hsm::{VaultError, Wrapped};
use uuid::Uuid;

#[derive(Debug)]
pub struct Unwrap {
    pub key: Uuid,
    pub ciphertext: String,
    pub aad: Vec<String>,
}

#[derive(Debug)]
pub struct Unwrapped {
    pub plaintext: SecretBytes,
    /// The version that had wrapped it.
    pub version: Version,
    /// The same DEK under the active version, where that is a newer one.
    pub rewrapped: Option<(String, Version)>,
}

/// # Errors
/// `Denied`, `KeyNotFound`, `KeyDeleted`, `Field` (no WDEK at all), `NotAuthentic`, and those of HSM, database and
/// audit log.
pub async fn unwrap(app: &App, call: &Call, asked: Unwrap) -> Result<Unwrapped, Error> {
    call.allow(Action::Unwrap)?;
    let key = living_key(app, call, asked.key).await?;
    let (plaintext, version) = open(app, &key, &asked).await?;
    let rewrapped = rewrap(app, &key, &version, &plaintext, &asked.aad).await?;
    let subject = Subject { target: Some(key.id), version: Some(version.id) };
    record(app, call, Action::Unwrap, subject).await?;
    Ok(Unwrapped { plaintext, version, rewrapped })
}

async fn open(app: &App, key: &Key, asked: &Unwrap) -> Result<(SecretBytes, Version), Error> {
    let wdek = Wdek::decode(&asked.ciphertext).map_err(|_| Error::Field {
        name: "ciphertext",
        why: "must be the original base64 encoded ciphertext from the wrap operation".into(),
    })?;
    let versions = app.store.versions(key.instance, key.id).await?;
    let mut missing = None;
    for version in candidates(versions, wdek.handle) {
        let wrapped = Wrapped {
            iv: wdek.iv.clone(),
            ciphertext: wdek.ciphertext.clone(),
            hash: wdek.hash.clone(),
        };
        let context = mac_context(key, version.id, &asked.aad);
        match app.vault.unwrap(version.id, &context, wrapped).await {
            Ok(plaintext) => return Ok((plaintext, version)),
            Err(VaultError::NotAuthentic | VaultError::BadInput(_)) => {}
            // The HSM lost a version that the store knows. Another one may still have made this WDEK.
            Err(VaultError::NotFound) => missing = Some(VaultError::NotFound),
            Err(other) => return Err(other.into()),
        }
    }
    Err(missing.map_or(Error::NotAuthentic, Error::Vault))
}

/// A handle names the version; without one, all of the key's own versions are tried, newest first.
fn candidates(versions: Vec<Version>, handle: Option<Uuid>) -> Vec<Version> {
    match handle {
        Some(id) => versions.into_iter().filter(|version| version.id == id).collect(),
        None => versions,
    }
}

async fn rewrap(
    app: &App,
    key: &Key,
    from: &Version,
    plaintext: &SecretBytes,
    aad: &[String],
) -> Result<Option<(String, Version)>, Error> {
    if from.id == key.version.id || key.state(app.now()) != KeyState::Active {
        return Ok(None);
    }
    let ciphertext = wrap_with(app, key, plaintext.clone(), aad).await?;
    Ok(Some((ciphertext, key.version.clone())))
}
