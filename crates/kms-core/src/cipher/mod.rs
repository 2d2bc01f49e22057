//! What the plug-in returns to kube-apiserver: [`v1`] within the original's bytes, [`v2`] in our own.
//!
//! Sealing takes its IV or nonce as an argument. Opening says "not authentic" with one text for
//! every cause, so that nobody can ask the plug-in which guess came closer.

pub mod gob;
pub mod v1;
pub mod v2;

use std::sync::OnceLock;

use aws_lc_rs::aead::{LessSafeKey, RandomizedNonceKey};
use aws_lc_rs::cipher::{DecryptingKey, EncryptingKey};
use aws_lc_rs::{digest, hkdf, hmac};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::secret::Dek;

/// A payload could not be sealed. The caller gave something that no reader would take back.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SealError {
    #[error("NUM_LEN_BYTES must be 1 to 8, not {0}")]
    LenBytes(u8),
    #[error("the payload has {len} bytes, at most {max} can be sealed")]
    PayloadTooLong { len: usize, max: usize },
    #[error("the sealed value would have {len} bytes, kube-apiserver takes at most {max}")]
    CiphertextTooLong { len: usize, max: usize },
    #[error("there is no wrapped DEK to seal under")]
    NoWdek,
    #[error("the cryptographic library refused to seal")]
    Library,
}

/// Bytes that are not a sealed value of this API at all. Says what is wrong: nothing of it is
/// secret, and no key was touched.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FormatError {
    #[error("the ciphertext has {len} bytes, at most {max} are read")]
    TooLong { len: usize, max: usize },
    #[error("the ciphertext is not standard base64")]
    Base64,
    #[error("the ciphertext is not a gob stream of the plug-in: {0}")]
    Gob(#[from] gob::GobError),
    #[error("the ciphertext holds no wrapped DEK")]
    NoWdek,
    #[error("the ciphertext does not begin with the format byte of this plug-in")]
    FormatByte,
    #[error("the ciphertext is not a protobuf message of the plug-in")]
    Protobuf,
    #[error("the encrypted part is not an IV and whole blocks in base64")]
    Blocks,
    #[error("the nonce or the encrypted part has an impossible length")]
    Lengths,
    #[error("the ciphertext is not encoded as the plug-in encodes")]
    NotCanonical,
}

/// A well-formed value was not opened.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OpenError {
    /// The one answer to everything that depends on the key: wrong DEK, changed bytes, another
    /// key_id, a value without an authentication code.
    #[error("the ciphertext is not authentic")]
    NotAuthentic,
    #[error("NUM_LEN_BYTES must be 1 to 8, not {0}")]
    LenBytes(u8),
}

/// The keys that were derived from one DEK: each once, when it is first needed, because deriving takes longer than
/// sealing. The DEK holds them and they end with it; the library wipes them.
#[derive(Default)]
pub(crate) struct Derived {
    v1_encrypting: OnceLock<EncryptingKey>,
    v1_decrypting: OnceLock<DecryptingKey>,
    v1_code: OnceLock<hmac::Key>,
    v2_gcm: OnceLock<LessSafeKey>,
    v2_gcm_drawing: OnceLock<RandomizedNonceKey>,
}

/// The key in `slot`, made first if it is not there. Who comes second while it is being made, makes it too.
fn once<K>(slot: &OnceLock<K>, make: impl FnOnce() -> Option<K>) -> Option<&K> {
    match slot.get() {
        Some(key) => Some(key),
        None => make().map(|key| slot.get_or_init(|| key)),
    }
}

/// A key for one purpose. The DEK itself is only ever the AES-CBC key of the original's format.
fn derive(dek: &Dek, purpose: &str) -> Option<Zeroizing<[u8; 32]>> {
    let mut key = Zeroizing::new([0; 32]);
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(dek.as_bytes());
    let info = [purpose.as_bytes()];
    let okm = prk.expand(&info, hkdf::HKDF_SHA256).ok()?;
    okm.fill(&mut *key).ok()?;
    Some(key)
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key_id::KeyId;

    #[test]
    fn a_key_is_derived_once_for_all_clones_of_a_dek() {
        let (dek, key_id) = (Dek::from_bytes([7; 32]), KeyId::new("i", "c", "v").unwrap());
        let clone = dek.clone();
        assert!(dek.derived().v2_gcm.get().is_none());
        v2::seal(&clone, &key_id, 1, b"wdek", Some([1; 12]), b"payload").unwrap();
        let made: *const LessSafeKey = dek.derived().v2_gcm.get().unwrap();
        v2::seal(&dek, &key_id, 1, b"wdek", Some([2; 12]), b"payload").unwrap();
        assert!(std::ptr::eq(made, clone.derived().v2_gcm.get().unwrap()));
    }

    #[test]
    fn two_deks_share_no_derived_key() {
        let (one, other) = (Dek::from_bytes([7; 32]), Dek::from_bytes([8; 32]));
        assert_ne!(derive(&one, "a").unwrap(), derive(&other, "a").unwrap());
        assert_ne!(derive(&one, "a").unwrap(), derive(&one, "b").unwrap());
    }
}
