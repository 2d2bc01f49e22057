//! What the store knows of the HSM: which versions it ought to hold, and by what each is known again.

use super::StoreError;
use async_trait::async_trait;
use kms_hsm::CheckValue;
use std::fmt::Debug;
use time::OffsetDateTime;
use uuid::Uuid;

/// Every method that changes something has done so durably when it returns. None removes anything.
#[async_trait]
pub trait Custody: Send + Sync + Debug {
    /// Every version of every key, pending ones too: what the HSM is compared with.
    async fn known_versions(&self) -> Result<Vec<KnownVersion>, StoreError>;
    /// The most uses with AES-GCM that are reserved of one version that wraps: those before it, and those of keys that
    /// are gone, are used up no further.
    async fn most_gcm_uses(&self) -> Result<u64, StoreError>;
    /// When the first of the keys that are active at `now` expires.
    async fn next_expiry(&self, now: OffsetDateTime) -> Result<Option<OffsetDateTime>, StoreError>;
    /// Keeps the check value of `version`, for good.
    ///
    /// # Errors
    /// `Conflict` when there is no such version, or it has another check value.
    async fn keep_check_value(&self, version: Uuid, value: CheckValue) -> Result<(), StoreError>;
    /// Puts a version that is not known, or pending, behind all others of its key, visible and not the one that wraps. A
    /// key that is pending becomes active with it.
    ///
    /// # Errors
    /// `Conflict` when the key does not exist, or the version is known and not pending, or of another key, or has another
    /// check value.
    async fn adopt_version(&self, adopted: &Adopted) -> Result<(), StoreError>;
    /// The serial number of the token in which the versions were seen last.
    async fn token_serial(&self) -> Result<Option<String>, StoreError>;
    async fn keep_token_serial(&self, serial: &str) -> Result<(), StoreError>;
}

/// A version that the HSM holds and the store did not know to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adopted {
    pub key: Uuid,
    pub version: Uuid,
    pub check_value: CheckValue,
    pub at: OffsetDateTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownVersion {
    pub instance: Uuid,
    pub key: Uuid,
    pub version: Uuid,
    /// Its making was begun and not completed when this was written. Nothing was wrapped with it, unless this is a copy
    /// of a database in which it was completed afterwards.
    pub pending: bool,
    /// Its key is being purged: the HSM may hold it or not.
    pub purging: bool,
    /// Its key is destroyed: what it wrapped is opened for nobody any more.
    pub destroyed: bool,
    pub created_at: OffsetDateTime,
    /// `None` for versions of older servers that no newer one has seen in the HSM yet.
    pub check_value: Option<CheckValue>,
}
