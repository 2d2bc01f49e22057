//! The wrapped DEK as text: base64 of the compact JSON that the original wrote, and what its hash covers.
//!
//! Nothing here wraps or unwraps; that happens in the HSM. To the plug-in the text is opaque.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use thiserror::Error;
use uuid::Uuid;

use crate::canonical::Canonical;
use crate::limits::MAX_WDEK;

/// The tag of AES-GCM, in bytes.
const GCM_TAG: usize = 16;

/// A wrapped DEK of the key service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wdek {
    pub version: WdekVersion,
    /// AES-256-CBC-PAD under the CRK version; in version 4.0.0 AES-256-GCM over [`mac_context`], with its tag.
    pub ciphertext: Vec<u8>,
    /// HMAC-SHA-512 over [`mac_input`]; empty in version 4.0.0, which has none.
    pub hash: Vec<u8>,
    pub iv: Vec<u8>,
    /// The CRK version. Versions 2.1.0 and 4.0.0 always have it, 2.0.0 never.
    pub handle: Option<Uuid>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WdekVersion {
    /// The original's: does not say which CRK version wrapped it.
    V2_0_0,
    /// With a handle.
    V2_1_0,
    /// With a handle, in one step: AES-GCM.
    V4_0_0,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WdekError {
    #[error("the wrapped DEK has {0} bytes, at most {MAX_WDEK} are read")]
    TooLong(usize),
    #[error("the wrapped DEK is not standard base64")]
    Base64,
    #[error("the wrapped DEK is not a JSON object with ciphertext, hash, iv and version")]
    Json,
    #[error("the wrapped DEK has version {0:?}; 2.0.0, 2.1.0 and 4.0.0 are known")]
    Version(String),
    #[error("the wrapped DEK has a handle in version 2.0.0, or none in a later one")]
    Handle,
    #[error("the wrapped DEK has a {0} of impossible length")]
    Length(&'static str),
}

impl WdekVersion {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V2_0_0 => "2.0.0",
            Self::V2_1_0 => "2.1.0",
            Self::V4_0_0 => "4.0.0",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::V2_0_0, Self::V2_1_0, Self::V4_0_0]
            .into_iter()
            .find(|version| version.as_str() == text)
    }
}

