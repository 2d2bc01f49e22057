//! API keys: made in the HSM's random source, shown once, kept as a hash; locked, replaced and revoked at once.

use super::issue_token::hash;
use super::service_ids::{managed, managed_one};
use super::{Call, Error, Subject, announce, record};
use crate::app::App;
use crate::policy::{Action, Credential};
use crate::store::{ApiKey, NewSecret};
use crate::token::random_uuid;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use kms_core::secret::SecretText;
use kms_hsm::{Vault, VaultError};
use std::time::Duration;
use uuid::Uuid;

/// 256 bits: nobody guesses one, so its hash needs no salt and no stretching.
const LENGTH: usize = 32;

/// Those of the service IDs that the caller manages.
///
/// # Errors
/// `Denied`, and those of database and audit log.
pub async fn list_api_keys(app: &App, call: &Call) -> Result<Vec<ApiKey>, Error> {
    let mine = managed(app, call, Action::ListApiKeys).await?;
    let mut keys = app.store.api_keys().await?;
    keys.retain(|key| mine.iter().any(|one| one.id == key.service_id));
    record(app, call, Action::ListApiKeys, Subject::default()).await?;
    Ok(keys)
}

/// A new API key for a service ID; the text is in this answer and nowhere else.
///
/// # Errors
/// `Denied`; `NotFound` for a service ID that does not exist or that the caller does not manage; and those of HSM,
/// database and audit log.
pub async fn create_api_key(
    app: &App,
    call: &Call,
    service_id: Uuid,
    name: String,
) -> Result<(ApiKey, SecretText), Error> {
    let owner = managed_one(app, call, Action::CreateApiKey, service_id).await?;
    let text = random_api_key(&*app.vault).await?;
    let id = random_uuid(&*app.vault).await?;
    let key = ApiKey::new(id, owner.id, name, app.now());
    let subject = of(&key);
    announce(app, call, Action::CreateApiKey, subject.clone()).await?;
    app.store.add_api_key(&key, &hash(&text)).await?;
    record(app, call, Action::CreateApiKey, subject).await?;
    Ok((key, text))
}

/// Makes an API key and every token that was issued for it useless, until it is unlocked.
///
/// # Errors
/// `Denied`, `NotFound`, `Conflict` when it is locked already, and those of database and audit log.
pub async fn lock_api_key(app: &App, call: &Call, id: Uuid) -> Result<(), Error> {
    let key = managed_key(app, call, Action::LockApiKey, id).await?;
    announce(app, call, Action::LockApiKey, of(&key)).await?;
    if !app.store.lock_api_key(key.id, Some(app.now())).await? {
        return Err(Error::Conflict("the API key is locked already".into()));
    }
    record(app, call, Action::LockApiKey, of(&key)).await
}

/// Makes a locked API key good again, with those of its tokens that have not expired.
///
/// # Errors
/// `Denied`, `NotFound`, `Conflict` when it is not locked, and those of database and audit log.
pub async fn unlock_api_key(app: &App, call: &Call, id: Uuid) -> Result<(), Error> {
    let key = managed_key(app, call, Action::UnlockApiKey, id).await?;
    announce(app, call, Action::UnlockApiKey, of(&key)).await?;
    if !app.store.lock_api_key(key.id, None).await? {
        return Err(Error::Conflict("the API key is not locked".into()));
    }
    record(app, call, Action::UnlockApiKey, of(&key)).await
}

/// A new secret under the same id. The one before, with all tokens that it got, ends when `overlap` is over, and those
/// before that one at once; where the caller logged in with one of those before, that stays good instead of the last.
///
/// # Errors
/// `Denied`, `NotFound`, `Conflict` where the last administrator's ends without an overlap, and those of HSM, database
/// and audit log. Whoever gets no answer rotates again: the new secret may be in force, and nobody knows it.
pub async fn rotate_api_key(
    app: &App,
    call: &Call,
    id: Uuid,
    overlap: Duration,
) -> Result<(ApiKey, SecretText), Error> {
    let key = managed_key(app, call, Action::RotateApiKey, id).await?;
    let (text, at) = (random_api_key(&*app.vault).await?, app.now());
    let old_until = (!overlap.is_zero()).then(|| at + overlap);
    let by = match call.caller.credential {
        Credential::ApiKey(secret) => Some(secret),
        Credential::Profile(_) => None,
    };
    let new = NewSecret { hash: hash(&text), at, old_until, by };
    announce(app, call, Action::RotateApiKey, of(&key)).await?;
    if !app.store.rotate_api_key(id, &new).await? {
        return Err(Error::NotFound("API key"));
    }
    record(app, call, Action::RotateApiKey, of(&key)).await?;
    Ok((ApiKey { rotated_at: Some(at), ..key }, text))
}

/// Ends an API key and, with the next call, every token that was issued for it.
///
/// # Errors
/// `Denied`, `NotFound`, and those of database and audit log.
pub async fn revoke_api_key(app: &App, call: &Call, id: Uuid) -> Result<(), Error> {
    let key = managed_key(app, call, Action::DeleteApiKey, id).await?;
    announce(app, call, Action::DeleteApiKey, of(&key)).await?;
    if !app.store.revoke_api_key(id, app.now()).await? {
        return Err(Error::NotFound("API key"));
    }
    record(app, call, Action::DeleteApiKey, of(&key)).await
}

/// The text of a new API key.
///
/// # Errors
/// What the vault meets.
pub async fn random_api_key(vault: &dyn Vault) -> Result<SecretText, VaultError> {
    let random = vault.random(LENGTH).await?;
    Ok(SecretText::new(BASE64URL.encode(random.as_slice())))
}

fn of(key: &ApiKey) -> Subject {
    Subject::of_service_id(key.service_id, key.id)
}

/// The API key `id`, if the caller may do `action` with it.
async fn managed_key(app: &App, call: &Call, action: Action, id: Uuid) -> Result<ApiKey, Error> {
    let mine = managed(app, call, action).await?;
    let found = app.store.api_keys().await?.into_iter().find(|key| key.id == id);
    found
        .filter(|key| mine.iter().any(|one| one.id == key.service_id))
        .ok_or(Error::NotFound("API key"))
}
