//! What Status and Encrypt must agree on, in one place and behind one lock: the CRKs of the configuration, the
//! DEK that seals, the key_id that is reported, and whether the key service answers.
//!
//! Nothing here waits or asks anybody; what came of asking is handed in, with the time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kms_core::key_id::{KeyId, KeyIdError};
use kms_core::secret::Dek;

use crate::dek_cache::CrkName;
use crate::provider::{Backend, NewDek};
use crate::sealer::{Refusal, SealerError, Status};
use active::Active;

mod active;
mod crk;
mod doubt;
mod policy;

pub use crk::{Crk, Ring};
pub use policy::Policy;

/// So long may some replicas of a key service not know of a rotation that others do.
const REPLICAS_LAG: Duration = Duration::from_secs(60);
/// For as long as something can be saved from memory, and not for less than this.
const LOSS_IS_TOLD: Duration = Duration::from_secs(3600);

/// Why a changed configuration is not taken over. The operator must write another one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    #[error(
        "KP_CONFIG goes back to VERSION {kp_version} of CRK {crk}, which was left, and a key_id is never used twice: give \
         KP_CONFIG a VERSION that was never used, such as {free}, and list VERSION {kp_version} in KP_CONFIG_PREVIOUS"
    )]
    UsedBefore { crk: CrkName, kp_version: i64, free: i64 },
    #[error(
        "no entry is VERSION {kp_version} of CRK {crk} any more, under which values are sealed now, so that they could not be \
         opened: list it in KP_CONFIG_PREVIOUS, and give KP_CONFIG a VERSION that was never used, such as {free}"
    )]
    Forgotten { crk: CrkName, kp_version: i64, free: i64 },
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
    pub grant: Grant,
    changes: u64,
}

/// How often access to a CRK was withdrawn before it was asked. What it answers is kept only if that was the last time:
/// an answer that was under way when access ended would else bring a DEK back that was wiped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Grant(u64);

/// What a request has learned about a CRK.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Wraps,
    Unwraps,
    Fails,
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
    /// It was asked before the key_id changed or access ended.
    Stale,
    /// It wraps with a version that another one had replaced: a replica lags, or it was restored from a backup.
    Replaced { backend: Backend, version: String, by: String },
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
    /// key_ids that were reported before, oldest first: never again, whatever a lagging replica answers and the
    /// configuration says.
    retired: Vec<KeyId>,
    /// Of the CRKs to which access was withdrawn once.
    grants: HashMap<CrkName, Grant>,
    /// The key service was seen to unwrap, not only to wrap.
    proven: bool,
    /// Since when the key service wraps with a version that was replaced.
    replaced: Option<Duration>,
    /// Since when `reported` is.
    since: Duration,
    /// What it had sealed before is lost, while the version that came instead works.
    loss: Option<SealerError>,
    /// How often `reported` changed.
    changes: u64,
    /// Since when the configuration wants another key_id than the reported one.
    moved: Option<Duration>,
    /// Whether the configuration's CRK wraps and unwraps.
    ready: Result<(), SealerError>,
    /// Whether the CRK does that the configuration has moved away from, while it still seals.
    fallback: Result<(), SealerError>,
}

impl Keys {
    pub fn new(ring: Ring, policy: Policy) -> Keys {
        let ready = Err(SealerError::Unavailable {
            text: format!(
                "the plug-in has just started and has not asked the {} yet",
                ring.current.service.backend()
            ),
        });
        Keys {
            policy,
            ring,
            active: None,
            reported: None,
            retired: Vec::new(),
            grants: HashMap::new(),
            proven: false,
            replaced: None,
            since: Duration::ZERO,
            loss: None,
            changes: 0,
            moved: None,
            fallback: ready.clone(),
            ready,
        }
    }

    /// A new configuration. Old values can be opened as it says from now on. The DEK that seals, and with it the
    /// reported key_id, stays until the new entry's CRK, or the version that is newly named, has wrapped another one;
    /// but not for longer than a DEK may live.
    ///
    /// # Errors
    /// See [`InstallError`]; then nothing changed.
    pub fn install(
        &mut self,
        ring: Ring,
        policy: Policy,
        now: Duration,
    ) -> Result<(), InstallError> {
        self.check(&ring)?;
        if let Some(active) = &mut self.active {
            // The way to it may be another one now, also where it is no longer the current one.
            if let Some(crk) = ring.entries().find(|crk| active.crk.wraps_like(crk)) {
                active.crk = crk.clone();
            }
            if !policy.keeps_dek() {
                active.dek = None;
            }
        }
        (self.ring, self.policy) = (ring, policy);
        if self.reports_current() {
            self.moved = None;
        } else if self.moved.is_none() {
            (self.moved, self.fallback) = (Some(now), self.ready.clone());
        }
        Ok(())
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
        self.asking(crk)
    }

