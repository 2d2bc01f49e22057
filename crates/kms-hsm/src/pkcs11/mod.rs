//! The vault in an HSM, through PKCS#11.
//!
//! `mod` turns each verb into a job; `queue` holds the jobs; `pool` keeps worker threads with
//! logged-in sessions alive; `seat` is what a worker has in hand; `ops` are the verbs; `keys` what
//! the objects look like; `module` the loaded library; `raw` the hot path; `error` the table of
//! return codes, `gcm` the other way to wrap. No PKCS#11 call is ever made on a thread of the async runtime.

mod error;
mod gcm;
mod keys;
mod module;
mod ops;
mod pin;
mod pool;
mod queue;
mod raw;
mod refused;
mod seat;

use crate::statistics::Statistics;
use crate::vault::{
    CheckValue, Circuit, MAX_PLAINTEXT, MAX_RANDOM, RsaPublic, Sealed, Vault, VaultError, Wrapped,
};
use async_trait::async_trait;
use error::Fault;
pub use gcm::{IvChoice, IvMode};
use kms_core::secret::{SecretBytes, SecretText};
use module::Module;
use ops::{Inventory, Origin};
pub use pin::Pin;
use pool::Pool;
pub(crate) use pool::{Known, Standstill};
use queue::Job;
pub(crate) use queue::{Then, Waiting};
use seat::Seat;
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use uuid::Uuid;

/// Making keys and listing thousands of them takes a token this many times longer than using one.
pub(crate) const SLOW: u32 = 10;

/// How long a service that starts waits for the first login, to say at once that the PIN is wrong. A token that takes
/// longer, or hangs, is waited for while the service already says that it is not ready.
pub(crate) const FIRST_ATTEMPT: Duration = Duration::from_secs(3);

/// Everything that the vault must be told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The vendor's PKCS#11 module, a shared library.
    pub library: PathBuf,
    /// Which token.
    pub token: TokenChoice,
    /// The user PIN. A refused one is tried again only after it was replaced.
    pub pin: Pin,
    /// How many sessions, each with a thread. SoftHSM: 2 to 4. Network HSM: rate times latency.
    pub sessions: usize,
    /// How many requests may wait for a session; more are refused as `Busy`.
    pub queue: usize,
    /// How long a caller waits for the use of a key. Making keys is given ten times as long.
    pub deadline: Duration,
    /// Who makes the IV of AES-GCM. `None`: nothing is wrapped with AES-GCM, and no self-test is made.
    pub gcm: Option<IvChoice>,
}

/// How the operator names a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenChoice {
    /// By its label. Two tokens with one label are refused.
    Label(String),
    /// By its serial number, which no two tokens of a vendor share.
    Serial(String),
    /// By its slot. SoftHSM hands out new slot numbers.
    Slot(u64),
}

/// The identity of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// What the operator called it.
    pub label: String,
    /// What the vendor called it.
    pub serial: String,
    /// Where it is.
    pub slot: u64,
}

/// Root keys in an HSM.
#[derive(Debug)]
pub struct Pkcs11Vault {
    pool: Pool,
    making: Making,
    /// Two callers that make one signing key must not both make it.
    signing: Arc<tokio::sync::Mutex<()>>,
}

/// A use of a key that is to be begun.
pub(crate) struct Direct(Box<dyn Job>);

/// Makes a token in the first free slot, with both PINs. Run before the first
/// [`Pkcs11Vault::open`], in a process that does not use the library yet.
///
/// # Errors
/// `Exists` when a token of this label is there: initialising it again would destroy its keys.
/// `Capacity` when no slot is free, `Credential` when the token dislikes a PIN.
pub fn init_token(
    library: &Path,
    label: &str,
    so_pin: &SecretText,
    user_pin: &SecretText,
) -> Result<Token, VaultError> {
    if label.is_empty() || label.len() > 32 {
        return Err(VaultError::BadInput("a token label has 1 to 32 bytes".to_owned()));
    }
    let module = Module::load(library).map_err(Fault::into_answer)?;
    module.initialise().map_err(Fault::into_answer)?;
    let token = module.make_token(label, so_pin, user_pin).map_err(Fault::into_answer);
    module.finalise();
    token
}

impl Pkcs11Vault {
    /// Loads the library, finds the token, logs in. Blocks for some seconds at most; call it before the service starts.
    ///
    /// A token that is away is no error, nor is one that does not answer or refuses the PIN: the vault keeps looking for
    /// it, or for another PIN, and answers `Unavailable`, `TimedOut` or `Credential` meanwhile. [`Vault::probe`] tells.
    ///
    /// # Errors
    /// `Unavailable` when the library cannot be loaded.
    pub fn open(settings: Settings) -> Result<Self, VaultError> {
        Self::start(settings, None)
    }

    /// Like [`Pkcs11Vault::open`], on the token that another vault has found before, and on no other.
    ///
    /// # Errors
    /// As `open`, and `Credential` when the PIN is refused at once.
    pub(crate) fn open_known(settings: Settings, known: Option<Known>) -> Result<Self, VaultError> {
        let vault = Self::start(settings, known)?;
        vault.pool.refusal().map_or(Ok(vault), |cause| Err(VaultError::Credential(cause)))
    }

