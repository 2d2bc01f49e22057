//! The hot path: Encrypt, Decrypt and Sign in two calls each, straight through the C function list.
//!
//! The safe wrapper asks for the length of the result first; over a network HSM that third call
//! costs a third of the rate. We know the lengths, so the buffers are made here; those of attributes
//! as well. And whatever would be several calls, or one that nobody sees, is made here one by one, so
//! that each is counted. This is the only file of the product with unsafe code.

use crate::pkcs11::error::Fault;
use crate::statistics::timed;
use cryptoki::context::Function;
use cryptoki::error::{Error, Rv, RvError};
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use cryptoki::session::Session;
use cryptoki_sys::{
    CK_ATTRIBUTE, CK_BYTE, CK_FUNCTION_LIST, CK_GCM_PARAMS, CK_MECHANISM, CK_MECHANISM_TYPE,
    CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE, CK_SLOT_ID, CK_TRUE, CK_ULONG,
    CK_UNAVAILABLE_INFORMATION, CKM_AES_CBC_PAD, CKM_AES_GCM, CKM_SHA256_RSA_PKCS, CKM_SHA512_HMAC,
};
use std::path::Path;
use std::ptr;
use zeroize::Zeroizing;

pub(super) const BLOCK: usize = 16;
pub(super) const HMAC_LEN: usize = 64;
/// The tag of AES-GCM, whole.
pub(super) const TAG_LEN: usize = 16;
const TAG_BITS: CK_ULONG = 128;
/// RSA-4096; ours are shorter.
const SIGNATURE_MAX: usize = 512;
/// More than any attribute of ours has; the longest is the modulus of an RSA key.
const ATTRIBUTE_MAX: usize = 512;

/// `C_*Init` of the operations.
type Init = unsafe extern "C" fn(CK_SESSION_HANDLE, *mut CK_MECHANISM, CK_OBJECT_HANDLE) -> CK_RV;

/// `C_Encrypt`, `C_Decrypt` and `C_Sign`: session, input and its length, output and its length.
type Work = unsafe extern "C" fn(
    CK_SESSION_HANDLE,
    *mut CK_BYTE,
    CK_ULONG,
    *mut CK_BYTE,
    *mut CK_ULONG,
) -> CK_RV;

/// The function list of a loaded module, and the module itself, which must outlive it.
pub(super) struct Raw {
    functions: CK_FUNCTION_LIST,
    _library: cryptoki_sys::Pkcs11,
}

/// One operation with a key of the token.
struct Operation<'a> {
    init: (Option<Init>, Function),
    work: (Option<Work>, Function),
    mechanism: CK_MECHANISM_TYPE,
    parameters: Parameters<'a>,
}

/// The parameters of a mechanism.
enum Parameters<'a> {
    None,
    Iv(&'a [u8; BLOCK]),
    /// The module may write into the IV, and does where the HSM makes it.
    Gcm {
        iv: &'a mut [u8],
        context: &'a [u8],
    },
}

impl Raw {
    /// Loads the module once more; the loader counts, so it is the same module with the same state.
    #[expect(unsafe_code, reason = "PKCS#11 is a C interface")]
    pub(super) fn load(library: &Path) -> Result<Self, Fault> {
        // SAFETY: the operator names the module; its initialisers run as for any linked library.
        let library = unsafe { cryptoki_sys::Pkcs11::new(library) }.map_err(Error::from)?;
        let Ok(list_of) = &library.C_GetFunctionList else {
            return Err(Error::MissingSymbol("C_GetFunctionList").into());
        };
        let mut list: *mut CK_FUNCTION_LIST = ptr::null_mut();
        // SAFETY: the argument is a valid place for one pointer, as the standard asks.
        let code = unsafe { list_of(&raw mut list) };
        Rv::from(code).into_result(Function::GetFunctionList)?;
        if list.is_null() {
            return Err(Error::NullFunctionPointer.into());
        }
        // SAFETY: not null, and C_GetFunctionList promises a CK_FUNCTION_LIST of version 2 that
        // lives as long as the module is loaded; we copy it and keep the module beside it.
        let functions = unsafe { *list };
        Ok(Self { functions, _library: library })
    }

