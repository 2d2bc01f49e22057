//! The vault as the operations see it: nothing is asked of a token before it was seen to hold our keys, and a version
//! whose key is another one than it was is not used.
//!
//! The vault itself knows a token again within one process. Across restarts and restores the database does: by the
//! check value of each version.

use crate::reconcile::{Comparison, ReconcileError, Standing, compare};
use crate::report;
use crate::store::Store;
use async_trait::async_trait;
use kms_core::secret::SecretBytes;
use kms_hsm::{CheckValue, RsaPublic, Sealed, Statistics, Vault, VaultError, Wrapped};
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::timeout;
use uuid::Uuid;

/// How long a probe waits for a comparison that it has begun; one of thousands of keys goes on beside it.
const PATIENCE: Duration = Duration::from_secs(1);

/// A vault behind its check values.
#[derive(Debug)]
pub struct Guarded {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    vault: Arc<dyn Vault>,
    store: Arc<dyn Store>,
    state: RwLock<State>,
    /// One comparison at a time.
    comparing: Mutex<()>,
}

#[derive(Debug)]
struct State {
    /// Whether anything may be asked.
    open: Result<(), String>,
    /// What is not used even so.
    refused: BTreeSet<Uuid>,
    /// To be compared with the next good probe: at the start, and after the HSM was away.
    due: bool,
}

impl Guarded {
    /// Closed until the first comparison.
    #[must_use]
    pub fn new(vault: Arc<dyn Vault>, store: Arc<dyn Store>) -> Guarded {
        let open = Err("its keys have not been compared with the database yet".to_owned());
        let state = RwLock::new(State { open, refused: BTreeSet::new(), due: true });
        Guarded { shared: Arc::new(Shared { vault, store, state, comparing: Mutex::default() }) }
    }

    /// Compares, and opens or closes.
    ///
    /// # Errors
    /// HSM or store do not answer. Then it stays as it was.
    pub async fn compare(&self) -> Result<(), ReconcileError> {
        self.shared.compare().await
    }

    fn pass(&self) -> Result<(), VaultError> {
        self.shared.open().map_err(|cause| VaultError::Unavailable { cause })
    }

    fn pass_for(&self, id: Uuid) -> Result<(), VaultError> {
        self.pass()?;
        let state = self.shared.state.read().unwrap_or_else(PoisonError::into_inner);
        if state.refused.contains(&id) {
            let what = format!("it holds another key under the name of version {id}");
            return Err(VaultError::Policy(what));
        }
        Ok(())
    }
}

impl Shared {
    fn open(&self) -> Result<(), String> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).open.clone()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn is_due(&self) -> bool {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.due || state.open.is_err()
    }

    async fn compare(&self) -> Result<(), ReconcileError> {
        let _one = self.comparing.lock().await;
        // Before the look: whoever loses the HSM meanwhile wants another one.
        self.change(|state| state.due = false);
        let found = compare(&*self.vault, &*self.store).await;
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                self.change(|state| state.due = true);
                return Err(error);
            }
        };
        let open = found.verdict();
        if self.open() != open || open.is_ok() {
            report::log(&found);
        }
        let kept = if open.is_ok() { self.keep(&found).await } else { Ok(()) };
        self.change(|state| (state.open, state.refused) = (open, found.other_keys()));
        kept
    }

    /// Keeps by what the keys are known again. Not where some are other keys: then the token is in doubt.
    async fn keep(&self, found: &Comparison) -> Result<(), ReconcileError> {
        if !found.other_keys().is_empty() {
            return Ok(());
        }
        for (one, standing) in &found.versions {
            if let Standing::Unproven(value) = standing {
                self.store.keep_check_value(one.version, *value).await?;
            }
        }
        match &found.serial {
            Some(serial) if found.seen_in.as_ref() != Some(serial) => {
                Ok(self.store.keep_token_serial(serial).await?)
            }
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Vault for Guarded {
    async fn create_version(&self, id: Uuid) -> Result<(), VaultError> {
        self.pass()?;
        self.shared.vault.create_version(id).await
    }

    async fn import_version(&self, id: Uuid, material: SecretBytes) -> Result<(), VaultError> {
        self.pass()?;
        self.shared.vault.import_version(id, material).await
    }

    async fn destroy_version(&self, id: Uuid) -> Result<(), VaultError> {
        self.pass_for(id)?;
        self.shared.vault.destroy_version(id).await
    }

    async fn wrap(
        &self,
        id: Uuid,
        context: &[u8],
        dek: SecretBytes,
    ) -> Result<Wrapped, VaultError> {
        self.pass_for(id)?;
        self.shared.vault.wrap(id, context, dek).await
    }

    async fn unwrap(
        &self,
        id: Uuid,
        context: &[u8],
        wrapped: Wrapped,
    ) -> Result<SecretBytes, VaultError> {
        self.pass_for(id)?;
        self.shared.vault.unwrap(id, context, wrapped).await
    }

    async fn wrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        dek: SecretBytes,
    ) -> Result<Sealed, VaultError> {
        self.pass_for(id)?;
        self.shared.vault.wrap_gcm(id, context, dek).await
    }

    async fn unwrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        sealed: Sealed,
    ) -> Result<SecretBytes, VaultError> {
        self.pass_for(id)?;
        self.shared.vault.unwrap_gcm(id, context, sealed).await
    }

    async fn check_value(&self, id: Uuid) -> Result<CheckValue, VaultError> {
        self.pass()?;
        self.shared.vault.check_value(id).await
    }

    fn serial(&self) -> Option<String> {
        self.shared.vault.serial()
    }

    async fn random(&self, len: usize) -> Result<SecretBytes, VaultError> {
        self.pass()?;
        self.shared.vault.random(len).await
    }

    async fn signing_key(&self, id: Uuid) -> Result<RsaPublic, VaultError> {
        self.pass()?;
        self.shared.vault.signing_key(id).await
    }

    async fn sign(&self, id: Uuid, data: &[u8]) -> Result<Vec<u8>, VaultError> {
        self.pass()?;
        self.shared.vault.sign(id, data).await
    }

    async fn versions(&self) -> Result<Vec<Uuid>, VaultError> {
        self.pass()?;
        self.shared.vault.versions().await
    }

    async fn incomplete(&self) -> Result<Vec<Uuid>, VaultError> {
        self.pass()?;
        self.shared.vault.incomplete().await
    }

    /// Also whether the keys are ours.
    async fn statistics(&self) -> Option<Statistics> {
        self.shared.vault.statistics().await
    }

    async fn probe(&self) -> Result<(), VaultError> {
        let answers = self.shared.vault.probe().await;
        if answers.is_err() {
            self.shared.change(|state| state.due = true);
            return answers;
        }
        if self.shared.is_due() {
            let shared = self.shared.clone();
            // A task of its own: it goes on when the one who waits for the probe has left.
            let comparison = tokio::spawn(async move {
                if let Err(error) = shared.compare().await {
                    tracing::warn!("HSM and database cannot be compared: {error}");
                }
            });
            // Where it takes longer, the next probe hears of it.
            let _ = timeout(PATIENCE, comparison).await;
        }
        self.pass()
    }
}