    fn start(settings: Settings, known: Option<Known>) -> Result<Self, VaultError> {
        if settings.sessions == 0 || settings.queue == 0 {
            return Err(VaultError::BadInput("sessions and queue must be at least 1".to_owned()));
        }
        let pool = Pool::start(settings, known)?;
        Ok(Self { pool, making: Making::default(), signing: Arc::default() })
    }

    /// The token in use; `None` until it was found for the first time.
    #[must_use]
    pub fn token(&self) -> Option<Token> {
        self.pool.known().map(|known| known.token)
    }

    /// For a vault that takes over from this one.
    pub(crate) fn known(&self) -> Option<Known> {
        self.pool.known()
    }

    /// What to compare with later: twice the same, and nothing has moved in the library meanwhile.
    pub(crate) fn standstill(&self) -> Option<Standstill> {
        self.pool.standstill()
    }

    pub(crate) fn deadline(&self) -> Duration {
        self.pool.settings().deadline
    }

    /// A wrap whose result goes to `then`, on the thread that has made it. Nothing is done before [`Pkcs11Vault::begin`].
    pub(crate) fn wrap_then(
        id: Uuid,
        context: Vec<u8>,
        dek: SecretBytes,
        then: Then<Wrapped>,
    ) -> (Direct, Waiting) {
        let work = move |seat: &Seat| {
            check_length(&dek)?;
            ops::wrap(seat, id, &context, &dek)
        };
        let (job, waiting) = Pool::direct(work, then);
        (Direct(job), waiting)
    }

    /// The same for an unwrap.
    pub(crate) fn unwrap_then(
        id: Uuid,
        context: Vec<u8>,
        wrapped: Wrapped,
        then: Then<SecretBytes>,
    ) -> (Direct, Waiting) {
        let work = move |seat: &Seat| ops::unwrap(seat, id, &context, &wrapped);
        let alike: Then<SecretBytes> = Box::new(move |opened| then(opened.map_err(all_alike)));
        let (job, waiting) = Pool::direct(work, alike);
        (Direct(job), waiting)
    }

    pub(crate) fn begin(&self, Direct(job): Direct) {
        self.pool.submit(job);
    }

    /// Has a session that sleeps look for what waits; to be called now and then by whoever begins anything.
    pub(crate) fn nudge(&self) {
        self.pool.queue().nudge();
    }

    async fn use_key<T: Send + 'static>(
        &self,
        work: impl FnMut(&Seat) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, VaultError> {
        self.pool.call(self.pool.settings().deadline, None, work).await
    }

    async fn inventory(&self) -> Result<Inventory, VaultError> {
        self.pool.call(self.pool.settings().patience(), None, ops::inventory).await
    }

    async fn create(&self, id: Uuid, origin: Origin) -> Result<(), VaultError> {
        let reserved = self.making.reserve(id).ok_or(VaultError::Exists)?;
        let mut begun = false;
        let work = move |seat: &Seat| {
            let _reserved = &reserved;
            ops::create(seat, id, &origin, &mut begun)
        };
        // Nobody knows a key whose creator did not wait for the answer.
        let undo = move |seat: &Seat| {
            if let Err(fault) = ops::destroy(seat, id, &mut true) {
                tracing::warn!("CRK version {id}, which nobody waits for, stays: {fault:?}");
            }
        };
        let patience = self.pool.settings().patience();
        self.pool.call(patience, Some(Box::new(undo)), work).await.map_err(not_the_callers_fault)
    }
}

#[async_trait]
impl Vault for Pkcs11Vault {
    async fn create_version(&self, id: Uuid) -> Result<(), VaultError> {
        self.create(id, Origin::Token).await
    }

    async fn import_version(&self, id: Uuid, material: SecretBytes) -> Result<(), VaultError> {
        if !matches!(material.len(), 16 | 24 | 32) {
            return Err(VaultError::BadInput(format!("{} bytes of key material", material.len())));
        }
        self.create(id, Origin::Import(material)).await
    }

    async fn destroy_version(&self, id: Uuid) -> Result<(), VaultError> {
        let reserved = self.making.reserve(id).ok_or(VaultError::Busy)?;
        let mut begun = false;
        self.use_key(move |seat| {
            let _reserved = &reserved;
            ops::destroy(seat, id, &mut begun)
        })
        .await
    }

    async fn wrap(
        &self,
        id: Uuid,
        context: &[u8],
        dek: SecretBytes,
    ) -> Result<Wrapped, VaultError> {
        check_length(&dek)?;
        let context = context.to_vec();
        self.use_key(move |seat| ops::wrap(seat, id, &context, &dek)).await
    }

    async fn unwrap(
        &self,
        id: Uuid,
        context: &[u8],
        wrapped: Wrapped,
    ) -> Result<SecretBytes, VaultError> {
        let context = context.to_vec();
        let opened = self.use_key(move |seat| ops::unwrap(seat, id, &context, &wrapped)).await;
        opened.map_err(all_alike)
    }

