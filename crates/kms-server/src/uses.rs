//! How often a CRK version is used with AES-GCM: after 2^32 times with IVs made at random an IV may repeat, and with it the
//! key stream (NIST SP 800-38D, 8.3). All servers on one database share the limit.
//!
//! A server reserves a block of uses in the database before it uses the first of them, so the count is never too low; what
//! is left of a block when the server ends is lost. Nothing here knows an IV or a key.

use crate::ops::Error;
use crate::store::Store;
use std::collections::HashMap;
use tokio::sync::Mutex;
use uuid::Uuid;

/// How many uses are reserved at once: at 1,000 wraps a second one write to the database in 17 minutes.
pub const BLOCK: u64 = 1 << 20;
/// From here on the log asks for a rotation, once in each block.
const WARNING: u64 = 1 << 31;
/// No use is granted beyond.
pub const LIMIT: u64 = 1 << 32;

/// What this server has reserved and not used yet, by version.
#[derive(Debug, Default)]
pub struct Uses(Mutex<HashMap<Uuid, u64>>);

impl Uses {
    /// Takes one use of `version`.
    ///
    /// # Errors
    /// `UsedUp` when all were taken; those of the database.
    pub async fn take(&self, store: &dyn Store, version: Uuid) -> Result<(), Error> {
        // Held while a block is reserved: a second reservation for those who wait would waste one.
        let mut left = self.0.lock().await;
        let left = left.entry(version).or_default();
        if *left == 0 {
            *left = reserve(store, version).await?;
        }
        *left -= 1;
        Ok(())
    }
}

async fn reserve(store: &dyn Store, version: Uuid) -> Result<u64, Error> {
    let used = store.reserve_gcm_uses(version, BLOCK).await?;
    if used > LIMIT {
        return Err(Error::UsedUp);
    }
    if used > WARNING {
        let percent = used / (LIMIT / 100);
        tracing::warn!("CRK version {version} has used up {percent} % of its uses: rotate its key");
    }
    Ok(BLOCK)
}
