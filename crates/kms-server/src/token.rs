//! Access tokens: issued for an API key, signed in the HSM, checked here on every call.
//!
//! One issuer, one key, one algorithm. The private key is never in this process, and nothing that a token says about
//! how to check it (`alg`, `kid`, `jku`, `jwk`, ...) is followed: its header must be ours, byte for byte.

use crate::policy::{ApiKeySecret, Caller, Credential, PROFILE_PREFIX, SERVICE_ID_PREFIX};
use crate::store::SigningKey;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use kms_core::clock::Clock;
use kms_core::secret::SecretText;
use kms_hsm::{Vault, VaultError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Whom our tokens are for. A token of another service under the same issuer is not one for this API.
const AUDIENCE: &str = "kms";
/// How long after its end a token is still taken, for its way here.
const LEEWAY_SECONDS: u64 = 5;
/// How much a replica's clock may be ahead of ours: beyond that its tokens seem to come from the future, and its callers
/// are refused here. They are genuine all the same, so that a generous bound costs nothing.
const MAX_SKEW_SECONDS: u64 = 60;
/// No token of ours is longer; anything longer is refused before it is decoded.
const MAX_TOKEN: usize = 4096;

/// Issues and checks tokens.
#[derive(Debug)]
pub struct Issuer {
    url: String,
    lifetime: Duration,
    key: SigningKey,
    header: String,
    clock: Arc<dyn Clock>,
    check: (DecodingKey, Validation),
}

/// A token as it is handed out.
#[derive(Debug)]
pub struct Issued {
    pub token: SecretText,
    pub expires_in: u32,
    /// Seconds since 1970.
    pub expiration: u64,
}

/// What a genuine token says. Whether the credential that it was got with is still good is for the store to say.
#[derive(Debug, PartialEq, Eq)]
pub enum Bearer {
    ServiceId { service_id: Uuid, secret: ApiKeySecret },
    Profile(Uuid),
}

/// What a token is issued for.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// The name of the grant that was asked for.
    pub grant: &'static str,
    /// Seconds since 1970 that the token must not outlive: it may come from another one that ends.
    pub until: Option<u64>,
}

/// Not one of our tokens, or no longer. One answer for every reason: which it was is for the audit log only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the token is not valid")]
pub enum NotValid {
    /// Its header is not ours: no token at all, or one of another key or algorithm.
    Foreign,
    Signature,
    Issuer,
    Audience,
    Expired,
    /// It is from the future, or for longer than ours are.
    Times,
    /// It is signed, but says nothing that we say.
    Claims,
    /// What it was got with is no longer good.
    Revoked,
}

impl NotValid {
    /// What audit records and metrics call it.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            NotValid::Foreign => "TOKEN_FOREIGN",
            NotValid::Signature => "TOKEN_SIGNATURE",
            NotValid::Issuer => "TOKEN_ISSUER",
            NotValid::Audience => "TOKEN_AUDIENCE",
            NotValid::Expired => "TOKEN_EXPIRED",
            NotValid::Times => "TOKEN_TIMES",
            NotValid::Claims => "TOKEN_CLAIMS",
            NotValid::Revoked => "TOKEN_REVOKED",
        }
    }

    /// Why a signed token is none of ours.
    fn of(error: &jsonwebtoken::errors::Error) -> NotValid {
        match error.kind() {
            ErrorKind::InvalidSignature => NotValid::Signature,
            ErrorKind::InvalidIssuer => NotValid::Issuer,
            ErrorKind::InvalidAudience => NotValid::Audience,
            ErrorKind::MissingRequiredClaim(_) | ErrorKind::Json(_) => NotValid::Claims,
            // No token: parts, base64, a header that only begins as ours.
            _ => NotValid::Foreign,
        }
    }
}

/// The public key, as `GET /identity/keys` shows it.
#[derive(Debug, Serialize)]
pub struct Jwk {
    kty: &'static str,
    n: String,
    e: String,
    alg: &'static str,
    kid: String,
}

