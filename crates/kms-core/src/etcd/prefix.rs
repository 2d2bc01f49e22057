//! The text in front of a stored value: which provider of kube-apiserver encrypted it.
//!
//! Nothing is decrypted here, and no configuration is known: a name is taken from the value.

use thiserror::Error;

use super::object::V1Body;
use crate::limits::MAX_ETCD_VALUE;

/// A stored value, by provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredValue<'a> {
    /// Not encrypted by kube-apiserver.
    Identity(&'a [u8]),
    AesCbc {
        key_name: &'a str,
        body: &'a [u8],
    },
    AesGcm {
        key_name: &'a str,
        body: &'a [u8],
    },
    Secretbox {
        key_name: &'a str,
        body: &'a [u8],
    },
    /// `body` goes to [`V1Body::decode`].
    KmsV1 {
        provider: &'a str,
        body: &'a [u8],
    },
    /// `body` goes to [`V2Object::decode`](super::object::V2Object::decode).
    KmsV2 {
        provider: &'a str,
        body: &'a [u8],
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PrefixError {
    #[error("the value has {0} bytes, at most {MAX_ETCD_VALUE} are read")]
    TooLong(usize),
    #[error("the value begins with k8s:enc: but with no provider that is known")]
    UnknownProvider,
    #[error("the prefix of the value ends without a name and ':'")]
    NoName,
}

/// A name is found within so many bytes of its value or not at all. Kubernetes sets no limit; file
/// names and labels, which is what people take for it, end at 253.
const MAX_NAME: usize = 1024;

type Make = for<'a> fn(&'a str, &'a [u8]) -> StoredValue<'a>;

/// Providers whose names hold no ':'.
const PROVIDERS: [(&[u8], Make); 4] = [
    (b"kms:v2:", |provider, body| StoredValue::KmsV2 { provider, body }),
    (b"aescbc:v1:", |key_name, body| StoredValue::AesCbc { key_name, body }),
    (b"aesgcm:v1:", |key_name, body| StoredValue::AesGcm { key_name, body }),
    (b"secretbox:v1:", |key_name, body| StoredValue::Secretbox { key_name, body }),
];

/// Tells by whom a value was encrypted.
///
/// # Errors
/// It claims to be encrypted, but not in a way that is known.
pub fn classify(value: &[u8]) -> Result<StoredValue<'_>, PrefixError> {
    if value.len() > MAX_ETCD_VALUE {
        return Err(PrefixError::TooLong(value.len()));
    }
    let Some(rest) = value.strip_prefix(b"k8s:enc:") else {
        return Ok(StoredValue::Identity(value));
    };
    if let Some(rest) = rest.strip_prefix(b"kms:v1:") {
        let (provider, body) = split_v1(rest).ok_or(PrefixError::NoName)?;
        return Ok(StoredValue::KmsV1 { provider, body });
    }
    for (prefix, make) in PROVIDERS {
        if let Some(rest) = rest.strip_prefix(prefix) {
            return match splits(rest).next() {
                Some((name, body)) if !name.is_empty() => Ok(make(name, body)),
                _ => Err(PrefixError::NoName),
            };
        }
    }
    Err(PrefixError::UnknownProvider)
}

/// A KMS v1 name may itself hold ':'. The right split is the last whose name is text and whose
/// body fits its own length field: up to 8191 bytes that field begins with a control character,
/// so that no name reaches beyond it.
fn split_v1(rest: &[u8]) -> Option<(&str, &[u8])> {
    let named = || splits(rest).filter(|(name, _)| !name.is_empty());
    named().filter(|(_, body)| V1Body::decode(body).is_ok()).last().or_else(|| named().next())
}

/// Every way to read `name:body` with a name of text, shortest first.
fn splits(rest: &[u8]) -> impl Iterator<Item = (&str, &[u8])> {
    let text = rest.iter().take(MAX_NAME).take_while(|byte| !byte.is_ascii_control());
    let colons = text.enumerate().filter(|(_, byte)| **byte == b':');
    colons.map_while(|(at, _)| Some((std::str::from_utf8(&rest[..at]).ok()?, &rest[at + 1..])))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v1_value(name: &str, encrypted_dek: &[u8]) -> Vec<u8> {
        let len = u16::try_from(encrypted_dek.len()).unwrap();
        let prefix = format!("k8s:enc:kms:v1:{name}:");
        [prefix.as_bytes(), &len.to_be_bytes(), encrypted_dek, &[b':'; 60]].concat()
    }

    fn v1_name(value: &[u8]) -> &str {
        match classify(value) {
            Ok(StoredValue::KmsV1 { provider, .. }) => provider,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_provider_is_known_by_its_prefix() {
        let body: &[u8] = b"a:b";
        let cases = [
            ("aescbc:v1:key1:a:b", StoredValue::AesCbc { key_name: "key1", body }),
            ("aesgcm:v1:key1:a:b", StoredValue::AesGcm { key_name: "key1", body }),
            ("secretbox:v1:key1:a:b", StoredValue::Secretbox { key_name: "key1", body }),
            ("kms:v2:plug-in:a:b", StoredValue::KmsV2 { provider: "plug-in", body }),
        ];
        for (value, expected) in cases {
            assert_eq!(classify(format!("k8s:enc:{value}").as_bytes()), Ok(expected));
        }
        for plain in [&b"k8s\0\n\x0c"[..], b"{}", b"", b"k8s:enc"] {
            assert_eq!(classify(plain), Ok(StoredValue::Identity(plain)));
        }
    }

    #[test]
    fn what_is_encrypted_in_an_unknown_way_is_refused() {
        for value in ["k8s:enc:", "k8s:enc:rot13:v1:k:x", "k8s:enc:kms:v3:n:x"] {
            assert_eq!(classify(value.as_bytes()), Err(PrefixError::UnknownProvider));
        }
        for value in ["k8s:enc:kms:v1:name", "k8s:enc:kms:v2::x:y", "k8s:enc:aescbc:v1:\x01:x"] {
            assert_eq!(classify(value.as_bytes()), Err(PrefixError::NoName), "{value:?}");
        }
        let long = vec![0; MAX_ETCD_VALUE + 1];
        assert_eq!(classify(&long), Err(PrefixError::TooLong(MAX_ETCD_VALUE + 1)));
    }

    #[test]
    fn a_v1_name_may_hold_colons() {
        assert_eq!(v1_name(&v1_value("KmsPlugin", b"dek")), "KmsPlugin");
        assert_eq!(v1_name(&v1_value("team:a:b", b"d:e:k")), "team:a:b");
    }

    #[test]
    fn a_large_v1_value_does_not_mislead_the_split() {
        // After the first ':' stands "b:", which as a length is 25,146 and would fit.
        let value = [v1_value("a:b", &[b'A'; 628]), vec![b'x'; 40_000]].concat();
        assert_eq!(v1_name(&value), "a:b");
    }

    #[test]
    fn a_v1_body_that_fits_nowhere_is_left_to_its_decoder() {
        let value = b"k8s:enc:kms:v1:a:b:\x02\x74short";
        assert_eq!(
            classify(value),
            Ok(StoredValue::KmsV1 { provider: "a", body: b"b:\x02\x74short" })
        );
    }

    proptest! {
        #[test]
        fn a_v1_value_comes_apart_as_it_was_put_together(
            name in "[a-z:]{0,20}[a-z]",
            encrypted_dek in proptest::collection::vec(any::<u8>(), 0..700),
        ) {
            let value = v1_value(&name, &encrypted_dek);
            prop_assert_eq!(v1_name(&value), name.as_str());
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            prefix in "(k8s:enc:(kms:v1:|kms:v2:|aescbc:v1:)?)?",
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = classify(&[prefix.as_bytes(), &bytes].concat());
        }
    }
}
