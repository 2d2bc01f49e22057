//! Policies: a service ID, a role, and the place where it holds. What a new one allows and what a removed one allowed
//! is so from the next call on.

use super::service_ids::{managed, managed_one};
use super::{Call, Error, Subject, announce, record};
use crate::app::App;
use crate::policy::{self, Action, Grant, Scope};
use crate::store::Policy;
use crate::token::random_uuid;
use uuid::Uuid;

/// Those of the service IDs that the caller manages.
///
/// # Errors
/// `Denied`, and those of database and audit log.
pub async fn list_policies(app: &App, call: &Call) -> Result<Vec<Policy>, Error> {
    let mine = managed(app, call, Action::ListPolicies).await?;
    record(app, call, Action::ListPolicies, Subject::default()).await?;
    Ok(mine.into_iter().flat_map(|one| one.policies).collect())
}

/// # Errors
/// `Denied` for a right outside the caller's own scope; `NotFound` for a service ID or key that does not exist or that
/// the caller does not manage; `Conflict` when the instance does not exist; and those of HSM, database and audit log.
pub async fn create_policy(
    app: &App,
    call: &Call,
    service_id: Uuid,
    grant: Grant,
) -> Result<Policy, Error> {
    let there = call.at(grant.scope);
    there.allow(Action::CreatePolicy)?;
    let owner = managed_one(app, call, Action::CreatePolicy, service_id).await?;
    check_key(app, grant.scope).await?;
    let (id, created_at) = (random_uuid(&*app.vault).await?, app.now());
    let policy = Policy { id, service_id: owner.id, grant, created_at };
    let subject = Subject::of_service_id(owner.id, id).granting(grant);
    announce(app, &there, Action::CreatePolicy, subject.clone()).await?;
    app.store.add_policy(&policy).await?;
    record(app, &there, Action::CreatePolicy, subject).await?;
    Ok(policy)
}

/// # Errors
/// `Denied`; `NotFound`, also for one of a service ID that the caller does not manage; and those of database and audit
/// log.
pub async fn delete_policy(app: &App, call: &Call, id: Uuid) -> Result<(), Error> {
    policy::allow_somewhere(&call.caller, Action::DeletePolicy)?;
    let mine = managed(app, call, Action::DeletePolicy).await?;
    let found = mine.iter().flat_map(|one| &one.policies).find(|policy| policy.id == id);
    let policy = found.ok_or(Error::NotFound("policy"))?;
    let there = call.at(policy.grant.scope);
    let subject = Subject::of_service_id(policy.service_id, id).granting(policy.grant);
    announce(app, &there, Action::DeletePolicy, subject.clone()).await?;
    if !app.store.remove_policy(id).await? {
        return Err(Error::NotFound("policy"));
    }
    record(app, &there, Action::DeletePolicy, subject).await
}

/// A right for a key that is not there would come to life with whatever gets its id.
pub(super) async fn check_key(app: &App, scope: Scope) -> Result<(), Error> {
    let Scope::Key { instance, key } = scope else { return Ok(()) };
    app.store.key(instance, key).await?.map(drop).ok_or(Error::NotFound("key"))
}
