//! What the store remembers of the audit logs, so that one that was moved away is not begun anew unnoticed.

use super::{SigningKey, StoreError};
use async_trait::async_trait;
use kms_core::audit::Link;
use std::fmt::Debug;

/// Every method that changes something has done so durably when it returns.
#[async_trait]
pub trait Trail: Send + Sync + Debug {
    /// Where the chain of `node` was at its last anchor.
    async fn audit_head(&self, node: &str) -> Result<Option<Link>, StoreError>;
    /// Never goes back.
    async fn keep_audit_head(&self, node: &str, head: Link) -> Result<(), StoreError>;
    /// The key that signs anchors, for all nodes.
    async fn audit_key(&self) -> Result<Option<SigningKey>, StoreError>;
    /// Keeps `key`, unless there is one already; returns the one that is kept.
    async fn keep_audit_key(&self, key: &SigningKey) -> Result<SigningKey, StoreError>;
    /// Puts `key` in the place of the one that is kept.
    async fn replace_audit_key(&self, key: &SigningKey) -> Result<(), StoreError>;
}
