//! The use case: encrypt, decrypt, status. What kube-apiserver hands over is sealed with the current
//! DEK and opened with the DEK that the value names; the key service is asked only on a miss.
//!
//! Never here: gRPC, HTTP, sockets, reading a clock or a random source that was not passed in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kms_api::trace::{TraceId, TraceParent};
use kms_core::cipher::{FormatError, OpenError, SealError, v1, v2};
use kms_core::key_id::KeyId;
use kms_core::secret::{Dek, SecretBytes};
use kms_daemon::telemetry::{Shown, VALUES};
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::field::{DisplayValue, display};

use crate::dek_cache::{DekCache, DekId};
use crate::flight::{Flights, Seat};
use crate::keys::{
    Adopted, Asked, Crk, Found, Grant, InstallError, Keys, Next, NotAdopted, Policy, Ring, Sealing,
    Wrapped,
};
use crate::metrics::Snapshot;
use crate::provider::guard::{Tools, budget};
use crate::provider::{self, Backend, NewDek, Withdrawn};

/// What comes with each request: who to name in the log, and how long an answer may take.
#[derive(Debug, Clone)]
pub struct Call {
    pub uid: String,
    /// The trace that the caller is part of, if it said so.
    pub trace: Option<TraceParent>,
    pub deadline: Duration,
}

impl Call {
    /// For the field `trace_id` of each log line; without a trace there is none.
    pub fn trace_id(&self) -> Option<DisplayValue<TraceId>> {
        self.trace.map(|trace| display(trace.trace_id()))
    }
}

/// A sealed payload of KMS v2 and the key_id that goes with it.
#[derive(Debug)]
pub struct Sealed {
    pub ciphertext: Vec<u8>,
    pub key_id: KeyId,
}

/// The key under which the next Encrypt will answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    pub key_id: KeyId,
}

/// Why a request was not answered, by who must act.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealerError {
    #[error("{what} has {bytes} bytes, the limit is {limit}")]
    TooLarge { what: &'static str, bytes: usize, limit: usize },
    /// One text for every failure of authentication, whatever it was.
    #[error("the value does not authenticate")]
    NotAuthentic,
    /// Nobody was asked: what the value names (key_id or KpVersion) is not configured here.
    #[error("{0} names no CRK of this plug-in's configuration")]
    UnknownKey(String),
    /// The operator must act: the service answered, and said no. Its own text comes first.
    #[error("{text}")]
    Refused { refusal: Refusal, text: String },
    /// Nobody has to act if it passes: the service is away or overloaded.
    #[error("{text}")]
    Unavailable { text: String },
    #[error("the {0} did not answer in time")]
    TimedOut(Backend),
    #[error("too many requests are waiting for the {0}")]
    Overloaded(Backend),
}

/// What the service refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// API key, token, role or instance header.
    Access,
    /// There is no such CRK.
    NoSuchKey,
    /// The CRK is disabled, suspended or deleted.
    KeyState,
    /// The CRK does not wrap: it is disabled, expired or used up. Whether it still unwraps is not said.
    NoWrap,
    /// It wraps with a version that another one had replaced.
    Replaced,
    /// The request itself, such as an instance header that is no UUID: nothing was withdrawn.
    Request,
}

/// Answers the five calls of kube-apiserver. Cheap to share behind an `Arc`.
#[derive(Debug)]
pub struct Sealer {
    keys: Mutex<Keys>,
    deks: DekCache,
    unwraps: Flights<DekId, Result<Dek, SealerError>>,
    renewals: Flights<(), Result<(), SealerError>>,
    probe_wanted: Notify,
    tools: Tools,
}

/// kube-apiserver hands on the deadline of whoever asks it: a `--request-timeout=200ms` says nothing to those with time
/// left.
fn ran_out_of_time<T>(answer: &Result<T, SealerError>) -> bool {
    matches!(answer, Err(SealerError::TimedOut(_)))
}

/// A key service may answer with an older version while its replicas catch up; so often it is asked again.
const ATTEMPTS_AT_A_NEW_DEK: usize = 3;

