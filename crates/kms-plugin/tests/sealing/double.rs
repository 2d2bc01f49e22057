//! A key service in memory: it rotates, refuses, hangs and lags when told to, and counts what it is asked.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kms_core::clock::ManualClock;
use kms_core::secret::{Dek, SecretBytes};
use kms_plugin::dek_cache::CrkName;
use kms_plugin::keys::{Crk, Policy, Ring};
use kms_plugin::metrics::Metrics;
use kms_plugin::probe::probe;
use kms_plugin::provider::guard::{Guard, Patience, Tools};
use kms_plugin::provider::{Error, KeyService, NewDek, Unwrapped};
use kms_plugin::random::Random;
use kms_plugin::sealer::{Call, Refusal, Sealed, Sealer, SealerError};
use tokio::sync::Semaphore;

pub(crate) use crate::policy::{HOUR, policy};

pub(crate) const MINUTE: Duration = Duration::from_secs(60);

/// How the service behaves.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Mood {
    Up,
    Unreachable,
    Hangs,
    /// Unwraps to another DEK than it wrapped.
    Lies,
    Fails(Error),
    FailsToWrap(Error),
}

#[derive(Debug)]
pub(crate) struct FakeKms {
    state: Mutex<State>,
    pub(crate) wraps: AtomicUsize,
    pub(crate) unwraps: AtomicUsize,
    /// Unwraps wait here for a permit, if there is one.
    pub(crate) gate: Mutex<Option<Arc<Semaphore>>>,
    /// So long does an unwrap take by this clock.
    pub(crate) slow: Mutex<Option<(Arc<ManualClock>, Duration)>>,
}

#[derive(Debug)]
struct State {
    mood: Mood,
    versions: Vec<String>,
    /// How many versions were ever made: no name comes twice, whatever a restore makes it forget.
    made: usize,
    /// They unwrap and never wrap.
    adopted: Vec<String>,
    /// A replica that has not heard of the last rotation answers.
    lags: bool,
    /// So many unwraps of the first DEK are answered as if the WDEK were a stranger's.
    odd: usize,
    deks: HashMap<Vec<u8>, (Dek, String)>,
}

impl FakeKms {
    pub(crate) fn new() -> Arc<FakeKms> {
        Arc::new(FakeKms {
            state: Mutex::new(State {
                mood: Mood::Up,
                versions: vec!["v1".into()],
                made: 1,
                adopted: Vec::new(),
                lags: false,
                odd: 0,
                deks: HashMap::new(),
            }),
            wraps: AtomicUsize::new(0),
            unwraps: AtomicUsize::new(0),
            gate: Mutex::new(None),
            slow: Mutex::new(None),
        })
    }

    pub(crate) fn set(&self, mood: Mood) {
        self.state.lock().unwrap().mood = mood;
    }

    pub(crate) fn rotate(&self) -> String {
        let mut state = self.state.lock().unwrap();
        state.made += 1;
        let version = format!("v{}", state.made);
        state.versions.push(version.clone());
        version
    }

    /// Its database is the backup of a time at which it had so many versions; it knows no other.
    pub(crate) fn restore(&self, versions: usize) {
        self.state.lock().unwrap().versions.truncate(versions);
    }

    /// As a replica that has not heard of the newest version answers.
    pub(crate) fn forget_newest(&self) -> String {
        self.state.lock().unwrap().versions.pop().unwrap()
    }

    /// It has.
    pub(crate) fn remember(&self, version: &str) {
        self.state.lock().unwrap().versions.push(version.into());
    }

    /// `kms-server adopt`.
    pub(crate) fn adopt(&self, version: &str) {
        self.state.lock().unwrap().adopted.push(version.into());
    }

    pub(crate) fn set_lag(&self, lags: bool) {
        self.state.lock().unwrap().lags = lags;
    }

    /// The next unwraps of the first DEK find an HSM whose fault looks like a forged WDEK.
    pub(crate) fn answers_oddly(&self, times: usize) {
        self.state.lock().unwrap().odd = times;
    }

    pub(crate) fn dek_of(&self, wdek: &[u8]) -> Dek {
        self.state.lock().unwrap().deks[wdek].0.clone()
    }

    /// (wraps, unwraps) so far.
    pub(crate) fn asked(&self) -> (usize, usize) {
        (self.wraps.load(Ordering::Relaxed), self.unwraps.load(Ordering::Relaxed))
    }

    async fn mood(&self) -> Result<(), Error> {
        let mood = self.state.lock().unwrap().mood.clone();
        match mood {
            Mood::Up | Mood::Lies | Mood::FailsToWrap(_) => Ok(()),
            Mood::Unreachable => Err(Error::Unreachable { text: "connection refused".into() }),
            Mood::Hangs => std::future::pending().await,
            Mood::Fails(error) => Err(error),
        }
    }
}

