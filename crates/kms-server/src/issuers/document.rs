//! What other issuers write: discovery documents, key sets, headers and claims. Each reader takes bounded bytes from a
//! stranger and gives back what it understood, or nothing.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use std::collections::BTreeMap;
use std::fmt;

/// Longest document that is read: real ones have a few kilobytes.
pub const MAX_DOCUMENT: usize = 256 * 1024;
/// More keys than any issuer has in use at once.
const MAX_KEYS: usize = 64;
const MAX_KID: usize = 256;
const MAX_SUBJECT: usize = 512;
/// RSA moduli of 2048 to 8192 bits; a longer one only costs time.
const MODULUS_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// For the operator: an issuer's document cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    #[error("it is longer than {MAX_DOCUMENT} bytes")]
    TooLong,
    #[error("it is not the JSON that was expected: {0}")]
    Form(String),
    #[error("it says that its issuer is {found:?}, which is not the configured one byte for byte")]
    OtherIssuer { found: String },
    #[error("its jwks_uri does not begin with https://")]
    NotHttps,
    #[error("it holds more than {MAX_KEYS} keys")]
    TooManyKeys,
    #[error("it holds two keys of one kid")]
    TwoOfOneKid,
    #[error(
        "it holds no key that can be used: RSA of 2048 bits and more, P-256 or P-384, with a kid"
    )]
    NoKeys,
}

/// The `jwks_uri` of the discovery document of `issuer`.
///
/// # Errors
/// [`DocumentError`].
pub fn jwks_uri(bytes: &[u8], issuer: &str) -> Result<String, DocumentError> {
    #[derive(Deserialize)]
    struct Discovery {
        issuer: String,
        jwks_uri: String,
    }
    let found: Discovery = parse(bytes)?;
    if found.issuer != issuer {
        let shown = found.issuer.chars().filter(|c| !c.is_control()).take(200).collect();
        return Err(DocumentError::OtherIssuer { found: shown });
    }
    if !found.jwks_uri.starts_with("https://") {
        return Err(DocumentError::NotHttps);
    }
    Ok(found.jwks_uri)
}

/// An issuer's public keys, by `kid`.
#[derive(Debug, Clone, Default)]
pub struct Keys(BTreeMap<String, Key>);

/// One public key, good for one algorithm.
#[derive(Clone)]
pub struct Key {
    algorithm: Algorithm,
    decoding: DecodingKey,
}

impl Keys {
    /// Reads a JWKS. Keys of kinds that are not used here are passed over; a document that is ambiguous is refused.
    ///
    /// # Errors
    /// [`DocumentError`].
    pub fn parse(bytes: &[u8]) -> Result<Keys, DocumentError> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Jwk>,
        }
        let set: Set = parse(bytes)?;
        if set.keys.len() > MAX_KEYS {
            return Err(DocumentError::TooManyKeys);
        }
        let mut keys = BTreeMap::new();
        for jwk in &set.keys {
            let (Some(kid), Some(key)) = (jwk.kid(), jwk.key()) else { continue };
            if keys.insert(kid.to_owned(), key).is_some() {
                return Err(DocumentError::TwoOfOneKid);
            }
        }
        if keys.is_empty() { Err(DocumentError::NoKeys) } else { Ok(Keys(keys)) }
    }

    #[must_use]
    pub fn find(&self, kid: &str) -> Option<&Key> {
        self.0.get(kid)
    }
}

impl Key {
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Whether `alg` of a token's header is this key's one algorithm.
    #[must_use]
    pub fn names(&self, alg: &str) -> bool {
        algorithm(alg) == Some(self.algorithm)
    }

    pub(super) fn decoding(&self) -> &DecodingKey {
        &self.decoding
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({:?})", self.algorithm)
    }
}