impl Sealer {
    pub fn new(ring: Ring, policy: Policy, tools: Tools) -> Sealer {
        Sealer {
            keys: Mutex::new(Keys::new(ring, policy)),
            deks: DekCache::new(),
            unwraps: Flights::new(ran_out_of_time),
            renewals: Flights::new(ran_out_of_time),
            probe_wanted: Notify::new(),
            tools,
        }
    }

    /// # Errors
    /// See [`SealerError`]; true of every method here.
    pub async fn encrypt_v1(
        &self,
        payload: SecretBytes,
        call: Call,
    ) -> Result<Vec<u8>, SealerError> {
        let len_bytes = self.keys().policy().len_bytes;
        let sealing = self.sealing(&call).await?;
        let cipher = v1::seal(&v1::Seal {
            dek: &sealing.dek,
            kp_version: sealing.kp_version,
            wdek: &sealing.wdek,
            len_bytes,
            iv: self.tools.random.bytes()?,
            payload: payload.as_slice(),
        })?;
        self.log_sealed(&sealing, &call);
        Ok(cipher)
    }

    pub async fn decrypt_v1(&self, cipher: &[u8], call: Call) -> Result<SecretBytes, SealerError> {
        let envelope = v1::Envelope::decode(cipher).map_err(|error| foreign(&error, &call))?;
        let kp_version = envelope.kp_version();
        tracing::info!(target: VALUES, uid = call.uid, trace_id = call.trace_id(), kp_version, wdek = %Shown(envelope.wdek()), "opening v1");
        let crk = self
            .keys()
            .versioned(kp_version)
            .ok_or_else(|| SealerError::UnknownKey(format!("KpVersion {kp_version}")))?;
        let id = DekId::hashed(&crk.name, envelope.wdek_sha256());
        let dek = self.dek_in(&crk, id, envelope.wdek(), &call).await?;
        let policy = self.keys().policy();
        let opened = envelope.open(&dek, policy.len_bytes, policy.accept_unauthenticated)?;
        if !opened.authenticated {
            self.tools.metrics.v1_unauthenticated();
            tracing::warn!(
                uid = call.uid,
                trace_id = call.trace_id(),
                "Opened a KMS v1 value without an authentication code."
            );
        }
        Ok(opened.payload)
    }

    pub async fn encrypt_v2(
        &self,
        payload: SecretBytes,
        call: Call,
    ) -> Result<Sealed, SealerError> {
        let sealing = self.sealing(&call).await?;
        let ciphertext = v2::seal(
            &sealing.dek,
            &sealing.key_id,
            sealing.kp_version,
            &sealing.wdek,
            self.tools.random.nonce()?,
            payload.as_slice(),
        )?;
        self.log_sealed(&sealing, &call);
        Ok(Sealed { ciphertext, key_id: sealing.key_id })
    }

    /// The key_id decides which CRK is asked; one that is not configured is refused without asking anybody.
    pub async fn decrypt_v2(
        &self,
        ciphertext: &[u8],
        key_id: &str,
        call: Call,
    ) -> Result<SecretBytes, SealerError> {
        let unknown = || SealerError::UnknownKey(format!("key_id {key_id:?}"));
        let key_id = KeyId::parse(key_id).map_err(|_| unknown())?;
        let crk = self.keys().behind(&key_id).ok_or_else(unknown)?;
        let envelope = v2::Envelope::decode(ciphertext).map_err(|error| foreign(&error, &call))?;
        tracing::info!(target: VALUES, uid = call.uid, trace_id = call.trace_id(), %key_id, wdek = %Shown(envelope.wdek()), "opening v2");
        let id = DekId::hashed(&crk.name, envelope.wdek_sha256());
        let dek = self.dek_in(&crk, id, envelope.wdek(), &call).await?;
        Ok(envelope.open(&dek, &key_id)?)
    }

    /// From memory only: never waits, never asks the service.
    pub fn status(&self) -> Result<Status, SealerError> {
        self.keys().status(self.now())
    }

    /// What the last background probe found.
    pub fn ready(&self) -> Result<(), SealerError> {
        self.keys().ready()
    }

