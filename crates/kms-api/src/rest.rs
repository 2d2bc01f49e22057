//! The JSON of the key service (Key Protect REST v2) and of the token service (IAM): one set of types, which our
//! server writes and our clients read, so that both cannot drift apart. Members that carry key material, API keys
//! or tokens are secret types: wiped on drop and never printed.

use kms_core::secret::SecretText;
use serde::{Deserialize, Serialize, Serializer};

/// Media type of one key or several; `collectionType` of key answers and `type` of a key resource.
pub const KEY_TYPE: &str = "application/vnd.ibm.kms.key+json";
/// Media type of wrap, unwrap and rotate.
pub const KEY_ACTION_TYPE: &str = "application/vnd.ibm.kms.key_action+json";
/// `collectionType` of a refusal.
pub const ERROR_TYPE: &str = "application/vnd.ibm.kms.error+json";
/// The grant that trades an API key for a token.
pub const API_KEY_GRANT: &str = "urn:ibm:params:oauth:grant-type:apikey";
/// The grant that trades a compute resource's token, such as a Kubernetes service account's, for one of a profile.
pub const CR_TOKEN_GRANT: &str = "urn:ibm:params:oauth:grant-type:cr-token";
/// RFC 7523: the grant that trades a token of another issuer.
pub const JWT_BEARER_GRANT: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";

/// The envelope of every list, of key creation and of every refusal.
#[derive(Debug, Serialize, Deserialize)]
pub struct Collection<T> {
    pub metadata: Metadata,
    // Absent means empty: the cloud service leaves the member out, one of IBM's clients insists on it.
    #[serde(default = "Vec::new")]
    pub resources: Vec<T>,
}

impl<T> Collection<T> {
    /// An envelope of `kind` around all of `resources`.
    pub fn new(kind: &str, resources: Vec<T>) -> Self {
        let total = u64::try_from(resources.len()).unwrap_or(u64::MAX);
        let metadata = Metadata {
            collection_type: kind.to_owned(),
            collection_total: total,
            ..Metadata::default()
        };
        Collection { metadata, resources }
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    #[serde(default)]
    pub collection_type: String,
    #[serde(default)]
    pub collection_total: u64,
    /// Only where the request said `totalCount=true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_count: Option<u64>,
}

/// A key as created, listed and shown. A request names only what it wants; an answer leaves out what does not apply.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyResource {
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// 0 pre-activation, 1 active, 2 suspended, 3 deactivated, 5 destroyed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<u8>,
    /// True for a standard key, false for a root key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extractable: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crn: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported: Option<bool>,
    #[serde(default, rename = "keyRingID", skip_serializing_if = "Option::is_none")]
    pub key_ring_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm_metadata: Option<AlgorithmMetadata>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm_bit_size: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm_mode: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonactive_state_reason: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_date: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiration_date: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_update_date: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_rotate_date: Option<String>,
    /// The version that wraps now; root keys only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_version: Option<KeyVersion>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_date: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted_by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purge_allowed: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purge_allowed_from: Option<String>,
    /// Base64 key material: on import, and when a standard key is read.
    #[serde(
        default,
        serialize_with = "write_optional_secret",
        skip_serializing_if = "Option::is_none"
    )]
    pub payload: Option<SecretText>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AlgorithmMetadata {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bit_length: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyVersion {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_date: Option<String>,
}

/// Without `plaintext` the service makes a DEK and returns it beside its wrapped form.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrapRequest {
    #[serde(
        default,
        serialize_with = "write_optional_secret",
        skip_serializing_if = "Option::is_none"
    )]
    pub plaintext: Option<SecretText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aad: Option<Vec<String>>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WrapAnswer {
    /// The WDEK.
    pub ciphertext: String,
    /// Base64 of the DEK, only where the service made it.
    #[serde(
        default,
        serialize_with = "write_optional_secret",
        skip_serializing_if = "Option::is_none"
    )]
    pub plaintext: Option<SecretText>,
    /// The CRK version that wrapped; the on-premises product of 2019 does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_version: Option<KeyVersion>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnwrapRequest {
    pub ciphertext: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aad: Option<Vec<String>>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UnwrapAnswer {
    /// Base64 of the DEK.
    #[serde(serialize_with = "write_secret")]
    pub plaintext: SecretText,
    /// The CRK version that the WDEK was made with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_version: Option<KeyVersion>,
    /// The same DEK wrapped by the newest version, only where the WDEK came from an older one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ciphertext: Option<String>,
    /// The version of that newer `ciphertext`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewrapped_key_version: Option<KeyVersion>,
}

/// Imported keys need the next version's material, generated keys must not have any.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotateRequest {
    #[serde(
        default,
        serialize_with = "write_optional_secret",
        skip_serializing_if = "Option::is_none"
    )]
    pub payload: Option<SecretText>,
}