    /// Whom the probe asks: the CRK of the configuration, reported or not yet.
    pub fn to_probe(&self) -> Asked {
        self.asking(&self.ring.current)
    }

    /// To be taken before a CRK is asked.
    pub fn grant(&self, crk: &CrkName) -> Grant {
        self.grants.get(crk).copied().unwrap_or_default()
    }

    /// Whether an Encrypt asks another CRK than the probe does: the one that the configuration has moved away from.
    pub fn clings(&self) -> bool {
        self.moved.is_some() && self.active.is_some()
    }

    /// Takes over a DEK that the key service has made. If it was wrapped by another CRK version than the reported one,
    /// DEK and key_id change in this one step: first rotated, reported from here on.
    ///
    /// # Errors
    /// If the answer or the version is older than what is reported; then nothing changed.
    pub fn adopt(
        &mut self,
        asked: &Asked,
        new: &NewDek,
        now: Duration,
    ) -> Result<Adopted, NotAdopted> {
        let Crk { name, kp_version, .. } = &*asked.crk;
        let (version, kp_version) = (&new.version, *kp_version);
        let key_id = KeyId::of_entry(&name.instance, &name.crk, version, kp_version)
            .map_err(NotAdopted::KeyId)?;
        if self.grant(name) != asked.grant {
            return Err(NotAdopted::Stale);
        }
        let changed = self.reported.as_ref() != Some(&key_id);
        let wanted = self.wants(&asked.crk);
        if changed {
            self.check_news(asked, &key_id)?;
            self.report(key_id.clone(), now);
        }
        self.replaced = None;
        let worn = |active: &Active| active.is_worn(&self.policy, now);
        if changed || wanted && self.active.as_ref().is_none_or(worn) {
            self.active = Some(Active {
                crk: asked.crk.clone(),
                key_id: key_id.clone(),
                wdek: new.wdek.clone(),
                dek: self.policy.keeps_dek().then(|| new.dek.clone()),
                born: now,
                confirmed: now,
                uses: 0,
                opens: true,
                doubted: false,
            });
        }
        let sealing = Sealing { dek: new.dek.clone(), wdek: new.wdek.clone(), key_id, kp_version };
        Ok(Adopted { sealing, changed })
    }

    /// The WDEK that seals, if its DEK was confirmed so long ago, or is in doubt: to be unwrapped again before or after it
    /// ends.
    pub fn to_refresh(&self, now: Duration, age: Duration) -> Option<Wrapped> {
        let active = self.active.as_ref()?;
        let is_old = self.policy.keeps_dek() && now.saturating_sub(active.confirmed) >= age;
        (is_old || active.doubted).then(|| active.wrapped())
    }

    /// The WDEK that seals, or would if it opened.
    pub fn sealing(&self) -> Option<Wrapped> {
        self.active.as_ref().map(Active::wrapped)
    }

    /// The key service has given out the DEK of `wdek` again.
    pub fn confirm(&mut self, grant: Grant, wdek: &[u8], dek: &Dek, now: Duration) {
        let keeps_dek = self.policy.keeps_dek();
        let granted = |active: &Active| self.grant(&active.crk.name) == grant;
        if !self.active.as_ref().is_some_and(granted) {
            return;
        }
        if let Some(active) = self.active.as_mut().filter(|active| *active.wdek == *wdek) {
            (active.opens, active.doubted) = (true, false);
            if keeps_dek {
                active.dek = Some(dek.clone());
                active.confirmed = now;
                self.proven = true;
            }
        }
    }

    /// What the probe makes of a key service that wraps with a version which was replaced.
    ///
    /// # Errors
    /// The cause: at once if it does not open what seals, and after a while even if it does, because the next DEK is
    /// not to be had.
    pub fn outlast(
        &mut self,
        cause: SealerError,
        opens: bool,
        now: Duration,
    ) -> Result<(), SealerError> {
        let since = *self.replaced.get_or_insert(now);
        let lags = opens && now.saturating_sub(since) < REPLICAS_LAG;
        if lags { Ok(()) } else { Err(cause) }
    }

    /// Access to this CRK was withdrawn: nothing more is sealed with its DEK, and the cause is what Status says. False
    /// if it did not seal.
    pub fn withdraw(&mut self, crk: &CrkName, cause: &SealerError) -> bool {
        self.grants.entry(crk.clone()).or_default().0 += 1;
        let sealed = self.active.as_ref().is_some_and(|active| active.crk.name == *crk);
        if sealed {
            self.active = None;
            self.ready = Err(cause.clone());
        }
        sealed
    }

