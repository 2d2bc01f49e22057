//! Shows one CRK, or its versions. A root key has no material to show.

use super::{Call, Error, Subject, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::{Key, KeyState, Version};
use uuid::Uuid;

/// Destroyed keys are shown too.
///
/// # Errors
/// `Denied`, `KeyNotFound`, and those of database and audit log.
pub async fn get_key(app: &App, call: &Call, id: Uuid) -> Result<Key, Error> {
    call.allow_key(Action::ReadKey, id)?;
    show(app, call, Action::ReadKey, id).await
}

/// The same without what only some may see.
///
/// # Errors
/// As [`get_key`].
pub async fn get_metadata(app: &App, call: &Call, id: Uuid) -> Result<Key, Error> {
    call.allow_key(Action::ReadMetadata, id)?;
    show(app, call, Action::ReadMetadata, id).await
}

/// Newest first.
///
/// # Errors
/// `Denied`, `KeyNotFound`, `KeyState` for a key that is not active unless `any_state`, and those of database and
/// audit log.
pub async fn list_versions(
    app: &App,
    call: &Call,
    id: Uuid,
    any_state: bool,
) -> Result<Vec<Version>, Error> {
    call.allow_key(Action::ListVersions, id)?;
    let key = find(app, call, id).await?;
    if !any_state && key.state(app.now()) != KeyState::Active {
        return Err(Error::KeyState);
    }
    let versions = app.store.versions(key.instance, key.id).await?;
    record(app, call, Action::ListVersions, Subject::key(&key)).await?;
    Ok(versions)
}

async fn show(app: &App, call: &Call, action: Action, id: Uuid) -> Result<Key, Error> {
    let key = find(app, call, id).await?;
    record(app, call, action, Subject::key(&key)).await?;
    Ok(key)
}

async fn find(app: &App, call: &Call, id: Uuid) -> Result<Key, Error> {
    app.store.key(call.instance()?, id).await?.ok_or(Error::KeyNotFound)
}
