//! A vault without an HSM, for tests of what stands above it: same answers, keys in this process.
//!
//! Its fault switches show a service what an HSM does on a bad day. Nothing but a test builds it:
//! the feature `memory` is a dev-dependency everywhere.

use crate::check::{CHECKED, check_input, first_quarter};
use crate::vault::{
    CheckValue, MAX_PLAINTEXT, MAX_RANDOM, RsaPublic, Sealed, Vault, VaultError, Wrapped,
};
use async_trait::async_trait;
use aws_lc_rs::aead::{AES_128_GCM, AES_192_GCM, AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use aws_lc_rs::cipher::{
    AES_128, AES_192, AES_256, DecryptionContext, EncryptionContext, PaddedBlockDecryptingKey,
    PaddedBlockEncryptingKey, UnboundCipherKey,
};
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256};
use aws_lc_rs::{hmac, rand};
use kms_core::secret::SecretBytes;
use kms_core::wdek::mac_input;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;
use uuid::Uuid;

const IV_LEN: usize = 16;
const HMAC_KEY_LEN: usize = 64;

/// What the vault does instead of its work while a switch is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Every call fails like this.
    Fail(VaultError),
    /// The next `calls` calls fail like this, then all is well again.
    FailNext {
        /// How many.
        calls: usize,
        /// With what.
        error: VaultError,
    },
    /// Calls do not return until the switch is turned off.
    Hang,
}

/// Keys in memory.
#[derive(Debug)]
pub struct MemoryVault {
    keys: Mutex<Keys>,
    fault: watch::Sender<Option<Fault>>,
    unwraps: AtomicUsize,
}

#[derive(Default)]
struct Keys {
    versions: BTreeMap<Uuid, Version>,
    incomplete: BTreeSet<Uuid>,
    signing: BTreeMap<Uuid, KeyPair>,
}

struct Version {
    aes: SecretBytes,
    hmac: hmac::Key,
}

impl MemoryVault {
    /// An empty vault without faults.
    #[must_use]
    pub fn new() -> Self {
        Self {
            keys: Mutex::default(),
            fault: watch::Sender::new(None),
            unwraps: AtomicUsize::new(0),
        }
    }

    /// Turns a fault on, or off with `None`; calls that hang go on then.
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.fault.send_replace(fault);
    }

    /// Leaves what a crash in the middle of `create_version` leaves.
    pub fn leave_incomplete(&self, id: Uuid) {
        self.keys().incomplete.insert(id);
    }

    /// Loses a key, as a token that was restored from an old backup does.
    pub fn lose_version(&self, id: Uuid) {
        self.keys().versions.remove(&id);
    }

    /// Loses a key pair.
    pub fn lose_signing_key(&self, id: Uuid) {
        self.keys().signing.remove(&id);
    }

    /// The key pairs that were made and not lost.
    #[must_use]
    pub fn signing_keys(&self) -> usize {
        self.keys().signing.len()
    }

    /// Puts another key under this name, as a token does that was made anew.
    ///
    /// # Errors
    /// The software cipher fails.
    pub fn replace_version(&self, id: Uuid) -> Result<(), VaultError> {
        self.lose_version(id);
        self.add(id, fresh(32)?)
    }

    /// How often something was to be unwrapped.
    #[must_use]
    pub fn unwraps(&self) -> usize {
        self.unwraps.load(Ordering::Relaxed)
    }

    async fn pass_fault(&self) -> Result<(), VaultError> {
        let mut switch = self.fault.subscribe();
        // The sender lives in self, so the wait cannot fail while this call borrows it.
        let _ = switch.wait_for(|fault| *fault != Some(Fault::Hang)).await;
        let mut failure = None;
        self.fault.send_if_modified(|fault| match fault {
            Some(Fault::Fail(error)) => {
                failure = Some(error.clone());
                false
            }
            Some(Fault::FailNext { calls, error }) if *calls > 0 => {
                failure = Some(error.clone());
                *calls -= 1;
                true
            }
            _ => false,
        });
        failure.map_or(Ok(()), Err)
    }

    fn keys(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn public(&self, id: Uuid) -> Result<RsaPublic, VaultError> {
        let keys = self.keys();
        let pair = keys.signing.get(&id).ok_or(VaultError::NotFound)?;
        let public = aws_lc_rs::rsa::PublicKeyComponents::<Vec<u8>>::from(pair.public_key());
        Ok(RsaPublic { n: public.n, e: public.e })
    }

    fn add(&self, id: Uuid, aes: SecretBytes) -> Result<(), VaultError> {
        let hmac_key = fresh(HMAC_KEY_LEN)?;
        let version = Version { aes, hmac: hmac::Key::new(hmac::HMAC_SHA512, hmac_key.as_slice()) };
        let mut keys = self.keys();
        if keys.versions.contains_key(&id) || keys.incomplete.contains(&id) {
            return Err(VaultError::Exists);
        }
        keys.versions.insert(id, version);
        Ok(())
    }
}