impl Wdek {
    /// The text, its members in the original's order.
    #[must_use]
    pub fn encode(&self) -> String {
        // By hand: the order is the format, and nothing in it could need escaping.
        let handle = self.handle.map(|handle| format!(r#","handle":"{handle}""#));
        let hash = match self.version {
            WdekVersion::V4_0_0 => String::new(),
            _ => format!(r#""hash":"{}","#, STANDARD.encode(&self.hash)),
        };
        let json = format!(
            r#"{{"ciphertext":"{}",{}"iv":"{}","version":"{}"{}}}"#,
            STANDARD.encode(&self.ciphertext),
            hash,
            STANDARD.encode(&self.iv),
            self.version.as_str(),
            handle.unwrap_or_default(),
        );
        STANDARD.encode(json)
    }

    /// Reads a text of ours.
    ///
    /// # Errors
    /// It is not base64 of such a JSON object, or of another version, or its parts have lengths
    /// that its algorithms never give.
    pub fn decode(text: &str) -> Result<Self, WdekError> {
        let members = Members::decode(text)?;
        let version = members.version.ok_or(WdekError::Json)?;
        let version = WdekVersion::parse(&version).ok_or(WdekError::Version(version))?;
        let handle = match (version, members.handle) {
            (WdekVersion::V2_0_0, None) => None,
            (WdekVersion::V2_1_0 | WdekVersion::V4_0_0, Some(handle)) => {
                Some(Uuid::try_parse(&handle).map_err(|_| WdekError::Handle)?)
            }
            _ => return Err(WdekError::Handle),
        };
        let ciphertext = bytes("ciphertext", &members.ciphertext)?;
        let iv = bytes("iv", &members.iv.ok_or(WdekError::Json)?)?;
        if version == WdekVersion::V4_0_0 {
            check("hash", members.hash.is_none())?;
            check("ciphertext", ciphertext.len() > GCM_TAG)?;
            check("iv", matches!(iv.len(), 12 | 16))?;
            return Ok(Self { version, ciphertext, hash: Vec::new(), iv, handle });
        }
        let hash = bytes("hash", &members.hash.ok_or(WdekError::Json)?)?;
        check("ciphertext", !ciphertext.is_empty() && ciphertext.len() % 16 == 0)?;
        check("hash", hash.len() == 64)?;
        check("iv", iv.len() == 16)?;
        Ok(Self { version, ciphertext, hash, iv, handle })
    }
}

/// What can be told of any WDEK in this look, of ours or of another service or version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    pub version: Option<String>,
    pub ciphertext_bytes: usize,
    pub hash_bytes: Option<usize>,
    pub iv_bytes: Option<usize>,
    pub handle: Option<String>,
}

impl Look {
    /// Describes a WDEK without judging it.
    ///
    /// # Errors
    /// It is not base64 of a JSON object with a ciphertext.
    pub fn of(text: &str) -> Result<Self, WdekError> {
        let members = Members::decode(text)?;
        let len = |name, text: Option<String>| {
            text.map(|text| bytes(name, &text).map(|bytes| bytes.len())).transpose()
        };
        Ok(Self {
            version: members.version,
            ciphertext_bytes: bytes("ciphertext", &members.ciphertext)?.len(),
            hash_bytes: len("hash", members.hash)?,
            iv_bytes: len("iv", members.iv)?,
            handle: members.handle,
        })
    }
}

/// What a WDEK is bound to: where its CRK version lives, and the caller's associated data. A
/// missing list and an empty one are the same, an empty entry is not.
#[must_use]
pub fn mac_context(instance: &str, key: &str, version: &str, aad: &[String]) -> Vec<u8> {
    let head = Canonical::new("keelson wrapped DEK")
        .field(instance.as_bytes())
        .field(key.as_bytes())
        .field(version.as_bytes());
    aad.iter().fold(head, |context, entry| context.field(entry.as_bytes())).into_bytes()
}

/// What the hash covers.
#[must_use]
pub fn mac_input(context: &[u8], iv: &[u8], ciphertext: &[u8]) -> Vec<u8> {
    Canonical::new("keelson wrapped DEK hash")
        .field(context)
        .field(iv)
        .field(ciphertext)
        .into_bytes()
}

/// The JSON. Members beyond ciphertext are optional, because other versions lack some.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Members {
    ciphertext: String,
    hash: Option<String>,
    iv: Option<String>,
    version: Option<String>,
    handle: Option<String>,
}

impl Members {
    fn decode(text: &str) -> Result<Self, WdekError> {
        if text.len() > MAX_WDEK {
            return Err(WdekError::TooLong(text.len()));
        }
        let json = STANDARD.decode(text).map_err(|_| WdekError::Base64)?;
        serde_json::from_slice(&json).map_err(|_| WdekError::Json)
    }
}

fn bytes(name: &'static str, text: &str) -> Result<Vec<u8>, WdekError> {
    STANDARD.decode(text).map_err(|_| WdekError::Length(name))
}

fn check(name: &'static str, possible: bool) -> Result<(), WdekError> {
    if possible { Ok(()) } else { Err(WdekError::Length(name)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HANDLE: Uuid = Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);

    fn wdek(handle: Option<Uuid>) -> Wdek {
        let version = if handle.is_some() { WdekVersion::V2_1_0 } else { WdekVersion::V2_0_0 };
        Wdek { version, ciphertext: vec![1; 48], hash: vec![2; 64], iv: vec![3; 16], handle }
    }

    /// The members of a good 2.1.0 text after `change`.
    fn changed(change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) -> String {
        let json = STANDARD.decode(wdek(Some(HANDLE)).encode()).unwrap();
        let mut members = serde_json::from_slice(&json).unwrap();
        change(&mut members);
        STANDARD.encode(serde_json::to_vec(&members).unwrap())
    }

    #[test]
    fn members_stand_in_the_seeds_order() {
        let json = STANDARD.decode(wdek(Some(HANDLE)).encode()).unwrap();
        let json = String::from_utf8(json).unwrap();
        let at = |name: &str| json.find(&format!("\"{name}\":")).unwrap();
        assert!(at("ciphertext") < at("hash") && at("hash") < at("iv"));
        assert!(at("iv") < at("version") && at("version") < at("handle"));
        assert!(
            json.ends_with(r#""version":"2.1.0","handle":"01234567-89ab-4def-8123-456789abcdef"}"#)
        );
    }

    #[test]
    fn version_and_handle_belong_together() {
        assert!(
            !STANDARD.decode(wdek(None).encode()).unwrap().windows(6).any(|at| at == b"handle")
        );
        let no_handle = changed(|members| {
            members.remove("handle");
        });
        assert_eq!(Wdek::decode(&no_handle), Err(WdekError::Handle));
        let old = changed(|members| {
            members.insert("version".into(), "2.0.0".into());
        });
        assert_eq!(Wdek::decode(&old), Err(WdekError::Handle));
        let no_uuid = changed(|members| {
            members.insert("handle".into(), "x".into());
        });
        assert_eq!(Wdek::decode(&no_uuid), Err(WdekError::Handle));
    }

    #[test]
    fn what_aes_cbc_and_hmac_sha_512_never_give_is_refused() {
        for (name, len) in [("ciphertext", 0), ("ciphertext", 47), ("hash", 63), ("iv", 12)] {
            let text = changed(|members| {
                members.insert(name.into(), STANDARD.encode(vec![0; len]).into());
            });
            assert_eq!(Wdek::decode(&text), Err(WdekError::Length(name)), "{name} {len}");
        }
        let no_base64 = changed(|members| {
            members.insert("iv".into(), "!".into());
        });
        assert_eq!(Wdek::decode(&no_base64), Err(WdekError::Length("iv")));
    }

    #[test]
    fn texts_of_others_are_refused_but_described() {
        let cloud = changed(|members| {
            members.remove("hash");
            members.insert("version".into(), "5.0.0".into());
        });
        assert_eq!(Wdek::decode(&cloud), Err(WdekError::Version("5.0.0".into())));
        let look = Look::of(&cloud).unwrap();
        assert_eq!(look.version.as_deref(), Some("5.0.0"));
        assert_eq!((look.ciphertext_bytes, look.hash_bytes, look.iv_bytes), (48, None, Some(16)));
        assert_eq!(look.handle.as_deref(), Some("01234567-89ab-4def-8123-456789abcdef"));
    }

    #[test]
    fn version_4_has_no_hash_and_lengths_of_its_own() {
        let whole = Wdek {
            version: WdekVersion::V4_0_0,
            ciphertext: vec![1; 48],
            hash: Vec::new(),
            iv: vec![3; 12],
            handle: Some(HANDLE),
        };
        for iv in [12, 16] {
            let whole = Wdek { iv: vec![3; iv], ..whole.clone() };
            assert_eq!(Wdek::decode(&whole.encode()), Ok(whole));
        }
        for iv in [0, 11, 13] {
            let text = Wdek { iv: vec![3; iv], ..whole.clone() }.encode();
            assert_eq!(Wdek::decode(&text), Err(WdekError::Length("iv")));
        }
        let short = Wdek { ciphertext: vec![1; 16], ..whole.clone() }.encode();
        assert_eq!(Wdek::decode(&short), Err(WdekError::Length("ciphertext")));
        let json = String::from_utf8(STANDARD.decode(whole.encode()).unwrap()).unwrap();
        assert!(
            !json.contains("hash") && json.contains(r#""version":"4.0.0","handle":"#),
            "{json}"
        );
        let with_hash = changed(|members| {
            members.insert("version".into(), "4.0.0".into());
        });
        assert_eq!(Wdek::decode(&with_hash), Err(WdekError::Length("hash")));
        let no_handle = Wdek { handle: None, ..whole }.encode();
        assert_eq!(Wdek::decode(&no_handle), Err(WdekError::Handle));
    }

    #[test]
    fn what_is_no_wdek_at_all_is_named() {
        assert_eq!(Wdek::decode("{}"), Err(WdekError::Base64));
        assert_eq!(Wdek::decode(&STANDARD.encode("{}")), Err(WdekError::Json));
        assert_eq!(Wdek::decode(&"A".repeat(MAX_WDEK + 1)), Err(WdekError::TooLong(16_385)));
        let more = changed(|members| {
            members.insert("more".into(), 1.into());
        });
        assert_eq!(Wdek::decode(&more), Err(WdekError::Json));
    }

    #[test]
    fn the_context_tells_every_part_apart() {
        let aad = |entries: &[&str]| entries.iter().map(|&entry| entry.into()).collect::<Vec<_>>();
        let contexts = [
            mac_context("i", "k", "v", &[]),
            mac_context("i", "k", "v", &aad(&[""])),
            mac_context("i", "k", "v", &aad(&["", ""])),
            mac_context("i", "k", "v", &aad(&["ab"])),
            mac_context("i", "k", "v", &aad(&["a", "b"])),
            mac_context("i", "k", "va", &aad(&["b"])),
            mac_context("ik", "", "v", &[]),
            mac_context("", "ik", "v", &[]),
        ];
        for (at, context) in contexts.iter().enumerate() {
            assert!(!contexts[..at].contains(context), "context {at}");
        }
    }

    /// Written out by hand: whoever changes it makes every stored WDEK unreadable.
    #[test]
    fn the_hash_covers_exactly_this() {
        let input = mac_input(&mac_context("i", "k", "v", &["a".into()]), &[1, 2], &[3]);
        let context = b"\0\0\0\0\0\0\0\x13keelson wrapped DEK\
            \0\0\0\0\0\0\0\x01i\0\0\0\0\0\0\0\x01k\0\0\0\0\0\0\0\x01v\0\0\0\0\0\0\0\x01a";
        let mut expected = b"\0\0\0\0\0\0\0\x18keelson wrapped DEK hash".to_vec();
        expected.extend_from_slice(b"\0\0\0\0\0\0\0\x3f");
        expected.extend_from_slice(context);
        expected.extend_from_slice(b"\0\0\0\0\0\0\0\x02\x01\x02\0\0\0\0\0\0\0\x01\x03");
        assert_eq!(input, expected);
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes(
            blocks in 1..20_usize, byte: u8, hash in any::<[u8; 32]>(), iv: [u8; 16],
            handle in proptest::option::of(any::<u128>()),
        ) {
            let whole = Wdek {
                ciphertext: vec![byte; blocks * 16],
                hash: hash.repeat(2),
                iv: iv.to_vec(),
                ..wdek(handle.map(Uuid::from_u128))
            };
            prop_assert_eq!(Wdek::decode(&whole.encode()), Ok(whole));
        }

        #[test]
        fn arbitrary_text_never_panics(text in "\\PC{0,200}", bytes: Vec<u8>) {
            for text in [text.clone(), STANDARD.encode(text), STANDARD.encode(bytes)] {
                let _ = Wdek::decode(&text);
                let _ = Look::of(&text);
            }
        }
    }
}
