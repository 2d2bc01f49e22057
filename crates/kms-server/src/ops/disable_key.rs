//! Suspends a CRK: nothing is wrapped or unwrapped with it until it is enabled. Nothing is lost.

use super::{Call, Error, Subject, active_key, announce, record};
use crate::app::App;
use crate::policy::Action;
use uuid::Uuid;

/// From the answer on no use of the key is answered any more, however early it was asked for.
///
/// # Errors
/// `Denied`, `KeyNotFound`, `KeyDeleted`, `KeyState` (not active), and those of database and audit log.
pub async fn disable_key(app: &App, call: &Call, key: Uuid) -> Result<(), Error> {
    call.allow_key(Action::DisableKey, key)?;
    let _gate = app.gates.change(key).await;
    let key = active_key(app, call, key).await?;
    announce(app, call, Action::DisableKey, Subject::key(&key)).await?;
    if !app.store.suspend_key(key.instance, key.id, true).await? {
        return Err(Error::KeyState);
    }
    record(app, call, Action::DisableKey, Subject::key(&key)).await
}
