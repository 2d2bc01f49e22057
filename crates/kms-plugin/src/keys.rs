//! What Status and Encrypt must agree on, in one place and behind one lock: the CRKs of the configuration, the
//! DEK that seals, the key_id that is reported, and whether the key service answers.
//!
//! Nothing here waits or asks anybody; what came of asking is handed in, with the time.

use std::sync::Arc;
use std::time::Duration;

use kms_core::key_id::{KeyId, KeyIdError};
use kms_core::secret::Dek;

use crate::dek_cache::{CrkName, refresh_age};
use crate::provider::NewDek;
use crate::provider::guard::Guard;
use crate::sealer::{SealerError, Status};

/// One entry of the configuration: a CRK and the way to it.
#[derive(Debug)]
pub struct Crk {
    pub name: CrkName,
    /// KP_CONFIG.VERSION: how KMS v1 values name this entry.
    pub kp_version: i64,
    pub service: Guard,
}

/// The CRK that wraps, and those that only unwrap.
#[derive(Debug, Clone)]
pub struct Ring {
    pub current: Arc<Crk>,
    pub previous: Vec<Arc<Crk>>,
}

/// What the configuration says about DEKs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// A new DEK for each Encrypt.
    pub new_dek: bool,
    /// How long a plain DEK may be used without asking the key service again; zero: none is kept.
    pub lifetime: Duration,
    /// When the DEK that seals is replaced by a new one.
    pub max_age: Duration,
    pub max_uses: u64,
    /// How many DEKs are held for opening.
    pub capacity: usize,
    pub len_bytes: u8,
    pub accept_unauthenticated: bool,
}

/// All that one seal takes.
#[derive(Debug, Clone)]
pub struct Sealing {
    pub dek: Dek,
    pub wdek: Arc<[u8]>,
    pub key_id: KeyId,
    pub kp_version: i64,
}

/// How the next Encrypt gets its DEK.
#[derive(Debug)]
pub enum Next {
    FromMemory(Sealing),
    /// The WDEK stays, its DEK is not kept: to be unwrapped for this one seal.
    Unwrap(Wrapped),
    /// There is none that may be used: one new DEK for all who wait.
    Renew,
    /// A new DEK for this Encrypt alone.
    New,
}

/// A WDEK with everything that a seal under it needs, except the DEK.
#[derive(Debug, Clone)]
pub struct Wrapped {
    pub crk: Arc<Crk>,
    pub wdek: Arc<[u8]>,
    pub key_id: KeyId,
}

/// Whom to ask for a new DEK; given back with the answer, it shows whether the world has moved on meanwhile.
#[derive(Debug, Clone)]
pub struct Asked {
    pub crk: Arc<Crk>,
    changes: u64,
}

/// A new DEK, ready to seal with.
#[derive(Debug)]
pub struct Adopted {
    pub sealing: Sealing,
    /// Its key_id is reported from now on, and another one was before.
    pub changed: bool,
}

/// Why an answer of the key service was not taken over.
#[derive(Debug)]
pub enum NotAdopted {
    /// It was asked before the key_id changed, or it still wraps with a version that was replaced.
    Stale,
    /// The names of instance, CRK and version make no key_id.
    KeyId(KeyIdError),
}

#[derive(Debug)]
pub struct Keys {
    policy: Policy,
    ring: Ring,
    active: Option<Active>,
    /// What Status says. Outlives `active`, so that a withdrawn CRK that comes back is no change.
    reported: Option<KeyId>,
    /// key_ids of this CRK that were reported before: never again, whatever a lagging replica answers.
    retired: Vec<KeyId>,
    /// How often `reported` changed.
    changes: u64,
    ready: Result<(), SealerError>,
}

#[derive(Debug)]
struct Active {
    crk: Arc<Crk>,
    key_id: KeyId,
    wdek: Arc<[u8]>,
    dek: Option<Dek>,
    born: Duration,
    confirmed: Duration,
    uses: u64,
}

impl Keys {
    pub fn new(ring: Ring, policy: Policy) -> Keys {
        let ready = Err(SealerError::Unavailable {
            text: "the plug-in has just started and has not asked the key service yet".into(),
        });
        Keys { policy, ring, active: None, reported: None, retired: Vec::new(), changes: 0, ready }
    }

