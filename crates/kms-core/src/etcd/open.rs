//! From a key in hand to the object that kube-apiserver stored, for each of its providers.
//!
//! For reading a cluster's data without its API server. Keys come from elsewhere: the unwrapped
//! payload of a KMS value, or a key of the encryption configuration. Nothing is fetched, unwrapped
//! or guessed here, and nothing is ever encrypted.
//!
//! Where a provider authenticates, it does so under the *complete* key in etcd: take that from
//! etcd or the snapshot, never build it anew. CBC proves nothing, so that what it yields counts only
//! if it begins as objects do.

use aws_lc_rs::aead::{AES_128_GCM, AES_192_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::cipher::{
    AES_128, AES_192, AES_256, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey,
};
use aws_lc_rs::hmac;
use aws_lc_rs::iv::FixedLength;
use crypto_secretbox::aead::AeadInPlace;
use crypto_secretbox::{KeyInit, XSalsa20Poly1305};
use thiserror::Error;
use zeroize::Zeroizing;

use super::object::{SourceType, V1Body, V2Object};
use crate::secret::SecretBytes;

/// No object came out.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OpenError {
    #[error("the key has {len} bytes, {expected} are needed")]
    KeyLength { len: usize, expected: &'static str },
    #[error("the encrypted object has {len} bytes, it takes at least {min}")]
    TooShort { len: usize, min: usize },
    /// The wrong key, changed bytes, or a value that lies under another key in etcd.
    #[error("the object does not open with this key under this key in etcd")]
    NotAuthentic,
    /// CBC gave something, but no object: the wrong key, or changed bytes.
    #[error("what comes out is no Kubernetes object: the key is wrong or the value was changed")]
    NotAnObject,
}

/// How the object of a KMS v1 value was encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum V1Mode {
    /// Kubernetes 1.25 and later.
    Gcm,
    /// Kubernetes 1.24 and earlier: not authenticated.
    Cbc,
}

const GCM_NONCE: usize = 12;
const GCM_TAG: usize = 16;
const BLOCK: usize = 16;
/// Random bytes in front of a KMS v2 object, from which with the seed its key is derived.
const INFO: usize = 32;
const MIN_SEED: usize = 32;
const SECRETBOX_KEY: usize = 32;
const SECRETBOX_NONCE: usize = 24;
const SECRETBOX_TAG: usize = 16;

const AES_KEYS: &str = "16, 24 or 32";

/// The object of a KMS v2 value. `source` is what the plug-in's Decrypt returns for it.
///
/// # Errors
/// The source is too short for its type, or the object is not authentic.
pub fn kms_v2(object: &V2Object, source: &[u8], etcd_key: &[u8]) -> Result<SecretBytes, OpenError> {
    match object.source_type {
        SourceType::AesGcmKey => aesgcm(&object.encrypted_data, source, etcd_key),
        SourceType::HkdfSha256XnonceAesGcmSeed => seeded(&object.encrypted_data, source, etcd_key),
    }
}

/// The object of a KMS v1 value. `dek` is what the plug-in's Decrypt returns for it. Nothing in the
/// value says how it was encrypted: GCM is tried first, which cannot take CBC for its own.
///
/// # Errors
/// The DEK is no AES key, or the object opens neither way.
pub fn kms_v1(
    body: &V1Body<'_>,
    dek: &[u8],
    etcd_key: &[u8],
) -> Result<(SecretBytes, V1Mode), OpenError> {
    match aesgcm(body.body, dek, etcd_key) {
        Ok(object) => Ok((object, V1Mode::Gcm)),
        Err(error @ OpenError::KeyLength { .. }) => Err(error),
        // That it was GCM is the likelier case by far, so its answer is the better one.
        Err(error) => aescbc(body.body, dek).map(|object| (object, V1Mode::Cbc)).map_err(|_| error),
    }
}

/// `nonce ‖ AES-GCM ‖ tag`, authenticated under the key in etcd.
///
/// # Errors
/// The key is no AES key, or the object is too short or not authentic.
pub fn aesgcm(body: &[u8], key: &[u8], etcd_key: &[u8]) -> Result<SecretBytes, OpenError> {
    let algorithm = match key.len() {
        16 => &AES_128_GCM,
        24 => &AES_192_GCM,
        32 => &AES_256_GCM,
        len => return Err(OpenError::KeyLength { len, expected: AES_KEYS }),
    };
    let (nonce, sealed) = split::<GCM_NONCE>(body, GCM_TAG)?;
    let key = UnboundKey::new(algorithm, key).map_err(|_| OpenError::NotAuthentic)?;
    let mut buffer = Zeroizing::new(sealed.to_vec());
    let len = LessSafeKey::new(key)
        .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(etcd_key), &mut buffer)
        .map_err(|_| OpenError::NotAuthentic)?
        .len();
    Ok(first(buffer, len))
}

