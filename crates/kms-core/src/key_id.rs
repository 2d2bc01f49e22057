//! What KMS v2 calls the key_id: one printable string that names a CRK version, and the configuration entry under
//! which it is used. The entry makes a return to an earlier CRK a new key_id: none is ever used twice.
//!
//! Public by contract: it stands in plain text in etcd, metrics and logs. It never names a DEK.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest;
use thiserror::Error;

use crate::limits::MAX_KEY_ID;

const SCHEME: &str = "keelson";
/// The entry that a key_id does not name: a plug-in that never changed its CRK has this one only.
const FIRST_ENTRY: i64 = 1;

/// `keelson/<instance>/<crk>/<version>`, and `/<KpVersion>` behind it unless that is 1.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct KeyId {
    text: String,
    instance_end: usize,
    crk_end: usize,
    version_end: usize,
    kp_version: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyIdError {
    #[error("key_id: the {0} is empty")]
    Empty(&'static str),
    #[error("key_id: the {0} holds a character other than printable ASCII without '/' and space")]
    Character(&'static str),
    #[error("key_id: {0} bytes are more than kube-apiserver takes ({MAX_KEY_ID})")]
    TooLong(usize),
    #[error("key_id: not of the form {SCHEME}/<instance>/<crk>/<version>[/<KpVersion>]")]
    Form,
}

impl KeyId {
    /// Names one version of a CRK, used under the entry with KpVersion 1.
    ///
    /// # Errors
    /// A part is empty or holds anything but printable ASCII, or the whole is over 1024 bytes.
    pub fn new(instance: &str, crk: &str, version: &str) -> Result<Self, KeyIdError> {
        Self::of_entry(instance, crk, version, FIRST_ENTRY)
    }

    /// Names one version of a CRK, used under the configuration entry that KMS v1 values call `kp_version`.
    ///
    /// # Errors
    /// As of [`new`](Self::new).
    pub fn of_entry(
        instance: &str,
        crk: &str,
        version: &str,
        kp_version: i64,
    ) -> Result<Self, KeyIdError> {
        check_part("instance", instance)?;
        check_part("CRK id", crk)?;
        check_part("CRK version", version)?;
        let mut text = format!("{SCHEME}/{instance}/{crk}/{version}");
        let version_end = text.len();
        if kp_version != FIRST_ENTRY {
            text.push_str(&format!("/{kp_version}"));
        }
        if text.len() > MAX_KEY_ID {
            return Err(KeyIdError::TooLong(text.len()));
        }
        let instance_end = SCHEME.len() + 1 + instance.len();
        let crk_end = instance_end + 1 + crk.len();
        Ok(Self { text, instance_end, crk_end, version_end, kp_version })
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
        let (Some(SCHEME), Some(instance), Some(crk), Some(version), entry, None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(KeyIdError::Form);
        };
        let kp_version = entry.map_or(Ok(FIRST_ENTRY), str::parse);
        let kp_version = kp_version.map_err(|_| KeyIdError::Form)?;
        let key_id = Self::of_entry(instance, crk, version, kp_version)?;
        // One key_id has one spelling: kube-apiserver compares bytes, and so does what is sealed.
        if key_id.text == text { Ok(key_id) } else { Err(KeyIdError::Form) }
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
        &self.text[self.crk_end + 1..self.version_end]
    }

    /// The configuration entry under which the CRK was used.
    #[must_use]
    pub fn kp_version(&self) -> i64 {
        self.kp_version
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
    fn every_entry_but_the_first_is_named_and_makes_another_key_id() {
        let first = KeyId::of_entry("i", "c", "v", 1).unwrap();
        assert_eq!((first.as_str(), first.kp_version()), ("keelson/i/c/v", 1));
        let third = KeyId::of_entry("i", "c", "v", 3).unwrap();
        assert_eq!((third.as_str(), third.kp_version()), ("keelson/i/c/v/3", 3));
        assert_eq!((third.instance(), third.crk(), third.version()), ("i", "c", "v"));
        // One spelling each.
        for other in ["keelson/i/c/v/1", "keelson/i/c/v/03", "keelson/i/c/v/+3", "keelson/i/c/v/"] {
            assert_eq!(KeyId::parse(other), Err(KeyIdError::Form), "{other:?}");
        }
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
        for foreign in
            ["", "keelson", "keelson/i/c", "keelson/i/c/v/x", "keelson/i/c/v/2/3", "Keelson/i/c/v"]
        {
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
            kp_version: i64,
        ) {
            let id = KeyId::of_entry(&instance, &crk, &version, kp_version).unwrap();
            prop_assert_eq!(KeyId::parse(id.as_str()).unwrap(), id);
        }

        #[test]
        fn any_text_is_refused_or_kept_as_it_is(text in "(keelson/(i/c/v/)?)?\\PC{0,60}") {
            if let Ok(id) = KeyId::parse(&text) {
                prop_assert_eq!(id.as_str(), text);
            }
        }
    }
}
