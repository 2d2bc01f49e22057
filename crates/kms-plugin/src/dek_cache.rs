//! The plain DEKs that open values, found by the SHA-256 of their WDEK: bounded in number and in age,
//! wiped when they go.
//!
//! Nothing here asks the key service; a DEK comes in only after it did answer.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use kms_core::secret::Dek;

use crate::random::Random;

/// Which CRK a DEK belongs to, whatever URL or API key it is reached with.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CrkName {
    pub instance: Arc<str>,
    pub crk: Arc<str>,
}

/// A WDEK and the CRK that it is to be unwrapped with.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct DekId {
    pub crk: CrkName,
    wdek_sha256: [u8; 32],
}

#[derive(Debug)]
pub struct DekCache {
    slots: Mutex<HashMap<DekId, Slot>>,
}

#[derive(Debug)]
struct Slot {
    dek: Dek,
    wdek: Arc<[u8]>,
    /// When the key service last gave it out.
    confirmed: Duration,
    last_used: Duration,
    /// When it was last asked for again.
    asked: Duration,
}

impl DekId {
    pub fn new(crk: &CrkName, wdek: &[u8]) -> DekId {
        let mut wdek_sha256 = [0; 32];
        wdek_sha256.copy_from_slice(digest(&SHA256, wdek).as_ref());
        DekId::hashed(crk, wdek_sha256)
    }

    /// For whoever knows the WDEK's SHA-256 already.
    pub fn hashed(crk: &CrkName, wdek_sha256: [u8; 32]) -> DekId {
        DekId { crk: crk.clone(), wdek_sha256 }
    }
}

impl fmt::Debug for DekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DekId({} {:02x?})", self.crk, &self.wdek_sha256[..4])
    }
}

impl fmt::Display for CrkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.instance, self.crk)
    }
}

impl DekCache {
    pub fn new() -> DekCache {
        DekCache { slots: Mutex::default() }
    }

    /// The DEK, if the key service gave it out less than `lifetime` ago.
    pub fn find(&self, id: &DekId, now: Duration, lifetime: Duration) -> Option<Dek> {
        let mut slots = self.slots();
        let slot = slots.get_mut(id).filter(|slot| slot.lives(now, lifetime))?;
        slot.last_used = now;
        Some(slot.dek.clone())
    }

    /// Keeps a DEK that the key service has just given out. If there is no room, the one that was not used
    /// for the longest time goes.
    pub fn keep(&self, id: DekId, wdek: Arc<[u8]>, dek: Dek, now: Duration, capacity: usize) {
        let mut slots = self.slots();
        let last_used = slots.get(&id).map_or(now, |slot| slot.last_used);
        slots.insert(id, Slot { dek, wdek, confirmed: now, last_used, asked: now });
        while slots.len() > capacity.max(1) {
            let Some(oldest) =
                slots.iter().min_by_key(|(_, slot)| slot.last_used).map(|(id, _)| id.clone())
            else {
                return;
            };
            slots.remove(&oldest);
        }
    }

    /// Those of some CRKs that were confirmed so long ago and were used since: to be asked for again before they end and a
    /// caller has to wait for them. At most `most`, first whose turn was the longest ago; see [`DekCache::asked`].
    pub fn due(
        &self,
        now: Duration,
        age: Duration,
        most: usize,
        of: impl Fn(&CrkName) -> bool,
    ) -> Vec<(DekId, Arc<[u8]>)> {
        let slots = self.slots();
        let mut due: Vec<_> = slots
            .iter()
            .filter(|(id, slot)| {
                now.saturating_sub(slot.confirmed) >= age
                    && slot.last_used > slot.confirmed
                    && of(&id.crk)
            })
            .collect();
        due.sort_unstable_by_key(|(_, slot)| slot.asked);
        due.into_iter().take(most).map(|(id, slot)| (id.clone(), slot.wdek.clone())).collect()
    }

    /// It has its turn now, whatever comes of it.
    pub fn asked(&self, id: &DekId, now: Duration) {
        if let Some(slot) = self.slots().get_mut(id) {
            slot.asked = now;
        }
    }

    /// The one that was used last of each CRK.
    pub fn latest_of_each(&self) -> HashMap<CrkName, Arc<[u8]>> {
        let slots = self.slots();
        let mut latest: HashMap<&CrkName, &Slot> = HashMap::new();
        for (id, slot) in slots.iter() {
            let known = latest.entry(&id.crk).or_insert(slot);
            if slot.last_used > known.last_used {
                *known = slot;
            }
        }
        latest.into_iter().map(|(crk, slot)| (crk.clone(), slot.wdek.clone())).collect()
    }

    /// Wipes what is too old to be used.
    pub fn expire(&self, now: Duration, lifetime: Duration) {
        self.slots().retain(|_, slot| slot.lives(now, lifetime));
    }

    /// Wipes whatever does not belong to one of these CRKs, and says how many those were.
    pub fn keep_only(&self, wanted: impl Fn(&CrkName) -> bool) -> usize {
        let mut slots = self.slots();
        let before = slots.len();
        slots.retain(|id, _| wanted(&id.crk));
        before - slots.len()
    }

