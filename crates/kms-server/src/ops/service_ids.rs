//! Service IDs: who may do what. Nobody gives a right that reaches further than their own.

use super::policies::check_key;
use super::{Call, Error, Subject, announce, record};
use crate::app::App;
use crate::policy::{self, Action, Grant, Scope};
use crate::store::ServiceId;
use crate::token::random_uuid;
use uuid::Uuid;

/// What the caller says about a new service ID.
#[derive(Debug)]
pub struct NewServiceId {
    pub name: String,
    pub description: Option<String>,
    /// Its first policy. It lives in the instance of that one.
    pub grant: Grant,
}

/// Those that the caller manages.
///
/// # Errors
/// `Denied`, and those of database and audit log.
pub async fn list_service_ids(app: &App, call: &Call) -> Result<Vec<ServiceId>, Error> {
    let service_ids = managed(app, call, Action::ListServiceIds).await?;
    record(app, call, Action::ListServiceIds, Subject::default()).await?;
    Ok(service_ids)
}

/// # Errors
/// `Denied`, also for a right outside the caller's own scope; `Conflict` when its instance does not exist, `NotFound`
/// when its key does not; and those of HSM, database and audit log.
pub async fn create_service_id(
    app: &App,
    call: &Call,
    asked: NewServiceId,
) -> Result<ServiceId, Error> {
    let there = call.at(Scope::of(asked.grant.scope.instance()));
    there.allow(Action::CreateServiceId)?;
    check_key(app, asked.grant.scope).await?;
    let id = random_uuid(&*app.vault).await?;
    let service_id = ServiceId {
        description: asked.description,
        ..ServiceId::with(id, asked.name, asked.grant, app.now())
    };
    let subject = Subject::of(service_id.id).granting(asked.grant);
    announce(app, &there, Action::CreateServiceId, subject.clone()).await?;
    app.store.add_service_id(&service_id).await?;
    record(app, &there, Action::CreateServiceId, subject).await?;
    Ok(service_id)
}

/// Ends a service ID with its policies, API keys and profiles, and with the next call every token that was issued for it.
///
/// # Errors
/// `Denied`; `NotFound`, also for one that the caller does not manage; `Conflict` for the last that can manage the whole
/// server; and those of database and audit log.
pub async fn delete_service_id(app: &App, call: &Call, id: Uuid) -> Result<(), Error> {
    let found = managed_one(app, call, Action::DeleteServiceId, id).await?;
    let there = call.at(found.home);
    announce(app, &there, Action::DeleteServiceId, Subject::of(id)).await?;
    if !app.store.remove_service_id(id).await? {
        return Err(Error::NotFound("service ID"));
    }
    record(app, &there, Action::DeleteServiceId, Subject::of(id)).await
}

/// All service IDs that the caller may do `action` with.
pub(super) async fn managed(
    app: &App,
    call: &Call,
    action: Action,
) -> Result<Vec<ServiceId>, Error> {
    policy::allow_somewhere(&call.caller, action)?;
    let mut service_ids = app.store.service_ids().await?;
    service_ids.retain(|one| policy::manages(&call.caller, action, one.home, &one.grants()));
    Ok(service_ids)
}

/// The service ID `id`, if the caller may do `action` with it. One that they may not looks like none.
pub(super) async fn managed_one(
    app: &App,
    call: &Call,
    action: Action,
    id: Uuid,
) -> Result<ServiceId, Error> {
    policy::allow_somewhere(&call.caller, action)?;
    let found = app.store.service_id(id).await?;
    found
        .filter(|one| policy::manages(&call.caller, action, one.home, &one.grants()))
        .ok_or(Error::NotFound("service ID"))
}