impl Default for MemoryVault {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Vault for MemoryVault {
    async fn create_version(&self, id: Uuid) -> Result<(), VaultError> {
        self.pass_fault().await?;
        self.add(id, fresh(32)?)
    }

    async fn import_version(&self, id: Uuid, material: SecretBytes) -> Result<(), VaultError> {
        self.pass_fault().await?;
        if !matches!(material.len(), 16 | 24 | 32) {
            return Err(VaultError::BadInput(format!("{} bytes of key material", material.len())));
        }
        self.add(id, material)
    }

    async fn destroy_version(&self, id: Uuid) -> Result<(), VaultError> {
        self.pass_fault().await?;
        let mut keys = self.keys();
        let whole = keys.versions.remove(&id).is_some();
        let part = keys.incomplete.remove(&id);
        if whole || part { Ok(()) } else { Err(VaultError::NotFound) }
    }

    async fn wrap(
        &self,
        id: Uuid,
        context: &[u8],
        dek: SecretBytes,
    ) -> Result<Wrapped, VaultError> {
        self.pass_fault().await?;
        check_length(&dek)?;
        let keys = self.keys();
        let version = keys.versions.get(&id).ok_or(VaultError::NotFound)?;
        let mut iv = [0; IV_LEN];
        rand::fill(&mut iv).map_err(broken)?;
        let ciphertext = encrypt(&version.aes, iv, &dek).map_err(broken)?;
        let tag = hmac::sign(&version.hmac, &mac_input(context, &iv, &ciphertext));
        Ok(Wrapped { iv: iv.to_vec(), ciphertext, hash: tag.as_ref().to_vec() })
    }

    async fn unwrap(
        &self,
        id: Uuid,
        context: &[u8],
        wrapped: Wrapped,
    ) -> Result<SecretBytes, VaultError> {
        self.unwraps.fetch_add(1, Ordering::Relaxed);
        self.pass_fault().await?;
        let keys = self.keys();
        let version = keys.versions.get(&id).ok_or(VaultError::NotFound)?;
        let covered = mac_input(context, &wrapped.iv, &wrapped.ciphertext);
        hmac::verify(&version.hmac, &covered, &wrapped.hash)
            .map_err(|_| VaultError::NotAuthentic)?;
        decrypt(&version.aes, wrapped).map_err(|_| VaultError::NotAuthentic)
    }

    async fn wrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        dek: SecretBytes,
    ) -> Result<Sealed, VaultError> {
        self.pass_fault().await?;
        check_length(&dek)?;
        let keys = self.keys();
        let version = keys.versions.get(&id).ok_or(VaultError::NotFound)?;
        let key = aead_key(&version.aes).map_err(broken)?;
        let mut ciphertext = dek.as_slice().to_vec();
        let iv =
            key.seal_in_place_append_tag(Aad::from(context), &mut ciphertext).map_err(broken)?;
        Ok(Sealed { iv: iv.as_ref().to_vec(), ciphertext })
    }

