//! The vault: what the key service may ask of the thing that holds the root keys.
//!
//! A version of a CRK is named by its UUID alone. There is no method that returns a root key, none
//! that lists attributes, and none that opens something whose code was not checked first.

use crate::statistics::Statistics;
use async_trait::async_trait;
use aws_lc_rs::rsa::PublicKeyComponents;
use aws_lc_rs::signature::RSA_PKCS1_2048_8192_SHA256;
use kms_core::secret::SecretBytes;
use std::fmt::Debug;
use uuid::Uuid;

/// The longest input of [`Vault::wrap`], in bytes: what the on-premises key service allows.
pub const MAX_PLAINTEXT: usize = 4096;

/// The most random bytes that one call of [`Vault::random`] returns.
pub const MAX_RANDOM: usize = 1024;

/// By which a CRK version is known again: [`Vault::check_value`].
pub type CheckValue = [u8; 16];

/// Holds root keys and uses them. Every call ends within the vault's own deadline.
#[async_trait]
pub trait Vault: Send + Sync + Debug {
    /// Makes the AES-256 key of a CRK version, and the HMAC key beside it.
    ///
    /// Both exist afterwards with the attributes that were asked for, or neither does.
    ///
    /// # Errors
    /// `Exists` when the vault holds anything under this name; `Policy` when the keys that were
    /// made are weaker than asked for (they are destroyed).
    async fn create_version(&self, id: Uuid) -> Result<(), VaultError>;

    /// Like [`Vault::create_version`], with an AES key of 16, 24 or 32 bytes brought by the user.
    ///
    /// # Errors
    /// As `create_version`, and `BadInput` for any other length.
    async fn import_version(&self, id: Uuid, material: SecretBytes) -> Result<(), VaultError>;

    /// Destroys every key of this version, whole or not. What it wrapped is lost for good.
    ///
    /// # Errors
    /// `NotFound` when the vault holds nothing under this name.
    async fn destroy_version(&self, id: Uuid) -> Result<(), VaultError>;

    /// Encrypts `dek`, and binds the result to `context` (see `kms_core::wdek::mac_context`).
    ///
    /// # Errors
    /// `NotFound`; `BadInput` for an empty or overlong input.
    async fn wrap(&self, id: Uuid, context: &[u8], dek: SecretBytes)
    -> Result<Wrapped, VaultError>;

    /// Checks the code over context, IV and ciphertext, and only then decrypts.
    ///
    /// # Errors
    /// `NotFound`; `NotAuthentic` for whatever this version did not wrap under this context.
    async fn unwrap(
        &self,
        id: Uuid,
        context: &[u8],
        wrapped: Wrapped,
    ) -> Result<SecretBytes, VaultError>;

    /// Like [`Vault::wrap`], with AES-GCM in one step. One version may be used so at most 2^32 times
    /// (NIST SP 800-38D, 8.3); whoever calls this counts, over all who use the version.
    ///
    /// # Errors
    /// As `wrap`, and `Policy` where no way to make the IV has passed the self-test. After `Unavailable` it may be asked
    /// again: the vault never uses the key twice for one call, because the caller counts the uses.
    async fn wrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        dek: SecretBytes,
    ) -> Result<Sealed, VaultError>;

    /// Opens what [`Vault::wrap_gcm`] made.
    ///
    /// # Errors
    /// As `unwrap`.
    async fn unwrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        sealed: Sealed,
    ) -> Result<SecretBytes, VaultError>;

    /// What both keys of this version make of a fixed input, cut to a quarter: the same in every copy of the token, and
    /// in no other. Public: a MAC tells nothing of its key, and nothing that is wrapped is covered by this one.
    ///
    /// # Errors
    /// `NotFound`.
    async fn check_value(&self, id: Uuid) -> Result<CheckValue, VaultError>;

    /// The serial number of the token, `None` until it was found for the first time.
    fn serial(&self) -> Option<String>;

    /// Bytes from the vault's own random source, at most [`MAX_RANDOM`].
    ///
    /// # Errors
    /// `BadInput` when more are asked for.
    async fn random(&self, len: usize) -> Result<SecretBytes, VaultError>;

    /// Makes the RSA key pair `id` and returns its public half. A pair that is there is left as it is: so whoever did
    /// not hear the answer asks again.
    ///
    /// # Errors
    /// `Exists` when the vault holds one half only: it may be the only copy of a key that is in use, and is not
    /// touched. `Policy` when the token makes a weaker key than asked for.
    async fn make_signing_key(&self, id: Uuid) -> Result<RsaPublic, VaultError>;

    /// The public half of the key pair `id`, as far as the vault shows it. Nothing is made or changed.
    ///
    /// # Errors
    /// `NotFound` when there is none; the private half may be there all the same.
    async fn public_half(&self, id: Uuid) -> Result<RsaPublic, VaultError>;

    /// RSASSA-PKCS1-v1_5 with SHA-256 over `data`.
    ///
    /// # Errors
    /// `NotFound` when there is no such key pair: signing never makes one.
    async fn sign(&self, id: Uuid, data: &[u8]) -> Result<Vec<u8>, VaultError>;

    /// The CRK versions that are whole, sorted.
    ///
    /// # Errors
    /// Only those of a vault that cannot answer.
    async fn versions(&self) -> Result<Vec<Uuid>, VaultError>;

    /// The CRK versions of which a part is missing, sorted: what a crash in the middle of a
    /// creation leaves. They cannot be used; `destroy_version` removes them.
    ///
    /// # Errors
    /// Only those of a vault that cannot answer.
    async fn incomplete(&self) -> Result<Vec<Uuid>, VaultError>;

    /// Proves with a throw-away key that the vault computes, now.
    ///
    /// # Errors
    /// What a wrap would meet.
    async fn probe(&self) -> Result<(), VaultError>;

    /// Whether requests are let through now. Asks nothing of the HSM, and is told also where it hangs.
    fn circuit(&self) -> Circuit {
        Circuit::Closed
    }

    /// What was counted until now; `None` where there is no HSM to count the calls of. Asks nothing of the HSM.
    async fn statistics(&self) -> Option<Statistics> {
        None
    }
}

