//! What the plug-in returns to kube-apiserver: [`v1`] within the original's bytes, [`v2`] in our own.
//!
//! Sealing takes its IV or nonce as an argument. Opening says "not authentic" with one text for
//! every cause, so that nobody can ask the plug-in which guess came closer.

pub mod gob;
pub mod v1;
pub mod v2;

use aws_lc_rs::{digest, hkdf};
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

/// A key for one purpose. The DEK itself is only ever the AES-CBC key of the original's format.
fn derive(dek: &Dek, purpose: &str) -> Option<Zeroizing<[u8; 32]>> {
    let mut key = Zeroizing::new([0; 32]);
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(dek.as_bytes());
    let info = [purpose.as_bytes()];
    let okm = prk.expand(&info, hkdf::HKDF_SHA256).ok()?;
    okm.fill(&mut *key).ok()?;
    Some(key)
}

fn sha256(bytes: &[u8]) -> digest::Digest {
    digest::digest(&digest::SHA256, bytes)
}
