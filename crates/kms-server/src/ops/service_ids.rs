//! Service IDs: who may do what. Nobody gives a right that reaches further than their own.

use super::{Call, Error, Subject, record};
use crate::app::App;
use crate::policy::{Action, Grant};
use crate::store::ServiceId;
use crate::token::random_uuid;

/// What the caller says about a new service ID.
#[derive(Debug)]
pub struct NewServiceId {
    pub name: String,
    pub description: Option<String>,
    pub grant: Grant,
}

/// Those whose rights are within the caller's own scope.
///
/// # Errors
/// `Denied`, and those of database and audit log.
pub async fn list_service_ids(app: &App, call: &Call) -> Result<Vec<ServiceId>, Error> {
    call.allow(Action::ListServiceIds)?;
    let mut service_ids = app.store.service_ids().await?;
    service_ids.retain(|one| call.caller.grant.scope.covers(one.grant.scope));
    record(app, call, Action::ListServiceIds, Subject::default()).await?;
    Ok(service_ids)
}

/// # Errors
/// `Denied`, also for a right outside the caller's own scope; `Conflict` when its instance does not exist; and those of
/// HSM, database and audit log.
pub async fn create_service_id(
    app: &App,
    call: &Call,
    asked: NewServiceId,
) -> Result<ServiceId, Error> {
    let there = Call { scope: asked.grant.scope, ..call.clone() };
    there.allow(Action::CreateServiceId)?;
    let service_id = ServiceId {
        id: random_uuid(&*app.vault).await?,
        name: asked.name,
        description: asked.description,
        grant: asked.grant,
        created_at: app.now(),
    };
    app.store.add_service_id(&service_id).await?;
    let subject = Subject { target: Some(service_id.id), version: None };
    record(app, &there, Action::CreateServiceId, subject).await?;
    Ok(service_id)
}