    /// Wipes one.
    pub fn forget(&self, id: &DekId) {
        self.slots().remove(id);
    }

    pub fn len(&self) -> usize {
        self.slots().len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots().is_empty()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<DekId, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for DekCache {
    fn default() -> DekCache {
        DekCache::new()
    }
}

impl Slot {
    fn lives(&self, now: Duration, lifetime: Duration) -> bool {
        now.saturating_sub(self.confirmed) < lifetime
    }
}

/// At this age a DEK is asked for again in the background: a quarter of its life is left to succeed in. Drawn anew at
/// each look and sometimes up to an eighth earlier: plug-ins that got their DEKs together, when an outage ended, do not
/// all come back together.
pub fn refresh_age(lifetime: Duration, random: &Random) -> Duration {
    let latest = lifetime - lifetime / 4;
    random.between(latest - lifetime / 8, latest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn crk(name: &str) -> CrkName {
        CrkName { instance: "i".into(), crk: name.into() }
    }

    fn id(wdek: &[u8]) -> DekId {
        DekId::new(&crk("a"), wdek)
    }

    fn keep(cache: &DekCache, wdek: &[u8], now: Duration, capacity: usize) {
        cache.keep(id(wdek), wdek.into(), Dek::from_bytes([wdek[0]; 32]), now, capacity);
    }

    fn any(_: &CrkName) -> bool {
        true
    }

    fn at(minutes: u64) -> Duration {
        Duration::from_secs(minutes * 60)
    }

    #[test]
    fn a_dek_lives_for_its_lifetime_and_no_longer() {
        let cache = DekCache::new();
        keep(&cache, b"1", at(0), 10);
        assert_eq!(cache.find(&id(b"1"), at(59), HOUR).unwrap().as_bytes(), &[b'1'; 32]);
        assert!(cache.find(&id(b"1"), at(60), HOUR).is_none(), "use does not prolong it");
        cache.expire(at(59), HOUR);
        assert_eq!(cache.len(), 1);
        cache.expire(at(60), HOUR);
        assert!(cache.is_empty());
    }

    #[test]
    fn a_dek_is_found_only_under_its_own_crk() {
        let cache = DekCache::new();
        keep(&cache, b"1", at(0), 10);
        assert!(cache.find(&DekId::new(&crk("b"), b"1"), at(0), HOUR).is_none());
        cache.keep_only(|name| name == &crk("b"));
        assert!(cache.is_empty());
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let cache = DekCache::new();
        keep(&cache, b"1", at(0), 2);
        keep(&cache, b"2", at(1), 2);
        cache.find(&id(b"1"), at(2), HOUR);
        keep(&cache, b"3", at(3), 2);
        let held = [b"1", b"2", b"3"].map(|wdek| cache.find(&id(wdek), at(4), HOUR).is_some());
        assert_eq!(held, [true, false, true]);
    }

    #[test]
    fn only_what_was_used_is_refreshed_and_before_it_ends() {
        let cache = DekCache::new();
        keep(&cache, b"1", at(0), 10);
        keep(&cache, b"2", at(0), 10);
        cache.find(&id(b"1"), at(10), HOUR);
        let age = at(45);
        assert!(cache.due(at(44), age, 10, any).is_empty());
        let due: Vec<_> = cache.due(at(45), age, 10, any).into_iter().map(|(id, _)| id).collect();
        assert_eq!(due, [id(b"1")]);
        keep(&cache, b"1", at(45), 10);
        assert!(cache.due(at(46), age, 10, any).is_empty(), "confirmed just now");
        assert!(cache.find(&id(b"1"), at(100), HOUR).is_some(), "it lives on");
    }

    #[test]
    fn everybody_has_a_turn_also_where_the_first_are_never_confirmed() {
        let cache = DekCache::new();
        let all: HashMap<_, _> = (0..5u8).map(|number| (id(&[number]), number)).collect();
        for number in 0..5u8 {
            keep(&cache, &[number], at(0), 10);
            cache.find(&id(&[number]), at(1), HOUR);
        }
        let mut seen: Vec<_> = (45..48)
            .map(|minute| (minute, cache.due(at(minute), at(45), 2, any)))
            .inspect(|(_, due)| assert_eq!(due.len(), 2))
            .inspect(|(minute, due)| due.iter().for_each(|(id, _)| cache.asked(id, at(*minute))))
            .flat_map(|(_, due)| due)
            .map(|(id, _)| all[&id])
            .collect();
        seen.truncate(5);
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_refresh_is_early_enough_and_not_at_one_age_for_all() {
        let ages: Vec<_> = (0..100).map(|_| refresh_age(HOUR, &Random::system())).collect();
        let (earliest, latest) = (at(37), at(45));
        assert!(ages.iter().all(|age| (earliest..=latest).contains(age)), "{ages:?}");
        assert!(ages.iter().max() > ages.iter().min(), "{ages:?}");
    }
}
