//! A PKCS#11 module that passes every call on to a real one, and injects faults on the way: any return code at any
//! call, delays, hangs, crashes, lost sessions, tokens that go and return, other tokens in their place, tokens that
//! lie about attributes, and the ways in which vendors treat the IV of AES-GCM. It counts every call.
//!
//! Three environment variables tell it what to do: `PKCS11_SHIM_MODULE` names the real module,
//! `PKCS11_SHIM_CONTROL` the file of faults ([`control`] has its format), `PKCS11_SHIM_COUNTS` the file into which the
//! calls are counted ([`Counts`] reads it). The control file may change at any time and is looked at in every call.
//!
//! For tests only. No product links it, and nothing here knows what an application wants from a token.
#![expect(unsafe_code, reason = "a PKCS#11 module is a C library, and calls another one")]

mod codes;
pub mod control;
mod counts;
mod engine;
mod functions;
mod gcm;
mod hooks;

pub use codes::CODES;
pub use control::Control;
pub use counts::Counts;
pub use functions::Function;

use cryptoki_sys::{CK_FUNCTION_LIST, CK_RV, CKR_ARGUMENTS_BAD, CKR_OK};
use std::path::PathBuf;

/// Names the real module.
pub const MODULE: &str = "PKCS11_SHIM_MODULE";
/// Names the control file. It need not exist.
pub const CONTROL: &str = "PKCS11_SHIM_CONTROL";
/// Names the file of counts, which is made if it is missing.
pub const COUNTS: &str = "PKCS11_SHIM_COUNTS";

/// Where cargo has put the module: beside the running test, or one folder above it.
#[must_use]
pub fn library() -> Option<PathBuf> {
    let test = std::env::current_exe().ok()?;
    let folders = test.ancestors().skip(1).take(2);
    folders.map(|folder| folder.join("libpkcs11_shim.so")).find(|file| file.is_file())
}

/// The one symbol that an application looks for.
///
/// # Safety
/// `list` is null or a valid place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: *mut *mut CK_FUNCTION_LIST) -> CK_RV {
    if list.is_null() {
        return CKR_ARGUMENTS_BAD;
    }
    // SAFETY: not null, so the caller's place for a pointer. Applications only read the list, which C declares mutable.
    unsafe { *list = (&raw const functions::LIST).cast_mut() };
    CKR_OK
}