/// Members that say nothing about the public key are not read; a private or symmetric one is never used.
#[derive(Debug, Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl Jwk {
    fn kid(&self) -> Option<&str> {
        self.kid.as_deref().filter(|kid| (1..=MAX_KID).contains(&kid.len()))
    }

    /// `None` for a key that is not one for signatures of a kind that is used here.
    fn key(&self) -> Option<Key> {
        if self.purpose.as_deref().is_some_and(|purpose| purpose != "sig") {
            return None;
        }
        match self.kty.as_str() {
            "RSA" => self.rsa(),
            "EC" => self.ec(),
            _ => None,
        }
    }

    fn rsa(&self) -> Option<Key> {
        use Algorithm::{PS256, PS384, PS512, RS256, RS384, RS512};
        let algorithm = self.alg.as_deref().map_or(Some(RS256), algorithm)?;
        let fits = matches!(algorithm, RS256 | RS384 | RS512 | PS256 | PS384 | PS512);
        let modulus = BASE64URL.decode(self.n.as_deref()?).ok()?;
        let length = modulus.iter().skip_while(|byte| **byte == 0).count();
        if !fits || !MODULUS_BYTES.contains(&length) {
            return None;
        }
        let exponent = BASE64URL.decode(self.e.as_deref()?).ok()?;
        Some(Key { algorithm, decoding: DecodingKey::from_rsa_raw_components(&modulus, &exponent) })
    }

    fn ec(&self) -> Option<Key> {
        let (of_curve, size) = match self.crv.as_deref()? {
            "P-256" => (Algorithm::ES256, 32),
            "P-384" => (Algorithm::ES384, 48),
            _ => return None,
        };
        let algorithm = self.alg.as_deref().map_or(Some(of_curve), algorithm)?;
        let (x, y) = (self.x.as_deref()?, self.y.as_deref()?);
        let fits = |text: &str| BASE64URL.decode(text).is_ok_and(|bytes| bytes.len() == size);
        if algorithm != of_curve || !fits(x) || !fits(y) {
            return None;
        }
        Some(Key { algorithm, decoding: DecodingKey::from_ec_components(x, y).ok()? })
    }
}

/// Only what proves something to somebody who holds no secret: no `none`, no HMAC.
fn algorithm(name: &str) -> Option<Algorithm> {
    match name {
        "RS256" => Some(Algorithm::RS256),
        "RS384" => Some(Algorithm::RS384),
        "RS512" => Some(Algorithm::RS512),
        "PS256" => Some(Algorithm::PS256),
        "PS384" => Some(Algorithm::PS384),
        "PS512" => Some(Algorithm::PS512),
        "ES256" => Some(Algorithm::ES256),
        "ES384" => Some(Algorithm::ES384),
        _ => None,
    }
}

/// The header of a token, as far as it is listened to.
#[derive(Debug, Deserialize)]
pub struct Header {
    pub alg: String,
    pub kid: String,
    // RFC 7515 4.1.11: who does not understand what is critical must refuse; nothing of it is understood here.
    crit: Option<IgnoredAny>,
}

impl Header {
    /// `None` for what is no token of three parts, has no `alg` or `kid`, or says that something is critical.
    #[must_use]
    pub fn of(token: &str) -> Option<Header> {
        if token.split('.').count() != 3 {
            return None;
        }
        part(token, 0).filter(|header: &Header| header.crit.is_none())
    }
}

/// What a token says about whom it was issued to.
#[derive(Debug, Deserialize)]
pub struct Claims {
    pub iss: String,
    pub sub: String,
    pub exp: u64,
    pub nbf: Option<u64>,
    pub iat: Option<u64>,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<Kubernetes>,
}

#[derive(Debug, Deserialize)]
struct Kubernetes {
    namespace: String,
    serviceaccount: Option<Named>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

impl Claims {
    /// Reads claims that nobody has proved yet.
    #[must_use]
    pub fn of(token: &str) -> Option<Claims> {
        part(token, 1)
    }

    /// A subject that can be compared, and where Kubernetes says in two places who it is, the same in both.
    #[must_use]
    pub fn names_one_subject(&self) -> bool {
        if self.sub.is_empty() || self.sub.len() > MAX_SUBJECT {
            return false;
        }
        let Some(account) = &self.kubernetes else { return true };
        let name = account.serviceaccount.as_ref().map(|account| account.name.as_str());
        name.is_some_and(|name| self.sub == service_account(&account.namespace, name))
    }
}

/// The `sub` of a Kubernetes service account's tokens. Neither name can hold a colon.
#[must_use]
pub fn service_account(namespace: &str, name: &str) -> String {
    format!("system:serviceaccount:{namespace}:{name}")
}

/// One of the dot-separated parts of a token, as JSON.
pub(super) fn part<T: DeserializeOwned>(token: &str, index: usize) -> Option<T> {
    let bytes = BASE64URL.decode(token.split('.').nth(index)?).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DocumentError> {
    if bytes.len() > MAX_DOCUMENT {
        return Err(DocumentError::TooLong);
    }
    serde_json::from_slice(bytes).map_err(|e| {
        // Where, not what: the text of the error may repeat a value.
        DocumentError::Form(format!("line {}, column {}", e.line(), e.column()))
    })
}

#[cfg(test)]
mod tests;