    /// Takes over a changed configuration; see [`Keys::install`].
    pub fn install(&self, ring: Ring, policy: Policy) -> Result<(), InstallError> {
        self.keys().install(ring, policy, self.now())?;
        self.forget_strangers();
        self.deks.expire(self.now(), policy.lifetime);
        self.want_probe();
        Ok(())
    }

    pub fn snapshot(&self) -> Snapshot {
        let keys = self.keys();
        let (dek_age, dek_uses) = keys.age_and_uses(self.now());
        Snapshot {
            dek_cache_entries: self.deks.len(),
            dek_age,
            dek_uses,
            token_life_left: keys.token_life_left(),
            crks_down: keys.down(),
        }
    }

    /// The DEK to seal with, and what belongs to it: from memory, or with the key service's help.
    async fn sealing(&self, call: &Call) -> Result<Sealing, SealerError> {
        let next = self.keys().next(self.now());
        match next {
            Next::FromMemory(sealing) => Ok(sealing),
            // In a box: all that waiting for the service may take would else be part of every call's future, which is
            // moved several times.
            next => Box::pin(self.in_time(call, self.sealing_anew(next, call))).await,
        }
    }

    async fn sealing_anew(&self, mut next: Next, call: &Call) -> Result<Sealing, SealerError> {
        loop {
            match next {
                Next::FromMemory(sealing) => return Ok(sealing),
                Next::New => return self.new_dek(call).await,
                Next::Unwrap(wrapped) => return self.unwrap_to_seal(wrapped, call).await,
                Next::Renew => {
                    let renew = || async { self.new_dek(call).await.map(drop) };
                    let (renewed, _) = self.renewals.join((), renew).await;
                    renewed?;
                }
            }
            next = self.keys().next(self.now());
        }
    }

    /// A DEK that the key service makes now; it becomes the one that seals, if that is due.
    async fn new_dek(&self, call: &Call) -> Result<Sealing, SealerError> {
        let mut last = NotAdopted::Stale;
        for _ in 0..ATTEMPTS_AT_A_NEW_DEK {
            let asked = self.keys().to_seal();
            let new =
                self.heard(&asked.crk, Found::Wraps, asked.crk.service.wrap_new(call).await)?;
            match self.take_over(&asked, &new, call).await {
                Err(older @ (NotAdopted::Stale | NotAdopted::Replaced { .. })) => last = older,
                Ok(sealing) => {
                    // It does not do what the probe found any more.
                    if let Err(SealerError::Refused { refusal: Refusal::Replaced, .. }) =
                        self.ready()
                    {
                        self.want_probe();
                    }
                    return Ok(sealing);
                }
                Err(error) => return Err(error.into()),
            }
        }
        if matches!(last, NotAdopted::Replaced { .. }) && self.ready().is_ok() {
            self.want_probe();
        }
        Err(last.into())
    }

    /// CACHE_TIMEOUT_IN_HOURS is 0: the same WDEK seals, but its DEK is asked for each time.
    async fn unwrap_to_seal(&self, wrapped: Wrapped, call: &Call) -> Result<Sealing, SealerError> {
        let Wrapped { crk, wdek, key_id } = wrapped;
        let dek = self.unwrap(&crk, &wdek, call).await.map_err(|error| match error {
            // It is our own, and no caller's.
            SealerError::NotAuthentic => {
                if self.keys().doubt(&wdek, self.now()) {
                    self.want_probe();
                }
                crk.opens_no_more()
            }
            error => error,
        })?;
        Ok(Sealing { dek, wdek, key_id, kp_version: crk.kp_version })
    }

    /// The DEK of a value that is to be opened: from memory, or unwrapped once for all who want it.
    async fn dek_in(
        &self,
        crk: &Crk,
        id: DekId,
        wdek: &[u8],
        call: &Call,
    ) -> Result<Dek, SealerError> {
        let lifetime = self.keys().policy().lifetime;
        if let Some(dek) = self.deks.find(&id, self.now(), lifetime) {
            self.tools.metrics.open_hit();
            return Ok(dek);
        }
        // In a box for the same reason as in `sealing`.
        Box::pin(self.in_time(call, self.dek_asked_for(crk, id, wdek, call))).await
    }