impl Issuer {
    #[must_use]
    pub fn new(url: String, lifetime: Duration, key: SigningKey, clock: Arc<dyn Clock>) -> Self {
        let header = BASE64URL
            .encode(format!(r#"{{"alg":"RS256","kid":"{}","typ":"JWT"}}"#, key.id.hyphenated()));
        let decoding = DecodingKey::from_rsa_raw_components(&key.public.n, &key.public.e);
        let check = (decoding, validation(&url));
        Self { url, lifetime, key, header, clock, check }
    }

    /// Signs a token for `caller`.
    ///
    /// # Errors
    /// What the vault meets: every token needs it.
    pub async fn issue(
        &self,
        vault: &dyn Vault,
        caller: &Caller,
        terms: Terms,
    ) -> Result<Issued, VaultError> {
        let now = seconds(self.clock.wall());
        let left = terms.until.map_or(u64::MAX, |until| until.saturating_sub(now));
        let expires_in = u32::try_from(self.lifetime.as_secs().min(left)).unwrap_or(u32::MAX);
        let expiration = now.saturating_add(u64::from(expires_in));
        let id = random_uuid(vault).await?;
        let claims = Claims::new(&self.url, caller, terms.grant, id, now, expiration);
        let claims =
            serde_json::to_vec(&claims).map_err(|e| VaultError::BadInput(e.to_string()))?;
        let signed = format!("{}.{}", self.header, BASE64URL.encode(claims));
        let signature = vault.sign(self.key.id, signed.as_bytes()).await?;
        let token = SecretText::new(format!("{signed}.{}", BASE64URL.encode(signature)));
        Ok(Issued { token, expires_in, expiration })
    }

    /// Checks form, header, signature, issuer, audience and times, in this order.
    ///
    /// # Errors
    /// [`NotValid`].
    pub fn verify(&self, token: &str) -> Result<Bearer, NotValid> {
        if token.len() > MAX_TOKEN || token.split('.').next() != Some(self.header.as_str()) {
            return Err(NotValid::Foreign);
        }
        let (key, validation) = &self.check;
        let decoded = jsonwebtoken::decode::<Claims>(token, key, validation);
        let claims = decoded.map_err(|error| NotValid::of(&error))?.claims;
        self.check_times(&claims)?;
        bearer(&claims)
    }

    #[must_use]
    pub fn jwk(&self) -> Jwk {
        Jwk {
            kty: "RSA",
            n: BASE64URL.encode(&self.key.public.n),
            e: BASE64URL.encode(&self.key.public.e),
            alg: "RS256",
            kid: self.key.id.to_string(),
        }
    }

    fn check_times(&self, claims: &Claims) -> Result<(), NotValid> {
        let now = seconds(self.clock.wall());
        let latest = now.saturating_add(MAX_SKEW_SECONDS);
        let expired = claims.exp.saturating_add(LEEWAY_SECONDS) <= now;
        // No token of ours lives longer than the lifetime, so one that claims to was not meant for this server.
        let too_long = claims.exp.saturating_sub(claims.iat) > self.lifetime.as_secs();
        if claims.iat > latest || claims.nbf > latest || too_long {
            return Err(NotValid::Times);
        }
        if expired { Err(NotValid::Expired) } else { Ok(()) }
    }
}

/// A version 4 UUID whose bits are the vault's.
///
/// # Errors
/// What the vault meets.
pub async fn random_uuid(vault: &dyn Vault) -> Result<Uuid, VaultError> {
    let random = vault.random(16).await?;
    let bytes = <[u8; 16]>::try_from(random.as_slice())
        .map_err(|_| VaultError::Policy("the HSM returned a short random value".into()))?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

fn validation(url: &str) -> Validation {
    let mut validation = Validation::new(Algorithm::RS256);
    validation.set_issuer(&[url]);
    validation.set_audience(&[AUDIENCE]);
    validation.set_required_spec_claims(&["exp", "nbf", "iss", "aud", "sub"]);
    // Times are checked against our own clock, which tests can move.
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation
}

/// The members are those of the cloud service's tokens; `aud`, `nbf` and the last two are ours.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iam_id: String,
    id: String,
    realmid: String,
    jti: String,
    identifier: String,
    sub: String,
    sub_type: String,
    authn: Authn,
    account: Account,
    iat: u64,
    nbf: u64,
    exp: u64,
    iss: String,
    aud: String,
    grant_type: String,
    scope: String,
    client_id: String,
    acr: u8,
    amr: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    api_key_id: Option<Uuid>,
    /// Which of the secrets that this API key has had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    api_key_generation: Option<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Authn {
    sub: String,
    iam_id: String,
    sub_type: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Account {
    valid: bool,
    frozen: bool,
}

impl Claims {
    fn new(
        issuer: &str,
        caller: &Caller,
        grant: &str,
        id: Uuid,
        now: u64,
        expiration: u64,
    ) -> Self {
        let iam_id = caller.iam_id();
        let sub = iam_id.strip_prefix("iam-").unwrap_or_default().to_owned();
        let (secret, sub_type) = match caller.credential {
            Credential::ApiKey(secret) => (Some(secret), "ServiceId"),
            Credential::Profile(_) => (None, "ComputeResource"),
        };
        Claims {
            id: iam_id.clone(),
            realmid: "iam".into(),
            jti: id.to_string(),
            identifier: sub.clone(),
            sub_type: sub_type.into(),
            authn: Authn { sub: sub.clone(), iam_id: iam_id.clone(), sub_type: sub_type.into() },
            account: Account { valid: true, frozen: false },
            iat: now,
            nbf: now,
            exp: expiration,
            iss: issuer.into(),
            aud: AUDIENCE.into(),
            grant_type: grant.into(),
            scope: "ibm openid".into(),
            client_id: "default".into(),
            acr: 1,
            amr: vec!["pwd".into()],
            api_key_id: secret.map(|secret| secret.api_key),
            api_key_generation: secret.map(|secret| secret.generation),
            iam_id,
            sub,
        }
    }
}

fn bearer(claims: &Claims) -> Result<Bearer, NotValid> {
    let named = |prefix| claims.iam_id.strip_prefix(prefix).and_then(|id| id.parse().ok());
    let secret = claims.api_key_id.zip(claims.api_key_generation);
    match (named(SERVICE_ID_PREFIX), named(PROFILE_PREFIX), secret) {
        (Some(service_id), None, Some((api_key, generation))) => {
            Ok(Bearer::ServiceId { service_id, secret: ApiKeySecret { api_key, generation } })
        }
        (None, Some(profile), None) => Ok(Bearer::Profile(profile)),
        _ => Err(NotValid::Claims),
    }
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
