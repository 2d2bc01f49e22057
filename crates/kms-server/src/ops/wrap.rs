//! Wraps a DEK with the active version of a CRK; makes the DEK where the caller brought none.

use super::{Call, Error, Subject, active_key, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::{Key, Version};
use kms_core::secret::SecretBytes;
use kms_core::wdek::{self, Wdek, WdekVersion};
use kms_hsm::{Sealed, VaultError};
use uuid::Uuid;

/// The length of a DEK that the HSM makes.
const NEW_DEK: usize = 32;

#[derive(Debug)]
pub struct Wrap {
    pub key: Uuid,
    /// `None`: the HSM's random source makes the DEK.
    pub plaintext: Option<SecretBytes>,
    pub aad: Vec<String>,
}

#[derive(Debug)]
pub struct Wrapped {
    pub ciphertext: String,
    /// The DEK, only where it was made here.
    pub made: Option<SecretBytes>,
    pub version: Version,
}

/// # Errors
/// `Denied`, `KeyNotFound`, `KeyDeleted`, `KeyState` (disabled or expired), and those of HSM, database and audit log.
pub async fn wrap(app: &App, call: &Call, asked: Wrap) -> Result<Wrapped, Error> {
    call.allow_key(Action::Wrap, asked.key)?;
    let _gate = app.gates.use_of(asked.key).await;
    let key = active_key(app, call, asked.key).await?;
    let (dek, made) = dek(app, asked.plaintext).await?;
    let ciphertext = wrap_with(app, &key, dek, &asked.aad).await?;
    record(app, call, Action::Wrap, Subject::key(&key)).await?;
    Ok(Wrapped { ciphertext, made, version: key.version })
}

async fn dek(
    app: &App,
    plaintext: Option<SecretBytes>,
) -> Result<(SecretBytes, Option<SecretBytes>), Error> {
    if let Some(dek) = plaintext {
        return Ok((dek, None));
    }
    let dek = app.vault.random(NEW_DEK).await?;
    Ok((dek.clone(), Some(dek)))
}

/// The WDEK of `dek` under the active version of `key`.
pub(super) async fn wrap_with(
    app: &App,
    key: &Key,
    dek: SecretBytes,
    aad: &[String],
) -> Result<String, Error> {
    let version = key.version.id;
    let context = mac_context(key, version, aad);
    let format = app.settings.wdek_version;
    let wdek = if format == WdekVersion::V4_0_0 {
        let Sealed { iv, ciphertext } = seal(app, version, &context, dek).await?;
        Wdek { version: format, ciphertext, hash: Vec::new(), iv, handle: Some(version) }
    } else {
        let kms_hsm::Wrapped { iv, ciphertext, hash } =
            app.vault.wrap(version, &context, dek).await?;
        let handle = (format != WdekVersion::V2_0_0).then_some(version);
        Wdek { version: format, ciphertext, hash, iv, handle }
    };
    Ok(wdek.encode())
}

/// The vault does not repeat this by itself where sessions or the HSM's library are lost in the middle: the key may have
/// been used all the same, and each use is counted before.
async fn seal(app: &App, version: Uuid, context: &[u8], dek: SecretBytes) -> Result<Sealed, Error> {
    app.uses.take(&*app.store, version).await?;
    match app.vault.wrap_gcm(version, context, dek.clone()).await {
        Err(VaultError::Unavailable { .. }) => {}
        done => return Ok(done?),
    }
    app.uses.take(&*app.store, version).await?;
    Ok(app.vault.wrap_gcm(version, context, dek).await?)
}

/// What a WDEK of `key` is bound to, besides its own bytes.
pub(super) fn mac_context(key: &Key, version: Uuid, aad: &[String]) -> Vec<u8> {
    let (instance, key) = (key.instance.to_string(), key.id.to_string());
    wdek::mac_context(&instance, &key, &version.to_string(), aad)
}