    /// Wipes the DEK that seals if it is too old to be used. A CRK that the configuration has moved away from seals for
    /// no longer than a DEK may live: a rotation that fails is not hidden for ever.
    pub fn expire(&mut self, now: Duration) {
        let Policy { lifetime, max_age, .. } = self.policy;
        if now.saturating_sub(self.since) >= lifetime.max(LOSS_IS_TOLD) {
            self.loss = None;
        }
        if self.moved.is_some_and(|since| now.saturating_sub(since) >= max_age) {
            self.active = None;
        }
        if let Some(active) = &mut self.active
            && now.saturating_sub(active.confirmed) >= lifetime
        {
            active.dek = None;
        }
    }

    /// What the background probe found; true if that is news.
    pub fn set_ready(&mut self, ready: Result<(), SealerError>) -> bool {
        self.proven |= ready.is_ok();
        let news = self.ready != ready;
        self.ready = ready;
        news
    }

    /// What it found about the CRK that the configuration has moved away from.
    pub fn set_fallback(&mut self, fallback: Result<(), SealerError>) {
        self.fallback = fallback;
    }

    /// # Errors
    /// Why sealing is not possible, or what was lost though it is.
    pub fn ready(&self) -> Result<(), SealerError> {
        self.ready.clone()?;
        self.loss.clone().map_or(Ok(()), Err)
    }

    /// Who is asked for DEKs.
    pub fn backend(&self) -> Backend {
        self.ring.current.service.backend()
    }

    /// The reported key_id, while sealing is possible: with a DEK in memory, or because the key service answered last.
    /// A DEK that came with a request counts only once the service was seen to unwrap, too: what it only wraps nobody
    /// could read. Nor does one whose WDEK is so long that kube-apiserver would discard every value sealed with it; KMS v1,
    /// which does not ask for Status, has room for it.
    ///
    /// # Errors
    /// Why sealing is not possible.
    pub fn status(&self, now: Duration) -> Result<Status, SealerError> {
        let new_dek = self.policy.new_dek;
        let sealing =
            self.active.as_ref().filter(|active| active.may_seal(&self.policy, now) && !new_dek);
        let from_memory = sealing.is_some_and(|active| active.dek.is_some()) && self.proven;
        let found = if self.clings() { &self.fallback } else { &self.ready };
        match found {
            Err(cause) if is_replaced(cause) && sealing.is_some() => {}
            Err(cause) if !from_memory => return Err(cause.clone()),
            _ => {}
        }
        if let Some(active) = &self.active {
            active.check_opens()?;
            active.check_room()?;
        }
        let key_id = self.reported.clone();
        key_id.map(|key_id| Status { key_id }).ok_or_else(|| SealerError::Unavailable {
            text: format!("the {} has not wrapped a DEK yet", self.backend()),
        })
    }

    /// The CRK that a key_id names.
    pub fn behind(&self, key_id: &KeyId) -> Option<Arc<Crk>> {
        self.known().find(|crk| names(key_id, &crk.name)).cloned()
    }

