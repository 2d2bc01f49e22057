//! Compares what the HSM holds with what the store knows, at start, and tells the operator. Nothing is repaired: what
//! looks like a leftover may be the only copy of a key whose database was restored from an old backup.

use crate::store::{KnownVersion, SigningKey, Store, StoreError};
use kms_hsm::{Vault, VaultError};
use std::collections::BTreeSet;
use uuid::Uuid;

/// One difference between HSM and store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// The store knows a version that the HSM does not hold: what it wrapped cannot be unwrapped.
    Lost(KnownVersion),
    /// The HSM holds a version whose making was not completed; nothing was wrapped with it.
    Unfinished(KnownVersion),
    /// The HSM holds a part of a version only.
    Incomplete(Uuid),
    /// The HSM holds a version that the store does not know.
    Unknown(Uuid),
    /// The HSM has another key pair for signing tokens than the store, or none.
    SigningKey(Uuid),
}

/// Why they could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error("HSM: {0}")]
    Vault(#[from] VaultError),
    #[error("database: {0}")]
    Store(#[from] StoreError),
}

/// All differences, the worst first.
///
/// # Errors
/// HSM or store do not answer.
pub async fn differences(
    vault: &dyn Vault,
    store: &dyn Store,
) -> Result<Vec<Difference>, ReconcileError> {
    let held: BTreeSet<Uuid> = vault.versions().await?.into_iter().collect();
    let parts: BTreeSet<Uuid> = vault.incomplete().await?.into_iter().collect();
    let known = store.known_versions().await?;
    let ids: BTreeSet<Uuid> = known.iter().map(|one| one.version).collect();
    let mut found: Vec<Difference> = known
        .iter()
        .filter(|one| !one.pending && !held.contains(&one.version))
        .map(|one| Difference::Lost(*one))
        .collect();
    found.extend(other_signing_key(vault, store.signing_key().await?).await?);
    found.extend(
        known
            .iter()
            .filter(|one| one.pending && held.contains(&one.version))
            .map(|one| Difference::Unfinished(*one)),
    );
    found.extend(held.difference(&ids).map(|id| Difference::Unknown(*id)));
    found.extend(parts.iter().map(|id| Difference::Incomplete(*id)));
    Ok(found)
}

/// Says each difference, key by key.
pub fn report(found: &[Difference]) {
    for one in found {
        match one {
            Difference::Lost(at) => tracing::error!(
                "The HSM does not hold version {} of key {} in instance {}: what it wrapped cannot be unwrapped. \
                 Restore the HSM's backup.",
                at.version,
                at.key,
                at.instance
            ),
            Difference::SigningKey(id) => tracing::error!(
                "The HSM does not hold the key {id} that signs tokens: no tokens can be issued. Restore the HSM's \
                 backup."
            ),
            Difference::Unfinished(at) => tracing::warn!(
                "The HSM holds version {} of key {} in instance {}, whose making was interrupted. Nothing was wrapped \
                 with it; it is left where it is.",
                at.version,
                at.key,
                at.instance
            ),
            Difference::Incomplete(id) => tracing::warn!(
                "The HSM holds a part of version {id} only. It cannot be used; it is left where it is."
            ),
            Difference::Unknown(id) => tracing::warn!(
                "The HSM holds version {id}, which this database does not know. If the database was restored from a \
                 backup, it may be needed; it is left where it is."
            ),
        }
    }
    if found.is_empty() {
        tracing::info!("HSM and database hold the same keys.");
    }
}

/// `sign` never makes a key, so it tells whether there is one without changing anything.
async fn other_signing_key(
    vault: &dyn Vault,
    known: Option<SigningKey>,
) -> Result<Option<Difference>, VaultError> {
    let Some(known) = known else { return Ok(None) };
    match vault.sign(known.id, b"kms-server start").await {
        Ok(_) => {}
        Err(VaultError::NotFound) => return Ok(Some(Difference::SigningKey(known.id))),
        Err(other) => return Err(other),
    }
    let same = vault.signing_key(known.id).await? == known.public;
    Ok((!same).then_some(Difference::SigningKey(known.id)))
}
