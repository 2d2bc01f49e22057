//! What follows the prefix of a KMS value: the wrapped key beside the object it encrypts.
//!
//! The same checks as kube-apiserver makes on every read; nothing is decrypted here.

use std::collections::BTreeMap;

use prost::Message;
use thiserror::Error;

use crate::limits::{MAX_ANNOTATIONS, MAX_KEY_ID, MAX_V2_CIPHERTEXT};

/// KMS v1: `u16 n ‖ encrypted DEK (n) ‖ body`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct V1Body<'a> {
    /// What the plug-in returned from Encrypt.
    pub encrypted_dek: &'a [u8],
    /// AES-GCM since Kubernetes 1.25, AES-CBC before.
    pub body: &'a [u8],
}

/// KMS v2: the message `EncryptedObject`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct V2Object {
    pub encrypted_data: Vec<u8>,
    pub key_id: String,
    /// What the plug-in returned from Encrypt.
    pub encrypted_dek_source: Vec<u8>,
    pub annotations: BTreeMap<String, Vec<u8>>,
    pub source_type: SourceType,
}

/// What the unwrapped payload is to kube-apiserver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceType {
    /// The AES-GCM key itself (Kubernetes 1.27, 1.28).
    AesGcmKey,
    /// A seed from which each object's key is derived (since 1.29).
    HkdfSha256XnonceAesGcmSeed,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ObjectError {
    #[error("the value ends within its encrypted DEK")]
    Truncated,
    #[error("the encrypted object has {len} bytes, it takes at least {min}")]
    TooShort { len: usize, min: usize },
    #[error("the value is not a protobuf EncryptedObject")]
    Protobuf,
    #[error("the encrypted object has source type {0}, which is not known")]
    SourceType(i32),
    #[error("the {what} has {len} bytes, kube-apiserver takes 1 to {max}")]
    Length { what: &'static str, len: usize, max: usize },
}

/// IV and one block, or nonce, tag and one byte: no object encrypts to less.
const MIN_V1_BODY: usize = 12 + 16 + 1;

impl<'a> V1Body<'a> {
    /// Takes apart what stands after `k8s:enc:kms:v1:<name>:`.
    ///
    /// # Errors
    /// It is shorter than its length field says, or too short to hold an object.
    pub fn decode(body: &'a [u8]) -> Result<Self, ObjectError> {
        let (len, rest) = body.split_first_chunk().ok_or(ObjectError::Truncated)?;
        let len = usize::from(u16::from_be_bytes(*len));
        let (encrypted_dek, body) = rest.split_at_checked(len).ok_or(ObjectError::Truncated)?;
        if body.len() < MIN_V1_BODY {
            return Err(ObjectError::TooShort { len: body.len(), min: MIN_V1_BODY });
        }
        Ok(Self { encrypted_dek, body })
    }
}

impl V2Object {
    /// Takes apart what stands after `k8s:enc:kms:v2:<name>:`.
    ///
    /// # Errors
    /// It is not the message, or kube-apiserver would not accept it either.
    pub fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let wire = EncryptedObject::decode(body).map_err(|_| ObjectError::Protobuf)?;
        let source_type = SourceType::from_wire(wire.encrypted_dek_source_type)?;
        let min = source_type.min_data();
        if wire.encrypted_data.len() < min {
            return Err(ObjectError::TooShort { len: wire.encrypted_data.len(), min });
        }
        let annotations =
            wire.annotations.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
        in_range("key_id", wire.key_id.len(), 1, MAX_KEY_ID)?;
        in_range("encrypted DEK source", wire.encrypted_dek_source.len(), 1, MAX_V2_CIPHERTEXT)?;
        in_range("list of annotations", annotations, 0, MAX_ANNOTATIONS)?;
        Ok(Self {
            encrypted_data: wire.encrypted_data,
            key_id: wire.key_id,
            encrypted_dek_source: wire.encrypted_dek_source,
            annotations: wire.annotations,
            source_type,
        })
    }
}

impl SourceType {
    /// The name in kube-apiserver's proto file.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AesGcmKey => "AES_GCM_KEY",
            Self::HkdfSha256XnonceAesGcmSeed => "HKDF_SHA256_XNONCE_AES_GCM_SEED",
        }
    }

    fn from_wire(number: i32) -> Result<Self, ObjectError> {
        match number {
            0 => Ok(Self::AesGcmKey),
            1 => Ok(Self::HkdfSha256XnonceAesGcmSeed),
            _ => Err(ObjectError::SourceType(number)),
        }
    }

    /// Nonce and tag; with a seed, the 32 bytes of info before them.
    fn min_data(self) -> usize {
        match self {
            Self::AesGcmKey => 12 + 16,
            Self::HkdfSha256XnonceAesGcmSeed => 32 + 12 + 16,
        }
    }
}

fn in_range(what: &'static str, len: usize, min: usize, max: usize) -> Result<(), ObjectError> {
    if (min..=max).contains(&len) { Ok(()) } else { Err(ObjectError::Length { what, len, max }) }
}

