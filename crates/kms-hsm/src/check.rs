//! What a key check value is made of.
//!
//! The AES key encrypts a constant, and the HMAC key makes its code of that: one value stands for both. It is kept in
//! databases, manifests and reports, so it must help nobody: the ciphertext never leaves the vault; the code's input
//! begins with a label that no WDEK's does, so it is the code of nothing that could be unwrapped; and three quarters of
//! it are thrown away, so it is no whole code at all. To find a key from it means to try all 2^256.

use crate::vault::{CheckValue, VaultError};

/// What the AES key encrypts, under an IV of zeros.
pub(crate) const CHECKED: [u8; 16] = *b"keelson is well!";

/// What the HMAC key makes the code of. A WDEK's input begins with the eight bytes of a length, the first of them zero
/// (`kms_core::wdek::mac_input`).
pub(crate) fn check_input(ciphertext: &[u8]) -> Vec<u8> {
    [b"keelson check value 1", ciphertext].concat()
}

/// # Errors
/// `Policy` for a code that is too short to have one.
pub(crate) fn first_quarter(code: &[u8]) -> Result<CheckValue, VaultError> {
    let short = || VaultError::Policy("the token makes codes that are too short".to_owned());
    code.first_chunk().copied().ok_or_else(short)
}