/// `IV ‖ AES-CBC` with PKCS#7 padding. Padding alone would fit by chance once in 256 times.
///
/// # Errors
/// The key is no AES key, or what comes out is no object.
pub fn aescbc(body: &[u8], key: &[u8]) -> Result<SecretBytes, OpenError> {
    let algorithm = match key.len() {
        16 => &AES_128,
        24 => &AES_192,
        32 => &AES_256,
        len => return Err(OpenError::KeyLength { len, expected: AES_KEYS }),
    };
    let (iv, blocks) = split::<BLOCK>(body, BLOCK)?;
    let mut buffer = Zeroizing::new(blocks.to_vec());
    let len = UnboundCipherKey::new(algorithm, key)
        .and_then(PaddedBlockDecryptingKey::cbc_pkcs7)
        .and_then(|key| {
            let context = DecryptionContext::Iv128(FixedLength::from(*iv));
            key.decrypt(&mut buffer, context).map(|plain| plain.len())
        })
        .map_err(|_| OpenError::NotAnObject)?;
    let object = first(buffer, len);
    if begins_as_an_object(object.as_slice()) { Ok(object) } else { Err(OpenError::NotAnObject) }
}

/// `nonce ‖ tag ‖ XSalsa20`, which NaCl calls a secretbox. The key in etcd is not authenticated.
///
/// # Errors
/// The key has not 32 bytes, or the object is too short or not authentic.
pub fn secretbox(body: &[u8], key: &[u8]) -> Result<SecretBytes, OpenError> {
    if key.len() != SECRETBOX_KEY {
        return Err(OpenError::KeyLength { len: key.len(), expected: "32" });
    }
    let (nonce, sealed) = split::<SECRETBOX_NONCE>(body, SECRETBOX_TAG)?;
    let (tag, sealed) = sealed.split_at(SECRETBOX_TAG);
    let cipher = XSalsa20Poly1305::new_from_slice(key).map_err(|_| OpenError::NotAuthentic)?;
    let mut buffer = Zeroizing::new(sealed.to_vec());
    cipher
        .decrypt_in_place_detached(nonce.into(), &[], &mut buffer, tag.into())
        .map_err(|_| OpenError::NotAuthentic)?;
    let len = buffer.len();
    Ok(first(buffer, len))
}

/// `info ‖ nonce ‖ AES-256-GCM ‖ tag`. The key is HKDF-Expand over SHA-256 without Extract, which for
/// 32 bytes is a single HMAC; the seed may be longer than 32 bytes and is used whole.
fn seeded(data: &[u8], seed: &[u8], etcd_key: &[u8]) -> Result<SecretBytes, OpenError> {
    if seed.len() < MIN_SEED {
        return Err(OpenError::KeyLength { len: seed.len(), expected: "32 or more" });
    }
    let (info, rest) = split::<INFO>(data, GCM_NONCE + GCM_TAG)?;
    let mut expand = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, seed));
    expand.update(info);
    expand.update(&[1]);
    let mut key = Zeroizing::new([0; 32]);
    key.copy_from_slice(expand.sign().as_ref());
    aesgcm(rest, &*key, etcd_key)
}

/// The first `N` bytes, and at least `min` that follow them.
fn split<const N: usize>(body: &[u8], min: usize) -> Result<(&[u8; N], &[u8]), OpenError> {
    match body.split_first_chunk() {
        Some((head, rest)) if rest.len() >= min => Ok((head, rest)),
        _ => Err(OpenError::TooShort { len: body.len(), min: N + min }),
    }
}

/// The plain bytes, in the buffer in which they were decrypted.
fn first(mut buffer: Zeroizing<Vec<u8>>, len: usize) -> SecretBytes {
    buffer.truncate(len);
    SecretBytes::new(std::mem::take(&mut *buffer))
}