/// What the key service answers when it refuses.
pub type ErrorBody = Collection<Refusal>;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    /// One of IBM's clients reads nothing else, so the reason code stands here too, in parentheses.
    pub error_msg: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<Reason>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reason {
    #[serde(default)]
    pub code: String,
    #[serde(default)]
    pub message: String,
    #[serde(default)]
    pub status: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub more_info: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Target {
    /// `field` or `query_param`.
    #[serde(rename = "type")]
    pub kind: String,
    pub name: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct TokenAnswer {
    #[serde(serialize_with = "write_secret")]
    pub access_token: SecretText,
    /// Often literally `not_supported`.
    #[serde(
        default,
        serialize_with = "write_optional_secret",
        skip_serializing_if = "Option::is_none"
    )]
    pub refresh_token: Option<SecretText>,
    #[serde(default)]
    pub token_type: String,
    /// Seconds that the token lives from now. IBM's Go client reads 32 bits.
    pub expires_in: u32,
    /// Seconds since 1970 at which it ends.
    #[serde(default)]
    pub expiration: u64,
    #[serde(default)]
    pub scope: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenError {
    pub error_code: String,
    pub error_message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_details: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<TokenErrorContext>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenErrorContext {
    #[serde(default)]
    pub request_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_type: Option<String>,
}

/// A group of keys of one tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    pub id: String,
    pub name: String,
    pub created_at: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewInstance {
    pub name: String,
}

/// Answer of `GET /v1/instances`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Instances {
    pub instances: Vec<Instance>,
}

/// Who an API key speaks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceId {
    /// `ServiceId-<uuid>`.
    pub id: String,
    /// `iam-ServiceId-<uuid>`: the subject of its tokens and the `createdBy` of its keys.
    pub iam_id: String,
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The instance whose administrators manage it; absent means that only those of every instance do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<String>,
    /// What it may do, and where.
    pub policies: Vec<Policy>,
    pub created_at: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewServiceId {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The role of its first policy, such as `Viewer`, `Editor` or `Administrator`.
    pub role: String,
    /// The one instance in which the role holds; absent means every instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<String>,
    /// The one key of that instance for which the role holds; absent means all its keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
}

/// One role of one service ID, in one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// `Policy-<uuid>`.
    pub id: String,
    pub service_id: String,
    pub role: String,
    /// The one instance in which it holds; absent means every instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<String>,
    /// The one key for which it holds; absent means all keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    pub created_at: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewPolicy {
    pub service_id: String,
    pub role: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
}

/// Answer of `GET /v1/policies`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Policies {
    pub policies: Vec<Policy>,
}

/// Whose tokens of another issuer speak for a service ID.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// `Profile-<uuid>`.
    pub id: String,
    /// `iam-Profile-<uuid>`: the subject of its tokens and the `createdBy` of its keys.
    pub iam_id: String,
    pub name: String,
    pub service_id: String,
    /// What `iss` of a token must be.
    pub issuer: String,
    /// What `sub` of a token must be.
    pub subject: String,
    pub created_at: String,
}

/// The subject, or the Kubernetes service account whose subject is meant.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewProfile {
    pub name: String,
    pub service_id: String,
    pub issuer: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
}

/// Answer of `GET /v1/profiles`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Profiles {
    pub profiles: Vec<Profile>,
}

/// Answer of `GET /v1/serviceids`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct ServiceIds {
    pub serviceids: Vec<ServiceId>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct ApiKey {
    /// `ApiKey-<uuid>`: names the key without being one.
    pub id: String,
    pub name: String,
    /// The service ID that it speaks for.
    pub service_id: String,
    pub created_at: String,
    /// While it is locked it gets no tokens, and those that it got are refused.
    #[serde(default)]
    pub locked: bool,
    /// When it last got a new secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotated_at: Option<String>,
    /// The API key itself, in the answer to its creation or rotation only.
    #[serde(
        default,
        serialize_with = "write_optional_secret",
        skip_serializing_if = "Option::is_none"
    )]
    pub apikey: Option<SecretText>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewApiKey {
    pub name: String,
    pub service_id: String,
}

/// How an API key gets its next secret.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotation {
    /// How long the secret before it is taken as well.
    #[serde(default)]
    pub overlap_seconds: u32,
}

/// Answer of `GET /v1/apikeys`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct ApiKeys {
    pub apikeys: Vec<ApiKey>,
}

/// Secret text into JSON. It exists here and not on the type, so that nothing is ever written out by accident.
fn write_secret<S: Serializer>(text: &SecretText, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(text.expose())
}

fn write_optional_secret<S: Serializer>(
    text: &Option<SecretText>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match text {
        Some(text) => to.serialize_some(text.expose()),
        None => to.serialize_none(),
    }
}
