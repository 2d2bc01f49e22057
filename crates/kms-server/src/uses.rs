//! How often a CRK version is used with AES-GCM: after 2^32 times with IVs made at random an IV may repeat, and with it the
//! key stream (NIST SP 800-38D, 8.3). All servers on one database share the limit.
//!
//! A server reserves a block of uses in the database before it uses the first of them, so a crash counts too many and
//! never too few. Blocks begin small and double: what a crash loses is less than twice what was used since the start,
//! and a server that is started over and over uses nothing up. What is left at an orderly end goes back. A restored
//! database does not know what was used since its backup, so a restore adds [`RESTORE_MARGIN`]. Nothing here knows an IV
//! or a key.

use crate::ops::Error;
use crate::store::Store;
use std::collections::HashMap;
use std::sync::{Arc, Mutex as Short, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Mutex;
use uuid::Uuid;

/// What is reserved of a version first.
pub const FIRST_BLOCK: u64 = 1 << 10;
/// Beyond it blocks do not grow: at 1,000 wraps a second it is one write to the database in 17 minutes.
const LARGEST_BLOCK: u64 = 1 << 20;
/// From here on the log asks for a rotation, with each block.
const WARNING: u64 = 1 << 31;
/// No use is granted beyond.
pub const LIMIT: u64 = 1 << 32;
/// How long somebody who can do without waits for the database.
const PATIENCE: Duration = Duration::from_millis(200);
/// What a restore adds to each version: three days of 1,000 wraps a second since the backup.
pub const RESTORE_MARGIN: u64 = 1 << 28;

/// What this server has reserved and not used yet.
#[derive(Debug, Default)]
pub struct Uses(Short<HashMap<Uuid, Arc<Version>>>);

#[derive(Debug, Default)]
struct Version {
    at_hand: Short<AtHand>,
    /// Held while a block is reserved: a second reservation for those who wait would waste one. Other versions do not
    /// wait for it, nor does whoever takes what is at hand.
    reserving: Mutex<()>,
}

#[derive(Debug)]
struct AtHand {
    left: u64,
    next_block: u64,
    /// There is nothing left for anybody. It does not come back, so nobody asks again.
    used_up: bool,
}

impl Uses {
    /// Takes one use of `version`.
    ///
    /// # Errors
    /// `UsedUp` when all were taken; those of the database.
    pub async fn take(&self, store: &dyn Store, version: Uuid) -> Result<(), Error> {
        let uses = self.of(version);
        if uses.take()? {
            return Ok(());
        }
        let _turn = uses.reserving.lock().await;
        while !uses.take()? {
            uses.reserve(store, version).await?;
        }
        Ok(())
    }

    /// Whether a use of `version` can be taken without the database.
    pub fn are_at_hand(&self, version: Uuid) -> bool {
        self.of(version).at_hand().left > 0
    }

    /// Sees to it that uses of `version` are at hand, and waits for that a moment at most. The database is asked all the
    /// same, for whoever comes later, but once at a time: the others do not wait at all.
    pub async fn provide(&self, store: &Arc<dyn Store>, version: Uuid) {
        let (uses, store) = (self.of(version), store.clone());
        if uses.at_hand().left > 0 {
            return;
        }
        let reserve = tokio::spawn(async move {
            let Ok(_turn) = uses.reserving.try_lock() else { return };
            if uses.at_hand().left == 0
                && let Err(error) = uses.reserve(&*store, version).await
            {
                tracing::debug!("No uses of CRK version {version} are reserved: {error}");
            }
        });
        let _ = tokio::time::timeout(PATIENCE, reserve).await;
    }

    /// Gives back what is left, at the end of a server. Whoever still takes one reserves it anew.
    pub async fn give_back(&self, store: &dyn Store) {
        let versions = std::mem::take(&mut *self.versions());
        let mut left = Vec::with_capacity(versions.len());
        for (version, uses) in versions {
            let _turn = uses.reserving.lock().await;
            left.push((version, std::mem::take(&mut uses.at_hand().left)));
        }
        left.retain(|(_, left)| *left > 0);
        if let Err(error) = store.return_gcm_uses(&left).await {
            tracing::warn!("Uses with AES-GCM that were not needed stay counted: {error}");
        }
    }

    fn of(&self, version: Uuid) -> Arc<Version> {
        self.versions().entry(version).or_default().clone()
    }

    fn versions(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Version>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for AtHand {
    fn default() -> Self {
        Self { left: 0, next_block: FIRST_BLOCK, used_up: false }
    }
}

impl Version {
    /// Takes one, if one is at hand.
    fn take(&self) -> Result<bool, Error> {
        let mut at_hand = self.at_hand();
        if at_hand.left == 0 && at_hand.used_up {
            return Err(Error::UsedUp);
        }
        let some = at_hand.left > 0;
        at_hand.left = at_hand.left.saturating_sub(1);
        Ok(some)
    }

    /// At least one, or an error. Only in turn.
    async fn reserve(&self, store: &dyn Store, version: Uuid) -> Result<(), Error> {
        let next_block = {
            let at_hand = self.at_hand();
            if at_hand.used_up {
                return Err(Error::UsedUp);
            }
            at_hand.next_block
        };
        let reserved = store.reserve_gcm_uses(version, next_block, LIMIT).await?;
        if reserved.granted == 0 {
            self.at_hand().used_up = true;
            return Err(Error::UsedUp);
        }
        if reserved.total > WARNING {
            let percent = reserved.total / (LIMIT / 100);
            tracing::warn!(
                "CRK version {version} has used up {percent} % of its uses: rotate its key"
            );
        }
        let mut at_hand = self.at_hand();
        at_hand.left += reserved.granted;
        at_hand.next_block = (next_block * 2).min(LARGEST_BLOCK);
        Ok(())
    }

    fn at_hand(&self) -> MutexGuard<'_, AtHand> {
        self.at_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
