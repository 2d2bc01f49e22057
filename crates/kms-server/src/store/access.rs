//! The half of the store that says who may do what: service IDs, their policies, and what they log in with.

use super::StoreError;
use crate::policy::{ApiKeySecret, Caller, Grant, Scope};
use async_trait::async_trait;
use std::fmt::Debug;
use time::OffsetDateTime;
use uuid::Uuid;

/// Every method that changes something has done so durably when it returns, and the next call sees it.
///
/// Somebody must be able to manage the server for good: a ClusterAdministrator of every instance who can log in by an API
/// key that is neither locked nor revoked. A profile does not count: its issuer is in other hands. What would take the
/// last one away is a `Conflict`, whichever server on this database it is asked of.
#[async_trait]
pub trait Access: Send + Sync + Debug {
    /// With its policies, all or nothing.
    ///
    /// # Errors
    /// `Conflict` when an instance or key that it names does not exist.
    async fn add_service_id(&self, service_id: &ServiceId) -> Result<(), StoreError>;
    async fn service_ids(&self) -> Result<Vec<ServiceId>, StoreError>;
    async fn service_id(&self, id: Uuid) -> Result<Option<ServiceId>, StoreError>;
    /// With its policies, API keys and profiles, all or nothing. False when there is no such service ID.
    ///
    /// # Errors
    /// `Conflict` for the last that can manage the whole server.
    async fn remove_service_id(&self, id: Uuid) -> Result<bool, StoreError>;

    /// # Errors
    /// `Conflict` when service ID, instance or key does not exist.
    async fn add_policy(&self, policy: &Policy) -> Result<(), StoreError>;
    /// False when there is no such policy.
    ///
    /// # Errors
    /// `Conflict` for the last one that lets anybody manage the whole server, or anybody who can log in by an API key.
    async fn remove_policy(&self, id: Uuid) -> Result<bool, StoreError>;

    /// # Errors
    /// `Conflict` when its service ID does not exist.
    async fn add_api_key(&self, key: &ApiKey, hash: &ApiKeyHash) -> Result<(), StoreError>;
    /// Those that are not revoked.
    async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError>;
    /// Locks an API key since `at`, or with `None` unlocks it; false when there is none, or it is so already.
    ///
    /// # Errors
    /// `Conflict` for the last one with which the whole server can be managed.
    async fn lock_api_key(&self, id: Uuid, at: Option<OffsetDateTime>) -> Result<bool, StoreError>;
    /// Gives an API key a new secret; false when there is none that could get one.
    async fn rotate_api_key(&self, id: Uuid, new: &NewSecret) -> Result<bool, StoreError>;
    /// False when there is no such API key that could be revoked.
    ///
    /// # Errors
    /// `Conflict` for the last one with which the whole server can be managed.
    async fn revoke_api_key(&self, id: Uuid, at: OffsetDateTime) -> Result<bool, StoreError>;

    /// # Errors
    /// `Conflict` when the name is taken or its service ID does not exist.
    async fn add_profile(&self, profile: &Profile) -> Result<(), StoreError>;
    async fn profiles(&self) -> Result<Vec<Profile>, StoreError>;
    /// False when there is no such profile.
    async fn remove_profile(&self, id: Uuid) -> Result<bool, StoreError>;

    /// Who an API key speaks for, by what was presented; `None` for unknown, locked, replaced and revoked ones alike.
    async fn caller_by_hash(
        &self,
        hash: &ApiKeyHash,
        now: OffsetDateTime,
    ) -> Result<Option<Caller>, StoreError>;
    /// Who a token speaks for now; `None` once its API key is locked or revoked, or its secret replaced.
    async fn caller(
        &self,
        service_id: Uuid,
        secret: &ApiKeySecret,
        now: OffsetDateTime,
    ) -> Result<Option<Caller>, StoreError>;
    /// Who a profile speaks for now; `None` once it is removed.
    async fn caller_by_profile(&self, id: Uuid) -> Result<Option<Caller>, StoreError>;
}

/// SHA-256 of an API key. The key has 256 random bits, so the hash needs no salt and no stretching.
pub type ApiKeyHash = [u8; 32];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceId {
    pub id: Uuid,
    pub name: String,
    pub description: Option<String>,
    /// Where it lives: whoever manages service IDs there manages it, if all its policies hold there too.
    pub home: Scope,
    pub policies: Vec<Policy>,
    pub created_at: OffsetDateTime,
}

impl ServiceId {
    /// One that lives where its only policy holds. The policy gets the service ID's own id.
    #[must_use]
    pub fn with(id: Uuid, name: String, grant: Grant, created_at: OffsetDateTime) -> ServiceId {
        let home = Scope::of(grant.scope.instance());
        let policies = vec![Policy { id, service_id: id, grant, created_at }];
        ServiceId { id, name, description: None, home, policies, created_at }
    }

    #[must_use]
    pub fn grants(&self) -> Vec<Grant> {
        self.policies.iter().map(|policy| policy.grant).collect()
    }
}

/// One grant to one service ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    pub id: Uuid,
    pub service_id: Uuid,
    pub grant: Grant,
    pub created_at: OffsetDateTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    pub id: Uuid,
    pub service_id: Uuid,
    pub name: String,
    pub created_at: OffsetDateTime,
    pub rotated_at: Option<OffsetDateTime>,
    /// While it is locked it gets no tokens, and those that it got are refused.
    pub locked_at: Option<OffsetDateTime>,
}

impl ApiKey {
    #[must_use]
    pub fn new(id: Uuid, service_id: Uuid, name: String, created_at: OffsetDateTime) -> ApiKey {
        ApiKey { id, service_id, name, created_at, rotated_at: None, locked_at: None }
    }
}

/// The next secret of an API key.
#[derive(Debug, Clone)]
pub struct NewSecret {
    pub hash: ApiKeyHash,
    pub at: OffsetDateTime,
    /// How long the secret before it is taken as well; `None`: no longer.
    pub old_until: Option<OffsetDateTime>,
    /// By what whoever asks for it logged in. If that is the older of two good secrets of this very API key, it is the
    /// one that stays good: nobody may have got the other.
    pub by: Option<ApiKeySecret>,
}

/// Whose tokens of another issuer speak for a service ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub id: Uuid,
    pub service_id: Uuid,
    pub name: String,
    /// What `iss` must be, byte for byte.
    pub issuer: String,
    /// What `sub` must be, byte for byte.
    pub subject: String,
    pub created_at: OffsetDateTime,
}
