//! The key service says that it does not know the WDEK that seals: what follows, by what else it says.
//!
//! Nothing here asks again; that is the probe's.

use std::time::Duration;

use super::{Keys, REPLICAS_LAG};
use crate::sealer::SealerError;

impl Keys {
    /// A single answer was that the key service does not know `wdek`, which an HSM's passing fault can look like: it is
    /// asked again soon. Not known twice, a new DEK takes its place. True if this doubt is new.
    pub fn doubt(&mut self, wdek: &[u8], now: Duration) -> bool {
        let young = self.is_young(now);
        let Some(active) = self.active.as_mut().filter(|active| *active.wdek == *wdek) else {
            return false;
        };
        if active.doubted && active.opens && !young {
            active.wear_out();
        }
        !std::mem::replace(&mut active.doubted, true)
    }

    /// What seals is in doubt.
    pub fn doubts(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.doubted)
    }

    /// It was told already that nobody can open what was sealed: the next version is the cure.
    pub fn has_lost(&self) -> bool {
        self.active.as_ref().is_some_and(|active| !active.opens)
    }

    /// The key service does not know `wdek`, and wraps with another version than its own. Nothing more is sealed with its
    /// DEK, until it does again. False if `wdek` does not seal, or if the key_id is so young that this may be a replica
    /// that has not heard of it.
    pub fn lose(&mut self, wdek: &[u8], now: Duration) -> bool {
        let young = self.is_young(now);
        let Some(active) = self.active.as_mut().filter(|active| *active.wdek == *wdek) else {
            return false;
        };
        active.doubted = true;
        if !young {
            (active.opens, active.dek) = (false, None);
        }
        !young
    }

    /// What was sealed before the reported version can be opened from memory only: told until the next rotation, or
    /// until it cannot be opened from memory either.
    pub fn mourn(&mut self, cause: SealerError) {
        self.loss = Some(cause);
    }

    fn is_young(&self, now: Duration) -> bool {
        now.saturating_sub(self.since) < REPLICAS_LAG
    }
}
