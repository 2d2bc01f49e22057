//! Instances: the groups of keys of one tenant each.

use super::{Call, Error, Subject, announce, record};
use crate::app::App;
use crate::policy::{self, Action, Scope};
use crate::store::Instance;
use crate::token::random_uuid;

/// Those that the caller has rights in.
///
/// # Errors
/// `Denied`, and those of database and audit log.
pub async fn list_instances(app: &App, call: &Call) -> Result<Vec<Instance>, Error> {
    policy::allow_somewhere(&call.caller, Action::ListInstances)?;
    let mut instances = app.store.instances().await?;
    instances.retain(|one| policy::sees(&call.caller, Scope::Instance(one.id)));
    record(app, call, Action::ListInstances, Subject::default()).await?;
    Ok(instances)
}

/// # Errors
/// `Denied` unless the caller has rights everywhere, `Conflict` when the name is taken, and those of HSM, database and
/// audit log.
pub async fn create_instance(app: &App, call: &Call, name: String) -> Result<Instance, Error> {
    call.at(Scope::Everywhere).allow(Action::CreateInstance)?;
    let instance = Instance { id: random_uuid(&*app.vault).await?, name, created_at: app.now() };
    let there = call.at(Scope::Instance(instance.id));
    announce(app, &there, Action::CreateInstance, Subject::default()).await?;
    app.store.add_instance(&instance).await?;
    record(app, &there, Action::CreateInstance, Subject::default()).await?;
    Ok(instance)
}
