//! API keys: made in the HSM's random source, shown once, kept as a hash, revoked at once.

use super::issue_token::hash;
use super::{Call, Error, Subject, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::{ApiKey, ServiceId};
use crate::token::random_uuid;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use kms_core::secret::SecretText;
use kms_hsm::{Vault, VaultError};
use uuid::Uuid;

/// 256 bits: nobody guesses one, so its hash needs no salt and no stretching.
const LENGTH: usize = 32;

/// Those of service IDs within the caller's own scope.
///
/// # Errors
/// `Denied`, and those of database and audit log.
pub async fn list_api_keys(app: &App, call: &Call) -> Result<Vec<ApiKey>, Error> {
    call.allow(Action::ListApiKeys)?;
    let mine = app.store.service_ids().await?;
    let covered = |id: Uuid| {
        mine.iter().any(|one| one.id == id && call.caller.grant.scope.covers(one.grant.scope))
    };
    let mut keys = app.store.api_keys().await?;
    keys.retain(|key| covered(key.service_id));
    record(app, call, Action::ListApiKeys, Subject::default()).await?;
    Ok(keys)
}

/// A new API key for a service ID; the text is in this answer and nowhere else.
///
/// # Errors
/// `Denied`; `NotFound` for a service ID that does not exist or reaches further than the caller; and those of HSM,
/// database and audit log.
pub async fn create_api_key(
    app: &App,
    call: &Call,
    service_id: Uuid,
    name: String,
) -> Result<(ApiKey, SecretText), Error> {
    call.allow(Action::CreateApiKey)?;
    let owner = covered_service_id(app, call, service_id).await?;
    let text = random_api_key(&*app.vault).await?;
    let id = random_uuid(&*app.vault).await?;
    let key = ApiKey { id, service_id: owner.id, name, created_at: app.now() };
    app.store.add_api_key(&key, &hash(&text)).await?;
    let subject = Subject { target: Some(key.id), version: None };
    record(app, call, Action::CreateApiKey, subject).await?;
    Ok((key, text))
}

/// Ends an API key and, with the next call, every token that was issued for it.
///
/// # Errors
/// `Denied`, `NotFound`, and those of database and audit log.
pub async fn revoke_api_key(app: &App, call: &Call, id: Uuid) -> Result<(), Error> {
    call.allow(Action::DeleteApiKey)?;
    let keys = app.store.api_keys().await?;
    let key = keys.iter().find(|key| key.id == id).ok_or(Error::NotFound("API key"))?;
    covered_service_id(app, call, key.service_id).await.map_err(|e| match e {
        Error::NotFound(_) => Error::NotFound("API key"),
        other => other,
    })?;
    if !app.store.revoke_api_key(id, app.now()).await? {
        return Err(Error::NotFound("API key"));
    }
    let subject = Subject { target: Some(id), version: None };
    record(app, call, Action::DeleteApiKey, subject).await
}

/// The text of a new API key.
///
/// # Errors
/// What the vault meets.
pub async fn random_api_key(vault: &dyn Vault) -> Result<SecretText, VaultError> {
    let random = vault.random(LENGTH).await?;
    Ok(SecretText::new(BASE64URL.encode(random.as_slice())))
}

async fn covered_service_id(app: &App, call: &Call, id: Uuid) -> Result<ServiceId, Error> {
    let found = app.store.service_id(id).await?;
    found
        .filter(|one| call.caller.grant.scope.covers(one.grant.scope))
        .ok_or(Error::NotFound("service ID"))
}