/// The breaker before an HSM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Circuit {
    /// Requests are let through.
    #[default]
    Closed,
    /// The first connection or the first repair is under way; requests wait for it.
    Repairing,
    /// The HSM is away, or no call into it returns; requests are refused at once.
    Open,
    /// The PIN was refused; nothing is tried before it is replaced.
    Refused,
}

impl Circuit {
    pub const ALL: [Self; 4] = [Self::Closed, Self::Repairing, Self::Open, Self::Refused];

    /// What operators call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Repairing => "repairing",
            Self::Open => "open",
            Self::Refused => "pin_refused",
        }
    }
}

/// A wrapped DEK: AES-CBC-PAD, and HMAC-SHA-512 over `kms_core::wdek::mac_input`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrapped {
    /// 16 bytes.
    pub iv: Vec<u8>,
    /// A multiple of 16 bytes.
    pub ciphertext: Vec<u8>,
    /// 64 bytes.
    pub hash: Vec<u8>,
}

/// A DEK wrapped with AES-GCM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// 12 bytes, or the 16 that some HSMs make.
    pub iv: Vec<u8>,
    /// As long as the DEK, and the tag of 16 bytes.
    pub ciphertext: Vec<u8>,
}

/// The public half of an RSA key pair, both numbers big-endian without leading zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RsaPublic {
    /// The modulus.
    pub n: Vec<u8>,
    /// The public exponent.
    pub e: Vec<u8>,
}

impl RsaPublic {
    /// Whether `signature` is the [`Vault::sign`] of the private half over `data`.
    #[must_use]
    pub fn verifies(&self, data: &[u8], signature: &[u8]) -> bool {
        let numbers = PublicKeyComponents { n: &self.n, e: &self.e };
        let key = numbers.to_parsed_public_key(&RSA_PKCS1_2048_8192_SHA256);
        key.is_ok_and(|key| key.verify_sig(data, signature).is_ok())
    }
}

/// Why the vault did not do it, grouped by who must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VaultError {
    /// The caller: no such key in the vault.
    #[error("the vault holds no such key")]
    NotFound,
    /// The caller: not wrapped by this key under this context, or changed since.
    #[error("not authentic")]
    NotAuthentic,
    /// The caller: this input cannot be processed, however often it is tried.
    #[error("bad input: {0}")]
    BadInput(String),
    /// The caller: the name is taken.
    #[error("the vault already holds a key of this name")]
    Exists,
    /// The operator: the HSM has no room for more keys or sessions.
    #[error("the HSM is full: {0}")]
    Capacity(String),
    /// The operator: the PIN is wrong, locked or expired. It was tried once and is not tried again.
    #[error("the HSM refuses the PIN: {0}")]
    Credential(String),
    /// The operator: the HSM does or holds something that must not be accepted.
    #[error("the HSM does not do what was asked: {0}")]
    Policy(String),
    /// Nobody yet: the HSM is away; the vault keeps trying to reach it.
    #[error("the HSM is not available: {cause}")]
    Unavailable {
        /// What was seen last.
        cause: String,
    },
    /// Nobody yet: no answer within the deadline.
    #[error("the HSM did not answer in time")]
    TimedOut,
    /// Nobody yet: more is asked of the HSM than it can do; come back later.
    #[error("too many requests wait for the HSM")]
    Busy,
}
