//! Marks a CRK as destroyed: from then on nothing is wrapped or unwrapped with it. Its versions stay in the HSM;
//! nothing here removes key material.

use super::{Call, Error, Subject, announce, living_key, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::Key;
use uuid::Uuid;

/// The key as it is afterwards.
///
/// # Errors
/// `Denied`, `KeyNotFound`, `KeyDeleted`, and those of database and audit log.
pub async fn delete_key(app: &App, call: &Call, key: Uuid) -> Result<Key, Error> {
    call.allow_key(Action::DeleteKey, key)?;
    let _gate = app.gates.change(key).await;
    let key = living_key(app, call, key).await?;
    announce(app, call, Action::DeleteKey, Subject::key(&key)).await?;
    let by = call.caller.iam_id();
    if !app.store.delete_key(key.instance, key.id, app.now(), &by).await? {
        // Somebody else was faster.
        return Err(Error::KeyDeleted);
    }
    record(app, call, Action::DeleteKey, Subject::key(&key)).await?;
    app.store.key(key.instance, key.id).await?.ok_or(Error::KeyNotFound)
}
