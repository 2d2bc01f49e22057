//! Who may do something with a key while somebody else does. A use (wrap, unwrap) looks at the key's state, goes to the
//! HSM and is recorded, all of it either before or after a change of that state: so no use is answered or recorded
//! behind the record of the change that forbids it.
//!
//! Held for as long as one call into the HSM may take, and never for two keys at once.

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use uuid::Uuid;

/// Keys that share a gate wait for each other's changes; more gates than calls in flight are of no use.
const GATES: usize = 64;

#[derive(Debug)]
pub struct Gates([RwLock<()>; GATES]);

impl Gates {
    #[must_use]
    pub fn new() -> Gates {
        Gates(std::array::from_fn(|_| RwLock::new(())))
    }

    /// Uses of a key do not wait for each other.
    pub async fn use_of(&self, key: Uuid) -> RwLockReadGuard<'_, ()> {
        self.gate(key).read().await
    }

    /// Waits for the uses in flight; later ones wait for this.
    pub async fn change(&self, key: Uuid) -> RwLockWriteGuard<'_, ()> {
        self.gate(key).write().await
    }

    fn gate(&self, key: Uuid) -> &RwLock<()> {
        // Ids are random, so any byte of one is as good as another.
        let [.., last] = *key.as_bytes();
        &self.0[usize::from(last) % GATES]
    }
}

impl Default for Gates {
    fn default() -> Gates {
        Gates::new()
    }
}
