//! Who may do something with a key while somebody else does. A use (wrap, unwrap) looks at the key's state, goes to the
//! HSM and is recorded, all of it either before or after a change of that state: so no use is answered or recorded
//! behind the record of the change that forbids it.
//!
//! Held for as long as calls into the HSM and the record may take, and never for two keys at once. Each key has a gate
//! of its own: a use that hangs until its deadline holds up the changes of its own key, and of no other.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};
use uuid::Uuid;

type Gate = RwLock<()>;

/// The gates of the keys that are in use now.
#[derive(Debug, Default)]
pub struct Gates(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    /// Whoever is at a gate keeps it; ids come from requests, and those that nobody is at any more must not pile up.
    gates: HashMap<Uuid, Weak<Gate>>,
    /// How many gates there may be before the deserted ones go.
    full: usize,
}

/// Below it nothing is worth clearing away.
const FEW: usize = 64;

impl Gates {
    #[must_use]
    pub fn new() -> Gates {
        Gates::default()
    }

    /// Uses of a key do not wait for each other.
    pub async fn use_of(&self, key: Uuid) -> OwnedRwLockReadGuard<()> {
        self.gate(key).read_owned().await
    }

    /// Waits for the key's uses in flight; later ones wait for this.
    pub async fn change(&self, key: Uuid) -> OwnedRwLockWriteGuard<()> {
        self.gate(key).write_owned().await
    }

    fn gate(&self, key: Uuid) -> Arc<Gate> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gate) = table.gates.get(&key).and_then(Weak::upgrade) {
            return gate;
        }
        if table.gates.len() >= table.full {
            table.gates.retain(|_, gate| gate.strong_count() > 0);
            table.full = FEW.max(2 * table.gates.len());
        }
        let gate = Arc::new(Gate::default());
        table.gates.insert(key, Arc::downgrade(&gate));
        gate
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn a_use_that_hangs_holds_up_the_changes_of_its_own_key_only() {
        let gates = Gates::new();
        let hung = Uuid::from_u128(1 << 64);
        let used = gates.use_of(hung).await;
        // The second waits for the first: as the lock does, so that changes are not put off for ever.
        assert!(timeout(LONG, gates.change(hung)).await.is_err());
        assert!(timeout(LONG, gates.use_of(hung)).await.is_ok());
        for other in (0..1000).map(Uuid::from_u128) {
            let (change, more) = (gates.change(other), gates.use_of(other));
            drop(timeout(LONG, change).await.unwrap());
            drop(timeout(LONG, more).await.unwrap());
        }
        drop(used);
        assert!(timeout(LONG, gates.change(hung)).await.is_ok());
    }

    #[tokio::test]
    async fn gates_that_nobody_is_at_are_cleared_away_and_others_stay() {
        let gates = Gates::new();
        let held: Vec<_> = {
            let mut held = Vec::new();
            for key in (0..10).map(Uuid::from_u128) {
                held.push(gates.change(key).await);
            }
            held
        };
        for key in (10..100_000).map(Uuid::from_u128) {
            gates.use_of(key).await;
        }
        assert!(gates.0.lock().unwrap().gates.len() <= FEW);
        for key in (0..10).map(Uuid::from_u128) {
            assert!(gates.gate(key).try_read().is_err());
        }
        drop(held);
    }
}
