//! What stands in etcd, counted by who wrote it and under which key. No key is needed for that, and none is used.

use std::collections::BTreeMap;

use kms_core::cipher::v1;
use kms_core::etcd::object::{SourceType, V1Body, V2Object};
use kms_core::etcd::prefix::{StoredValue, classify};
use kms_core::wdek::Look;

use crate::source::encryption_config::Local;

/// Who wrote a value, as the value itself says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Found {
    /// Not encrypted.
    Identity,
    /// A key of the encryption configuration.
    Local { kind: Local, key: String },
    /// The version of the root key is known where the Keelson plug-in wrote it.
    KmsV1 { provider: String, crk_version: Option<String> },
    /// `seed` is what Kubernetes has written since 1.29.
    KmsV2 { provider: String, key_id: String, seed: bool },
    /// Nothing that kube-apiserver would read.
    Broken { why: String },
}

/// Objects of one resource that were written alike.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) objects: u64,
    /// The key in etcd of the first of them, to look at with `kmsctl inspect`.
    pub(super) example: String,
}

#[derive(Debug, Default)]
pub(super) struct Census {
    /// By resource and writer.
    pub(super) groups: BTreeMap<(String, Found), Tally>,
}

impl Census {
    pub(super) fn count(&mut self, resource: &str, key: &[u8], found: Found) {
        let tally = self.groups.entry((resource.to_owned(), found)).or_default();
        tally.objects += 1;
        if tally.example.is_empty() {
            tally.example = String::from_utf8_lossy(key).into_owned();
        }
    }
}

impl Found {
    /// Looks at one value. `v1_names` are the configured ones: such a name may hold ':', so that where it ends is only
    /// certain for a name that is known.
    pub(super) fn look(value: &[u8], v1_names: &[String]) -> Self {
        let local = |kind, key: &str| Self::Local { kind, key: key.to_owned() };
        match classify(value) {
            Ok(StoredValue::Identity(_)) => Self::Identity,
            Ok(StoredValue::AesCbc { key_name, .. }) => local(Local::AesCbc, key_name),
            Ok(StoredValue::AesGcm { key_name, .. }) => local(Local::AesGcm, key_name),
            Ok(StoredValue::Secretbox { key_name, .. }) => local(Local::Secretbox, key_name),
            Ok(StoredValue::KmsV1 { provider, body }) => match configured(value, v1_names) {
                Some((provider, body)) => Self::kms_v1(provider, body),
                None => Self::kms_v1(provider, body),
            },
            Ok(StoredValue::KmsV2 { provider, body }) => match V2Object::decode(body) {
                Ok(object) => Self::KmsV2 {
                    provider: provider.to_owned(),
                    key_id: object.key_id,
                    seed: object.source_type == SourceType::HkdfSha256XnonceAesGcmSeed,
                },
                Err(error) => Self::Broken { why: error.to_string() },
            },
            Err(error) => Self::Broken { why: error.to_string() },
        }
    }

    fn kms_v1(provider: &str, body: &[u8]) -> Self {
        match V1Body::decode(body) {
            Ok(body) => Self::KmsV1 {
                provider: provider.to_owned(),
                crk_version: crk_version(body.encrypted_dek),
            },
            Err(error) => Self::Broken { why: error.to_string() },
        }
    }
}

/// The longest configured name under which this value is stored, and what follows it.
fn configured<'a>(value: &'a [u8], names: &'a [String]) -> Option<(&'a str, &'a [u8])> {
    let rest = value.strip_prefix(b"k8s:enc:kms:v1:")?;
    let follows = |name: &'a String| {
        Some((name.as_str(), rest.strip_prefix(name.as_bytes())?.strip_prefix(b":")?))
    };
    names.iter().filter_map(follows).max_by_key(|(name, _)| name.len())
}

/// Which version of the root key wrapped the DEK, as the wrapped DEK says.
fn crk_version(encrypted_dek: &[u8]) -> Option<String> {
    let envelope = v1::Envelope::decode(encrypted_dek).ok()?;
    let text = std::str::from_utf8(envelope.wdek()).ok()?;
    Look::of(text).ok()?.handle
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v1(name: &str) -> Vec<u8> {
        [format!("k8s:enc:kms:v1:{name}:").as_bytes(), b"\0\x03dek", &[b':'; 40]].concat()
    }

    #[test]
    fn a_configured_v1_name_is_the_longest_that_fits() {
        let names = ["a".to_owned(), "a:b".to_owned(), "a:b:c:d".to_owned()];
        let found = Found::look(&v1("a:b"), &names);
        let expected = Found::KmsV1 { provider: "a:b".to_owned(), crk_version: None };
        assert_eq!(found, expected);
        assert_eq!(Found::look(&v1("a:b"), &[]), expected, "without any configuration too");
    }

    /// `k8s:enc:kms:v2:p:` and an EncryptedObject whose data and key are noise.
    fn v2(key_id: &str) -> Vec<u8> {
        let field = |number: u8, bytes: &[u8]| {
            [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()], bytes].concat()
        };
        let parts =
            [field(1, &[9; 60]), field(2, key_id.as_bytes()), field(3, b"noise"), vec![5 << 3, 1]];
        [b"k8s:enc:kms:v2:p:".to_vec(), parts.concat()].concat()
    }

    #[test]
    fn case_30_key_ids_are_counted_without_unwrapping() {
        let mut census = Census::default();
        for key_id in ["a", "b", "a"] {
            census.count("secrets", b"/registry/secrets/a/b", Found::look(&v2(key_id), &[]));
        }
        let objects = |key_id: &str| {
            let key_id = key_id.to_owned();
            let found = Found::KmsV2 { provider: "p".to_owned(), key_id, seed: true };
            census.groups.get(&("secrets".to_owned(), found)).map(|tally| tally.objects)
        };
        assert_eq!((objects("a"), objects("b"), objects("c")), (Some(2), Some(1), None));
    }

    #[test]
    fn broken_values_are_counted_and_not_taken_for_a_writers() {
        for value in [
            &b"k8s:enc:rot13:v1:k:x"[..],
            b"k8s:enc:kms:v1:p:\x02\x74short",
            b"k8s:enc:kms:v2:p:\xff",
        ] {
            assert!(matches!(Found::look(value, &["p".to_owned()]), Found::Broken { .. }));
        }
        let mut census = Census::default();
        census.count("secrets", b"/registry/secrets/a/b", Found::Identity);
        census.count("secrets", b"/registry/secrets/a/c", Found::Identity);
        let tally = &census.groups[&("secrets".to_owned(), Found::Identity)];
        assert_eq!(*tally, Tally { objects: 2, example: "/registry/secrets/a/b".to_owned() });
    }
}
