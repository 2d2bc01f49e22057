//! The key API between JSON and the operations: typed input in, the service's own answers out.

use super::body::Body;
use super::problem::Problem;
use super::{Answer, Asked, auth};
use crate::app::App;
use crate::ops::create_key::Description;
use crate::ops::list_keys::{Filter, Listed};
use crate::ops::unwrap::{Unwrap, Unwrapped};
use crate::ops::wrap::{Wrap, Wrapped};
use crate::ops::{self, Call, Error};
use crate::policy::Action;
use crate::store::{Key, KeyState, Page, Version};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::{HeaderMap, HeaderValue, StatusCode};
use kms_api::rest::{
    AlgorithmMetadata, Collection, KEY_ACTION_TYPE, KEY_TYPE, KeyResource, KeyVersion,
    RotateRequest, UnwrapAnswer, UnwrapRequest, WrapAnswer, WrapRequest,
};
use kms_core::secret::{SecretBytes, SecretText};
use kms_daemon::telemetry::VALUES;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::ops::RangeInclusive;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

const VERSION_TYPE: &str = "application/vnd.ibm.kms.key.version+json";
const DEFAULT_LIMIT: u32 = 200;
const MAX_LIMIT: u32 = 5000;
/// The on-premises product states these; the cloud service states no others.
const MAX_PLAINTEXT: usize = 4096;
const MAX_AAD_ENTRIES: usize = 126;
const MAX_AAD_CHARS: usize = 255;
const NAME_CHARS: RangeInclusive<usize> = 2..=90;
const DESCRIPTION_CHARS: RangeInclusive<usize> = 2..=240;
const MAX_TAGS: usize = 30;
const MAX_TAG_CHARS: usize = 30;

