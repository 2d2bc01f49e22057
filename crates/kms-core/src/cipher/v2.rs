//! The KMS v2 ciphertext: a format byte, then protobuf { KpVersion, WDEK, nonce, AES-256-GCM }.
//!
//! Small enough for kube-apiserver (1024 bytes), bound to its key_id, and with one encoding only:
//! what was encoded in another way is refused before any key is touched.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, RandomizedNonceKey, UnboundKey};
use prost::Message;
use zeroize::Zeroizing;

use super::{FormatError, OpenError, SealError, derive, once, sha256};
use crate::canonical::Canonical;
use crate::key_id::KeyId;
use crate::limits::{MAX_V2_CIPHERTEXT, V2_SEED};
use crate::secret::{Dek, SecretBytes};

/// First byte of each ciphertext. No character of base64, so no KMS v1 cipher is taken for one.
const FORMAT: u8 = 2;

const NONCE: usize = 12;
const TAG: usize = 16;

const LABEL: &str = "keelson kms v2 ciphertext";
const GCM_KEY: &str = "keelson kms v2 AES-256-GCM key";

/// Seals a payload under a DEK. The nonce is random, and never used before with this DEK. With none the cryptographic
/// module draws it: the FIPS module approves of no other encryption with GCM (SP 800-38D, 8.2.2; FIPS 140-3 IG, C.H).
///
/// # Errors
/// There is no WDEK, or the result would be longer than kube-apiserver takes.
pub fn seal(
    dek: &Dek,
    key_id: &KeyId,
    kp_version: i64,
    wdek: &[u8],
    nonce: Option<[u8; NONCE]>,
    payload: &[u8],
) -> Result<Vec<u8>, SealError> {
    if wdek.is_empty() {
        return Err(SealError::NoWdek);
    }
    let (wdek_field, nonce_field) = (wdek.to_vec(), nonce.unwrap_or_default().to_vec());
    let mut wire = Wire { kp_version, wdek: wdek_field, nonce: nonce_field, sealed: Vec::new() };
    wire.check_len(payload.len())?;
    let mut sealed = Zeroizing::new(Vec::with_capacity(payload.len() + TAG));
    sealed.extend_from_slice(payload);
    let aad = associated_data(key_id, kp_version, &sha256(wdek));
    wire.nonce = encrypt(dek, nonce, &aad, &mut sealed).ok_or(SealError::Library)?;
    wire.sealed = std::mem::take(&mut *sealed);
    Ok(wire.to_ciphertext())
}

/// Whether what kube-apiserver has sealed with KMS v2, a seed, can be sealed with this WDEK.
///
/// # Errors
/// The result would be longer than kube-apiserver takes.
pub fn check_wdek(kp_version: i64, wdek: &[u8]) -> Result<(), SealError> {
    let (wdek, nonce) = (wdek.to_vec(), [0; NONCE].to_vec());
    Wire { kp_version, wdek, nonce, sealed: Vec::new() }.check_len(V2_SEED)
}

/// A ciphertext taken apart; nothing in it is known to be authentic.
#[derive(Debug, Clone)]
pub struct Envelope {
    wire: Wire,
    wdek_sha256: [u8; 32],
    nonce: [u8; NONCE],
}

impl Envelope {
    /// Takes apart what kube-apiserver hands back.
    ///
    /// # Errors
    /// It is not a ciphertext of this form.
    pub fn decode(ciphertext: &[u8]) -> Result<Self, FormatError> {
        if ciphertext.len() > MAX_V2_CIPHERTEXT {
            let (len, max) = (ciphertext.len(), MAX_V2_CIPHERTEXT);
            return Err(FormatError::TooLong { len, max });
        }
        let message = match ciphertext.split_first() {
            Some((&FORMAT, message)) => message,
            _ => return Err(FormatError::FormatByte),
        };
        let wire = Wire::decode(message).map_err(|_| FormatError::Protobuf)?;
        if wire.to_ciphertext() != ciphertext {
            return Err(FormatError::NotCanonical);
        }
        if wire.wdek.is_empty() {
            return Err(FormatError::NoWdek);
        }
        let nonce = wire.nonce.as_slice().try_into().map_err(|_| FormatError::Lengths)?;
        if wire.sealed.len() < TAG {
            return Err(FormatError::Lengths);
        }
        let wdek_sha256 = sha256(&wire.wdek);
        Ok(Self { wire, wdek_sha256, nonce })
    }

