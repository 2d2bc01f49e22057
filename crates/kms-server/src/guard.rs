//! The vault as the operations see it: nothing is asked of a token before it was seen to hold our keys, and a version
//! whose key is another one than it was is not used.
//!
//! The vault itself knows a token again within one process. Across restarts and restores the database does: by the
//! check value of each version.

use crate::reconcile::{Comparison, ReconcileError, SignerFound, Standing, compare, signers};
use crate::report;
use crate::store::Store;
use async_trait::async_trait;
use kms_core::secret::SecretBytes;
use kms_hsm::{CheckValue, Circuit, RsaPublic, Sealed, Statistics, Vault, VaultError, Wrapped};
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

/// How long a probe waits for a comparison that it has begun; one of thousands of keys goes on beside it.
const PATIENCE: Duration = Duration::from_secs(1);
/// A token that was refused, or has not answered, is left alone for so long: looking through a full one keeps it busy.
const REST: Duration = Duration::from_secs(2);
/// How often the key pairs of this server prove that they sign. One that is lost is looked for after [`REST`] again.
const PROVEN_FOR: Duration = Duration::from_secs(30);

/// A key that another server has just made may come into this process's sight a moment later: SoftHSM2 and the members
/// of HSM clusters read what others wrote by and by. So long it is looked for before it counts as gone; from then on once
/// for each use, or the uses of one that is lost would hold the places of everybody else's.
const COMES_INTO_SIGHT: [Duration; 3] =
    [Duration::from_millis(20), Duration::from_millis(80), Duration::from_millis(200)];

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
    comparing: Arc<Mutex<()>>,
}

#[derive(Debug)]
struct State {
    /// Whether anything may be asked.
    open: Result<(), String>,
    /// What is not used even so.
    refused: BTreeSet<Uuid>,
    /// What did not come into sight in time when it was last asked for.
    missing: BTreeSet<Uuid>,
    /// To be compared with the next good probe: at the start, after the HSM was away, a while after it came to nothing.
    due: bool,
    /// How the key pairs stood last.
    signers: Vec<SignerFound>,
    /// They are to prove themselves with the next good probe.
    proof_due: bool,
    /// How often that was put off: only the last time counts.
    put_off: u64,
}

impl Guarded {
    /// Closed until the first comparison.
    #[must_use]
    pub fn new(vault: Arc<dyn Vault>, store: Arc<dyn Store>) -> Guarded {
        let open = Err("its keys have not been compared with the database yet".to_owned());
        let (refused, missing) = (BTreeSet::new(), BTreeSet::new());
        let signers = Vec::new();
        let (proof_due, put_off) = (false, 0);
        let due = true;
        let state = RwLock::new(State { open, refused, missing, due, signers, proof_due, put_off });
        Guarded { shared: Arc::new(Shared { vault, store, state, comparing: Arc::default() }) }
    }

    /// Compares, and opens or closes.
    ///
    /// # Errors
    /// HSM or store do not answer. Then it stays as it was.
    pub async fn compare(&self) -> Result<(), ReconcileError> {
        let turn = self.shared.comparing.clone().lock_owned().await;
        self.shared.compare(turn).await
    }

    fn pass(&self) -> Result<(), VaultError> {
        self.shared.open().map_err(|cause| VaultError::Unavailable { cause })
    }

    /// Whether tokens and anchors can be signed: without, keys are used all the same, but this server is not ready.
    fn can_sign(&self) -> Result<(), VaultError> {
        let state = self.shared.state.read().unwrap_or_else(PoisonError::into_inner);
        let lost = state.signers.iter().find(|one| !one.pair.signs());
        lost.map_or(Ok(()), |one| Err(VaultError::Policy(report::signer_meaning(one))))
    }

    /// What is signed with a pair that was seen to be lost, or another one, is worth nothing. It may come back: a restore
    /// brings it.
    fn signs_with(&self, id: Uuid) -> Result<(), VaultError> {
        let state = self.shared.state.read().unwrap_or_else(PoisonError::into_inner);
        let lost = state.signers.iter().find(|one| one.id == id && !one.pair.signs());
        let refused = |one| VaultError::Unavailable { cause: report::signer_meaning(one) };
        lost.map_or(Ok(()), |one| Err(refused(one)))
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
        state.due
    }

    fn is_proof_due(&self) -> bool {
        self.state.read().unwrap_or_else(PoisonError::into_inner).proof_due
    }

