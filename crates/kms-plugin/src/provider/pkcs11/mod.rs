//! The provider that has no key service behind it: this node's own way into the HSM.
//!
//! Which CRK version wraps is said by the configuration; every version that the token holds unwraps, named by the
//! handle in the WDEK. WDEKs are the key service's in every bit: with the same token, CRK and instance, either reads
//! what the other has wrapped. No version is made, and none destroyed, while the plug-in serves.

mod hsm;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use kms_core::secret::{Dek, SecretBytes};
use kms_core::wdek::{self, Wdek, WdekVersion};
use kms_daemon::telemetry::{Shown, VALUES};
use kms_hsm::{Sealed, VaultError, Wrapped};
use uuid::Uuid;

pub use self::hsm::{Hsm, settings};
use super::{Backend, Error, KeyService, NewDek, Unwrapped};
use crate::sealer::{Call, Refusal};

const NEW_DEK: usize = 32;

/// One CRK in the HSM.
#[derive(Debug)]
pub struct Pkcs11Crk {
    hsm: Arc<Hsm>,
    instance: String,
    crk: String,
    /// The version that wraps, with its name; a CRK without one only unwraps.
    version: Option<(Uuid, String)>,
    /// The HSM has used that version. If it does not find it later, the key is gone and not a name misspelt.
    used: AtomicBool,
}

impl Pkcs11Crk {
    pub fn new(hsm: Arc<Hsm>, instance: String, crk: String, version: Option<Uuid>) -> Pkcs11Crk {
        let version = version.map(|id| (id, id.to_string()));
        Pkcs11Crk { hsm, instance, crk, version, used: AtomicBool::new(false) }
    }

    async fn wrap(&self, version: Uuid, dek: SecretBytes) -> Result<Wdek, VaultError> {
        let context = self.context(version);
        let Wrapped { iv, ciphertext, hash } =
            self.hsm.vault().await?.wrap(version, &context, dek).await?;
        self.note_use(version);
        Ok(Wdek { version: WdekVersion::V2_1_0, ciphertext, hash, iv, handle: Some(version) })
    }

    /// What a WDEK is bound to, besides its own bytes.
    fn context(&self, version: Uuid) -> Vec<u8> {
        wdek::mac_context(&self.instance, &self.crk, &version.to_string(), &[])
    }

    fn is_named(&self, version: Uuid) -> bool {
        self.version.as_ref().is_some_and(|(id, _)| *id == version)
    }

    fn note_use(&self, version: Uuid) {
        if self.is_named(version) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// A handle is not authentic before its key has checked it: that a key is not there withdraws nothing, unless it
    /// is the very one that was in use.
    fn missing(&self, version: Uuid) -> Error {
        let was_used = self.is_named(version) && self.used.load(Ordering::Relaxed);
        let (refusal, text) = match was_used {
            true => (Refusal::NoSuchKey, format!("the HSM no longer holds CRK version {version}")),
            false => (Refusal::Request, format!("the HSM holds no CRK version {version}")),
        };
        Error::Refused { refusal, text }
    }

    fn failed(&self, error: VaultError, version: Uuid) -> Error {
        match error {
            VaultError::NotFound => self.missing(version),
            VaultError::NotAuthentic => Error::NotAuthentic,
            VaultError::Unavailable { .. } => {
                Error::Unreachable { text: format!("Unavailable: {error}") }
            }
            VaultError::TimedOut => Error::TimedOut(Backend::Hsm),
            VaultError::Busy => {
                Error::Overloaded { backend: Backend::Hsm, text: error.to_string() }
            }
            // A refused PIN withdraws nothing: sessions that are logged in go on after a change, so it ends nobody's access, and
            // whoever reaches the HSM can lock it with wrong ones.
            VaultError::Credential(_) => Error::Unusable { text: error.to_string() },
            VaultError::BadInput(_)
            | VaultError::Exists
            | VaultError::Capacity(_)
            | VaultError::Policy(_) => Error::Unusable { text: format!("Unavailable: {error}") },
        }
    }
}

#[async_trait]
impl KeyService for Pkcs11Crk {
    fn backend(&self) -> Backend {
        Backend::Hsm
    }

    async fn wrap_new(&self, call: &Call) -> Result<NewDek, Error> {
        let Some((id, name)) = &self.version else {
            let text = format!("the configuration names no version of CRK {} to wrap", self.crk);
            return Err(Error::Refused { refusal: Refusal::Request, text });
        };
        let failed = |error| self.failed(error, *id);
        let vault = self.hsm.vault().await.map_err(failed)?;
        let bytes = vault.random(NEW_DEK).await.map_err(failed)?;
        let dek = dek(&bytes)?;
        let wdek = self.wrap(*id, bytes).await.map_err(failed)?.encode();
        tracing::info!(target: VALUES, uid = call.uid, trace_id = call.trace_id(), crk = self.crk, wdek, "wrapped");
        Ok(NewDek { dek, wdek: wdek.into_bytes().into(), version: name.clone() })
    }

    async fn unwrap(&self, wdek: &[u8], call: &Call) -> Result<Unwrapped, Error> {
        tracing::info!(target: VALUES, uid = call.uid, trace_id = call.trace_id(), crk = self.crk, wdek = %Shown(wdek), "unwrapping");
        let (version, wdek) = parts(wdek).ok_or(Error::NotAuthentic)?;
        let failed = |error| self.failed(error, version);
        let vault = self.hsm.vault().await.map_err(failed)?;
        let Wdek { version: format, ciphertext, hash, iv, .. } = wdek;
        let context = self.context(version);
        // The plug-in writes no AES-GCM, whose uses only a database can count; it reads what a key service wrote.
        let opened = match format {
            WdekVersion::V4_0_0 => {
                vault.unwrap_gcm(version, &context, Sealed { iv, ciphertext }).await
            }
            _ => vault.unwrap(version, &context, Wrapped { iv, ciphertext, hash }).await,
        };
        let dek = dek(&opened.map_err(failed)?)?;
        self.note_use(version);
        let named = self.named_version().filter(|_| !self.is_named(version));
        Ok(Unwrapped { dek, active_version: named.map(str::to_owned) })
    }

    fn named_version(&self) -> Option<&str> {
        self.version.as_ref().map(|(_, name)| name.as_str())
    }
}

/// The version that a WDEK names, and the WDEK.
fn parts(wdek: &[u8]) -> Option<(Uuid, Wdek)> {
    let wdek = Wdek::decode(std::str::from_utf8(wdek).ok()?).ok()?;
    Some((wdek.handle?, wdek))
}

fn dek(bytes: &SecretBytes) -> Result<Dek, Error> {
    Dek::from_slice(bytes.as_slice()).ok_or_else(|| Error::Unusable {
        text: "Unavailable: the HSM answered without a 32-byte DEK".into(),
    })
}
