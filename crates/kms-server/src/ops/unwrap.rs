//! Unwraps a WDEK with the CRK version that made it, however old.
//!
//! The code over the WDEK is checked inside the vault before anything is decrypted, and every WDEK that fails it gets
//! the same answer.

use super::wrap::{mac_context, wrap_with};
use super::{Call, Error, Subject, opening_key, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::{Key, KeyState, Version};
use kms_core::secret::SecretBytes;
use kms_core::wdek::{Wdek, WdekVersion};
use kms_hsm::{Sealed, Vault, VaultError, Wrapped};
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
    /// The same DEK under the active version, where that is a newer one and can wrap.
    pub rewrapped: Option<(String, Version)>,
}

/// # Errors
/// `Denied`, `KeyNotFound`, `KeyDeleted`, `KeyState` (disabled), `Field` (no WDEK at all), `NotAuthentic`, and those of HSM, database and
/// audit log.
pub async fn unwrap(app: &App, call: &Call, asked: Unwrap) -> Result<Unwrapped, Error> {
    call.allow_key(Action::Unwrap, asked.key)?;
    let _gate = app.gates.use_of(asked.key).await;

    let key = opening_key(app, call, asked.key).await?;
    let (plaintext, version) = open(app, &key, &asked).await?;
    let rewrapped = rewrap(app, &key, &version, &plaintext, &asked.aad).await;
    let subject = Subject { target: Some(key.id), version: Some(version.id) };
    record(app, call, Action::Unwrap, subject).await?;
    Ok(Unwrapped { plaintext, version, rewrapped })
}

async fn open(app: &App, key: &Key, asked: &Unwrap) -> Result<(SecretBytes, Version), Error> {
    let wdek = Wdek::decode(&asked.ciphertext).map_err(|_| Error::Field {
        name: "ciphertext",
        why: "must be the original base64 encoded ciphertext from the wrap operation".into(),
    })?;
    let mut missing = None;
    for version in candidates(app, key, wdek.handle).await? {
        let context = mac_context(key, version.id, &asked.aad);
        match open_with(&*app.vault, version.id, &context, &wdek).await {
            Ok(plaintext) => return Ok((plaintext, version)),
            Err(VaultError::NotAuthentic | VaultError::BadInput(_)) => {}
            // The HSM lost a version that the store knows, or holds another key in its place. Another version may
            // still have made this WDEK.
            Err(lost @ (VaultError::NotFound | VaultError::Policy(_))) => missing = Some(lost),
            Err(other) => return Err(other.into()),
        }
    }
    Err(missing.map_or(Error::NotAuthentic, Error::Vault))
}

pub(crate) async fn open_with(
    vault: &dyn Vault,
    version: Uuid,
    context: &[u8],
    wdek: &Wdek,
) -> Result<SecretBytes, VaultError> {
    let (iv, ciphertext) = (wdek.iv.clone(), wdek.ciphertext.clone());
    if wdek.version == WdekVersion::V4_0_0 {
        return vault.unwrap_gcm(version, context, Sealed { iv, ciphertext }).await;
    }
    let hash = wdek.hash.clone();
    vault.unwrap(version, context, Wrapped { iv, ciphertext, hash }).await
}

/// A handle names the version; without one, all of the key's own versions are tried, newest first.
async fn candidates(app: &App, key: &Key, handle: Option<Uuid>) -> Result<Vec<Version>, Error> {
    if handle == Some(key.version.id) {
        // The usual case, and the store has told it with the key.
        return Ok(vec![key.version.clone()]);
    }
    let mut versions = app.store.versions(key.instance, key.id).await?;
    if let Some(id) = handle {
        versions.retain(|version| version.id == id);
    }
    Ok(versions)
}

/// A courtesy, not what was asked for: old data must open although the active version is lost or used up.
async fn rewrap(
    app: &App,
    key: &Key,
    from: &Version,
    plaintext: &SecretBytes,
    aad: &[String],
) -> Option<(String, Version)> {
    if from.id == key.version.id || key.state(app.now()) != KeyState::Active {
        return None;
    }
    match wrap_with(app, key, plaintext.clone(), aad).await {
        Ok(ciphertext) => Some((ciphertext, key.version.clone())),
        Err(cause) => {
            app.metrics.rewrap_failed();
            tracing::warn!(
                "A DEK was unwrapped and not wrapped by the active version {} of key {}: {cause}",
                key.version.id,
                key.id
            );
            None
        }
    }
}