    /// Holds `_turn` until it is done.
    async fn compare(self: &Arc<Self>, _turn: OwnedMutexGuard<()>) -> Result<(), ReconcileError> {
        // Before the look: whoever loses the HSM meanwhile wants another one.
        self.change(|state| state.due = false);
        let found = compare(&*self.vault, &*self.store).await;
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                self.compare_later();
                return Err(error);
            }
        };
        let open = found.verdict();
        if self.open() != open || open.is_ok() {
            report::log(&found);
        }
        let opened = open.is_ok();
        self.change(|state| {
            (state.open, state.refused) = (open, found.other_keys());
            state.signers.clone_from(&found.signing_keys);
        });
        self.prove_later(&found.signing_keys);
        if opened {
            // Served from already: thousands of check values are thousands of commits.
            return self.keep(&found).await;
        }
        self.compare_later();
        Ok(())
    }

    /// Has the key pairs sign, when they are to.
    async fn prove(self: &Arc<Self>) -> Result<(), ReconcileError> {
        self.change(|state| state.proof_due = false);
        let found = signers(&*self.vault, &*self.store).await.inspect_err(|_| self.later(REST))?;
        let mut news = false;
        self.change(|state| {
            news = state.signers != found;
            state.signers.clone_from(&found);
        });
        if news {
            report::log_signers(&found);
        }
        self.prove_later(&found);
        Ok(())
    }

    fn prove_later(self: &Arc<Self>, found: &[SignerFound]) {
        let good = found.iter().all(|one| one.pair.signs());
        self.later(if good { PROVEN_FOR } else { REST });
    }

    fn later(self: &Arc<Self>, pause: Duration) {
        let mut mine = 0;
        self.change(|state| {
            state.put_off += 1;
            mine = state.put_off;
        });
        let shared = Arc::downgrade(self);
        tokio::spawn(async move {
            sleep(pause).await;
            if let Some(shared) = shared.upgrade() {
                shared.change(|state| state.proof_due |= state.put_off == mine);
            }
        });
    }

    fn compare_later(self: &Arc<Self>) {
        let shared = self.clone();
        tokio::spawn(async move {
            sleep(REST).await;
            shared.change(|state| state.due = true);
        });
    }

    /// Asks for a version that the database knows.
    async fn in_sight<T, F: Future<Output = Result<T, VaultError>>>(
        &self,
        id: Uuid,
        ask: impl Fn() -> F,
    ) -> Result<T, VaultError> {
        if self.is_missing(id) {
            let answer = ask().await;
            if answer.is_ok() {
                self.change(|state| state.missing.retain(|one| *one != id));
            }
            return answer;
        }
        for pause in COMES_INTO_SIGHT {
            match ask().await {
                Err(VaultError::NotFound) => sleep(pause).await,
                answer => return answer,
            }
        }
        let answer = ask().await;
        if matches!(answer, Err(VaultError::NotFound)) {
            self.change(|state| state.missing.extend([id]));
        }
        answer
    }

    fn is_missing(&self, id: Uuid) -> bool {
        self.state.read().unwrap_or_else(PoisonError::into_inner).missing.contains(&id)
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
        self.shared.in_sight(id, || self.shared.vault.wrap(id, context, dek.clone())).await
    }

    async fn unwrap(
        &self,
        id: Uuid,
        context: &[u8],
        wrapped: Wrapped,
    ) -> Result<SecretBytes, VaultError> {
        self.pass_for(id)?;
        self.shared.in_sight(id, || self.shared.vault.unwrap(id, context, wrapped.clone())).await
    }

    async fn wrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        dek: SecretBytes,
    ) -> Result<Sealed, VaultError> {
        self.pass_for(id)?;
        self.shared.in_sight(id, || self.shared.vault.wrap_gcm(id, context, dek.clone())).await
    }

    async fn unwrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        sealed: Sealed,
    ) -> Result<SecretBytes, VaultError> {
        self.pass_for(id)?;
        self.shared.in_sight(id, || self.shared.vault.unwrap_gcm(id, context, sealed.clone())).await
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

    async fn make_signing_key(&self, id: Uuid) -> Result<RsaPublic, VaultError> {
        self.pass()?;
        self.shared.vault.make_signing_key(id).await
    }

    async fn public_half(&self, id: Uuid) -> Result<RsaPublic, VaultError> {
        self.pass()?;
        self.shared.vault.public_half(id).await
    }

    async fn sign(&self, id: Uuid, data: &[u8]) -> Result<Vec<u8>, VaultError> {
        self.pass()?;
        self.signs_with(id)?;
        let signed = self.shared.vault.sign(id, data).await;
        if signed == Err(VaultError::NotFound) {
            // The next probe tells who watches.
            self.shared.change(|state| state.proof_due = true);
            let cause =
                format!("it no longer holds the private key {id}, with which this server signs");
            return Err(VaultError::Unavailable { cause });
        }
        signed
    }

    async fn versions(&self) -> Result<Vec<Uuid>, VaultError> {
        self.pass()?;
        self.shared.vault.versions().await
    }

    async fn incomplete(&self) -> Result<Vec<Uuid>, VaultError> {
        self.pass()?;
        self.shared.vault.incomplete().await
    }

    fn circuit(&self) -> Circuit {
        self.shared.vault.circuit()
    }

    async fn statistics(&self) -> Option<Statistics> {
        self.shared.vault.statistics().await
    }

    /// Also whether the keys are ours, and those of this server still sign.
    async fn probe(&self) -> Result<(), VaultError> {
        let answers = self.shared.vault.probe().await;
        if answers.is_err() {
            self.shared.change(|state| state.due = true);
            return answers;
        }
        // Of one that is under way already, the next probe hears.
        if self.shared.is_due()
            && let Ok(turn) = self.shared.comparing.clone().try_lock_owned()
        {
            let shared = self.shared.clone();
            // A task of its own: it goes on when the one who waits for the probe has left.
            let comparison = tokio::spawn(async move {
                if let Err(error) = shared.compare(turn).await {
                    tracing::warn!("HSM and database cannot be compared: {error}");
                }
            });
            // Where it takes longer, the next probe hears of it.
            let _ = timeout(PATIENCE, comparison).await;
        }
        self.pass()?;
        if self.shared.is_proof_due() {
            let shared = self.shared.clone();
            let proof = tokio::spawn(async move {
                if let Err(error) = shared.prove().await {
                    tracing::warn!("The keys that sign cannot be proven: {error}");
                }
            });
            let _ = timeout(PATIENCE, proof).await;
        }
        self.can_sign()
    }
}
