//! The store: which instances, service IDs, API keys, CRKs and versions exist. Names and states only; key material
//! and API keys are never in it.
//!
//! A CRK is first *pending*: its row is there before the HSM makes anything, so that whatever a crash leaves behind
//! has a name. Pending keys and versions are invisible to all but [`Custody::known_versions`].

mod access;
mod custody;
mod sqlite;
mod trail;

pub use access::{Access, ApiKey, ApiKeyHash, NewSecret, Policy, Profile, ServiceId};
pub use custody::{Adopted, Custody, KnownVersion};
pub use sqlite::{SqliteStore, sides};
pub use trail::Trail;

use crate::policy::Reach;
use async_trait::async_trait;
use kms_hsm::RsaPublic;
use std::fmt::Debug;
use time::OffsetDateTime;
use uuid::Uuid;

/// What the server remembers. Every method that changes something has done so durably when it returns.
#[async_trait]
pub trait Store: Access + Trail + Custody {
    /// Answers when the store can be read.
    async fn probe(&self) -> Result<(), StoreError>;
    /// Puts everything where a backup finds it. Nothing is asked of the store afterwards.
    async fn close(&self);

    /// Puts the first instance, service IDs and signing key in place, all or nothing.
    ///
    /// # Errors
    /// `Conflict` when anything of the kind is there already.
    async fn initialise(&self, first: &FirstContent) -> Result<(), StoreError>;
    /// The key that signs tokens, `None` before [`Store::initialise`].
    async fn signing_key(&self) -> Result<Option<SigningKey>, StoreError>;
    /// Puts a newer one in its place; the one before is kept, and counts as older whatever its time is.
    async fn add_signing_key(&self, key: &SigningKey) -> Result<(), StoreError>;

    /// # Errors
    /// `Conflict` when the name is taken.
    async fn add_instance(&self, instance: &Instance) -> Result<(), StoreError>;
    async fn instances(&self) -> Result<Vec<Instance>, StoreError>;
    async fn instance_exists(&self, id: Uuid) -> Result<bool, StoreError>;

    /// Notes that `key` and its first version are about to be made.
    async fn begin_key(&self, key: &NewKey) -> Result<(), StoreError>;
    /// Makes a pending key visible and active, with its first version.
    ///
    /// # Errors
    /// `Conflict` when it is not pending.
    async fn activate_key(&self, key: Uuid, version: Uuid) -> Result<(), StoreError>;
    /// Notes that `version` of `key` is about to be made.
    async fn begin_version(&self, key: Uuid, version: &Version) -> Result<(), StoreError>;
    /// Makes a pending version the one that wraps, unless the key was rotated after `unless_since`, by whatever server.
    ///
    /// # Errors
    /// `Conflict` when it is not pending, or its key is no longer active or was rotated.
    async fn activate_version(
        &self,
        key: Uuid,
        version: Uuid,
        at: OffsetDateTime,
        unless_since: Option<OffsetDateTime>,
    ) -> Result<(), StoreError>;
    /// Adds `uses` to how often `version` may have been used with AES-GCM, by all servers; fewer where the sum would be
    /// more than `limit`.
    ///
    /// # Errors
    /// `Conflict` when there is no such version.
    async fn reserve_gcm_uses(
        &self,
        version: Uuid,
        uses: u64,
        limit: u64,
    ) -> Result<Reserved, StoreError>;
    /// Takes back what was reserved of these versions and never used.
    async fn return_gcm_uses(&self, uses: &[(Uuid, u64)]) -> Result<(), StoreError>;
    async fn key(&self, instance: Uuid, id: Uuid) -> Result<Option<Key>, StoreError>;
    /// One page, ordered by id.
    async fn keys(
        &self,
        instance: Uuid,
        wanted: &Wanted,
        page: Page,
    ) -> Result<Vec<Key>, StoreError>;
    async fn count_keys(&self, instance: Uuid, wanted: &Wanted) -> Result<u64, StoreError>;
    /// Newest first. The first is the one that wraps.
    async fn versions(&self, instance: Uuid, key: Uuid) -> Result<Vec<Version>, StoreError>;
    /// Marks an active key as suspended, or a suspended one as active; false when it was not in the other state.
    async fn suspend_key(
        &self,
        instance: Uuid,
        id: Uuid,
        suspended: bool,
    ) -> Result<bool, StoreError>;
    /// Marks a key as destroyed; false when it was already. Its versions stay, here and in the HSM.
    async fn delete_key(
        &self,
        instance: Uuid,
        id: Uuid,
        at: OffsetDateTime,
        by: &str,
    ) -> Result<bool, StoreError>;
    /// Notes that the versions of a destroyed key are about to be destroyed in the HSM: from then on it may lack them.
    /// Noted already, it stays as it is.
    ///
    /// # Errors
    /// `Conflict` when there is no such key, or it is not destroyed.
    async fn begin_purge(
        &self,
        instance: Uuid,
        id: Uuid,
        at: OffsetDateTime,
    ) -> Result<(), StoreError>;
    /// Removes a key whose purge has begun, its versions, all of which are `versions`, and the policies for it. None of
    /// their ids is taken again. False when there is no such key: somebody else was faster.
    ///
    /// # Errors
    /// `Conflict` when it has other versions.
    async fn finish_purge(
        &self,
        id: Uuid,
        versions: &[Uuid],
        at: OffsetDateTime,
    ) -> Result<bool, StoreError>;
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub id: Uuid,
    pub name: String,
    pub created_at: OffsetDateTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SigningKey {
    pub id: Uuid,
    pub public: RsaPublic,
    pub created_at: OffsetDateTime,
}

/// What `kms-server init` puts in place.
#[derive(Debug)]
pub struct FirstContent {
    pub instance: Instance,
    pub signing_key: SigningKey,
    pub service_ids: Vec<(ServiceId, ApiKey, ApiKeyHash)>,
}

/// The numbers are those of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    Active,
    /// Disabled: neither wraps nor unwraps until it is enabled.
    Suspended,
    /// Expired: still unwraps, no longer wraps.
    Deactivated,
    Destroyed,
}

