//! Removes a destroyed CRK for good: first its versions, out of the HSM, then what the database knows of it. This is the
//! only way in which either ever loses a key.
//!
//! Between the two nothing may be lost: that the purge has begun is on disk before the HSM is asked to destroy anything,
//! and the rows go once the HSM was seen to hold nothing of the key any more. A purge that was interrupted is asked for
//! again and goes on. The HSM must have held the very keys before: what is missing there may be in another token, or in
//! one that will be back, and would live on without a name.

use super::{Call, Error, Subject, announce, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::{Key, KeyState, KnownVersion};
use kms_hsm::VaultError;
use std::collections::BTreeSet;
use uuid::Uuid;

/// The key as it was.
///
/// # Errors
/// `Denied`, `KeyNotFound`, `KeyState` for one that is not destroyed, `PurgedTooSoon`, `Conflict` where the HSM does not
/// hold what is to be destroyed, and those of HSM, database and audit log: then it is asked for again.
pub async fn purge_key(app: &App, call: &Call, id: Uuid) -> Result<Key, Error> {
    call.allow_key(Action::PurgeKey, id)?;
    let _gate = app.gates.change(id).await;
    let key = ripe_key(app, call, id).await?;
    let versions = versions(app, &key).await?;
    for version in &versions {
        check_held(app, version).await?;
    }
    announce(app, call, Action::PurgeKey, Subject::key(&key)).await?;
    app.store.begin_purge(key.instance, id, app.now()).await?;
    let ids: BTreeSet<Uuid> = versions.iter().map(|one| one.version).collect();
    destroy(app, &ids).await?;
    if !app.store.finish_purge(id, &Vec::from_iter(ids), app.now()).await? {
        // Somebody else was faster.
        return Err(Error::KeyNotFound);
    }
    record(app, call, Action::PurgeKey, Subject::key(&key)).await?;
    Ok(key)
}

/// The key `id`, if it was destroyed long enough ago.
async fn ripe_key(app: &App, call: &Call, id: Uuid) -> Result<Key, Error> {
    let key = app.store.key(call.instance()?, id).await?.ok_or(Error::KeyNotFound)?;
    let (KeyState::Destroyed, Some(deleted_at)) = (key.state(app.now()), key.deleted_at) else {
        return Err(Error::KeyState);
    };
    let wait = app.settings.min_purge_wait;
    if key.purge_begun_at.is_none() && app.now() < deleted_at + wait {
        return Err(Error::PurgedTooSoon { wait });
    }
    Ok(key)
}

/// All of them, also those that were never completed.
async fn versions(app: &App, key: &Key) -> Result<Vec<KnownVersion>, Error> {
    let mut known = app.store.known_versions().await?;
    known.retain(|one| one.key == key.id);
    Ok(known)
}

/// Whether the HSM holds this very version, or may lack it: because its making was interrupted, or its purge was.
async fn check_held(app: &App, version: &KnownVersion) -> Result<(), Error> {
    let id = version.version;
    let kept = version.check_value;
    let why = match app.vault.check_value(id).await {
        Ok(found) if kept.is_none_or(|kept| kept == found) => return Ok(()),
        Ok(_) => "holds another key under the name of",
        Err(VaultError::NotFound) if version.pending || version.purging => return Ok(()),
        Err(VaultError::NotFound) => "does not hold",
        Err(other) => return Err(other.into()),
    };
    Err(Error::Conflict(format!(
        "the HSM {why} version {id} of this key, so nothing was purged: what another token or a backup of the HSM holds \
         of it would live on. Restore the HSM's backup first, or leave the destroyed key as it is"
    )))
}

/// Returns once the vault holds nothing of these any more.
async fn destroy(app: &App, versions: &BTreeSet<Uuid>) -> Result<(), Error> {
    for id in versions {
        match app.vault.destroy_version(*id).await {
            Ok(()) | Err(VaultError::NotFound) => {}
            Err(other) => return Err(other.into()),
        }
    }
    // The rows are all that names them: better looked for once more than believed.
    let held = [app.vault.versions().await?, app.vault.incomplete().await?].concat();
    match held.iter().find(|id| versions.contains(id)) {
        None => Ok(()),
        Some(left) => {
            Err(Error::Vault(VaultError::Policy(format!("it still holds version {left}"))))
        }
    }
}
