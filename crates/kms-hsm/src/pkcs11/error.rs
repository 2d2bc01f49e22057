//! What a PKCS#11 return code means for the one who must act.
//!
//! The table is the union of what brokers in production have learnt (lost sessions that were
//! reused for ever, dead devices that only a new C_Initialize revives, PINs locked by retries).

use crate::statistics;
use crate::vault::VaultError;
use cryptoki::error::{Error, RvError};
use cryptoki_sys::{
    CK_RV, CKR_AEAD_DECRYPT_FAILED, CKR_KEY_EXHAUSTED, CKR_OPERATION_CANCEL_FAILED,
    CKR_OPERATION_NOT_VALIDATED, CKR_PARAMETER_SET_NOT_SUPPORTED, CKR_PENDING,
    CKR_SEED_RANDOM_REQUIRED, CKR_SESSION_ASYNC_NOT_SUPPORTED, CKR_TOKEN_NOT_INITIALIZED,
    CKR_TOKEN_RESOURCE_EXCEEDED,
};

/// What to do about a return code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The input is at fault: answer, keep the session.
    Data,
    /// An object handle went stale: forget the handles, find the key again, try once more.
    Handle,
    /// The session is lost or confused: new sessions, try once more.
    Session,
    /// The device or its driver is lost: C_Finalize, C_Initialize, log in, with growing pauses.
    Device,
    /// No room: answer, keep the session. Kryoptic says so too when it cannot read its storage: ask a
    /// canary.
    Capacity,
    /// The PIN. At a login: stop, and never try it again. Elsewhere: answer, keep the session.
    Credential,
    /// The token cannot or will not do this: answer, keep the session.
    Refused,
    /// Vendors use it for bad data and for dead devices alike: ask a canary.
    Ambiguous,
}

/// Why one attempt at a job failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// A PKCS#11 function failed.
    Token {
        /// What to do about it.
        class: Class,
        /// Function and code, for the operator: `C_Encrypt: CKR_DEVICE_ERROR`.
        what: String,
    },
    /// We know the answer: nothing to recover from.
    Answer(VaultError),
}

impl Fault {
    pub(super) fn session(what: impl Into<String>) -> Self {
        Self::Token { class: Class::Session, what: what.into() }
    }

    pub(super) fn device(what: impl Into<String>) -> Self {
        Self::Token { class: Class::Device, what: what.into() }
    }

    pub(super) fn class(&self) -> Option<Class> {
        match self {
            Self::Token { class, .. } => Some(*class),
            Self::Answer(_) => None,
        }
    }

    /// The answer to the caller when nothing more will be tried.
    pub(super) fn into_answer(self) -> VaultError {
        let (class, what) = match self {
            Self::Answer(error) => return error,
            Self::Token { class, what } => (class, what),
        };
        match class {
            Class::Data | Class::Ambiguous => VaultError::BadInput(what),
            Class::Handle | Class::Session | Class::Device => {
                VaultError::Unavailable { cause: what }
            }
            Class::Capacity => VaultError::Capacity(what),
            Class::Credential => VaultError::Credential(what),
            Class::Refused => VaultError::Policy(what),
        }
    }
}

impl From<VaultError> for Fault {
    fn from(error: VaultError) -> Self {
        Self::Answer(error)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match error {
            Error::Pkcs11(code, function) => {
                let name = code_name(&code);
                statistics::code(&name);
                let what = format!("{}: {name}", statistics::name(function));
                Self::Token { class: classify(&code), what }
            }
            Error::LibraryLoading(cause) => Self::device(format!("PKCS#11 library: {cause}")),
            other => Self::Token { class: Class::Refused, what: other.to_string() },
        }
    }
}

