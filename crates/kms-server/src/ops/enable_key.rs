//! Makes a suspended CRK usable again. At once: whoever disabled it by mistake has an outage to end.

use super::{Call, Error, Subject, announce, living_key, record};
use crate::app::App;
use crate::policy::Action;
use uuid::Uuid;

/// # Errors
/// `Denied`, `KeyNotFound`, `KeyDeleted`, `KeyState` (not suspended), and those of database and audit log.
pub async fn enable_key(app: &App, call: &Call, key: Uuid) -> Result<(), Error> {
    call.allow_key(Action::EnableKey, key)?;
    let _gate = app.gates.change(key).await;
    let key = living_key(app, call, key).await?;
    announce(app, call, Action::EnableKey, Subject::key(&key)).await?;
    if !app.store.suspend_key(key.instance, key.id, false).await? {
        return Err(Error::KeyState);
    }
    record(app, call, Action::EnableKey, Subject::key(&key)).await
}