    /// The configured CRK of this name.
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
        self.ring.entries().filter(|crk| crk.service.is_down()).count()
    }

    /// True if `version` of `crk` is news: neither reported nor replaced.
    pub fn is_news(&self, crk: &CrkName, version: &str) -> bool {
        let reported = self.reported.as_ref().filter(|reported| names(reported, crk));
        reported.is_some_and(|reported| reported.version() != version)
            && self.successor(crk, version).is_none()
    }

    /// What a request has just found out about this CRK is not what the last probe did. That it unwraps is no news of one
    /// that was seen not to wrap.
    pub fn contradicts(&self, crk: &CrkName, found: Found) -> bool {
        let clings_to_it =
            self.clings() && self.active.as_ref().is_some_and(|active| active.crk.name == *crk);
        let probed = match *crk == self.ring.current.name {
            true => &self.ready,
            false if clings_to_it => &self.fallback,
            false => return false,
        };
        match (probed, found) {
            (Ok(()), found) => found == Found::Fails,
            (Err(_), Found::Fails) => false,
            (Err(cause), Found::Wraps) => !is_replaced(cause),
            (Err(cause), Found::Unwraps) => !is_replaced(cause) && !is_no_wrap(cause),
        }
    }

    /// It is one of those that are configured now, and not one of the same name of before.
    pub fn knows(&self, crk: &Crk) -> bool {
        self.known().any(|known| std::ptr::eq(&raw const **known, crk))
    }

    /// The configuration's CRKs, and the one that still seals while a new one is being tried.
    fn known(&self) -> impl Iterator<Item = &Arc<Crk>> {
        self.ring.entries().chain(self.active.iter().map(|active| &active.crk))
    }

    /// A DEK of this entry's CRK may seal: the configuration says so, or the new one is not proven yet.
    fn wants(&self, crk: &Crk) -> bool {
        crk.is_entry(&self.ring.current)
            || self.active.as_ref().is_some_and(|active| crk.is_entry(&active.crk))
    }

    /// Whether another key_id than the reported one may be.
    fn check_news(&self, asked: &Asked, key_id: &KeyId) -> Result<(), NotAdopted> {
        let service = &asked.crk.service;
        let version = key_id.version();
        let successor = self.successor(&asked.crk.name, version);
        let outdated = self.changes != asked.changes || !self.wants(&asked.crk);
        if outdated || successor.is_some() && service.named_version().is_some() {
            return Err(NotAdopted::Stale);
        }
        if let Some(by) = successor {
            let (version, by) = (version.to_owned(), by.to_owned());
            return Err(NotAdopted::Replaced { backend: service.backend(), version, by });
        }
        if self.retired.contains(key_id) { Err(NotAdopted::Stale) } else { Ok(()) }
    }

    /// The version that has taken its place. If the configuration chooses the version, every other one is replaced; if
    /// the service does, one that another one followed.
    fn successor(&self, crk: &CrkName, version: &str) -> Option<&str> {
        let current = &self.ring.current;
        if let Some(named) = current.service.named_version().filter(|_| current.name == *crk) {
            return (named != version).then_some(named);
        }
        let history = self.retired.iter().chain(&self.reported);
        let versions = history.filter(|key_id| names(key_id, crk)).map(KeyId::version);
        versions.skip_while(|seen| *seen != version).filter(|later| *later != version).last()
    }

    fn asking(&self, crk: &Arc<Crk>) -> Asked {
        Asked { crk: crk.clone(), grant: self.grant(&crk.name), changes: self.changes }
    }

    fn report(&mut self, key_id: KeyId, now: Duration) {
        self.changes += 1;
        (self.since, self.loss) = (now, None);
        if let Some(before) = self.reported.replace(key_id) {
            self.retired.push(before);
        }
        if self.reports_current() {
            self.moved = None;
        }
    }

    /// The reported key_id, if there is one, is what the configuration wants.
    fn reports_current(&self) -> bool {
        let current = &self.ring.current;
        self.reported.as_ref().is_none_or(|reported| {
            let named = current.service.named_version();
            belongs(reported, current) && named.is_none_or(|named| named == reported.version())
        })
    }

    /// No key_id comes back, and what was sealed a moment ago can be opened.
    fn check(&self, ring: &Ring) -> Result<(), InstallError> {
        let Some(reported) = &self.reported else { return Ok(()) };
        let used = ring.entries().map(|crk| crk.kp_version);
        let used = used.chain(self.retired.iter().chain([reported]).map(KeyId::kp_version));
        let free = used.max().unwrap_or_default().saturating_add(1);
        if !ring.entries().any(|crk| belongs(reported, crk)) {
            let (instance, crk) = (reported.instance().into(), reported.crk().into());
            let (crk, kp_version) = (CrkName { instance, crk }, reported.kp_version());
            return Err(InstallError::Forgotten { crk, kp_version, free });
        }
        let current = &ring.current;
        let comes_back = match current.service.named_version() {
            Some(named) => {
                self.retired.iter().any(|old| belongs(old, current) && old.version() == named)
            }
            None => {
                !belongs(reported, current) && self.retired.iter().any(|old| belongs(old, current))
            }
        };
        if comes_back {
            let (crk, kp_version) = (current.name.clone(), current.kp_version);
            return Err(InstallError::UsedBefore { crk, kp_version, free });
        }
        Ok(())
    }
}

fn names(key_id: &KeyId, crk: &CrkName) -> bool {
    key_id.instance() == &*crk.instance && key_id.crk() == &*crk.crk
}

fn belongs(key_id: &KeyId, crk: &Crk) -> bool {
    names(key_id, &crk.name) && key_id.kp_version() == crk.kp_version
}

fn is_replaced(cause: &SealerError) -> bool {
    matches!(cause, SealerError::Refused { refusal: Refusal::Replaced, .. })
}

fn is_no_wrap(cause: &SealerError) -> bool {
    matches!(cause, SealerError::Refused { refusal: Refusal::NoWrap, .. })
}
