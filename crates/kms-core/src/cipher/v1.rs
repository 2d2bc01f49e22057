//! The KMS v1 cipher: the original's bytes, with an authentication code hidden in their fill.
//!
//! `base64(gob(KpVersion, WDEK, base64(IV ‖ AES-256-CBC(length ‖ payload ‖ fill))))`.
//!
//! CBC alone can be changed without anyone noticing, but the fill up to the block is ours to
//! choose. So it is a truncated HMAC-SHA-256 of at least 12 bytes under a key of its own; a reader
//! that ignores the fill still reads the value. What was written by others has no such code, and
//! is opened only when the caller says so.

use std::ops::Range;

use aws_lc_rs::cipher::{
    AES_256, DecryptingKey, DecryptionContext, EncryptingKey, EncryptionContext, UnboundCipherKey,
};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::hmac;
use aws_lc_rs::iv::FixedLength;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use super::gob::{self, Secret};
use super::{FormatError, OpenError, SealError, derive, once, sha256};
use crate::canonical::{Canonical, length};
use crate::limits::{MAX_PAYLOAD, MAX_V1_CIPHER};
use crate::secret::{Dek, SecretBytes};

/// What NUM_LEN_BYTES may be.
pub const LEN_BYTES: std::ops::RangeInclusive<u8> = 1..=8;

const BLOCK: usize = 16;

/// A forger's chance per try is 2^-96; a 32-byte payload after 4 length bytes leaves just this.
const MIN_CODE: usize = 12;

const LABEL: &str = "keelson kms v1 cipher";
const CODE_KEY: &str = "keelson kms v1 authentication code";

/// What goes into one value. `Debug` is left out: it holds a payload.
pub struct Seal<'a> {
    pub dek: &'a Dek,
    pub kp_version: i64,
    pub wdek: &'a [u8],
    /// SERVER_CONFIG.NUM_LEN_BYTES.
    pub len_bytes: u8,
    /// Random, and never used before with this DEK.
    pub iv: [u8; BLOCK],
    pub payload: &'a [u8],
}

/// Seals a payload; returns the base64 text that goes to kube-apiserver.
///
/// # Errors
/// NUM_LEN_BYTES is out of range, the payload is too long for it or for kube-apiserver, or there
/// is no WDEK.
pub fn seal(input: &Seal<'_>) -> Result<Vec<u8>, SealError> {
    check_input(input)?;
    let width = usize::from(input.len_bytes);
    let code = Code::new(input.dek, input.kp_version, &sha256(input.wdek), &input.iv);
    let tag = code.ok_or(SealError::Library)?.of(width, input.payload);

    let mut blocks = Zeroizing::new(Vec::with_capacity(sealed_len(width, input.payload.len())));
    blocks.extend_from_slice(&length(input.payload.len())[8 - width..]);
    blocks.extend_from_slice(input.payload);
    let fill = sealed_len(width, input.payload.len()) - blocks.len();
    blocks.extend_from_slice(&tag.as_ref()[..fill]);
    encrypt(input.dek, input.iv, &mut blocks).ok_or(SealError::Library)?;

    let cipher = STANDARD.encode([&input.iv, blocks.as_slice()].concat());
    let secret = Secret { kp_version: input.kp_version, wrapped_dek: input.wdek.to_vec(), cipher };
    let text = STANDARD.encode(gob::encode(&secret)).into_bytes();
    if text.len() > MAX_V1_CIPHER {
        return Err(SealError::CiphertextTooLong { len: text.len(), max: MAX_V1_CIPHER });
    }
    Ok(text)
}

/// A value taken apart; nothing in it is known to be authentic.
#[derive(Debug, Clone)]
pub struct Envelope {
    kp_version: i64,
    wdek: Vec<u8>,
    wdek_sha256: [u8; 32],
    iv: [u8; BLOCK],
    blocks: Vec<u8>,
    canonical: bool,
}

