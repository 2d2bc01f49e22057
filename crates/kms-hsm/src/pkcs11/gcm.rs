//! AES-GCM, and who makes its IV: every vendor has another rule, and the wrong one repeats an IV, which gives away the
//! key stream. So nothing is encrypted this way before a self-test has seen what this token does.
//!
//! SoftHSM, for example, takes an empty IV without a word, and encrypts alike each time.

use crate::pkcs11::error::{Class, Fault};
use crate::pkcs11::keys::{self, Kind};
use crate::pkcs11::raw::TAG_LEN;
use crate::pkcs11::seat::Seat;
use crate::vault::{Sealed, VaultError};
use cryptoki::object::ObjectHandle;
use kms_core::secret::SecretBytes;
use std::fmt;
use uuid::Uuid;

/// The length that NIST SP 800-38D recommends, and that nShield and CloudHSM fill.
const IV_LEN: usize = 12;
/// What a Luna appends.
const LONG_IV_LEN: usize = 16;

/// Who makes the IV of AES-GCM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvMode {
    /// We do, from the token's random source: SoftHSM, and any HSM outside its FIPS mode.
    Caller,
    /// The HSM does, and appends it to the ciphertext: Luna in FIPS mode.
    Appended,
    /// The HSM does, and writes it into our zeroed buffer: nShield and CloudHSM.
    Filled,
}

/// What the operator says about the IV mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IvChoice {
    /// The self-test finds out.
    #[default]
    Auto,
    /// This one; the self-test only confirms it.
    Only(IvMode),
}

impl IvChoice {
    /// As operators write it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let modes = [IvMode::Appended, IvMode::Filled, IvMode::Caller];
        match text {
            "auto" => Some(Self::Auto),
            text => modes.into_iter().find(|mode| mode.to_string() == text).map(Self::Only),
        }
    }

    /// In this order: a token that ignores our IV and appends its own passes no other trial, and one that would use a
    /// zeroed buffer as it is must not be taken for one that fills it.
    fn candidates(self) -> Vec<IvMode> {
        match self {
            Self::Auto => vec![IvMode::Appended, IvMode::Filled, IvMode::Caller],
            Self::Only(mode) => vec![mode],
        }
    }
}

impl fmt::Display for IvMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Caller => "caller",
            Self::Appended => "appended",
            Self::Filled => "filled",
        })
    }
}

/// The first mode that passes the self-test, or why none does.
///
/// # Errors
/// Those of a token that is lost meanwhile.
pub(super) fn self_test(seat: &Seat, choice: IvChoice) -> Result<Result<IvMode, String>, Fault> {
    let mut refusals = Vec::new();
    for mode in choice.candidates() {
        match trial(seat, mode) {
            Ok(()) => return Ok(Ok(mode)),
            Err(fault) if matches!(fault.class(), Some(Class::Session | Class::Device)) => {
                return Err(fault);
            }
            Err(fault) => refusals.push(format!("{mode}: {}", fault.into_answer())),
        }
    }
    Ok(Err(format!("AES-GCM has no IV mode that is safe on this token ({})", refusals.join("; "))))
}

/// Uses the key once, however often it is called: the token may have used it although nobody heard of it, and uses are
/// counted by the caller. `begun` is false at first.
pub(super) fn wrap(
    seat: &Seat,
    id: Uuid,
    context: &[u8],
    dek: &SecretBytes,
    begun: &mut bool,
) -> Result<Sealed, Fault> {
    let mode = seat.iv_mode()?;
    let root = seat.key(id, Kind::Root)?;
    if std::mem::replace(begun, true) {
        let cause = "the HSM was lost while it wrapped with AES-GCM".to_owned();
        return Err(VaultError::Unavailable { cause }.into());
    }
    encrypt(seat, mode, root, context, dek.as_slice())
}

pub(super) fn unwrap(
    seat: &Seat,
    id: Uuid,
    context: &[u8],
    sealed: &Sealed,
) -> Result<SecretBytes, Fault> {
    let possible =
        matches!(sealed.iv.len(), IV_LEN | LONG_IV_LEN) && sealed.ciphertext.len() > TAG_LEN;
    if !possible {
        return Err(VaultError::NotAuthentic.into());
    }
    let root = seat.key(id, Kind::Root)?;
    let (iv, ciphertext) = (&sealed.iv, &sealed.ciphertext);
    let mut dek = seat.raw().gcm_decrypt(seat.session(), root, iv, context, ciphertext)?;
    Ok(SecretBytes::new(std::mem::take(&mut *dek)))
}

fn encrypt(
    seat: &Seat,
    mode: IvMode,
    key: ObjectHandle,
    context: &[u8],
    plaintext: &[u8],
) -> Result<Sealed, Fault> {
    let mut iv = vec![0; if mode == IvMode::Appended { 0 } else { IV_LEN }];
    if mode == IvMode::Caller {
        seat.random(&mut iv)?;
    }
    let mut ciphertext =
        seat.raw().gcm_encrypt(seat.session(), key, &mut iv, context, plaintext, LONG_IV_LEN)?;
    let len = plaintext.len() + TAG_LEN;
    if mode == IvMode::Appended && ciphertext.len() >= len {
        iv = ciphertext.split_off(len);
    }
    let made = matches!(iv.len(), IV_LEN | LONG_IV_LEN) && iv.iter().any(|byte| *byte != 0);
    if ciphertext.len() != len || !made {
        return Err(VaultError::Policy("the HSM makes no IV, or not this way".to_owned()).into());
    }
    Ok(Sealed { iv, ciphertext })
}

/// Encrypts the same twice under the canary key, which protects nothing, and opens what came out.
fn trial(seat: &Seat, mode: IvMode) -> Result<(), Fault> {
    let refuse = |what: &str| Err(VaultError::Policy(what.to_owned()).into());
    let (known, context) = ([0x5a; 32], b"keelson IV self-test");
    let key = seat.key(keys::CANARY, Kind::Canary)?;
    let one = encrypt(seat, mode, key, context, &known)?;
    let two = encrypt(seat, mode, key, context, &known)?;
    if one.iv == two.iv || one.ciphertext == two.ciphertext {
        return refuse("two encryptions have the same IV");
    }
    let open = |sealed: &Sealed, context: &[u8]| {
        seat.raw().gcm_decrypt(seat.session(), key, &sealed.iv, context, &sealed.ciphertext)
    };
    for sealed in [&one, &two] {
        if open(sealed, context)?.as_slice() != known {
            return refuse("what was encrypted does not open under its IV");
        }
    }
    let mut changed = one.clone();
    if let Some(byte) = changed.ciphertext.last_mut() {
        *byte ^= 1;
    }
    match (open(&changed, context), open(&one, b"another context")) {
        (Err(_), Err(_)) => Ok(()),
        _ => refuse("the tag is not checked"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read_as_they_are_shown() {
        assert_eq!(IvChoice::parse("auto"), Some(IvChoice::Auto));
        for mode in [IvMode::Caller, IvMode::Appended, IvMode::Filled] {
            assert_eq!(IvChoice::parse(&mode.to_string()), Some(IvChoice::Only(mode)));
        }
        assert_eq!(IvChoice::parse("Caller"), None);
    }
}