    /// A new configuration. Old values can be opened as it says from now on. The DEK that seals, and with it the
    /// reported key_id, stays until the new CRK, or the version that is newly named, has wrapped another one.
    pub fn install(&mut self, ring: Ring, policy: Policy) {
        if ring.current.name != self.ring.current.name {
            self.retired.clear();
        }
        if let Some(active) = &mut self.active {
            if active.crk.wraps_like(&ring.current) {
                active.crk = ring.current.clone();
            }
            if !policy.keeps_dek() {
                active.dek = None;
            }
        }
        (self.ring, self.policy) = (ring, policy);
    }

    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// How to seal now. Counts one use of what it gives out.
    pub fn next(&mut self, now: Duration) -> Next {
        let policy = self.policy;
        if policy.new_dek {
            return Next::New;
        }
        let Some(active) = self.active.as_mut().filter(|active| active.may_seal(&policy, now))
        else {
            return Next::Renew;
        };
        active.uses += 1;
        match &active.dek {
            Some(dek) => Next::FromMemory(Sealing {
                dek: dek.clone(),
                wdek: active.wdek.clone(),
                key_id: active.key_id.clone(),
                kp_version: active.crk.kp_version,
            }),
            None => Next::Unwrap(active.wrapped()),
        }
    }

    /// Whom an Encrypt asks for a new DEK: the CRK whose key_id is reported.
    pub fn to_seal(&self) -> Asked {
        let crk = self.active.as_ref().map_or(&self.ring.current, |active| &active.crk);
        Asked { crk: crk.clone(), changes: self.changes }
    }

    /// Whom the probe asks: the CRK of the configuration, reported or not yet.
    pub fn to_probe(&self) -> Asked {
        Asked { crk: self.ring.current.clone(), changes: self.changes }
    }

    /// Takes over a DEK that the key service has made. If it was wrapped by another CRK version than the reported one,
    /// DEK and key_id change in this one step: first rotated, reported from here on.
    ///
    /// # Errors
    /// If the answer is older than what is reported; then nothing changed.
    pub fn adopt(
        &mut self,
        asked: &Asked,
        new: &NewDek,
        now: Duration,
    ) -> Result<Adopted, NotAdopted> {
        let name = &asked.crk.name;
        let key_id =
            KeyId::new(&name.instance, &name.crk, &new.version).map_err(NotAdopted::KeyId)?;
        let changed = self.reported.as_ref() != Some(&key_id);
        let outdated = self.changes != asked.changes || !self.wants(name);
        if changed && (outdated || self.is_replaced(name, &key_id)) {
            return Err(NotAdopted::Stale);
        }
        if changed {
            self.report(key_id.clone());
        }
        let worn = |active: &Active| active.is_worn(&self.policy, now);
        if changed || self.active.as_ref().is_none_or(worn) {
            self.active = Some(Active {
                crk: asked.crk.clone(),
                key_id: key_id.clone(),
                wdek: new.wdek.clone(),
                dek: self.policy.keeps_dek().then(|| new.dek.clone()),
                born: now,
                confirmed: now,
                uses: 0,
            });
        }
        let kp_version = asked.crk.kp_version;
        let sealing = Sealing { dek: new.dek.clone(), wdek: new.wdek.clone(), key_id, kp_version };
        Ok(Adopted { sealing, changed })
    }

    /// The WDEK that seals, if its DEK ends soon or has ended: to be unwrapped again.
    pub fn to_refresh(&self, now: Duration) -> Option<Wrapped> {
        let active = self.active.as_ref().filter(|_| self.policy.keeps_dek())?;
        let age = now.saturating_sub(active.confirmed);
        (age >= refresh_age(self.policy.lifetime)).then(|| active.wrapped())
    }

    /// The key service has given out the DEK of `wdek` again.
    pub fn confirm(&mut self, wdek: &[u8], dek: &Dek, now: Duration) {
        if !self.policy.keeps_dek() {
            return;
        }
        if let Some(active) = self.active.as_mut().filter(|active| *active.wdek == *wdek) {
            active.dek = Some(dek.clone());
            active.confirmed = now;
        }
    }

    /// Access to this CRK was withdrawn: nothing more is sealed with its DEK, and the cause is what Status says. False
    /// if it did not seal.
    pub fn withdraw(&mut self, crk: &CrkName, cause: &SealerError) -> bool {
        let sealed = self.active.as_ref().is_some_and(|active| active.crk.name == *crk);
        if sealed {
            self.active = None;
            self.ready = Err(cause.clone());
        }
        sealed
    }

    /// Wipes the DEK that seals if it is too old to be used.
    pub fn expire(&mut self, now: Duration) {
        let lifetime = self.policy.lifetime;
        if let Some(active) = &mut self.active
            && now.saturating_sub(active.confirmed) >= lifetime
        {
            active.dek = None;
        }
    }

    /// What the background probe found; true if that is news.
    pub fn set_ready(&mut self, ready: Result<(), SealerError>) -> bool {
        let news = self.ready != ready;
        self.ready = ready;
        news
    }

    pub fn ready(&self) -> Result<(), SealerError> {
        self.ready.clone()
    }