/// The table. Codes that PKCS#11 3.x added arrive as numbers.
pub(super) fn classify(code: &RvError) -> Class {
    use RvError as R;
    match code {
        R::EncryptedDataInvalid
        | R::EncryptedDataLenRange
        | R::DataInvalid
        | R::DataLenRange
        | R::SignatureInvalid
        | R::SignatureLenRange
        | R::WrappedKeyInvalid
        | R::WrappedKeyLenRange => Class::Data,

        R::ObjectHandleInvalid
        | R::KeyHandleInvalid
        | R::UnwrappingKeyHandleInvalid
        | R::WrappingKeyHandleInvalid => Class::Handle,

        R::SessionHandleInvalid
        | R::SessionClosed
        | R::UserNotLoggedIn
        | R::OperationActive
        | R::OperationNotInitialized
        | R::Cancel
        | R::FunctionCanceled => Class::Session,

        R::DeviceError
        | R::DeviceRemoved
        | R::TokenNotPresent
        | R::TokenNotRecognized
        | R::SlotIdInvalid
        | R::CryptokiNotInitialized
        | R::MutexBad
        | R::MutexNotLocked
        | R::FipsSelfTestFailed
        | R::LibraryLoadFailed => Class::Device,

        R::SessionCount | R::DeviceMemory | R::HostMemory => Class::Capacity,

        R::PinIncorrect
        | R::PinInvalid
        | R::PinLenRange
        | R::PinExpired
        | R::PinLocked
        | R::PinTooWeak
        | R::NewPinMode
        | R::NextOtp
        | R::UserPinNotInitialized => Class::Credential,

        R::GeneralError | R::FunctionFailed | R::VendorDefined(_) => Class::Ambiguous,
        R::UnknownErrorCode(number) => newer(*number).map_or(Class::Ambiguous, |(_, class)| class),
        _ => Class::Refused,
    }
}

/// Those that PKCS#11 3.x added.
const NEWER: [(CK_RV, &str, Class); 10] = [
    (CKR_AEAD_DECRYPT_FAILED, "CKR_AEAD_DECRYPT_FAILED", Class::Data),
    (CKR_OPERATION_CANCEL_FAILED, "CKR_OPERATION_CANCEL_FAILED", Class::Session),
    (CKR_PENDING, "CKR_PENDING", Class::Session),
    (CKR_TOKEN_NOT_INITIALIZED, "CKR_TOKEN_NOT_INITIALIZED", Class::Device),
    (CKR_TOKEN_RESOURCE_EXCEEDED, "CKR_TOKEN_RESOURCE_EXCEEDED", Class::Capacity),
    (CKR_KEY_EXHAUSTED, "CKR_KEY_EXHAUSTED", Class::Refused),
    (CKR_SESSION_ASYNC_NOT_SUPPORTED, "CKR_SESSION_ASYNC_NOT_SUPPORTED", Class::Refused),
    (CKR_SEED_RANDOM_REQUIRED, "CKR_SEED_RANDOM_REQUIRED", Class::Refused),
    (CKR_OPERATION_NOT_VALIDATED, "CKR_OPERATION_NOT_VALIDATED", Class::Refused),
    (CKR_PARAMETER_SET_NOT_SUPPORTED, "CKR_PARAMETER_SET_NOT_SUPPORTED", Class::Refused),
];

fn newer(code: CK_RV) -> Option<(&'static str, Class)> {
    NEWER.iter().find(|(number, ..)| *number == code).map(|(_, name, class)| (*name, *class))
}