    /// AES-CBC-PAD. The ciphertext is one to sixteen bytes longer than the plaintext.
    pub(super) fn encrypt(
        &self,
        session: &Session,
        key: ObjectHandle,
        iv: &[u8; BLOCK],
        plaintext: &[u8],
    ) -> Result<Vec<u8>, Fault> {
        let operation = Operation {
            init: (self.functions.C_EncryptInit, Function::EncryptInit),
            work: (self.functions.C_Encrypt, Function::Encrypt),
            mechanism: CKM_AES_CBC_PAD,
            parameters: Parameters::Iv(iv),
        };
        let mut ciphertext = vec![0; (plaintext.len() / BLOCK + 1) * BLOCK];
        let len = operation.run(session, key, plaintext, &mut ciphertext)?;
        ciphertext.truncate(len);
        Ok(ciphertext)
    }

    /// AES-CBC-PAD, into a buffer that is wiped. Check the code over the ciphertext first.
    pub(super) fn decrypt(
        &self,
        session: &Session,
        key: ObjectHandle,
        iv: &[u8; BLOCK],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Fault> {
        let operation = Operation {
            init: (self.functions.C_DecryptInit, Function::DecryptInit),
            work: (self.functions.C_Decrypt, Function::Decrypt),
            mechanism: CKM_AES_CBC_PAD,
            parameters: Parameters::Iv(iv),
        };
        let mut plaintext = Zeroizing::new(vec![0; ciphertext.len()]);
        let len = operation.run(session, key, ciphertext, &mut plaintext)?;
        plaintext.truncate(len);
        Ok(plaintext)
    }

    /// AES-GCM: ciphertext and tag, and behind them whatever else the module appends, at most `room` bytes.
    pub(super) fn gcm_encrypt(
        &self,
        session: &Session,
        key: ObjectHandle,
        iv: &mut [u8],
        context: &[u8],
        plaintext: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, Fault> {
        let operation = Operation {
            init: (self.functions.C_EncryptInit, Function::EncryptInit),
            work: (self.functions.C_Encrypt, Function::Encrypt),
            mechanism: CKM_AES_GCM,
            parameters: Parameters::Gcm { iv, context },
        };
        let mut ciphertext = vec![0; plaintext.len() + TAG_LEN + room];
        let len = operation.run(session, key, plaintext, &mut ciphertext)?;
        ciphertext.truncate(len);
        Ok(ciphertext)
    }

    /// AES-GCM, into a buffer that is wiped. `ciphertext` ends with the tag.
    pub(super) fn gcm_decrypt(
        &self,
        session: &Session,
        key: ObjectHandle,
        iv: &[u8],
        context: &[u8],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Fault> {
        let mut iv = iv.to_vec();
        let operation = Operation {
            init: (self.functions.C_DecryptInit, Function::DecryptInit),
            work: (self.functions.C_Decrypt, Function::Decrypt),
            mechanism: CKM_AES_GCM,
            parameters: Parameters::Gcm { iv: &mut iv, context },
        };
        let mut plaintext = Zeroizing::new(vec![0; ciphertext.len()]);
        let len = operation.run(session, key, ciphertext, &mut plaintext)?;
        plaintext.truncate(len);
        Ok(plaintext)
    }

    /// Closes what sessions this process still has on a slot, of whose numbers nobody knows any more.
    #[expect(unsafe_code, reason = "PKCS#11 is a C interface")]
    pub(super) fn close_all_sessions(&self, slot: CK_ULONG) -> Result<(), Fault> {
        let close = self.functions.C_CloseAllSessions.ok_or(Error::NullFunctionPointer)?;
        // SAFETY: a number is all that the function takes.
        let code = timed(Function::CloseAllSessions, || unsafe { close(slot) });
        Ok(Rv::from(code).into_result(Function::CloseAllSessions)?)
    }

    /// Closes a session that does not do so itself. Nothing can be done about one that does not close.
    #[expect(unsafe_code, reason = "PKCS#11 is a C interface")]
    pub(super) fn close_session(&self, session: &Session) -> Result<(), Fault> {
        let close = self.functions.C_CloseSession.ok_or(Error::NullFunctionPointer)?;
        // SAFETY: a number is all that the function takes.
        let code = timed(Function::CloseSession, || unsafe { close(session.handle()) });
        Ok(Rv::from(code).into_result(Function::CloseSession)?)
    }

    /// The slots with a token in them. Asked for their number first: that is when a library looks
    /// at its readers again.
    #[expect(unsafe_code, reason = "PKCS#11 is a C interface")]
    pub(super) fn slots_with_token(&self) -> Result<Vec<CK_SLOT_ID>, Fault> {
        let list = self.functions.C_GetSlotList.ok_or(Error::NullFunctionPointer)?;
        let mut count = 0;
        // SAFETY: without a place for the slots the function only counts them.
        let code = timed(Function::GetSlotList, || unsafe {
            list(CK_TRUE, ptr::null_mut(), &raw mut count)
        });
        Rv::from(code).into_result(Function::GetSlotList)?;
        let mut slots = vec![0; usize::try_from(count).map_err(Error::from)?];
        // SAFETY: `slots` has room for as many as `count` says.
        let code = timed(Function::GetSlotList, || unsafe {
            list(CK_TRUE, slots.as_mut_ptr(), &raw mut count)
        });
        // CKR_BUFFER_TOO_SMALL: another came meanwhile. Whoever looks for it looks again.
        Rv::from(code).into_result(Function::GetSlotList)?;
        slots.truncate(usize::try_from(count).map_err(Error::from)?);
        Ok(slots)
    }

    /// Reads attributes, none of which is secret, in one call. What the object does not have, or the token does not
    /// show, is left out.
    #[expect(unsafe_code, reason = "PKCS#11 is a C interface")]
    pub(super) fn attributes(
        &self,
        session: &Session,
        object: ObjectHandle,
        types: &[AttributeType],
    ) -> Result<Vec<Attribute>, Fault> {
        let read = self.functions.C_GetAttributeValue.ok_or(Error::NullFunctionPointer)?;
        let room = CK_ULONG::try_from(ATTRIBUTE_MAX).map_err(Error::from)?;
        let count = CK_ULONG::try_from(types.len()).map_err(Error::from)?;
        let mut values = vec![[0u8; ATTRIBUTE_MAX]; types.len()];
        let place = |(kind, value): (&AttributeType, &mut [u8; ATTRIBUTE_MAX])| CK_ATTRIBUTE {
            type_: (*kind).into(),
            pValue: value.as_mut_ptr().cast(),
            ulValueLen: room,
        };
        let mut found: Vec<CK_ATTRIBUTE> = types.iter().zip(&mut values).map(place).collect();
        // SAFETY: the array has `count` places, each of which points to as many bytes as it says; `values` is used
        // by nobody else before the last of them is read below.
        let code = timed(Function::GetAttributeValue, || unsafe {
            read(session.handle(), object.handle(), found.as_mut_ptr(), count)
        });
        match Rv::from(code) {
            // Said of some, while the others are there.
            Rv::Error(
                RvError::AttributeSensitive
                | RvError::AttributeTypeInvalid
                | RvError::BufferTooSmall,
            ) => {}
            code => code.into_result(Function::GetAttributeValue)?,
        }
        found.retain(|attribute| attribute.ulValueLen != CK_UNAVAILABLE_INFORMATION);
        if found.iter().any(|attribute| attribute.ulValueLen > room) {
            return Err(Fault::device("C_GetAttributeValue: more bytes than fit"));
        }
        Ok(found.into_iter().map(Attribute::try_from).collect::<Result<_, _>>()?)
    }

    /// HMAC-SHA-512, all 64 bytes of it.
    pub(super) fn hmac(
        &self,
        session: &Session,
        key: ObjectHandle,
        data: &[u8],
    ) -> Result<[u8; HMAC_LEN], Fault> {
        let mut tag = [0; HMAC_LEN];
        let len = self.signing(CKM_SHA512_HMAC).run(session, key, data, &mut tag)?;
        if len != HMAC_LEN {
            return Err(Fault::device(format!("C_Sign: an HMAC-SHA-512 of {len} bytes")));
        }
        Ok(tag)
    }

    /// RSASSA-PKCS1-v1_5 with SHA-256.
    pub(super) fn sign(
        &self,
        session: &Session,
        key: ObjectHandle,
        data: &[u8],
    ) -> Result<Vec<u8>, Fault> {
        let mut signature = vec![0; SIGNATURE_MAX];
        let len = self.signing(CKM_SHA256_RSA_PKCS).run(session, key, data, &mut signature)?;
        signature.truncate(len);
        Ok(signature)
    }

    fn signing(&self, mechanism: CK_MECHANISM_TYPE) -> Operation<'static> {
        Operation {
            init: (self.functions.C_SignInit, Function::SignInit),
            work: (self.functions.C_Sign, Function::Sign),
            mechanism,
            parameters: Parameters::None,
        }
    }
}

impl Operation<'_> {
    /// Runs both calls and returns how many bytes of `output` the module has filled.
    #[expect(unsafe_code, reason = "PKCS#11 is a C interface")]
    fn run(
        mut self,
        session: &Session,
        key: ObjectHandle,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<usize, Fault> {
        let init = self.init.0.ok_or(Error::NullFunctionPointer)?;
        let work = self.work.0.ok_or(Error::NullFunctionPointer)?;
        let mut gcm = self.parameters.gcm()?;
        let (parameter, len) = match (&self.parameters, &mut gcm) {
            (Parameters::Iv(iv), _) => (iv.as_ptr().cast_mut().cast(), iv.len()),
            (_, Some(gcm)) => (ptr::from_mut(gcm).cast(), size_of::<CK_GCM_PARAMS>()),
            _ => (ptr::null_mut(), 0),
        };
        let len = CK_ULONG::try_from(len).map_err(Error::from)?;
        let mut mechanism =
            CK_MECHANISM { mechanism: self.mechanism, pParameter: parameter, ulParameterLen: len };
        // SAFETY: the session is ours alone (Session is not Sync). `mechanism`, its parameters and the
        // IV that they point to live to the end of this function, after the last call; the IV of
        // AES-GCM may be written to, and comes from a mutable slice.
        let code = timed(self.init.1, || unsafe {
            init(session.handle(), &raw mut mechanism, key.handle())
        });
        Rv::from(code).into_result(self.init.1)?;

        let mut len = CK_ULONG::try_from(output.len()).map_err(Error::from)?;
        let input_len = CK_ULONG::try_from(input.len()).map_err(Error::from)?;
        // SAFETY: the pointers and lengths are those of two live slices. The module reads the
        // input, which C declares mutable for old compilers' sake, and writes at most `len` bytes.
        let code = timed(self.work.1, || unsafe {
            work(
                session.handle(),
                input.as_ptr().cast_mut(),
                input_len,
                output.as_mut_ptr(),
                &raw mut len,
            )
        });
        Rv::from(code).into_result(self.work.1)?;
        let len = usize::try_from(len).map_err(Error::from)?;
        if len > output.len() {
            return Err(Fault::device(format!("C_{:?}: more bytes than fit", self.work.1)));
        }
        Ok(len)
    }
}

impl Parameters<'_> {
    fn gcm(&mut self) -> Result<Option<CK_GCM_PARAMS>, Error> {
        let Self::Gcm { iv, context } = self else { return Ok(None) };
        let len = CK_ULONG::try_from(iv.len())?;
        Ok(Some(CK_GCM_PARAMS {
            pIv: if iv.is_empty() { ptr::null_mut() } else { iv.as_mut_ptr() },
            ulIvLen: len,
            // Luna reads this one.
            ulIvBits: len * 8,
            pAAD: context.as_ptr().cast_mut(),
            ulAADLen: CK_ULONG::try_from(context.len())?,
            ulTagBits: TAG_BITS,
        }))
    }
}

impl std::fmt::Debug for Raw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raw").finish_non_exhaustive()
    }
}
