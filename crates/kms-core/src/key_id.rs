//! What KMS v2 calls the key_id: one printable string that names a CRK version.
//!
//! Public by contract: it stands in plain text in etcd, metrics and logs. It never names a DEK.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest;
use thiserror::Error;

use crate::limits::MAX_KEY_ID;

const SCHEME: &str = "keelson";

/// `keelson/<instance>/<crk>/<version>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct KeyId {
    text: String,
    instance_end: usize,
    crk_end: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyIdError {
    #[error("key_id: the {0} is empty")]
    Empty(&'static str),
    #[error("key_id: the {0} holds a character other than printable ASCII without '/' and space")]
    Character(&'static str),
    #[error("key_id: {0} bytes are more than kube-apiserver takes ({MAX_KEY_ID})")]
    TooLong(usize),
    #[error("key_id: not of the form {SCHEME}/<instance>/<crk>/<version>")]
    Form,
}

impl KeyId {
    /// Names one version of a CRK.
    ///
    /// # Errors
    /// A part is empty or holds anything but printable ASCII, or the whole is over 1024 bytes.
    pub fn new(instance: &str, crk: &str, version: &str) -> Result<Self, KeyIdError> {
        check_part("instance", instance)?;
        check_part("CRK id", crk)?;
        check_part("CRK version", version)?;
        let text = format!("{SCHEME}/{instance}/{crk}/{version}");
        if text.len() > MAX_KEY_ID {
            return Err(KeyIdError::TooLong(text.len()));
        }
        let instance_end = SCHEME.len() + 1 + instance.len();
        let crk_end = instance_end + 1 + crk.len();
        Ok(Self { text, instance_end, crk_end })
    }

    /// Reads a key_id that kube-apiserver hands back.
    ///
    /// # Errors
    /// It is not one of ours.
    pub fn parse(text: &str) -> Result<Self, KeyIdError> {
        if text.len() > MAX_KEY_ID {
            return Err(KeyIdError::TooLong(text.len()));
        }
        let mut parts = text.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(SCHEME), Some(instance), Some(crk), Some(version), None) => {
                Self::new(instance, crk, version)
            }
            _ => Err(KeyIdError::Form),
        }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    #[must_use]
    pub fn instance(&self) -> &str {
        &self.text[SCHEME.len() + 1..self.instance_end]
    }

    #[must_use]
    pub fn crk(&self) -> &str {
        &self.text[self.instance_end + 1..self.crk_end]
    }

    #[must_use]
    pub fn version(&self) -> &str {
        &self.text[self.crk_end + 1..]
    }

    /// `sha256:<hex>`, the form in which kube-apiserver's metrics and logs name a key_id.
    #[must_use]
    pub fn hash(&self) -> String {
        let digest = digest::digest(&digest::SHA256, self.text.as_bytes());
        let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha256:{hex}")
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for KeyId {
    type Err = KeyIdError;

    fn from_str(text: &str) -> Result<Self, KeyIdError> {
        Self::parse(text)
    }
}

fn check_part(name: &'static str, part: &str) -> Result<(), KeyIdError> {
    if part.is_empty() {
        return Err(KeyIdError::Empty(name));
    }
    if part.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/') {
        Ok(())
    } else {
        Err(KeyIdError::Character(name))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_instance_crk_and_version() {
        let id = KeyId::new("i-1", "c.2", "v_3").unwrap();
        assert_eq!(id.to_string(), "keelson/i-1/c.2/v_3");
        assert_eq!((id.instance(), id.crk(), id.version()), ("i-1", "c.2", "v_3"));
    }

    #[test]
    fn hash_is_what_sha256sum_prints() {
        let id = KeyId::new("i", "c", "v").unwrap();
        assert_eq!(
            id.hash(),
            "sha256:31084796074b988e1f3acd064d8c0d87dc360ef3fdfc6f4ce7b37849f63419e8"
        );
    }

    #[test]
    fn refuses_what_would_not_come_back_the_same() {
        assert_eq!(KeyId::new("", "c", "v"), Err(KeyIdError::Empty("instance")));
        assert_eq!(KeyId::new("i", "c/d", "v"), Err(KeyIdError::Character("CRK id")));
        assert_eq!(KeyId::new("i", "c", "v 1"), Err(KeyIdError::Character("CRK version")));
        assert_eq!(KeyId::new("i", "c", "ü"), Err(KeyIdError::Character("CRK version")));
        for foreign in ["", "keelson", "keelson/i/c", "keelson/i/c/v/x", "Keelson/i/c/v"] {
            assert_eq!(KeyId::parse(foreign), Err(KeyIdError::Form), "{foreign:?}");
        }
    }

    #[test]
    fn is_at_most_what_kube_apiserver_takes() {
        let room = MAX_KEY_ID - "keelson/i/c/".len();
        assert_eq!(KeyId::new("i", "c", &"v".repeat(room)).unwrap().as_str().len(), 1024);
        assert_eq!(KeyId::new("i", "c", &"v".repeat(room + 1)), Err(KeyIdError::TooLong(1025)));
    }

    proptest! {
        #[test]
        fn what_is_made_parses_to_itself(
            instance in "[!-.0-~]{1,40}", crk in "[!-.0-~]{1,40}", version in "[!-.0-~]{1,40}",
        ) {
            let id = KeyId::new(&instance, &crk, &version).unwrap();
            prop_assert_eq!(KeyId::parse(id.as_str()).unwrap(), id);
        }

        #[test]
        fn any_text_is_refused_or_kept_as_it_is(text in "(keelson/)?\\PC{0,60}") {
            if let Ok(id) = KeyId::parse(&text) {
                prop_assert_eq!(id.as_str(), text);
            }
        }
    }
}