/// `v2.EncryptedObject` of k8s.io/apiserver (`kmsv2/v2/api.proto`).
#[derive(Clone, PartialEq, Message)]
struct EncryptedObject {
    #[prost(bytes = "vec", tag = "1")]
    encrypted_data: Vec<u8>,
    #[prost(string, tag = "2")]
    key_id: String,
    #[prost(bytes = "vec", tag = "3")]
    encrypted_dek_source: Vec<u8>,
    #[prost(btree_map = "string, bytes", tag = "4")]
    annotations: BTreeMap<String, Vec<u8>>,
    // A plain number, not a prost enumeration: an unknown type must be refused, not defaulted.
    #[prost(int32, tag = "5")]
    encrypted_dek_source_type: i32,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wire() -> EncryptedObject {
        EncryptedObject {
            encrypted_data: vec![1; 60],
            key_id: "keelson/i/c/v".into(),
            encrypted_dek_source: vec![2; 100],
            annotations: BTreeMap::from([("a.b".into(), vec![3])]),
            encrypted_dek_source_type: 1,
        }
    }

    fn decode_changed(change: impl FnOnce(&mut EncryptedObject)) -> Result<V2Object, ObjectError> {
        let mut wire = wire();
        change(&mut wire);
        V2Object::decode(&wire.encode_to_vec())
    }

    #[test]
    fn a_v2_object_comes_apart() {
        let object = V2Object::decode(&wire().encode_to_vec()).unwrap();
        assert_eq!(object.encrypted_data, [1; 60]);
        assert_eq!(object.key_id, "keelson/i/c/v");
        assert_eq!(object.encrypted_dek_source, [2; 100]);
        assert_eq!(object.annotations["a.b"], [3]);
        assert_eq!(object.source_type.as_str(), "HKDF_SHA256_XNONCE_AES_GCM_SEED");
    }

    #[test]
    fn the_first_source_type_is_absent_on_the_wire() {
        let object = decode_changed(|wire| {
            wire.encrypted_dek_source_type = 0;
            wire.encrypted_data.truncate(28);
        });
        assert_eq!(object.unwrap().source_type, SourceType::AesGcmKey);
    }

    #[test]
    fn an_unknown_source_type_is_refused() {
        for number in [2, -1, i32::MAX] {
            let object = decode_changed(|wire| wire.encrypted_dek_source_type = number);
            assert_eq!(object, Err(ObjectError::SourceType(number)));
        }
    }

    #[test]
    fn the_limits_of_kube_apiserver_hold() {
        let too_long = |what, len, max| Err(ObjectError::Length { what, len, max });
        let is = |change: fn(&mut EncryptedObject), expected: Result<V2Object, ObjectError>| {
            assert_eq!(decode_changed(change), expected);
        };
        is(|wire| wire.key_id.clear(), too_long("key_id", 0, 1024));
        is(|wire| wire.key_id = "k".repeat(1025), too_long("key_id", 1025, 1024));
        is(
            |wire| wire.encrypted_dek_source = vec![0; 1025],
            too_long("encrypted DEK source", 1025, 1024),
        );
        is(|wire| wire.encrypted_dek_source.clear(), too_long("encrypted DEK source", 0, 1024));
        is(
            |wire| drop(wire.annotations.insert("c.d".into(), vec![0; 32_765])),
            too_long("list of annotations", 4 + 32_768, 32_768),
        );
        is(
            |wire| wire.encrypted_data.truncate(59),
            Err(ObjectError::TooShort { len: 59, min: 60 }),
        );
        assert!(decode_changed(|wire| wire.key_id = "k".repeat(1024)).is_ok());
    }

    #[test]
    fn a_v1_body_comes_apart_or_says_why_not() {
        let body = [&[0, 3][..], b"dek", &[9; 29]].concat();
        assert_eq!(V1Body::decode(&body), Ok(V1Body { encrypted_dek: b"dek", body: &[9; 29] }));
        let short = Err(ObjectError::TooShort { len: 28, min: 29 });
        assert_eq!(V1Body::decode(&body[..33]), short);
        assert_eq!(V1Body::decode(&body[..4]), Err(ObjectError::Truncated));
        assert_eq!(V1Body::decode(&[0]), Err(ObjectError::Truncated));
    }

    proptest! {
        #[test]
        fn what_is_stored_comes_back(
            data in proptest::collection::vec(any::<u8>(), 60..200),
            key_id in "\\PC{1,40}",
            source in proptest::collection::vec(any::<u8>(), 1..1024),
            annotations in proptest::collection::btree_map("[a-z.]{1,20}", any::<Vec<u8>>(), 0..4),
        ) {
            let object = decode_changed(|wire| {
                wire.encrypted_data.clone_from(&data);
                wire.key_id.clone_from(&key_id);
                wire.encrypted_dek_source.clone_from(&source);
                wire.annotations.clone_from(&annotations);
            }).unwrap();
            prop_assert_eq!(object.encrypted_data, data);
            prop_assert_eq!(object.key_id, key_id);
            prop_assert_eq!(object.encrypted_dek_source, source);
            prop_assert_eq!(object.annotations, annotations);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = V1Body::decode(&bytes);
            let _ = V2Object::decode(&bytes);
        }
    }
}