    async fn dek_asked_for(
        &self,
        crk: &Crk,
        id: DekId,
        wdek: &[u8],
        call: &Call,
    ) -> Result<Dek, SealerError> {
        let lifetime = self.keys().policy().lifetime;
        if lifetime.is_zero() {
            self.tools.metrics.open("uncached");
            return self.unwrap(crk, wdek, call).await;
        }
        let unwrap = || async {
            // Another caller may have landed between the look above and this one's turn.
            match self.deks.find(&id, self.now(), lifetime) {
                Some(dek) => Ok(dek),
                None => self.unwrap_to_keep(crk, wdek, call).await,
            }
        };
        let (dek, seat) = self.unwraps.join(id.clone(), unwrap).await;
        self.tools.metrics.open(if seat == Seat::Pilot { "miss" } else { "shared" });
        dek
    }

    async fn unwrap_to_keep(
        &self,
        crk: &Crk,
        wdek: &[u8],
        call: &Call,
    ) -> Result<Dek, SealerError> {
        let grant = self.keys().grant(&crk.name);
        let dek = self.unwrap(crk, wdek, call).await?;
        self.keep(crk, grant, wdek.into(), &dek);
        Ok(dek)
    }

    async fn unwrap(&self, crk: &Crk, wdek: &[u8], call: &Call) -> Result<Dek, SealerError> {
        let unwrapped = self.heard(crk, Found::Unwraps, crk.service.unwrap(wdek, call).await)?;
        let version = unwrapped.active_version.as_deref();
        if version.is_some_and(|version| self.keys().is_news(&crk.name, version)) {
            self.want_probe();
        }
        Ok(unwrapped.dek)
    }

    /// The same for a request's answer. The probe decides what is reported as ready; an answer that contradicts it is
    /// reason to ask again.
    fn heard<T>(
        &self,
        crk: &Crk,
        wanted: Found,
        answer: Result<T, provider::Error>,
    ) -> Result<T, SealerError> {
        let found = match &answer {
            Ok(_) => Some(wanted),
            Err(error) => error.is_about_crk().then_some(Found::Fails),
        };
        if found.is_some_and(|found| self.keys().contradicts(&crk.name, found)) {
            self.want_probe();
        }
        Ok(self.learn(crk, answer)?)
    }

    async fn in_time<T>(
        &self,
        call: &Call,
        work: impl Future<Output = Result<T, SealerError>>,
    ) -> Result<T, SealerError> {
        // Longer than the key service's own budget, so that its cause comes back and not this.
        let margin = (call.deadline - budget(call.deadline)) / 2;
        let limit = call.deadline - margin;
        match timeout(limit, work).await {
            Ok(answer) => answer,
            Err(_) => Err(SealerError::TimedOut(self.keys().backend())),
        }
    }

    fn log_sealed(&self, sealing: &Sealing, call: &Call) {
        let Sealing { key_id, kp_version, wdek, .. } = sealing;
        tracing::info!(target: VALUES, uid = call.uid, trace_id = call.trace_id(), %key_id, kp_version, wdek = %Shown(wdek), "sealed");
    }
}