/// Protobuf, JSON or CBOR, as kube-apiserver writes them.
fn begins_as_an_object(plain: &[u8]) -> bool {
    [&b"k8s\0"[..], b"{", b"\xd9\xd9\xf7"].iter().any(|magic| plain.starts_with(magic))
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::cipher::{EncryptionContext, PaddedBlockEncryptingKey};
    use proptest::prelude::*;

    use super::*;

    const ETCD_KEY: &[u8] = b"/registry/secrets/default/a";

    fn gcm(key: &[u8; 32], plain: &[u8]) -> Vec<u8> {
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).unwrap());
        let nonce = [7; GCM_NONCE];
        let mut sealed = plain.to_vec();
        let aad = Aad::from(ETCD_KEY);
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut sealed)
            .unwrap();
        [&nonce, sealed.as_slice()].concat()
    }

    fn cbc(key: &[u8; 32], plain: &[u8]) -> Vec<u8> {
        let key = UnboundCipherKey::new(&AES_256, key).unwrap();
        let key = PaddedBlockEncryptingKey::cbc_pkcs7(key).unwrap();
        let iv = [9; BLOCK];
        let mut blocks = plain.to_vec();
        let context = EncryptionContext::Iv128(FixedLength::from(iv));
        key.less_safe_encrypt(&mut blocks, context).unwrap();
        [&iv, blocks.as_slice()].concat()
    }

    fn boxed(key: &[u8; 32], plain: &[u8]) -> Vec<u8> {
        let nonce = [5; SECRETBOX_NONCE];
        let mut sealed = plain.to_vec();
        let cipher = XSalsa20Poly1305::new(key.into());
        let tag = cipher.encrypt_in_place_detached(&nonce.into(), &[], &mut sealed).unwrap();
        [&nonce, &tag[..], &sealed].concat()
    }

    #[test]
    fn keys_of_the_wrong_length_are_named() {
        for len in [0, 15, 17, 33, 64] {
            let wrong = Err(OpenError::KeyLength { len, expected: AES_KEYS });
            let key = vec![1; len];
            assert_eq!(aesgcm(&[0; 60], &key, ETCD_KEY).map(drop), wrong);
            assert_eq!(aescbc(&[0; 64], &key).map(drop), wrong);
            let body = V1Body { encrypted_dek: b"x", body: &[0; 60] };
            assert_eq!(kms_v1(&body, &key, ETCD_KEY).map(drop), wrong);
        }
        let wrong = Err(OpenError::KeyLength { len: 31, expected: "32" });
        assert_eq!(secretbox(&[0; 60], &[1; 31]).map(drop), wrong);
        let wrong = Err(OpenError::KeyLength { len: 31, expected: "32 or more" });
        assert_eq!(seeded(&[0; 60], &[1; 31], ETCD_KEY).map(drop), wrong);
    }

    #[test]
    fn cbc_that_holds_no_object_is_not_believed() {
        let key = [3; 32];
        assert_eq!(aescbc(&cbc(&key, b"no object"), &key).map(drop), Err(OpenError::NotAnObject));
        for object in [&b"k8s\0x"[..], b"{}", b"\xd9\xd9\xf7\xa0"] {
            assert_eq!(aescbc(&cbc(&key, object), &key).unwrap().as_slice(), object);
        }
    }

    #[test]
    fn a_v1_value_that_opens_neither_way_is_not_authentic() {
        let body = cbc(&[3; 32], b"no object");
        let body = V1Body { encrypted_dek: b"x", body: &body };
        assert_eq!(kms_v1(&body, &[3; 32], ETCD_KEY).map(drop), Err(OpenError::NotAuthentic));
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens_and_nothing_else_does(
            key: [u8; 32], other: [u8; 32], plain in proptest::collection::vec(any::<u8>(), 1..200),
            at: proptest::sample::Index, bit in 0..8u8,
        ) {
            let object = [b"k8s\0".as_slice(), &plain].concat();
            let (by_gcm, by_box) = (gcm(&key, &object), boxed(&key, &object));
            let opened = aesgcm(&by_gcm, &key, ETCD_KEY).unwrap();
            prop_assert_eq!(opened.as_slice(), object.as_slice());
            let opened = secretbox(&by_box, &key).unwrap();
            prop_assert_eq!(opened.as_slice(), object.as_slice());
            let by_cbc = cbc(&key, &object);
            let opened = aescbc(&by_cbc, &key).unwrap();
            prop_assert_eq!(opened.as_slice(), object.as_slice());

            let flipped = |value: &[u8]| {
                let mut value = value.to_vec();
                let at = at.index(value.len());
                value[at] ^= 1u8 << bit;
                value
            };
            prop_assert!(aesgcm(&flipped(&by_gcm), &key, ETCD_KEY).is_err());
            prop_assert!(secretbox(&flipped(&by_box), &key).is_err());
            if key != other {
                prop_assert!(aesgcm(&by_gcm, &other, ETCD_KEY).is_err());
                prop_assert!(secretbox(&by_box, &other).is_err());
                prop_assert!(aescbc(&by_cbc, &other).is_err());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            body in proptest::collection::vec(any::<u8>(), 0..200),
            key in proptest::collection::vec(any::<u8>(), 0..80),
            etcd_key: Vec<u8>,
        ) {
            let _ = aesgcm(&body, &key, &etcd_key);
            let _ = aescbc(&body, &key);
            let _ = secretbox(&body, &key);
            let _ = seeded(&body, &key, &etcd_key);
        }
    }
}