/// A payload, and whether its authentication code proved it.
#[derive(Debug)]
pub struct Opened {
    pub payload: SecretBytes,
    pub authenticated: bool,
}

impl Envelope {
    /// Takes apart what kube-apiserver hands back.
    ///
    /// # Errors
    /// It is not a value of this form.
    pub fn decode(text: &[u8]) -> Result<Self, FormatError> {
        if text.len() > MAX_V1_CIPHER {
            return Err(FormatError::TooLong { len: text.len(), max: MAX_V1_CIPHER });
        }
        let stream = STANDARD.decode(text).map_err(|_| FormatError::Base64)?;
        let secret = gob::decode(&stream)?;
        if secret.wrapped_dek.is_empty() {
            return Err(FormatError::NoWdek);
        }
        let cipher = STANDARD.decode(&secret.cipher).map_err(|_| FormatError::Blocks)?;
        let (iv, blocks) = cipher.split_first_chunk().ok_or(FormatError::Blocks)?;
        if blocks.is_empty() || blocks.len() % BLOCK != 0 {
            return Err(FormatError::Blocks);
        }
        Ok(Self {
            kp_version: secret.kp_version,
            iv: *iv,
            blocks: blocks.to_vec(),
            canonical: gob::encode(&secret) == stream,
            wdek_sha256: sha256(&secret.wrapped_dek),
            wdek: secret.wrapped_dek,
        })
    }

    #[must_use]
    pub fn kp_version(&self) -> i64 {
        self.kp_version
    }

    #[must_use]
    pub fn wdek(&self) -> &[u8] {
        &self.wdek
    }

    #[must_use]
    pub fn wdek_sha256(&self) -> [u8; 32] {
        self.wdek_sha256
    }

    /// Length of the encrypted part, its IV included.
    #[must_use]
    pub fn cipher_len(&self) -> usize {
        BLOCK + self.blocks.len()
    }

    /// Opens with the unwrapped DEK. An authentic value is found under any NUM_LEN_BYTES, so that
    /// changing the setting makes nothing unreadable; one without a code only under `len_bytes`,
    /// in either byte order, and only if `accept_unauthenticated`.
    ///
    /// # Errors
    /// Anything that depends on the key is [`OpenError::NotAuthentic`], whatever the cause.
    pub fn open(
        &self,
        dek: &Dek,
        len_bytes: u8,
        accept_unauthenticated: bool,
    ) -> Result<Opened, OpenError> {
        if !LEN_BYTES.contains(&len_bytes) {
            return Err(OpenError::LenBytes(len_bytes));
        }
        let mut plain = Zeroizing::new(self.blocks.clone());
        decrypt(dek, self.iv, &mut plain).ok_or(OpenError::NotAuthentic)?;

        let code = Code::new(dek, self.kp_version, &self.wdek_sha256, &self.iv)
            .ok_or(OpenError::NotAuthentic)?;
        let width = usize::from(len_bytes);
        let others = LEN_BYTES.map(usize::from).filter(|other| *other != width);
        let proven = std::iter::once(width)
            .chain(others)
            .find_map(|width| self.authentic_payload(&code, width, &plain));
        let found = match proven {
            Some(payload) => Some((payload, true)),
            None if accept_unauthenticated => foreign_payload(width, &plain).map(|at| (at, false)),
            None => None,
        };
        let (at, authenticated) = found.ok_or(OpenError::NotAuthentic)?;
        Ok(Opened { payload: SecretBytes::new(plain[at].to_vec()), authenticated })
    }

    /// Where the payload is, if the code after it is right. A length that cannot be is replaced
    /// and the code computed all the same: its time must not tell an impossible length, which an
    /// attacker can bring about by changing the IV, from a wrong code.
    fn authentic_payload(
        &self,
        code: &Code<'_>,
        width: usize,
        plain: &[u8],
    ) -> Option<Range<usize>> {
        let claimed = big_endian(plain.get(..width)?);
        let fits =
            claimed.filter(|len| *len <= plain.len() && sealed_len(width, *len) == plain.len());
        let longest = plain.len().checked_sub(width + MIN_CODE)?;
        let payload = width..width + fits.unwrap_or(longest);
        let tag = code.of(width, &plain[payload.clone()]);
        let fill = &plain[payload.end..];
        let equal = verify_slices_are_equal(&tag.as_ref()[..fill.len()], fill).is_ok();
        (equal & fits.is_some() & self.canonical).then_some(payload)
    }
}

