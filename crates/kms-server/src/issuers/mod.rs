//! Other issuers' tokens, traded for ours at the token service: service-account tokens of Kubernetes clusters, and ID
//! tokens of OIDC providers. The key API never sees them.
//!
//! An issuer is trusted because the configuration names it. Of what a token says about itself only `iss` chooses whom
//! to ask, `kid` which of that issuer's keys is meant, and that key is good for one algorithm. Nothing else is followed,
//! and where an issuer's keys cannot be had, nobody is let in.

pub mod document;
mod keyring;

use document::{Claims, Header};
use jsonwebtoken::Validation;
use keyring::Keyring;
use kms_api::client::SetupError;
use kms_core::clock::Clock;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

/// Clusters' clocks and ours differ by this much at most.
const LEEWAY_SECONDS: u64 = 30;
/// A service-account token has about 1,000 bytes; ID tokens with many groups in them have more.
const MAX_TOKEN: usize = 16 * 1024;

/// One entry of ISSUERS in the configuration.
#[derive(Debug, Clone)]
pub struct Trusted {
    /// What `iss` must be, byte for byte.
    pub url: String,
    /// What must be in `aud`.
    pub audience: String,
    pub keys: KeySource,
}

/// Where an issuer's public keys come from.
#[derive(Debug, Clone)]
pub enum KeySource {
    /// The discovery document below the issuer's own URL, from a server whose certificate this CA signed.
    Discovery { ca: PathBuf },
    /// A JWKS file, for an issuer that cannot be reached from here. It is read again when it is asked for a new key.
    File(PathBuf),
}

/// Who a token was issued to, and by whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub issuer: String,
    pub subject: String,
    /// Seconds since 1970.
    pub expires: u64,
}

/// Why a token is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// The caller: one answer, whatever is wrong with the token.
    #[error("the token is not one of a trusted issuer for this service, or has expired")]
    NotTrusted,
    /// The operator: nobody can tell whether the token is good.
    #[error("the keys of issuer {issuer} cannot be had: {cause}")]
    Unavailable { issuer: String, cause: String },
}

/// All issuers that the configuration names.
#[derive(Debug)]
pub struct Issuers {
    all: Vec<(Trusted, Keyring)>,
    clock: Arc<dyn Clock>,
}

impl Issuers {
    /// Connects to nothing and reads no keys yet: a cluster that is away must not keep the server from starting.
    ///
    /// # Errors
    /// A URL or a CA file that no client can be made of.
    pub fn new(trusted: Vec<Trusted>, clock: Arc<dyn Clock>) -> Result<Issuers, SetupError> {
        let with_keys = |one: Trusted| {
            let keys = Keyring::new(&one, clock.clone())?;
            Ok::<_, SetupError>((one, keys))
        };
        Ok(Issuers { all: trusted.into_iter().map(with_keys).collect::<Result<_, _>>()?, clock })
    }

    #[must_use]
    pub fn knows(&self, issuer: &str) -> bool {
        self.all.iter().any(|(trusted, _)| trusted.url == issuer)
    }

    /// Checks length, form, issuer, key, algorithm, signature, audience and times, in this order.
    ///
    /// # Errors
    /// [`LoginError`].
    pub async fn verify(&self, token: &str) -> Result<Identity, LoginError> {
        if token.len() > MAX_TOKEN {
            return Err(LoginError::NotTrusted);
        }
        let header = Header::of(token).ok_or(LoginError::NotTrusted)?;
        let issuer = Unverified::of(token).ok_or(LoginError::NotTrusted)?.iss;
        let found = self.all.iter().find(|(trusted, _)| trusted.url == issuer);
        let (trusted, keys) = found.ok_or(LoginError::NotTrusted)?;
        let key = keys
            .key(&header.kid)
            .await
            .map_err(|cause| LoginError::Unavailable { issuer: trusted.url.clone(), cause })?;
        let key = key.filter(|key| key.names(&header.alg)).ok_or(LoginError::NotTrusted)?;
        let mut validation = Validation::new(key.algorithm());
        validation.set_issuer(&[&trusted.url]);
        validation.set_audience(&[&trusted.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        // Times are checked against our own clock, which tests can move.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        let checked = jsonwebtoken::decode::<Claims>(token, key.decoding(), &validation);
        self.identity(checked.map_err(|_| LoginError::NotTrusted)?.claims)
    }

    fn identity(&self, claims: Claims) -> Result<Identity, LoginError> {
        let now = self.clock.wall().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let latest = now.saturating_add(LEEWAY_SECONDS);
        // No leeway here: ours ends with it, and would be over before it is used.
        let expired = claims.exp <= now;
        let early =
            claims.nbf.is_some_and(|at| at > latest) || claims.iat.is_some_and(|at| at > latest);
        if expired || early || !claims.names_one_subject() {
            return Err(LoginError::NotTrusted);
        }
        Ok(Identity { issuer: claims.iss, subject: claims.sub, expires: claims.exp })
    }
}

/// What is read before anything is proved: whose key to take.
#[derive(Debug, Deserialize)]
struct Unverified {
    iss: String,
}

impl Unverified {
    fn of(token: &str) -> Option<Unverified> {
        document::part(token, 1)
    }
}