/// Does what the route says.
pub(super) async fn perform(
    app: &App,
    call: &Call,
    asked: &Asked<'_>,
    body: &Body,
    representation: bool,
) -> Result<Answer, Problem> {
    match asked.action {
        Action::CountKeys => count(app, call, asked).await,
        Action::ListKeys => list(app, call, asked).await,
        Action::CreateKey | Action::ImportKey => create(app, call, body).await,
        Action::ReadKey => {
            Ok(one(app, StatusCode::OK, &ops::get_key::get_key(app, call, key(asked)?).await?))
        }
        Action::ReadMetadata => {
            let key = ops::get_key::get_metadata(app, call, key(asked)?).await?;
            Ok(one(app, StatusCode::OK, &key))
        }
        Action::ListVersions => versions(app, call, asked).await,
        Action::Wrap => wrap(app, call, key(asked)?, body).await,
        Action::Unwrap => unwrap(app, call, key(asked)?, body).await,
        Action::RotateKey => rotate(app, call, key(asked)?, body).await,
        Action::DisableKey => {
            ops::disable_key::disable_key(app, call, key(asked)?).await?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        Action::EnableKey => {
            ops::enable_key::enable_key(app, call, key(asked)?).await?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        Action::DeleteKey => {
            let key = ops::delete_key::delete_key(app, call, key(asked)?).await?;
            Ok(gone(app, &key, representation))
        }
        Action::PurgeKey => {
            let key = ops::purge_key::purge_key(app, call, key(asked)?).await?;
            Ok(gone(app, &key, representation))
        }
        Action::ListInstances
        | Action::CreateInstance
        | Action::ListServiceIds
        | Action::CreateServiceId
        | Action::DeleteServiceId
        | Action::ListPolicies
        | Action::CreatePolicy
        | Action::DeletePolicy
        | Action::ListProfiles
        | Action::CreateProfile
        | Action::DeleteProfile
        | Action::ListApiKeys
        | Action::CreateApiKey
        | Action::LockApiKey
        | Action::UnlockApiKey
        | Action::RotateApiKey
        | Action::DeleteApiKey => Err(Problem::NotBuilt),
    }
}

async fn count(app: &App, call: &Call, asked: &Asked<'_>) -> Result<Answer, Problem> {
    let total = ops::list_keys::count_keys(app, call, filter(asked)?).await?;
    let mut headers = HeaderMap::new();
    headers.insert("key-total", HeaderValue::from(total));
    Ok(Answer::with(StatusCode::OK, headers))
}

async fn list(app: &App, call: &Call, asked: &Asked<'_>) -> Result<Answer, Problem> {
    asked.query.refuse(&["search", "sort"])?;
    let (filter, page) = (filter(asked)?, page(asked)?);
    let Listed { keys, total } = ops::list_keys::list_keys(app, call, filter, page).await?;
    let mut collection =
        Collection::new(KEY_TYPE, keys.iter().map(|key| resource(app, key)).collect());
    if asked.query.flag("totalCount")? == Some(true) {
        collection.metadata.total_count = Some(total);
    }
    Ok(Answer::json(StatusCode::OK, KEY_TYPE, &collection))
}

async fn create(app: &App, call: &Call, body: &Body) -> Result<Answer, Problem> {
    let new = body.json::<CreateBody>()?.ok_or(Problem::NoBody)?.only_resource()?;
    let payload = new.root_key_payload()?;
    let description = new.description(app)?;
    let key = match payload {
        None => ops::create_key::create_key(app, call, description).await?,
        Some(material) => ops::import_key::import_key(app, call, description, material).await?,
    };
    Ok(one(app, StatusCode::CREATED, &key))
}

async fn versions(app: &App, call: &Call, asked: &Asked<'_>) -> Result<Answer, Problem> {
    let any_state = asked.query.flag("allKeyStates")? == Some(true);
    let page = page(asked)?;
    let all = ops::get_key::list_versions(app, call, key(asked)?, any_state).await?;
    let total = u64::try_from(all.len()).unwrap_or(u64::MAX);
    let (offset, limit) = (page.offset as usize, page.limit as usize);
    let shown = all.iter().skip(offset).take(limit).map(version).collect();
    let mut collection = Collection::new(VERSION_TYPE, shown);
    if asked.query.flag("totalCount")? == Some(true) {
        collection.metadata.total_count = Some(total);
    }
    Ok(Answer::json(StatusCode::OK, VERSION_TYPE, &collection))
}

async fn wrap(app: &App, call: &Call, key: Uuid, body: &Body) -> Result<Answer, Problem> {
    let request = body.json::<WrapRequest>()?.unwrap_or_default();
    let plaintext = request.plaintext.filter(|text| !text.is_empty());
    let plaintext = plaintext.map(|text| decode("plaintext", &text, MAX_PLAINTEXT)).transpose()?;
    let asked = Wrap { key, plaintext, aad: aad(request.aad)? };
    let Wrapped { ciphertext, made, version } = ops::wrap::wrap(app, call, asked).await?;
    tracing::info!(target: VALUES, "wrapped with key {key}, version {}: {ciphertext}", version.id);
    let answer = WrapAnswer {
        ciphertext,
        plaintext: made.as_ref().map(encode),
        key_version: Some(version_id(&version)),
    };
    Ok(Answer::json(StatusCode::OK, KEY_ACTION_TYPE, &answer))
}

async fn unwrap(app: &App, call: &Call, key: Uuid, body: &Body) -> Result<Answer, Problem> {
    let request = body.json::<UnwrapRequest>()?.ok_or(Problem::NoBody)?;
    let asked = Unwrap { key, ciphertext: request.ciphertext, aad: aad(request.aad)? };
    let Unwrapped { plaintext, version, rewrapped } = ops::unwrap::unwrap(app, call, asked).await?;
    tracing::info!(target: VALUES, "unwrapped with key {key}, version {}", version.id);
    let (ciphertext, newer) = rewrapped.unzip();
    let answer = UnwrapAnswer {
        plaintext: encode(&plaintext),
        key_version: Some(version_id(&version)),
        ciphertext,
        rewrapped_key_version: newer.as_ref().map(version_id),
    };
    Ok(Answer::json(StatusCode::OK, KEY_ACTION_TYPE, &answer))
}

async fn rotate(app: &App, call: &Call, key: Uuid, body: &Body) -> Result<Answer, Problem> {
    let request = body.json::<RotateRequest>()?.unwrap_or_default();
    let payload = request.payload.filter(|text| !text.is_empty());
    let material = payload.map(|text| decode("payload", &text, MAX_PLAINTEXT)).transpose()?;
    ops::rotate_key::rotate_key(app, call, key, material).await?;
    Ok(Answer::empty(StatusCode::NO_CONTENT))
}

/// With the key as it is, or as it was.
fn gone(app: &App, key: &Key, representation: bool) -> Answer {
    if representation {
        one(app, StatusCode::OK, key)
    } else {
        Answer::empty(StatusCode::NO_CONTENT)
    }
}

/// The body of create and import. Names are in lower case here because `Body::json` reads them so.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateBody {
    #[serde(rename = "metadata")]
    _metadata: Option<IgnoredAny>,
    resources: Vec<NewResource>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct NewResource {
    #[serde(rename = "type")]
    _kind: Option<IgnoredAny>,
    name: Option<String>,
    description: Option<String>,
    tags: Option<Vec<String>>,
    aliases: Option<Vec<String>>,
    expirationdate: Option<String>,
    extractable: Option<bool>,
    payload: Option<SecretText>,
    encryptednonce: Option<String>,
    iv: Option<String>,
    #[serde(rename = "encryptionalgorithm")]
    _encryption_algorithm: Option<IgnoredAny>,
}

impl CreateBody {
    fn only_resource(self) -> Result<NewResource, Problem> {
        let mut resources = self.resources.into_iter();
        match (resources.next(), resources.next()) {
            (Some(only), None) => Ok(only),
            _ => Err(Problem::BadBody("resources must hold exactly one key".into())),
        }
    }
}

impl NewResource {
    /// The key material to import, if any, once it is sure that a root key is meant.
    fn root_key_payload(&self) -> Result<Option<SecretBytes>, Problem> {
        // Absent means extractable, as in the service whose API this is.
        if self.extractable != Some(false) {
            return Err(Error::NotBuilt("standard keys (extractable: true)").into());
        }
        if self.encryptednonce.is_some() || self.iv.is_some() {
            return Err(Error::NotBuilt("secure import (encryptedNonce, iv)").into());
        }
        if self.aliases.as_ref().is_some_and(|aliases| !aliases.is_empty()) {
            return Err(Error::NotBuilt("aliases").into());
        }
        let payload = self.payload.as_ref().filter(|text| !text.is_empty());
        payload.map(|text| decode("payload", text, MAX_PLAINTEXT)).transpose()
    }

    fn description(self, app: &App) -> Result<Description, Problem> {
        let name = self.name.ok_or_else(|| field("name", "is required"))?;
        check_text("name", &name, NAME_CHARS)?;
        if let Some(text) = &self.description {
            check_text("description", text, DESCRIPTION_CHARS)?;
        }
        let tags = self.tags.unwrap_or_default();
        if tags.len() > MAX_TAGS || tags.iter().any(|tag| tag.chars().count() > MAX_TAG_CHARS) {
            return Err(field("tags", "must be at most 30 of at most 30 characters"));
        }
        let expires_at = self.expirationdate.map(|text| expiration(app, &text)).transpose()?;
        Ok(Description { name, description: self.description, tags, expires_at })
    }
}

fn key(asked: &Asked<'_>) -> Result<Uuid, Problem> {
    // Aliases are not built: what is no UUID names no key.
    Ok(asked.id.and_then(auth::uuid).ok_or(Error::KeyNotFound)?)
}

fn filter(asked: &Asked<'_>) -> Result<Filter, Problem> {
    asked.query.refuse(&["filter"])?;
    Ok(Filter { states: asked.query.states()?, extractable: asked.query.flag("extractable")? })
}

fn page(asked: &Asked<'_>) -> Result<Page, Problem> {
    let limit = asked.query.number("limit", DEFAULT_LIMIT, MAX_LIMIT)?;
    let offset = asked.query.number("offset", 0, u32::MAX)?;
    Ok(Page { limit, offset })
}

fn aad(given: Option<Vec<String>>) -> Result<Vec<String>, Problem> {
    let aad = given.unwrap_or_default();
    if aad.len() > MAX_AAD_ENTRIES || aad.iter().any(|one| one.chars().count() > MAX_AAD_CHARS) {
        return Err(field("aad", "must be at most 126 strings of at most 255 characters"));
    }
    Ok(aad)
}

fn expiration(app: &App, text: &str) -> Result<OffsetDateTime, Problem> {
    let at = OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|_| field("expirationDate", "must be a time as RFC 3339 writes it"))?;
    if at <= app.now() {
        return Err(field("expirationDate", "must be in the future"));
    }
    Ok(at)
}

fn check_text(name: &'static str, text: &str, chars: RangeInclusive<usize>) -> Result<(), Problem> {
    let (least, most) = (chars.start(), chars.end());
    if !chars.contains(&text.chars().count()) || text.chars().any(char::is_control) {
        return Err(field(name, &format!("must have {least} to {most} printable characters")));
    }
    Ok(())
}

fn decode(name: &'static str, text: &SecretText, most: usize) -> Result<SecretBytes, Problem> {
    let bytes = BASE64.decode(text.expose()).map(SecretBytes::new);
    let bytes = bytes.map_err(|_| field(name, "must be base64 encoded"))?;
    if bytes.is_empty() || bytes.len() > most {
        return Err(field(name, &format!("must hold 1 to {most} bytes")));
    }
    Ok(bytes)
}

fn encode(bytes: &SecretBytes) -> SecretText {
    SecretText::new(BASE64.encode(bytes.as_slice()))
}

fn field(name: &'static str, why: &str) -> Problem {
    Error::Field { name, why: why.to_owned() }.into()
}

fn one(app: &App, status: StatusCode, key: &Key) -> Answer {
    Answer::json(status, KEY_TYPE, &Collection::new(KEY_TYPE, vec![resource(app, key)]))
}

fn resource(app: &App, key: &Key) -> KeyResource {
    let now = app.now();
    let state = key.state(now);
    let destroyed = state == KeyState::Destroyed;
    let ripe_at = key.deleted_at.map(|at| at + app.settings.min_purge_wait);
    let bits = if key.imported { None } else { Some(256) };
    KeyResource {
        kind: Some(KEY_TYPE.into()),
        id: Some(key.id.to_string()),
        name: Some(key.name.clone()),
        description: key.description.clone(),
        tags: key.tags.clone(),
        state: Some(state.number()),
        extractable: Some(false),
        crn: Some(format!("crn:v1:keelson:private:kms:::{}:key:{}", key.instance, key.id)),
        imported: Some(key.imported),
        key_ring_id: Some("default".into()),
        algorithm_type: Some("AES".into()),
        algorithm_metadata: bits.map(|bits: u32| AlgorithmMetadata {
            bit_length: Some(bits.to_string()),
            mode: Some("CBC_PAD".into()),
        }),
        algorithm_bit_size: bits,
        algorithm_mode: Some("CBC_PAD".into()),
        creation_date: Some(rfc3339(key.created_at)),
        created_by: Some(key.created_by.clone()),
        expiration_date: key.expires_at.map(rfc3339),
        last_update_date: key.deleted_at.or(key.rotated_at).map(rfc3339),
        last_rotate_date: key.rotated_at.map(rfc3339),
        key_version: Some(version(&key.version)),
        deleted: destroyed.then_some(true),
        deletion_date: key.deleted_at.map(rfc3339),
        deleted_by: key.deleted_by.clone(),
        purge_allowed: ripe_at.map(|at| at <= now),
        purge_allowed_from: ripe_at.map(rfc3339),
        ..KeyResource::default()
    }
}

fn version(version: &Version) -> KeyVersion {
    KeyVersion { creation_date: Some(rfc3339(version.created_at)), ..version_id(version) }
}

fn version_id(version: &Version) -> KeyVersion {
    KeyVersion { id: version.id.to_string(), creation_date: None }
}

/// With `Z` and the fraction that the clock has: one client compares it with a time in nanoseconds.
pub(super) fn rfc3339(at: OffsetDateTime) -> String {
    at.to_offset(time::UtcOffset::UTC).format(&Rfc3339).unwrap_or_default()
}