/// The authentication code of one value, short of its length and payload.
struct Code<'a> {
    key: &'a hmac::Key,
    header: Vec<u8>,
}

impl<'a> Code<'a> {
    fn new(
        dek: &'a Dek,
        kp_version: i64,
        wdek_sha256: &[u8; 32],
        iv: &[u8; BLOCK],
    ) -> Option<Self> {
        let key = once(&dek.derived().v1_code, || {
            Some(hmac::Key::new(hmac::HMAC_SHA256, &*derive(dek, CODE_KEY)?))
        })?;
        let header =
            Canonical::new(LABEL).number(kp_version).field(wdek_sha256).field(iv).into_bytes();
        Some(Self { key, header })
    }

    /// The payload goes into the code directly, so that no other buffer ever holds it.
    fn of(&self, width: usize, payload: &[u8]) -> hmac::Tag {
        let mut code = hmac::Context::with_key(self.key);
        code.update(&self.header);
        code.update(&length(width));
        code.update(&length(payload.len()));
        code.update(payload);
        code.sign()
    }
}

fn check_input(input: &Seal<'_>) -> Result<(), SealError> {
    if !LEN_BYTES.contains(&input.len_bytes) {
        return Err(SealError::LenBytes(input.len_bytes));
    }
    if input.wdek.is_empty() {
        return Err(SealError::NoWdek);
    }
    let max = if input.len_bytes == 1 { usize::from(u8::MAX) } else { MAX_PAYLOAD };
    if input.payload.len() > max {
        return Err(SealError::PayloadTooLong { len: input.payload.len(), max });
    }
    Ok(())
}

/// Length of the encrypted blocks: whole, with room for the code.
fn sealed_len(width: usize, payload: usize) -> usize {
    (width + payload + MIN_CODE).next_multiple_of(BLOCK)
}

/// The payload of a value without a code: the first length, of either byte order, that leaves
/// at most one block of fill.
fn foreign_payload(width: usize, plain: &[u8]) -> Option<Range<usize>> {
    let (prefix, rest) = plain.split_at_checked(width)?;
    let reversed = Zeroizing::new(prefix.iter().rev().copied().collect::<Vec<u8>>());
    [prefix, &reversed]
        .into_iter()
        .filter_map(big_endian)
        .find(|len| *len <= rest.len() && rest.len() - len <= BLOCK)
        .map(|len| width..width + len)
}

fn big_endian(prefix: &[u8]) -> Option<usize> {
    let number = prefix.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    usize::try_from(number).ok()
}

fn cbc_key(dek: &Dek) -> Option<UnboundCipherKey> {
    UnboundCipherKey::new(&AES_256, dek.as_bytes()).ok()
}

fn encrypt(dek: &Dek, iv: [u8; BLOCK], blocks: &mut [u8]) -> Option<()> {
    let key = once(&dek.derived().v1_encrypting, || EncryptingKey::cbc(cbc_key(dek)?).ok())?;
    let context = EncryptionContext::Iv128(FixedLength::from(iv));
    key.less_safe_encrypt(blocks, context).ok()?;
    Some(())
}

fn decrypt(dek: &Dek, iv: [u8; BLOCK], blocks: &mut [u8]) -> Option<()> {
    let key = once(&dek.derived().v1_decrypting, || DecryptingKey::cbc(cbc_key(dek)?).ok())?;
    let context = DecryptionContext::Iv128(FixedLength::from(iv));
    key.decrypt(blocks, context).ok()?;
    Some(())
}

#[cfg(test)]
mod tests;