/// The name in the standard, which is what an operator searches the vendor's manual for.
fn code_name(code: &RvError) -> String {
    if let RvError::VendorDefined(number) | RvError::UnknownErrorCode(number) = code {
        return match newer(*number) {
            Some((name, _)) => name.to_owned(),
            None => format!("return code 0x{number:08X}"),
        };
    }
    let mut name = String::from("CKR");
    for letter in format!("{code:?}").chars() {
        if letter.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptoki::context::Function;
    use cryptoki::error::Rv;
    use cryptoki_sys::*;

    const DATA: [CK_RV; 9] = [
        CKR_DATA_INVALID,
        CKR_DATA_LEN_RANGE,
        CKR_ENCRYPTED_DATA_INVALID,
        CKR_ENCRYPTED_DATA_LEN_RANGE,
        CKR_AEAD_DECRYPT_FAILED,
        CKR_SIGNATURE_INVALID,
        CKR_SIGNATURE_LEN_RANGE,
        CKR_WRAPPED_KEY_INVALID,
        CKR_WRAPPED_KEY_LEN_RANGE,
    ];
    const HANDLE: [CK_RV; 4] = [
        CKR_OBJECT_HANDLE_INVALID,
        CKR_KEY_HANDLE_INVALID,
        CKR_UNWRAPPING_KEY_HANDLE_INVALID,
        CKR_WRAPPING_KEY_HANDLE_INVALID,
    ];
    const SESSION: [CK_RV; 9] = [
        CKR_SESSION_HANDLE_INVALID,
        CKR_SESSION_CLOSED,
        CKR_USER_NOT_LOGGED_IN,
        CKR_OPERATION_ACTIVE,
        CKR_OPERATION_NOT_INITIALIZED,
        CKR_CANCEL,
        CKR_FUNCTION_CANCELED,
        CKR_OPERATION_CANCEL_FAILED,
        CKR_PENDING,
    ];
    const DEVICE: [CK_RV; 11] = [
        CKR_DEVICE_ERROR,
        CKR_DEVICE_REMOVED,
        CKR_TOKEN_NOT_PRESENT,
        CKR_TOKEN_NOT_RECOGNIZED,
        CKR_TOKEN_NOT_INITIALIZED,
        CKR_SLOT_ID_INVALID,
        CKR_CRYPTOKI_NOT_INITIALIZED,
        CKR_MUTEX_BAD,
        CKR_MUTEX_NOT_LOCKED,
        CKR_FIPS_SELF_TEST_FAILED,
        CKR_LIBRARY_LOAD_FAILED,
    ];
    const CAPACITY: [CK_RV; 4] =
        [CKR_SESSION_COUNT, CKR_DEVICE_MEMORY, CKR_HOST_MEMORY, CKR_TOKEN_RESOURCE_EXCEEDED];
    const CREDENTIAL: [CK_RV; 9] = [
        CKR_PIN_INCORRECT,
        CKR_PIN_INVALID,
        CKR_PIN_LEN_RANGE,
        CKR_PIN_EXPIRED,
        CKR_PIN_LOCKED,
        CKR_PIN_TOO_WEAK,
        CKR_NEW_PIN_MODE,
        CKR_NEXT_OTP,
        CKR_USER_PIN_NOT_INITIALIZED,
    ];
    const AMBIGUOUS: [CK_RV; 4] =
        [CKR_GENERAL_ERROR, CKR_FUNCTION_FAILED, CKR_VENDOR_DEFINED, CKR_VENDOR_DEFINED + 0x1234];
    const REFUSED: [CK_RV; 55] = [
        CKR_ARGUMENTS_BAD,
        CKR_NO_EVENT,
        CKR_NEED_TO_CREATE_THREADS,
        CKR_CANT_LOCK,
        CKR_ATTRIBUTE_READ_ONLY,
        CKR_ATTRIBUTE_SENSITIVE,
        CKR_ATTRIBUTE_TYPE_INVALID,
        CKR_ATTRIBUTE_VALUE_INVALID,
        CKR_ACTION_PROHIBITED,
        CKR_FUNCTION_NOT_PARALLEL,
        CKR_FUNCTION_NOT_SUPPORTED,
        CKR_KEY_SIZE_RANGE,
        CKR_KEY_TYPE_INCONSISTENT,
        CKR_KEY_NOT_NEEDED,
        CKR_KEY_CHANGED,
        CKR_KEY_NEEDED,
        CKR_KEY_INDIGESTIBLE,
        CKR_KEY_FUNCTION_NOT_PERMITTED,
        CKR_KEY_NOT_WRAPPABLE,
        CKR_KEY_UNEXTRACTABLE,
        CKR_MECHANISM_INVALID,
        CKR_MECHANISM_PARAM_INVALID,
        CKR_SESSION_PARALLEL_NOT_SUPPORTED,
        CKR_SESSION_READ_ONLY,
        CKR_SESSION_EXISTS,
        CKR_SESSION_READ_ONLY_EXISTS,
        CKR_SESSION_READ_WRITE_SO_EXISTS,
        CKR_TEMPLATE_INCOMPLETE,
        CKR_TEMPLATE_INCONSISTENT,
        CKR_TOKEN_WRITE_PROTECTED,
        CKR_UNWRAPPING_KEY_SIZE_RANGE,
        CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT,
        CKR_USER_ALREADY_LOGGED_IN,
        CKR_USER_TYPE_INVALID,
        CKR_USER_ANOTHER_ALREADY_LOGGED_IN,
        CKR_USER_TOO_MANY_TYPES,
        CKR_WRAPPING_KEY_SIZE_RANGE,
        CKR_WRAPPING_KEY_TYPE_INCONSISTENT,
        CKR_RANDOM_SEED_NOT_SUPPORTED,
        CKR_RANDOM_NO_RNG,
        CKR_DOMAIN_PARAMS_INVALID,
        CKR_CURVE_NOT_SUPPORTED,
        CKR_BUFFER_TOO_SMALL,
        CKR_SAVED_STATE_INVALID,
        CKR_INFORMATION_SENSITIVE,
        CKR_STATE_UNSAVEABLE,
        CKR_CRYPTOKI_ALREADY_INITIALIZED,
        CKR_EXCEEDED_MAX_ITERATIONS,
        CKR_PUBLIC_KEY_INVALID,
        CKR_FUNCTION_REJECTED,
        CKR_KEY_EXHAUSTED,
        CKR_SESSION_ASYNC_NOT_SUPPORTED,
        CKR_SEED_RANDOM_REQUIRED,
        CKR_OPERATION_NOT_VALIDATED,
        CKR_PARAMETER_SET_NOT_SUPPORTED,
    ];

    fn class_of(code: CK_RV) -> Class {
        match Rv::from(code) {
            Rv::Error(error) => classify(&error),
            Rv::Ok => panic!("{code:#x} is no error"),
        }
    }

    #[test]
    fn every_code_of_the_standard_has_its_class() {
        let table: [(&[CK_RV], Class); 8] = [
            (&DATA, Class::Data),
            (&HANDLE, Class::Handle),
            (&SESSION, Class::Session),
            (&DEVICE, Class::Device),
            (&CAPACITY, Class::Capacity),
            (&CREDENTIAL, Class::Credential),
            (&AMBIGUOUS, Class::Ambiguous),
            (&REFUSED, Class::Refused),
        ];
        let mut seen = std::collections::BTreeSet::new();
        for (codes, class) in table {
            for &code in codes {
                assert_eq!(class_of(code), class, "{code:#x}");
                assert!(seen.insert(code), "{code:#x} twice");
            }
        }
        // 104 codes in the PKCS#11 3.2 header besides CKR_OK, and one more of a vendor.
        assert_eq!(seen.len(), 105);
    }

    #[test]
    fn a_number_that_no_standard_knows_is_left_to_the_canary() {
        assert_eq!(class_of(0x61), Class::Ambiguous);
        assert_eq!(class_of(CK_RV::MAX), Class::Ambiguous);
    }

    #[test]
    fn operators_read_the_names_of_the_standard() {
        let fault = Fault::from(Error::Pkcs11(RvError::PinIncorrect, Function::Login));
        assert_eq!(
            fault.into_answer(),
            VaultError::Credential("C_Login: CKR_PIN_INCORRECT".to_owned())
        );
        let fault = Fault::from(Error::Pkcs11(RvError::VendorDefined(0x8000_0401), Function::Sign));
        assert_eq!(
            fault.into_answer(),
            VaultError::BadInput("C_Sign: return code 0x80000401".to_owned())
        );
        assert_eq!(code_name(&RvError::FipsSelfTestFailed), "CKR_FIPS_SELF_TEST_FAILED");
        for (number, name, _) in NEWER {
            assert_eq!(code_name(&RvError::UnknownErrorCode(number)), name);
        }
    }
}