    async fn unwrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        sealed: Sealed,
    ) -> Result<SecretBytes, VaultError> {
        self.pass_fault().await?;
        let keys = self.keys();
        let version = keys.versions.get(&id).ok_or(VaultError::NotFound)?;
        let key = aead_key(&version.aes).map_err(broken)?;
        let open = || {
            let iv = Nonce::try_assume_unique_for_key(&sealed.iv)?;
            let mut in_out = sealed.ciphertext.clone();
            let len = key.open_in_place(iv, Aad::from(context), &mut in_out)?.len();
            in_out.truncate(len);
            Ok(SecretBytes::new(in_out))
        };
        open().map_err(|_: Unspecified| VaultError::NotAuthentic)
    }

    async fn check_value(&self, id: Uuid) -> Result<CheckValue, VaultError> {
        self.pass_fault().await?;
        let keys = self.keys();
        let version = keys.versions.get(&id).ok_or(VaultError::NotFound)?;
        let iv = [0; IV_LEN];
        let ciphertext = encrypt(&version.aes, iv, &SecretBytes::new(CHECKED.to_vec()));
        let input = check_input(&ciphertext.map_err(broken)?);
        first_quarter(hmac::sign(&version.hmac, &input).as_ref())
    }

    fn serial(&self) -> Option<String> {
        Some("memory".to_owned())
    }

    async fn random(&self, len: usize) -> Result<SecretBytes, VaultError> {
        self.pass_fault().await?;
        if len > MAX_RANDOM {
            return Err(VaultError::BadInput(format!("{len} random bytes at once")));
        }
        fresh(len)
    }

    async fn make_signing_key(&self, id: Uuid) -> Result<RsaPublic, VaultError> {
        self.pass_fault().await?;
        if let Entry::Vacant(free) = self.keys().signing.entry(id) {
            free.insert(KeyPair::generate(KeySize::Rsa2048).map_err(broken)?);
        }
        self.public(id)
    }

    async fn public_half(&self, id: Uuid) -> Result<RsaPublic, VaultError> {
        self.pass_fault().await?;
        self.public(id)
    }

    async fn sign(&self, id: Uuid, data: &[u8]) -> Result<Vec<u8>, VaultError> {
        self.pass_fault().await?;
        let keys = self.keys();
        let pair = keys.signing.get(&id).ok_or(VaultError::NotFound)?;
        let mut signature = vec![0; pair.public_modulus_len()];
        let random = rand::SystemRandom::new();
        pair.sign(&RSA_PKCS1_SHA256, &random, data, &mut signature).map_err(broken)?;
        Ok(signature)
    }

    async fn versions(&self) -> Result<Vec<Uuid>, VaultError> {
        self.pass_fault().await?;
        Ok(self.keys().versions.keys().copied().collect())
    }

    async fn incomplete(&self) -> Result<Vec<Uuid>, VaultError> {
        self.pass_fault().await?;
        Ok(self.keys().incomplete.iter().copied().collect())
    }

    async fn probe(&self) -> Result<(), VaultError> {
        self.pass_fault().await
    }
}

fn check_length(dek: &SecretBytes) -> Result<(), VaultError> {
    if dek.is_empty() || dek.len() > MAX_PLAINTEXT {
        return Err(VaultError::BadInput(format!("{} bytes to wrap", dek.len())));
    }
    Ok(())
}

fn aead_key(key: &SecretBytes) -> Result<RandomizedNonceKey, Unspecified> {
    let algorithm = match key.len() {
        16 => &AES_128_GCM,
        24 => &AES_192_GCM,
        _ => &AES_256_GCM,
    };
    RandomizedNonceKey::new(algorithm, key.as_slice())
}

fn fresh(len: usize) -> Result<SecretBytes, VaultError> {
    let mut bytes = vec![0; len];
    rand::fill(&mut bytes).map_err(broken)?;
    Ok(SecretBytes::new(bytes))
}

fn encrypt(
    key: &SecretBytes,
    iv: [u8; IV_LEN],
    plaintext: &SecretBytes,
) -> Result<Vec<u8>, Unspecified> {
    let mut in_out = plaintext.as_slice().to_vec();
    let context = EncryptionContext::Iv128(FixedLength::from(iv));
    PaddedBlockEncryptingKey::cbc_pkcs7(unbound(key)?)?.less_safe_encrypt(&mut in_out, context)?;
    Ok(in_out)
}

fn decrypt(key: &SecretBytes, wrapped: Wrapped) -> Result<SecretBytes, Unspecified> {
    let iv: [u8; IV_LEN] = wrapped.iv.try_into().map_err(|_| Unspecified)?;
    let context = DecryptionContext::Iv128(FixedLength::from(iv));
    let mut in_out = wrapped.ciphertext;
    let len =
        PaddedBlockDecryptingKey::cbc_pkcs7(unbound(key)?)?.decrypt(&mut in_out, context)?.len();
    in_out.truncate(len);
    Ok(SecretBytes::new(in_out))
}

fn unbound(key: &SecretBytes) -> Result<UnboundCipherKey, Unspecified> {
    let algorithm = match key.len() {
        16 => &AES_128,
        24 => &AES_192,
        _ => &AES_256,
    };
    UnboundCipherKey::new(algorithm, key.as_slice())
}

fn broken(_: Unspecified) -> VaultError {
    VaultError::Unavailable { cause: "the software cipher failed".to_owned() }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { versions, incomplete, signing } = self;
        f.debug_struct("Keys")
            .field("versions", &versions.keys())
            .field("incomplete", incomplete)
            .field("signing", &signing.keys())
            .finish()
    }
}