/// What the background probe works with.
impl Sealer {
    pub(crate) fn keys(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tools(&self) -> &Tools {
        &self.tools
    }

    pub(crate) fn deks(&self) -> &DekCache {
        &self.deks
    }

    pub(crate) fn now(&self) -> Duration {
        self.tools.clock.now()
    }

    /// Returns when somebody has reason to believe that the last probe's result is out of date.
    pub(crate) async fn probe_wanted(&self) {
        self.probe_wanted.notified().await;
    }

    pub(crate) fn want_probe(&self) {
        self.probe_wanted.notify_one();
    }

    pub(crate) fn adopt(&self, asked: &Asked, new: &NewDek) -> Result<Sealing, NotAdopted> {
        let Adopted { sealing, changed } = self.keys().adopt(asked, new, self.now())?;
        self.keep(&asked.crk, asked.grant, new.wdek.clone(), &new.dek);
        if changed {
            self.forget_strangers();
            let key_id = &sealing.key_id;
            self.tools.metrics.key_id(key_id.hash());
            tracing::info!(%key_id, "New values are sealed under this key version from now on.");
        }
        Ok(sealing)
    }

    /// Wipes the DEKs of CRKs that the configuration no longer names.
    fn forget_strangers(&self) {
        let keys = self.keys();
        self.deks.keep_only(|name| keys.named(name).is_some());
    }

    /// A DEK for opening, unless access to its CRK was withdrawn since it was asked for.
    pub(crate) fn keep(&self, crk: &Crk, grant: Grant, wdek: Arc<[u8]>, dek: &Dek) {
        // Held until the DEK is in: one that a withdrawal would not find must not come after it.
        let keys = self.keys();
        let policy = keys.policy();
        if !policy.lifetime.is_zero() && keys.grant(&crk.name) == grant {
            let id = DekId::new(&crk.name, &wdek);
            self.deks.keep(id, wdek, dek.clone(), self.now(), policy.capacity);
        }
    }

    /// What an answer of the key service means for the DEKs that are held.
    pub(crate) fn learn<T>(
        &self,
        crk: &Crk,
        answer: Result<T, provider::Error>,
    ) -> Result<T, provider::Error> {
        if let Err(error) = &answer
            && let Some(withdrawn) = error.withdrawn()
        {
            self.withdraw(crk, withdrawn, &error.clone().into());
        }
        answer
    }

    fn withdraw(&self, crk: &Crk, withdrawn: Withdrawn, cause: &SealerError) {
        let sealed = {
            let mut keys = self.keys();
            if !keys.knows(crk) {
                // It was asked with a credential, or at a URL, that the configuration has left meanwhile. What it says
                // need not be true of the new one.
                self.want_probe();
                return;
            }
            // First the one that ends new answers, then the one that wipes those that are in.
            keys.withdraw(&crk.name, cause)
        };
        let wiped = match withdrawn {
            Withdrawn::Both => self.deks.keep_only(|name| *name != crk.name),
            Withdrawn::Sealing => 0,
        };
        if sealed || wiped > 0 {
            let (crk, what) = (&crk.name, withdrawn);
            tracing::warn!(%crk, "Access to the CRK was refused, {what} dropped: {cause}");
        }
    }
}

impl From<NotAdopted> for SealerError {
    fn from(error: NotAdopted) -> SealerError {
        let text = match error {
            NotAdopted::Stale => "the key version changed while a DEK was wrapped".into(),
            NotAdopted::KeyId(error) => error.to_string(),
            NotAdopted::Replaced { backend, version, by } => {
                let text = format!(
                    "the {backend} wraps with version {version}, which {by} had replaced: if it was restored from a \
                     backup, rotate the key (`kmsctl keys rotate`)"
                );
                return SealerError::Refused { refusal: Refusal::Replaced, text };
            }
        };
        SealerError::Unavailable { text }
    }
}

/// Bytes that this plug-in never made. The caller learns no more than from any other value that does not open: where
/// a change was noticed would tell a forger how far it came.
fn foreign(error: &FormatError, call: &Call) -> SealerError {
    tracing::debug!(
        uid = call.uid,
        trace_id = call.trace_id(),
        "Not a value of this plug-in: {error}."
    );
    SealerError::NotAuthentic
}

impl From<OpenError> for SealerError {
    fn from(_: OpenError) -> SealerError {
        SealerError::NotAuthentic
    }
}

impl From<SealError> for SealerError {
    fn from(error: SealError) -> SealerError {
        match error {
            SealError::PayloadTooLong { len, max } => {
                SealerError::TooLarge { what: "the payload", bytes: len, limit: max }
            }
            SealError::CiphertextTooLong { len, max } => {
                SealerError::TooLarge { what: "the sealed value", bytes: len, limit: max }
            }
            SealError::LenBytes(_) | SealError::NoWdek | SealError::Library => {
                SealerError::Unavailable { text: error.to_string() }
            }
        }
    }
}
