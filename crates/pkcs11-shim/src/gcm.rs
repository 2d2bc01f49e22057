//! The IV of AES-GCM as vendors treat it: a Luna in FIPS mode makes 16 bytes and appends them to the ciphertext; nShield
//! and CloudHSM write 12 bytes into the caller's buffer, which must be zero before.

use crate::control::IvMode;
use crate::engine::{Shim, forward};
use cryptoki_sys::{
    CK_BYTE, CK_GCM_PARAMS, CK_MECHANISM, CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE, CK_ULONG,
    CKM_AES_GCM, CKR_BUFFER_TOO_SMALL, CKR_MECHANISM_PARAM_INVALID, CKR_OK,
};

const APPENDED: usize = 16;
const FILLED: usize = 12;

/// An encryption of which the HSM has made the IV.
pub(crate) struct Pending {
    iv: [u8; APPENDED],
}

pub(crate) fn encrypt_init(
    shim: &Shim,
    session: CK_SESSION_HANDLE,
    mechanism: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    let mode = shim.state().orders.iv;
    // SAFETY: null or the application's mechanism.
    let asked = unsafe { mechanism.as_ref() };
    let gcm = asked.filter(|asked| {
        asked.mechanism == CKM_AES_GCM
            && asked.ulParameterLen as usize == size_of::<CK_GCM_PARAMS>()
            && mode != IvMode::AsIs
    });
    let Some(gcm) = gcm else { return begin(shim, session, mechanism, key) };
    // SAFETY: the mechanism says that this is where its parameters are, and their length is right.
    let params = unsafe { &mut *gcm.pParameter.cast::<CK_GCM_PARAMS>() };
    match mode {
        IvMode::Appended { strict, same } => {
            if strict && params.ulIvLen > 0 {
                return CKR_MECHANISM_PARAM_INVALID;
            }
            let mut iv = [0x11; APPENDED];
            if !same && let Err(code) = random(shim, session, &mut iv) {
                return code;
            }
            let mut own = *params;
            set_iv(&mut own, &mut iv);
            let code = begin_with(shim, session, &mut own, key);
            if code == CKR_OK {
                shim.state().pending.insert(session, Pending { iv });
            }
            code
        }
        IvMode::Filled { same } => {
            if params.pIv.is_null() || params.ulIvLen as usize != FILLED {
                return CKR_MECHANISM_PARAM_INVALID;
            }
            // SAFETY: the application says that its IV has this many bytes.
            let buffer = unsafe { std::slice::from_raw_parts_mut(params.pIv, FILLED) };
            if buffer.iter().any(|byte| *byte != 0) {
                return CKR_MECHANISM_PARAM_INVALID;
            }
            buffer.fill(0x22);
            if !same && let Err(code) = random(shim, session, buffer) {
                return code;
            }
            begin(shim, session, mechanism, key)
        }
        IvMode::AsIs => begin(shim, session, mechanism, key),
    }
}

pub(crate) fn encrypt(
    shim: &Shim,
    session: CK_SESSION_HANDLE,
    input: *mut CK_BYTE,
    input_len: CK_ULONG,
    output: *mut CK_BYTE,
    output_len: *mut CK_ULONG,
) -> CK_RV {
    // SAFETY: the application's own arguments.
    let encrypt = || {
        forward(shim.real().C_Encrypt, |encrypt| unsafe {
            encrypt(session, input, input_len, output, output_len)
        })
    };
    let Some(Pending { iv }) = shim.state().pending.remove(&session) else { return encrypt() };
    // SAFETY: the application's place for a number, of which the module requires that it is there.
    let len = || unsafe { *output_len as usize };
    let room = len();
    let code = encrypt();
    let filled = len();
    if code != CKR_OK {
        return code;
    }
    // SAFETY: as above.
    unsafe { *output_len += APPENDED as CK_ULONG };
    if output.is_null() {
        shim.state().pending.insert(session, Pending { iv });
    } else if room < filled + APPENDED {
        return CKR_BUFFER_TOO_SMALL;
    } else {
        // SAFETY: the application's buffer has room for that many bytes.
        unsafe { output.add(filled).copy_from(iv.as_ptr(), APPENDED) };
    }
    CKR_OK
}

fn begin_with(
    shim: &Shim,
    session: CK_SESSION_HANDLE,
    params: &mut CK_GCM_PARAMS,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    let mut mechanism = CK_MECHANISM {
        mechanism: CKM_AES_GCM,
        pParameter: std::ptr::from_mut(params).cast(),
        ulParameterLen: size_of::<CK_GCM_PARAMS>() as CK_ULONG,
    };
    begin(shim, session, &raw mut mechanism, key)
}

fn begin(
    shim: &Shim,
    session: CK_SESSION_HANDLE,
    mechanism: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    // SAFETY: the application's own arguments, or ours that live as long as the call.
    forward(shim.real().C_EncryptInit, |init| unsafe { init(session, mechanism, key) })
}

fn random(shim: &Shim, session: CK_SESSION_HANDLE, bytes: &mut [u8]) -> Result<(), CK_RV> {
    let len = bytes.len() as CK_ULONG;
    // SAFETY: the slice is as long as it says.
    let code = forward(shim.real().C_GenerateRandom, |random| unsafe {
        random(session, bytes.as_mut_ptr(), len)
    });
    if code == CKR_OK { Ok(()) } else { Err(code) }
}

fn set_iv(params: &mut CK_GCM_PARAMS, iv: &mut [u8; APPENDED]) {
    params.pIv = iv.as_mut_ptr();
    params.ulIvLen = APPENDED as CK_ULONG;
    params.ulIvBits = APPENDED as CK_ULONG * 8;
}