#[async_trait]
impl KeyService for FakeKms {
    async fn wrap_new(&self, _: &Call) -> Result<NewDek, Error> {
        let number = self.wraps.fetch_add(1, Ordering::Relaxed);
        self.mood().await?;
        let mut state = self.state.lock().unwrap();
        if let Mood::FailsToWrap(error) = &state.mood {
            return Err(error.clone());
        }
        let index = state.versions.len() - 1 - usize::from(state.lags);
        let version = state.versions[index].clone();
        let wdek = format!("wdek-{number}-{version}").into_bytes();
        let mut bytes = [0x5a; 32];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        let dek = Dek::from_bytes(bytes);
        state.deks.insert(wdek.clone(), (dek.clone(), version.clone()));
        Ok(NewDek { dek, wdek: wdek.into(), version })
    }

    async fn unwrap(&self, wdek: &[u8], _: &Call) -> Result<Unwrapped, Error> {
        self.unwraps.fetch_add(1, Ordering::Relaxed);
        if let Some((clock, time)) = &*self.slow.lock().unwrap() {
            clock.advance(*time);
        }
        let gate = self.gate.lock().unwrap().clone();
        if let Some(gate) = gate {
            gate.acquire().await.unwrap().forget();
        }
        self.mood().await?;
        let mut state = self.state.lock().unwrap();
        if state.odd > 0 && state.deks.get(wdek).is_some_and(|_| wdek.starts_with(b"wdek-0-")) {
            state.odd -= 1;
            return Err(Error::NotAuthentic);
        }
        let (mut dek, version) = state.deks.get(wdek).cloned().ok_or(Error::NotAuthentic)?;
        if !state.versions.iter().chain(&state.adopted).any(|known| *known == version) {
            return Err(Error::NotAuthentic);
        }
        if state.mood == Mood::Lies {
            dek = Dek::from_bytes([0; 32]);
        }
        let newest = state.versions.last().cloned();
        Ok(Unwrapped { dek, active_version: newest.filter(|newest| *newest != version) })
    }
}

/// A sealer over fake key services, with a clock that stands still.
pub(crate) struct World {
    pub(crate) kms: Arc<FakeKms>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) metrics: Metrics,
    pub(crate) policy: Policy,
    pub(crate) patience: Patience,
}

impl World {
    pub(crate) fn new(policy: Policy) -> World {
        World {
            kms: FakeKms::new(),
            clock: Arc::new(ManualClock::new()),
            metrics: Metrics::unregistered(),
            policy,
            patience: Patience { max_retries: 0, timeout: None },
        }
    }

    pub(crate) fn crk(&self, crk: &str, kp_version: i64, kms: &Arc<FakeKms>) -> Arc<Crk> {
        let name = CrkName { instance: "instance".into(), crk: crk.into() };
        let service = Guard::new(kms.clone(), self.patience, self.tools());
        Arc::new(Crk { name, kp_version, service })
    }

    pub(crate) fn ring(&self) -> Ring {
        Ring { current: self.crk("crk", 1, &self.kms), previous: Vec::new() }
    }

    /// A plug-in that has just been started.
    pub(crate) fn start(&self) -> Arc<Sealer> {
        self.start_with(self.ring())
    }

    /// One with another configuration.
    pub(crate) fn start_with(&self, ring: Ring) -> Arc<Sealer> {
        Arc::new(Sealer::new(ring, self.policy, self.tools()))
    }

    /// One that has run for a while.
    pub(crate) async fn started(&self) -> Arc<Sealer> {
        let sealer = self.start();
        assert!(probe(&sealer).await);
        sealer
    }

    fn tools(&self) -> Tools {
        let (clock, metrics) = (self.clock.clone(), self.metrics.clone());
        Tools { clock, random: Random::system(), metrics }
    }
}

pub(crate) fn call() -> Call {
    Call { uid: "uid".into(), trace: None, deadline: Duration::from_secs(3) }
}

pub(crate) fn payload(text: &[u8]) -> SecretBytes {
    SecretBytes::new(text.to_vec())
}

pub(crate) async fn seal_v1(sealer: &Sealer, text: &[u8]) -> Result<Vec<u8>, SealerError> {
    sealer.encrypt_v1(payload(text), call()).await
}

pub(crate) async fn open_v1(sealer: &Sealer, cipher: &[u8]) -> Result<Vec<u8>, SealerError> {
    sealer.decrypt_v1(cipher, call()).await.map(SecretBytes::into_vec)
}

pub(crate) async fn seal_v2(sealer: &Sealer, text: &[u8]) -> Result<Sealed, SealerError> {
    sealer.encrypt_v2(payload(text), call()).await
}

pub(crate) async fn open_v2(sealer: &Sealer, sealed: &Sealed) -> Result<Vec<u8>, SealerError> {
    let key_id = sealed.key_id.as_str();
    sealer.decrypt_v2(&sealed.ciphertext, key_id, call()).await.map(SecretBytes::into_vec)
}

pub(crate) fn reported(sealer: &Sealer) -> String {
    sealer.status().unwrap().key_id.version().to_owned()
}

pub(crate) fn refused(refusal: Refusal, text: &str) -> Mood {
    Mood::Fails(Error::Refused { refusal, text: text.into() })
}