    #[must_use]
    pub fn kp_version(&self) -> i64 {
        self.wire.kp_version
    }

    #[must_use]
    pub fn wdek(&self) -> &[u8] {
        &self.wire.wdek
    }

    #[must_use]
    pub fn wdek_sha256(&self) -> [u8; 32] {
        self.wdek_sha256
    }

    /// Length of the encrypted part, nonce and tag included.
    #[must_use]
    pub fn cipher_len(&self) -> usize {
        NONCE + self.wire.sealed.len()
    }

    /// Opens with the unwrapped DEK and the key_id under which kube-apiserver holds the value.
    ///
    /// # Errors
    /// Always [`OpenError::NotAuthentic`], whatever the cause.
    pub fn open(&self, dek: &Dek, key_id: &KeyId) -> Result<SecretBytes, OpenError> {
        let mut sealed = Zeroizing::new(self.wire.sealed.clone());
        let aad = associated_data(key_id, self.wire.kp_version, &self.wdek_sha256);
        let payload = gcm_key(dek)
            .ok_or(OpenError::NotAuthentic)?
            .open_in_place(Nonce::assume_unique_for_key(self.nonce), Aad::from(aad), &mut sealed)
            .map_err(|_| OpenError::NotAuthentic)?
            .len();
        sealed.truncate(payload);
        Ok(SecretBytes::new(std::mem::take(&mut *sealed)))
    }
}

#[derive(Clone, PartialEq, Message)]
struct Wire {
    #[prost(int64, tag = "1")]
    kp_version: i64,
    #[prost(bytes = "vec", tag = "2")]
    wdek: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    nonce: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    sealed: Vec<u8>,
}

impl Wire {
    /// Asked before anything is encrypted: the length does not depend on the content.
    fn check_len(&self, payload: usize) -> Result<(), SealError> {
        let len = 1 + self.encoded_len() + sealed_field_len(payload + TAG);
        if len > MAX_V2_CIPHERTEXT {
            return Err(SealError::CiphertextTooLong { len, max: MAX_V2_CIPHERTEXT });
        }
        Ok(())
    }

    fn to_ciphertext(&self) -> Vec<u8> {
        let mut ciphertext = Vec::with_capacity(1 + self.encoded_len());
        ciphertext.push(FORMAT);
        // A Vec has room for whatever comes.
        let _ = self.encode(&mut ciphertext);
        ciphertext
    }
}

/// Tag, length and content of field 4.
fn sealed_field_len(len: usize) -> usize {
    1 + prost::length_delimiter_len(len) + len
}

/// The nonce with which it was encrypted.
fn encrypt(
    dek: &Dek,
    nonce: Option<[u8; NONCE]>,
    aad: &[u8],
    sealed: &mut Vec<u8>,
) -> Option<Vec<u8>> {
    let aad = Aad::from(aad);
    let Some(nonce) = nonce else {
        let drawn = drawing_gcm_key(dek)?.seal_in_place_append_tag(aad, sealed).ok()?;
        return Some(drawn.as_ref().to_vec());
    };
    let unique = Nonce::assume_unique_for_key(nonce);
    gcm_key(dek)?.seal_in_place_append_tag(unique, aad, sealed).ok()?;
    Some(nonce.to_vec())
}

/// GCM has a key of its own, so that it never runs under the AES key of the original's CBC format.
fn gcm_key(dek: &Dek) -> Option<&LessSafeKey> {
    once(&dek.derived().v2_gcm, || {
        let key = derive(dek, GCM_KEY)?;
        UnboundKey::new(&AES_256_GCM, &*key).ok().map(LessSafeKey::new)
    })
}

/// The same key where the module draws the nonces.
fn drawing_gcm_key(dek: &Dek) -> Option<&RandomizedNonceKey> {
    once(&dek.derived().v2_gcm_drawing, || {
        RandomizedNonceKey::new(&AES_256_GCM, &*derive(dek, GCM_KEY)?).ok()
    })
}

fn associated_data(key_id: &KeyId, kp_version: i64, wdek_sha256: &[u8; 32]) -> Vec<u8> {
    Canonical::new(LABEL)
        .field(&[FORMAT])
        .field(key_id.as_str().as_bytes())
        .number(kp_version)
        .field(wdek_sha256)
        .into_bytes()
}

#[cfg(test)]
mod tests;
