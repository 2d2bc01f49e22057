//! Makes a CRK: its row first, then its key in the HSM, then both become visible. A crash in between leaves something
//! that has a name, is invisible, and is reported at the next start.

use super::{Call, Error, Subject, announce, keep_check_value, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::{Key, KeyState, NewKey, Version};
use crate::token::random_uuid;
use time::OffsetDateTime;

/// What the caller says about a new key.
#[derive(Debug)]
pub struct Description {
    pub name: String,
    pub description: Option<String>,
    pub tags: Vec<String>,
    pub expires_at: Option<OffsetDateTime>,
}

/// # Errors
/// `Denied`, and those of HSM, database and audit log.
pub async fn create_key(app: &App, call: &Call, asked: Description) -> Result<Key, Error> {
    call.allow(Action::CreateKey)?;
    let key = begin(app, call, Action::CreateKey, asked).await?;
    app.vault.create_version(key.version.id).await?;
    keep_check_value(app, key.version.id).await?;
    app.store.activate_key(key.id, key.version.id).await?;
    record(app, call, Action::CreateKey, Subject::key(&key)).await?;
    Ok(key)
}

/// Announces it, writes the pending row, and returns the key as it will be.
pub(super) async fn begin(
    app: &App,
    call: &Call,
    action: Action,
    asked: Description,
) -> Result<Key, Error> {
    let new = NewKey {
        id: random_uuid(&*app.vault).await?,
        instance: call.instance()?,
        name: asked.name,
        description: asked.description,
        tags: asked.tags,
        imported: action == Action::ImportKey,
        expires_at: asked.expires_at,
        created_at: app.now(),
        created_by: call.caller.iam_id(),
        version: random_uuid(&*app.vault).await?,
    };
    let subject =
        Subject { target: Some(new.id), version: Some(new.version), ..Subject::default() };
    announce(app, call, action, subject).await?;
    app.store.begin_key(&new).await?;
    Ok(Key {
        id: new.id,
        instance: new.instance,
        name: new.name,
        description: new.description,
        tags: new.tags,
        imported: new.imported,
        marked: KeyState::Active,
        expires_at: new.expires_at,
        created_at: new.created_at,
        created_by: new.created_by,
        rotated_at: None,
        deleted_at: None,
        deleted_by: None,
        purge_begun_at: None,
        version: Version { id: new.version, created_at: new.created_at },
    })
}
