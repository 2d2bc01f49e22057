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
use std::time::Duration;
use uuid::Uuid;

/// How long an unwrap that is done waits for what was not asked for.
const PATIENCE: Duration = Duration::from_secs(1);

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
    provide_use(app, call, &asked).await;
    let _gate = app.gates.use_of(asked.key).await;

    let key = opening_key(app, call, asked.key).await?;
    let (plaintext, version) = open(app, &key, &asked).await?;
    let rewrapped = rewrap(app, &key, &version, &plaintext, &asked.aad).await;
    let newer = rewrapped.as_ref().map(|(_, version)| version.id);
    let subject = Subject { version: Some(version.id), rewrapped: newer, ..Subject::of(key.id) };
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

/// What [`rewrap`] will take, before the key's gate: nobody who changes the key waits for the database then.
async fn provide_use(app: &App, call: &Call, asked: &Unwrap) {
    if app.settings.wdek_version != WdekVersion::V4_0_0 {
        return;
    }
    let Ok(instance) = call.instance() else { return };
    let Ok(Some(key)) = app.store.key(instance, asked.key).await else { return };
    let Ok(wdek) = Wdek::decode(&asked.ciphertext) else { return };
    if wdek.handle != Some(key.version.id) && key.state(app.now()) == KeyState::Active {
        app.uses.provide(&app.store, key.version.id).await;
    }
}

/// A courtesy, not what was asked for: old data must open although the active version is lost or used up, and although
/// database or HSM hang.
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
    match wrap_soon(app, key, plaintext, aad).await {
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

async fn wrap_soon(
    app: &App,
    key: &Key,
    plaintext: &SecretBytes,
    aad: &[String],
) -> Result<String, Error> {
    let away = |cause: &str| VaultError::Unavailable { cause: cause.into() };
    let gcm = app.settings.wdek_version == WdekVersion::V4_0_0;
    if gcm && !app.uses.are_at_hand(key.version.id) {
        return Err(away("no use with AES-GCM is reserved, or is left").into());
    }
    let wrap = wrap_with(app, key, plaintext.clone(), aad);
    tokio::time::timeout(PATIENCE, wrap).await.map_err(|_| away("it took too long"))?
}