impl KeyState {
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            KeyState::Active => 1,
            KeyState::Suspended => 2,
            KeyState::Deactivated => 3,
            KeyState::Destroyed => 5,
        }
    }
}

/// A CRK as it is to be made.
#[derive(Debug, Clone)]
pub struct NewKey {
    pub id: Uuid,
    pub instance: Uuid,
    pub name: String,
    pub description: Option<String>,
    pub tags: Vec<String>,
    pub imported: bool,
    pub expires_at: Option<OffsetDateTime>,
    pub created_at: OffsetDateTime,
    pub created_by: String,
    pub version: Uuid,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub id: Uuid,
    pub instance: Uuid,
    pub name: String,
    pub description: Option<String>,
    pub tags: Vec<String>,
    pub imported: bool,
    /// What somebody made of it: active, suspended or destroyed.
    pub marked: KeyState,
    pub expires_at: Option<OffsetDateTime>,
    pub created_at: OffsetDateTime,
    pub created_by: String,
    pub rotated_at: Option<OffsetDateTime>,
    pub deleted_at: Option<OffsetDateTime>,
    pub deleted_by: Option<String>,
    /// Its purge has begun and is not done.
    pub purge_begun_at: Option<OffsetDateTime>,
    /// The version that wraps.
    pub version: Version,
}

impl Key {
    /// Expiry needs no event: an active key is deactivated from its date on. A suspended one stays suspended: expiry
    /// must not give back the right to unwrap.
    #[must_use]
    pub fn state(&self, now: OffsetDateTime) -> KeyState {
        match (self.marked, self.expires_at) {
            (KeyState::Active, Some(end)) if end <= now => KeyState::Deactivated,
            (marked, _) => marked,
        }
    }
}

/// Uses of a version with AES-GCM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    /// 0 when there are no more.
    pub granted: u64,
    /// Of all servers, these included.
    pub total: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    pub id: Uuid,
    pub created_at: OffsetDateTime,
}

/// Which keys a list shows: those that are in one of these states at this time, and within the caller's reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub states: Vec<KeyState>,
    pub now: OffsetDateTime,
    pub reach: Reach,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    pub limit: u32,
    pub offset: u32,
}

/// Why the store did not do it, grouped by who must act.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The caller: what is there already does not allow it.
    #[error("{0}")]
    Conflict(String),
    /// The operator: the database holds something that this server never wrote.
    #[error("the database holds what this server did not write: {0}")]
    Corrupt(String),
    /// The operator: the database cannot be opened, read or written.
    #[error("the database does not answer: {0}")]
    Unavailable(String),
}
