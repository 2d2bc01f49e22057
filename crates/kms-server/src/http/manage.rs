//! Management on the token service's port: instances, service IDs and their policies, API keys, trusted profiles. An API
//! key is shown by the answer to its creation or rotation and never again.

use super::body::Body;
use super::keys::rfc3339;
use super::problem::Problem;
use super::{Answer, Asked, auth};
use crate::app::App;
use crate::issuers::document::service_account;
use crate::ops::{Call, Error, api_keys, instances, policies, profiles, service_ids};
use crate::policy::{Action, Grant, PROFILE_PREFIX, Role, Scope, iam_id};
use crate::store;
use http::StatusCode;
use kms_api::rest::{
    ApiKey, ApiKeys, Instance, Instances, NewApiKey, NewInstance, NewPolicy, NewProfile,
    NewServiceId, Policies, Policy, Profile, Profiles, Rotation, ServiceId, ServiceIds,
};
use kms_core::secret::SecretText;
use std::ops::RangeInclusive;
use std::time::Duration;
use uuid::Uuid;

const JSON: &str = "application/json";
const NAME_CHARS: RangeInclusive<usize> = 1..=90;
const SUBJECT_CHARS: RangeInclusive<usize> = 1..=255;
/// Long enough to tell every node, short enough that an old secret is not forgotten.
const MAX_OVERLAP: u32 = 7 * 86_400;

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
        Action::DeleteServiceId => {
            let id = named(asked, "ServiceId-", "service ID")?;
            service_ids::delete_service_id(app, call, id).await?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        Action::ListPolicies => {
            let all = policies::list_policies(app, call).await?;
            let policies = all.iter().map(policy).collect();
            Ok(Answer::json(StatusCode::OK, JSON, &Policies { policies }))
        }
        Action::CreatePolicy => {
            let new: NewPolicy = body.json()?.ok_or(Problem::NoBody)?;
            let owner = id("service_id", "ServiceId-", &new.service_id)?;
            let grant = grant(&new.role, new.instance_id.as_deref(), new.key_id.as_deref())?;
            let made = policies::create_policy(app, call, owner, grant).await?;
            Ok(Answer::json(StatusCode::CREATED, JSON, &policy(&made)))
        }
        Action::DeletePolicy => {
            policies::delete_policy(app, call, named(asked, "Policy-", "policy")?).await?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        Action::ListProfiles => {
            let all = profiles::list_profiles(app, call).await?;
            let profiles = all.iter().map(profile).collect();
            Ok(Answer::json(StatusCode::OK, JSON, &Profiles { profiles }))
        }
        Action::CreateProfile => {
            let new: NewProfile = body.json()?.ok_or(Problem::NoBody)?;
            let made = profiles::create_profile(app, call, new_profile(new)?).await?;
            Ok(Answer::json(StatusCode::CREATED, JSON, &profile(&made)))
        }
        Action::DeleteProfile => {
            profiles::delete_profile(app, call, named(asked, "Profile-", "profile")?).await?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        _ => api_key_call(app, call, asked, body).await,
    }
}

async fn api_key_call(
    app: &App,
    call: &Call,
    asked: &Asked<'_>,
    body: &Body,
) -> Result<Answer, Problem> {
    match asked.action {
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
        Action::LockApiKey => {
            api_keys::lock_api_key(app, call, named_key(asked)?).await?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        Action::UnlockApiKey => {
            api_keys::unlock_api_key(app, call, named_key(asked)?).await?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        Action::RotateApiKey => {
            let overlap = overlap(&body.json::<Rotation>()?.unwrap_or_default())?;
            let (key, text) =
                api_keys::rotate_api_key(app, call, named_key(asked)?, overlap).await?;
            Ok(Answer::json(StatusCode::OK, JSON, &api_key(&key, Some(text))))
        }
        Action::DeleteApiKey => {
            api_keys::revoke_api_key(app, call, named_key(asked)?).await?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        _ => Err(Problem::NoSuchPath),
    }
}

fn grant_of(new: NewServiceId) -> Result<service_ids::NewServiceId, Problem> {
    let grant = grant(&new.role, new.instance_id.as_deref(), new.key_id.as_deref())?;
    let description = new.description.map(name).transpose()?;
    Ok(service_ids::NewServiceId { name: name(new.name)?, description, grant })
}

fn grant(role: &str, instance: Option<&str>, key: Option<&str>) -> Result<Grant, Problem> {
    let role = Role::parse(role).ok_or_else(|| {
        let names = Role::ALL.map(Role::name).join(", ");
        Error::Field { name: "role", why: format!("must be one of {names}") }
    })?;
    let instance = instance.map(|text| id("instance_id", "", text)).transpose()?;
    let key = key.map(|text| id("key_id", "", text)).transpose()?;
    let scope = match (instance, key) {
        (instance, None) => Scope::of(instance),
        (Some(instance), Some(key)) => Scope::Key { instance, key },
        (None, Some(_)) => {
            let why = "is required with a key_id: the instance of that key".to_owned();
            return Err(Error::Field { name: "instance_id", why }.into());
        }
    };
    Ok(Grant { role, scope })
}

fn new_profile(new: NewProfile) -> Result<profiles::NewProfile, Problem> {
    let subject = match (new.subject, new.namespace, new.service_account) {
        (Some(subject), None, None) => subject,
        (None, Some(namespace), Some(account)) if dns(&namespace) && dns(&account) => {
            service_account(&namespace, &account)
        }
        _ => {
            let why =
                "is required, or else namespace and service_account, as Kubernetes names them";
            return Err(Error::Field { name: "subject", why: why.to_owned() }.into());
        }
    };
    if !SUBJECT_CHARS.contains(&subject.chars().count()) || subject.chars().any(char::is_control) {
        let why = "must have 1 to 255 printable characters".to_owned();
        return Err(Error::Field { name: "subject", why }.into());
    }
    let service_id = id("service_id", "ServiceId-", &new.service_id)?;
    Ok(profiles::NewProfile { name: name(new.name)?, service_id, issuer: new.issuer, subject })
}

/// A name as Kubernetes gives it; none holds a colon, which separates them in a subject.
fn dns(name: &str) -> bool {
    (1..=253).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b))
}

fn overlap(asked: &Rotation) -> Result<Duration, Problem> {
    if asked.overlap_seconds > MAX_OVERLAP {
        let why = format!("must be at most {MAX_OVERLAP}, which is a week");
        return Err(Error::Field { name: "overlap_seconds", why }.into());
    }
    Ok(Duration::from_secs(asked.overlap_seconds.into()))
}

/// The id in the path; what is no id names nothing.
fn named(asked: &Asked<'_>, prefix: &str, what: &'static str) -> Result<Uuid, Problem> {
    id("id", prefix, asked.id.unwrap_or_default()).map_err(|_| Error::NotFound(what).into())
}

fn named_key(asked: &Asked<'_>) -> Result<Uuid, Problem> {
    named(asked, "ApiKey-", "API key")
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
        instance_id: one.home.instance().map(|id| id.to_string()),
        policies: one.policies.iter().map(policy).collect(),
        created_at: rfc3339(one.created_at),
    }
}

fn policy(one: &store::Policy) -> Policy {
    Policy {
        id: format!("Policy-{}", one.id),
        service_id: format!("ServiceId-{}", one.service_id),
        role: one.grant.role.name().into(),
        instance_id: one.grant.scope.instance().map(|id| id.to_string()),
        key_id: one.grant.scope.key().map(|id| id.to_string()),
        created_at: rfc3339(one.created_at),
    }
}

fn profile(one: &store::Profile) -> Profile {
    Profile {
        id: format!("Profile-{}", one.id),
        iam_id: format!("{PROFILE_PREFIX}{}", one.id),
        name: one.name.clone(),
        service_id: format!("ServiceId-{}", one.service_id),
        issuer: one.issuer.clone(),
        subject: one.subject.clone(),
        created_at: rfc3339(one.created_at),
    }
}

fn api_key(key: &store::ApiKey, text: Option<SecretText>) -> ApiKey {
    ApiKey {
        id: format!("ApiKey-{}", key.id),
        name: key.name.clone(),
        service_id: format!("ServiceId-{}", key.service_id),
        created_at: rfc3339(key.created_at),
        locked: key.locked_at.is_some(),
        rotated_at: key.rotated_at.map(rfc3339),
        apikey: text,
    }
}
