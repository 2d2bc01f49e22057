//! Management on the token service's port: instances, service IDs and API keys. An API key is shown by the answer to
//! its creation and never again.

use super::body::Body;
use super::keys::rfc3339;
use super::problem::Problem;
use super::{Answer, Asked, auth};
use crate::app::App;
use crate::ops::{Call, Error, api_keys, instances, service_ids};
use crate::policy::{Action, Grant, Role, Scope, iam_id};
use crate::store;
use http::StatusCode;
use kms_api::rest::{
    ApiKey, ApiKeys, Instance, Instances, NewApiKey, NewInstance, NewServiceId, ServiceId,
    ServiceIds,
};
use kms_core::secret::SecretText;
use std::ops::RangeInclusive;
use uuid::Uuid;

const JSON: &str = "application/json";
const NAME_CHARS: RangeInclusive<usize> = 1..=90;

/// Does what the route says.
pub(super) async fn perform(
    app: &App,
    call: &Call,
    asked: &Asked<'_>,
    body: &Body,
) -> Result<Answer, Problem> {
    match asked.action {
        Action::ListInstances => {
            let all = instances::list_instances(app, call).await?;
            let instances = all.iter().map(instance).collect();
            Ok(Answer::json(StatusCode::OK, JSON, &Instances { instances }))
        }
        Action::CreateInstance => {
            let new: NewInstance = body.json()?.ok_or(Problem::NoBody)?;
            let made = instances::create_instance(app, call, name(new.name)?).await?;
            Ok(Answer::json(StatusCode::CREATED, JSON, &instance(&made)))
        }
        Action::ListServiceIds => {
            let all = service_ids::list_service_ids(app, call).await?;
            let serviceids = all.iter().map(service_id).collect();
            Ok(Answer::json(StatusCode::OK, JSON, &ServiceIds { serviceids }))
        }
        Action::CreateServiceId => {
            let new: NewServiceId = body.json()?.ok_or(Problem::NoBody)?;
            let made = service_ids::create_service_id(app, call, grant_of(new)?).await?;
            Ok(Answer::json(StatusCode::CREATED, JSON, &service_id(&made)))
        }
        Action::ListApiKeys => {
            let all = api_keys::list_api_keys(app, call).await?;
            let apikeys = all.iter().map(|key| api_key(key, None)).collect();
            Ok(Answer::json(StatusCode::OK, JSON, &ApiKeys { apikeys }))
        }
        Action::CreateApiKey => {
            let new: NewApiKey = body.json()?.ok_or(Problem::NoBody)?;
            let owner = id("service_id", "ServiceId-", &new.service_id)?;
            let (made, text) = api_keys::create_api_key(app, call, owner, name(new.name)?).await?;
            Ok(Answer::json(StatusCode::CREATED, JSON, &api_key(&made, Some(text))))
        }
        Action::DeleteApiKey => {
            let id = id("id", "ApiKey-", asked.id.unwrap_or_default())
                .map_err(|_| Error::NotFound("API key"))?;
            api_keys::revoke_api_key(app, call, id).await?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        _ => Err(Problem::NoSuchPath),
    }
}

fn grant_of(new: NewServiceId) -> Result<service_ids::NewServiceId, Problem> {
    let role = Role::parse(&new.role).ok_or_else(|| {
        let names = Role::ALL.map(Role::name).join(", ");
        Error::Field { name: "role", why: format!("must be one of {names}") }
    })?;
    let instance = new.instance_id.as_deref().map(|text| id("instance_id", "", text));
    let grant = Grant { role, scope: Scope::of(instance.transpose()?) };
    let description = new.description.map(name).transpose()?;
    Ok(service_ids::NewServiceId { name: name(new.name)?, description, grant })
}

fn name(text: String) -> Result<String, Problem> {
    if !NAME_CHARS.contains(&text.chars().count()) || text.chars().any(char::is_control) {
        let why = "must have 1 to 90 printable characters".to_owned();
        return Err(Error::Field { name: "name", why }.into());
    }
    Ok(text)
}

/// A UUID, with or without the prefix that answers write before it.
fn id(name: &'static str, prefix: &str, text: &str) -> Result<Uuid, Problem> {
    let bare = text.strip_prefix(prefix).unwrap_or(text);
    let why = format!("must be {prefix}<uuid>");
    auth::uuid(bare).ok_or_else(|| Error::Field { name, why }.into())
}

fn instance(instance: &store::Instance) -> Instance {
    Instance {
        id: instance.id.to_string(),
        name: instance.name.clone(),
        created_at: rfc3339(instance.created_at),
    }
}

fn service_id(one: &store::ServiceId) -> ServiceId {
    ServiceId {
        id: format!("ServiceId-{}", one.id),
        iam_id: iam_id(one.id),
        name: one.name.clone(),
        description: one.description.clone(),
        role: one.grant.role.name().into(),
        instance_id: one.grant.scope.instance().map(|id| id.to_string()),
        created_at: rfc3339(one.created_at),
    }
}

fn api_key(key: &store::ApiKey, text: Option<SecretText>) -> ApiKey {
    ApiKey {
        id: format!("ApiKey-{}", key.id),
        name: key.name.clone(),
        service_id: format!("ServiceId-{}", key.service_id),
        created_at: rfc3339(key.created_at),
        apikey: text,
    }
}
