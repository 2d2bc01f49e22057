//! The types that hold what must not leak: wiped on drop, silent under Debug, never Display.
//!
//! Nothing here is compared with `==`, serialised or printed. Whoever needs the bytes has to ask
//! for them by name.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use zeroize::{Zeroize, Zeroizing};

use crate::cipher::Derived;

/// A plain data encryption key. Clones share one copy, which is wiped when the last of them goes; so do the keys that
/// are derived from it.
#[derive(Clone)]
pub struct Dek(Arc<Material>);

#[derive(Default)]
struct Material {
    bytes: Zeroizing<[u8; Dek::LEN]>,
    derived: Derived,
}

impl Dek {
    pub const LEN: usize = 32;

    /// Takes the key over and wipes the argument's own copy.
    #[must_use]
    pub fn from_bytes(mut bytes: [u8; Self::LEN]) -> Self {
        let dek = Self::copied(&bytes);
        bytes.zeroize();
        dek
    }

    /// `None` unless there are exactly 32 bytes.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self::copied)
    }

    /// Straight to where it stays: nothing that holds it is moved.
    fn copied(bytes: &[u8; Self::LEN]) -> Self {
        let mut material = Arc::<Material>::default();
        if let Some(material) = Arc::get_mut(&mut material) {
            material.bytes.copy_from_slice(bytes);
        }
        Self(material)
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0.bytes
    }

    /// What has been derived from this DEK so far, for whoever derives.
    pub(crate) fn derived(&self) -> &Derived {
        &self.0.derived
    }
}

impl fmt::Debug for Dek {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dek(..)")
    }
}

/// Secret bytes of any length: payloads, wrapped plaintexts, imported key material.
#[derive(Clone, Default)]
pub struct SecretBytes(Zeroizing<Vec<u8>>);

impl SecretBytes {
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    /// Hands the buffer itself over, for a message type that insists on owning it. From here on
    /// the taker answers for wiping it.
    #[must_use]
    pub fn into_vec(mut self) -> Vec<u8> {
        std::mem::take(&mut *self.0)
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Vec<u8>> for SecretBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self::new(bytes)
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes({} bytes)", self.len())
    }
}

/// Secret text: API keys, tokens, PINs, base64 of plaintexts. Can be read from JSON, not written.
#[derive(Clone, Default, Deserialize)]
#[serde(from = "String")]
pub struct SecretText(Zeroizing<String>);

impl SecretText {
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<String> for SecretText {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_nothing_of_the_content() {
        let dek = Dek::from_bytes([0x5a; 32]);
        let bytes = SecretBytes::new(b"hunter2".to_vec());
        let text = SecretText::new("hunter2".into());
        assert_eq!(
            format!("{dek:?} {bytes:?} {text:?}"),
            "Dek(..) SecretBytes(7 bytes) SecretText(..)"
        );
    }

    #[test]
    fn a_dek_has_32_bytes() {
        assert!(Dek::from_slice(&[1; 31]).is_none());
        assert!(Dek::from_slice(&[1; 33]).is_none());
        assert_eq!(Dek::from_slice(&[1; 32]).unwrap().as_bytes(), &[1; 32]);
    }

    #[test]
    fn secret_bytes_hand_over_what_they_held() {
        assert_eq!(SecretBytes::new(vec![1, 2, 3]).into_vec(), [1, 2, 3]);
    }

    #[test]
    fn secret_text_is_read_from_json() {
        let text: SecretText = serde_json::from_str(r#""a\nb""#).unwrap();
        assert_eq!(text.expose(), "a\nb");
    }
}