    async fn wrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        dek: SecretBytes,
    ) -> Result<Sealed, VaultError> {
        check_length(&dek)?;
        let context = context.to_vec();
        let mut begun = false;
        self.use_key(move |seat| gcm::wrap(seat, id, &context, &dek, &mut begun)).await
    }

    async fn unwrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        sealed: Sealed,
    ) -> Result<SecretBytes, VaultError> {
        let context = context.to_vec();
        let opened = self.use_key(move |seat| gcm::unwrap(seat, id, &context, &sealed)).await;
        opened.map_err(all_alike)
    }

    async fn check_value(&self, id: Uuid) -> Result<CheckValue, VaultError> {
        self.use_key(move |seat| ops::check_value(seat, id)).await
    }

    fn serial(&self) -> Option<String> {
        self.token().map(|token| token.serial)
    }

    async fn random(&self, len: usize) -> Result<SecretBytes, VaultError> {
        if len > MAX_RANDOM {
            return Err(VaultError::BadInput(format!("{len} random bytes at once")));
        }
        self.use_key(move |seat| ops::random(seat, len)).await
    }

    async fn make_signing_key(&self, id: Uuid) -> Result<RsaPublic, VaultError> {
        let patience = self.pool.settings().patience();
        let one_at_a_time = Arc::clone(&self.signing).lock_owned();
        let turn = tokio::time::timeout(patience, one_at_a_time).await;
        let turn = turn.map_err(|_| VaultError::TimedOut)?;
        let mut begun = false;
        let work = move |seat: &Seat| {
            let _turn = &turn;
            ops::make_signing_key(seat, id, &mut begun)
        };
        self.pool.call(patience, None, work).await.map_err(not_the_callers_fault)
    }

    async fn public_half(&self, id: Uuid) -> Result<RsaPublic, VaultError> {
        self.use_key(move |seat| ops::public_half(seat, id)).await
    }

    async fn sign(&self, id: Uuid, data: &[u8]) -> Result<Vec<u8>, VaultError> {
        let data = data.to_vec();
        self.use_key(move |seat| ops::sign(seat, id, &data)).await
    }

    async fn versions(&self) -> Result<Vec<Uuid>, VaultError> {
        let found = self.inventory().await?;
        for id in found.exposed {
            tracing::error!(
                "The token lets a key of CRK version {id} leave it (CKA_SENSITIVE, CKA_EXTRACTABLE). It is used as it \
                 is. Rotate its CRK, and find out who put the key there."
            );
        }
        Ok(found.whole)
    }

    async fn incomplete(&self) -> Result<Vec<Uuid>, VaultError> {
        Ok(self.inventory().await?.incomplete)
    }

    async fn probe(&self) -> Result<(), VaultError> {
        self.use_key(Seat::canary).await
    }

    fn circuit(&self) -> Circuit {
        self.pool.circuit()
    }

    async fn statistics(&self) -> Option<Statistics> {
        Some(self.pool.statistics())
    }
}

impl Settings {
    fn patience(&self) -> Duration {
        self.deadline.saturating_mul(SLOW)
    }
}

impl TokenChoice {
    fn fits(&self, token: &Token) -> bool {
        match self {
            Self::Label(label) => token.label == *label,
            Self::Serial(serial) => token.serial == *serial,
            Self::Slot(slot) => token.slot == *slot,
        }
    }
}

impl fmt::Display for TokenChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label(label) => write!(f, "label \"{label}\""),
            Self::Serial(serial) => write!(f, "serial {serial}"),
            Self::Slot(slot) => write!(f, "slot {slot}"),
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "token \"{}\" (serial {}, slot {})", self.label, self.serial, self.slot)
    }
}

/// The names that are being made or destroyed now. PKCS#11 knows no unique CKA_ID, so two threads
/// could make the same key twice; a job keeps its reservation even when its caller has left.
#[derive(Clone, Debug, Default)]
struct Making(Arc<Mutex<BTreeSet<Uuid>>>);

struct Reserved {
    making: Making,
    id: Uuid,
}

impl Making {
    fn reserve(&self, id: Uuid) -> Option<Reserved> {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        free.then(|| Reserved { making: self.clone(), id })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.making.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

fn check_length(dek: &SecretBytes) -> Result<(), VaultError> {
    if dek.is_empty() || dek.len() > MAX_PLAINTEXT {
        return Err(VaultError::BadInput(format!("{} bytes to wrap", dek.len())));
    }
    Ok(())
}

/// Every failure to open looks alike, whatever the token said of padding or tag.
fn all_alike(error: VaultError) -> VaultError {
    match error {
        VaultError::BadInput(_) => VaultError::NotAuthentic,
        other => other,
    }
}

fn not_the_callers_fault(error: VaultError) -> VaultError {
    match error {
        VaultError::BadInput(what) => VaultError::Policy(what),
        other => other,
    }
}