    /// The reported key_id, while sealing is possible: with a DEK in memory, or because the key service answered last.
    ///
    /// # Errors
    /// Why sealing is not possible.
    pub fn status(&self, now: Duration) -> Result<Status, SealerError> {
        let from_memory = self.active.as_ref().is_some_and(|active| {
            active.dek.is_some() && active.may_seal(&self.policy, now) && !self.policy.new_dek
        });
        if !from_memory {
            self.ready.clone()?;
        }
        let key_id = self.reported.clone();
        key_id.map(|key_id| Status { key_id }).ok_or_else(|| SealerError::Unavailable {
            text: "the key service has not wrapped a DEK yet".into(),
        })
    }

    /// The CRK that a key_id names.
    pub fn named(&self, name: &CrkName) -> Option<Arc<Crk>> {
        self.known().find(|crk| crk.name == *name).cloned()
    }

    /// The CRK that a KMS v1 value names.
    pub fn versioned(&self, kp_version: i64) -> Option<Arc<Crk>> {
        self.known().find(|crk| crk.kp_version == kp_version).cloned()
    }

    /// Age and uses of the DEK that seals, for whoever looks at the metrics.
    pub fn age_and_uses(&self, now: Duration) -> (Duration, u64) {
        self.active
            .as_ref()
            .filter(|active| active.dek.is_some())
            .map_or_else(Default::default, |active| {
                (now.saturating_sub(active.confirmed), active.uses)
            })
    }

    /// How long the token that the current CRK's service is asked with is still used; `None` without one.
    pub fn token_life_left(&self) -> Option<Duration> {
        self.ring.current.service.token_life_left()
    }

    /// How many configured CRKs have a service that is down, so that callers are turned away.
    pub fn down(&self) -> usize {
        let crks = std::iter::once(&self.ring.current).chain(&self.ring.previous);
        crks.filter(|crk| crk.service.is_down()).count()
    }

    /// True if `version` of `crk` is news: neither reported nor replaced.
    pub fn is_news(&self, crk: &CrkName, version: &str) -> bool {
        KeyId::new(&crk.instance, &crk.crk, version).is_ok_and(|key_id| {
            self.reported.as_ref().is_some_and(|reported| {
                (reported.instance(), reported.crk()) == (key_id.instance(), key_id.crk())
                    && *reported != key_id
            }) && !self.is_replaced(crk, &key_id)
        })
    }

    /// The configuration's CRKs, and the one that still seals while a new one is being tried.
    fn known(&self) -> impl Iterator<Item = &Arc<Crk>> {
        let active = self.active.iter().map(|active| &active.crk);
        std::iter::once(&self.ring.current).chain(&self.ring.previous).chain(active)
    }

    /// A DEK of this CRK may seal: the configuration says so, or the new one is not proven yet.
    pub fn wants(&self, name: &CrkName) -> bool {
        *name == self.ring.current.name
            || self.active.as_ref().is_some_and(|active| active.crk.name == *name)
    }

    /// Another version has taken its place. If the configuration chooses the version, every other one is replaced, and
    /// one that comes back was meant to; if the service does, one that was reported before is an old replica's.
    fn is_replaced(&self, crk: &CrkName, key_id: &KeyId) -> bool {
        let current = &self.ring.current;
        match current.service.named_version().filter(|_| current.name == *crk) {
            Some(named) => named != key_id.version(),
            None => self.retired.contains(key_id),
        }
    }

    fn report(&mut self, key_id: KeyId) {
        self.changes += 1;
        if let Some(before) = self.reported.replace(key_id) {
            self.retired.push(before);
        }
    }
}

impl Crk {
    /// The same CRK, and the same version of it where the configuration names one.
    fn wraps_like(&self, other: &Crk) -> bool {
        self.name == other.name && self.service.named_version() == other.service.named_version()
    }
}

impl Policy {
    /// A DEK for sealing is held in memory.
    fn keeps_dek(&self) -> bool {
        !self.new_dek && !self.lifetime.is_zero()
    }
}

impl Active {
    /// Neither too old nor used up; where DEKs are kept, its DEK is there and the service confirmed it in time.
    fn may_seal(&self, policy: &Policy, now: Duration) -> bool {
        let fresh = self.dek.is_some() && now.saturating_sub(self.confirmed) < policy.lifetime;
        (fresh || !policy.keeps_dek())
            && now.saturating_sub(self.born) < policy.max_age
            && self.uses < policy.max_uses
    }

    /// To be replaced when there is an occasion, before an Encrypt has to wait for it.
    fn is_worn(&self, policy: &Policy, now: Duration) -> bool {
        !self.may_seal(policy, now)
            || self.uses >= policy.max_uses - policy.max_uses / 10
            || now.saturating_sub(self.born) >= policy.max_age - policy.max_age / 10
    }

    fn wrapped(&self) -> Wrapped {
        Wrapped { crk: self.crk.clone(), wdek: self.wdek.clone(), key_id: self.key_id.clone() }
    }
}
