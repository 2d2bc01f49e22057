//! Anchors: what a chain was up to one record, signed by a key that only the HSM has.
//!
//! An anchor proves that the records before it were these, at the latest when it was signed. It says nothing of the
//! records after it, and nothing of records that never reached the log.

use super::{ANCHOR, Hash, Link};
use crate::canonical::Canonical;
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rsa::PublicKeyComponents;
use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;
use thiserror::Error;
use uuid::Uuid;

/// The longest PEM file of a public key that is read: RSA of 8192 bits takes a fifth of it.
const MAX_PEM: usize = 8 * 1024;
const BEGIN: &str = "-----BEGIN PUBLIC KEY-----";
const END: &str = "-----END PUBLIC KEY-----";

/// What an anchor states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement<'a> {
    pub node: &'a str,
    /// RFC 3339, UTC.
    pub at: &'a str,
    /// The last record that it covers.
    pub head: Link,
    /// The id of the HSM's key.
    pub key: Uuid,
}

impl Statement<'_> {
    /// The bytes that are signed (RSASSA-PKCS1-v1_5 with SHA-256).
    #[must_use]
    pub fn signed_bytes(&self) -> Vec<u8> {
        Canonical::new("keelson audit anchor")
            .field(self.node.as_bytes())
            .field(self.at.as_bytes())
            .field(&self.head.seq.to_be_bytes())
            .field(self.head.hash.as_bytes())
            .field(self.key.as_bytes())
            .into_bytes()
    }
}

/// An anchor as it stands in the log. The records between [`Anchor::head`] and its own line came while the HSM signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Anchor<'a> {
    // What every line has; here so that nothing else can stand in an anchor.
    #[serde(skip_serializing, rename = "seq")]
    _seq: Ignored,
    #[serde(skip_serializing, rename = "prev")]
    _prev: Ignored,
    node: Cow<'a, str>,
    at: Cow<'a, str>,
    action: Cow<'a, str>,
    head: u64,
    hash: Hash,
    key: Uuid,
    #[serde(with = "base64_text")]
    signature: Vec<u8>,
}

impl<'a> Anchor<'a> {
    #[must_use]
    pub fn new(statement: &Statement<'a>, signature: Vec<u8>) -> Anchor<'a> {
        Anchor {
            _seq: Ignored,
            _prev: Ignored,
            node: statement.node.into(),
            at: statement.at.into(),
            action: ANCHOR.into(),
            head: statement.head.seq,
            hash: statement.head.hash,
            key: statement.key,
            signature,
        }
    }

    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    #[must_use]
    pub fn at(&self) -> &str {
        &self.at
    }

    #[must_use]
    pub fn key(&self) -> Uuid {
        self.key
    }

    /// The last record that it covers.
    #[must_use]
    pub fn head(&self) -> Link {
        Link { seq: self.head, hash: self.hash }
    }

    /// The same, independent of the line that it was read from.
    #[must_use]
    pub fn into_owned(self) -> Anchor<'static> {
        Anchor {
            node: self.node.into_owned().into(),
            at: self.at.into_owned().into(),
            action: ANCHOR.into(),
            _seq: Ignored,
            _prev: Ignored,
            head: self.head,
            hash: self.hash,
            key: self.key,
            signature: self.signature,
        }
    }

    /// Whether this statement was signed with `key`.
    #[must_use]
    pub fn is_signed_by(&self, key: &PublicKey) -> bool {
        let statement =
            Statement { node: &self.node, at: &self.at, head: self.head(), key: self.key };
        UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &key.der)
            .verify(&statement.signed_bytes(), &self.signature)
            .is_ok()
    }
}

/// The public half of the key that signs anchors: a PEM file (SubjectPublicKeyInfo), which `openssl pkey -pubin` reads.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    der: Vec<u8>,
}

/// For whoever named the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum KeyError {
    #[error("it is not a PEM file with one PUBLIC KEY")]
    Pem,
    #[error("it is not an RSA public key of 2048 to 8192 bits")]
    NotRsa,
}

impl PublicKey {
    /// From modulus and exponent, both big-endian without leading zeros.
    ///
    /// # Errors
    /// [`KeyError::NotRsa`].
    pub fn from_parts(n: &[u8], e: &[u8]) -> Result<PublicKey, KeyError> {
        let der = PublicKeyComponents { n, e }.as_der().map_err(|_| KeyError::NotRsa)?;
        Ok(PublicKey { der: der.as_ref().to_vec() })
    }

    /// # Errors
    /// [`KeyError`].
    pub fn parse_pem(text: &str) -> Result<PublicKey, KeyError> {
        let body = Some(text.trim())
            .filter(|text| text.len() <= MAX_PEM)
            .and_then(|text| text.strip_prefix(BEGIN))
            .and_then(|text| text.strip_suffix(END))
            .ok_or(KeyError::Pem)?;
        let body: String = body.split_ascii_whitespace().collect();
        let der = STANDARD.decode(body).map_err(|_| KeyError::Pem)?;
        aws_lc_rs::rsa::PublicEncryptingKey::from_der(&der).map_err(|_| KeyError::NotRsa)?;
        Ok(PublicKey { der })
    }

    #[must_use]
    pub fn pem(&self) -> String {
        let body = STANDARD.encode(&self.der);
        let mut text = format!("{BEGIN}\n");
        for (at, letter) in body.chars().enumerate() {
            if at > 0 && at % 64 == 0 {
                text.push('\n');
            }
            text.push(letter);
        }
        text + "\n" + END + "\n"
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PublicKey")
    }
}

/// A member that is read elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ignored;

impl<'de> Deserialize<'de> for Ignored {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Ignored, D::Error> {
        serde::de::IgnoredAny::deserialize(from).map(|_| Ignored)
    }
}

mod base64_text {
    use super::{Cow, Deserialize, Engine, STANDARD};

    pub(super) fn serialize<S: serde::Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(&*Cow::<str>::deserialize(from)?).map_err(serde::de::Error::custom)
    }
}
