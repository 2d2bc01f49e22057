//! Compares what the HSM holds with what the store knows, key by key. Nothing is repaired and nothing is removed: what
//! looks like a leftover may be the only copy of a key whose database was restored from an old backup, and a row whose
//! key is missing is how the operator learns which key to restore.

use crate::store::{KnownVersion, SigningKey, Store, StoreError};
use kms_hsm::{CheckValue, Vault, VaultError};
use std::collections::BTreeSet;
use uuid::Uuid;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// The serial number of the token.
    pub serial: Option<String>,
    /// Of the token in which the versions were seen before.
    pub seen_in: Option<String>,
    pub versions: Vec<(KnownVersion, Standing)>,
    pub signing_keys: Vec<SignerFound>,
    /// What the HSM holds a part of only.
    pub incomplete: Vec<Uuid>,
    /// What the HSM holds and the store does not know.
    pub unknown: Vec<Uuid>,
}

/// How it is with a version that the store knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The HSM holds the very key.
    Good,
    /// The HSM holds a key of this name, and nobody has kept yet by what to know it: this.
    Unproven(CheckValue),
    /// The HSM holds another key of this name: what the version wrapped cannot be unwrapped.
    OtherKey,
    /// The HSM does not hold it: what it wrapped cannot be unwrapped.
    Lost,
    /// Its making was interrupted, and the HSM holds it; nothing was wrapped with it.
    Unfinished,
    /// Its making was interrupted, or has just begun, and the HSM holds nothing of it.
    NeverMade,
    /// The HSM does not hold it, and its key is destroyed: nobody can miss it.
    Gone,
    /// Its key is being purged, and that is not done: whether the HSM holds it does not matter any more.
    Purging,
}

/// A key pair of this server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignerFound {
    pub id: Uuid,
    /// What it signs.
    pub signs: &'static str,
    pub pair: Pair,
}

/// How it is with a key pair. Its public numbers are in the database: what it signs is checked with those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pair {
    /// The HSM holds both halves.
    Good,
    /// The HSM signs with it, and shows no public half, or another one. Nothing depends on that half.
    NoPublicHalf,
    /// The HSM signs with another key under this name.
    OtherKey,
    /// The HSM does not hold the private half.
    Lost,
}

impl Pair {
    /// Whether what it signs is good.
    #[must_use]
    pub fn signs(self) -> bool {
        matches!(self, Self::Good | Self::NoPublicHalf)
    }
}

/// Why they could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error("HSM: {0}")]
    Vault(#[from] VaultError),
    #[error("database: {0}")]
    Store(#[from] StoreError),
}

/// What the key pairs sign.
pub const TOKENS: &str = "tokens";
pub const ANCHORS: &str = "audit anchors";

const PROOF: &[u8] = b"kms-server start";

/// How many versions are looked at together. On an HSM across a network each look is a journey of its own.
const AT_ONCE: usize = 4;

/// Looks at every version and every key pair.
///
/// # Errors
/// HSM or store do not answer.
pub async fn compare(vault: &dyn Vault, store: &dyn Store) -> Result<Comparison, ReconcileError> {
    // The store first: what is made meanwhile shows as unknown, not as lost.
    let known = store.known_versions().await?;
    let held: BTreeSet<Uuid> = vault.versions().await?.into_iter().collect();
    let incomplete = vault.incomplete().await?;
    let ids: BTreeSet<Uuid> = known.iter().map(|one| one.version).collect();
    let versions = standings(vault, &known, &held).await?;
    Ok(Comparison {
        serial: vault.serial(),
        seen_in: store.token_serial().await?,
        versions,
        signing_keys: signers(vault, store).await?,
        incomplete,
        unknown: held.difference(&ids).copied().collect(),
    })
}

/// Has every key pair sign once, and checks the signature with the numbers that the database keeps.
///
/// # Errors
/// HSM or store do not answer.
pub async fn signers(
    vault: &dyn Vault,
    store: &dyn Store,
) -> Result<Vec<SignerFound>, ReconcileError> {
    let mut found = Vec::new();
    for (signs, key) in [(TOKENS, store.signing_key().await?), (ANCHORS, store.audit_key().await?)]
    {
        if let Some(key) = key {
            found.push(SignerFound { id: key.id, signs, pair: pair(vault, &key).await? });
        }
    }
    Ok(found)
}

impl Comparison {
    /// Whether this token may be served from at all.
    ///
    /// # Errors
    /// It holds nothing of ours: it is empty, or another one. Says what to do.
    pub fn verdict(&self) -> Result<(), String> {
        let of = |wanted: fn(&Standing) -> bool| self.count(wanted);
        let good = of(|one| matches!(one, Standing::Good | Standing::Unproven(_)));
        let (lost, other) = (self.count(is_lost), self.count(is_other));
        let signer = self.signing_keys.iter().all(|one| one.pair.signs());
        if good > 0 || (lost + other == 0 && signer) {
            return Ok(());
        }
        let token = self.serial.as_deref().unwrap_or("(unknown)");
        let before = match &self.seen_in {
            Some(serial) if self.serial.as_ref() != Some(serial) => {
                format!(" They were last seen in token {serial}.")
            }
            _ => String::new(),
        };
        let what = match lost + other {
            0 => "does not hold the keys that sign for this database".to_owned(),
            all => format!(
                "holds none of the {all} root key versions of this database ({lost} missing, {other} under another key)"
            ),
        };
        Err(format!(
            "token {token} {what}: it is empty or another one.{before} Name the right token, or restore the HSM's \
             backup into this one; nothing was changed"
        ))
    }

    /// The versions that must not be used, whatever else is good.
    #[must_use]
    pub fn other_keys(&self) -> BTreeSet<Uuid> {
        let other = self.versions.iter().filter(|(_, standing)| is_other(standing));
        other.map(|(one, _)| one.version).collect()
    }

    /// Whether something was lost, or is not ours: somebody must restore the HSM's backup.
    #[must_use]
    pub fn is_bad(&self) -> bool {
        self.count(is_lost) + self.count(is_other) > 0
            || self.signing_keys.iter().any(|one| !one.pair.signs())
    }

    /// Whether there is something that nothing uses, or that nothing misses.
    #[must_use]
    pub fn has_leftovers(&self) -> bool {
        let left = |one: &Standing| {
            matches!(
                one,
                Standing::Gone | Standing::Unfinished | Standing::NeverMade | Standing::Purging
            )
        };
        !self.incomplete.is_empty()
            || !self.unknown.is_empty()
            || self.count(left) > 0
            || self.signing_keys.iter().any(|one| one.pair == Pair::NoPublicHalf)
    }

    /// How many versions stand so.
    #[must_use]
    pub fn count(&self, wanted: fn(&Standing) -> bool) -> usize {
        self.versions.iter().filter(|(_, standing)| wanted(standing)).count()
    }
}

fn is_lost(standing: &Standing) -> bool {
    *standing == Standing::Lost
}

fn is_other(standing: &Standing) -> bool {
    *standing == Standing::OtherKey
}

/// In the order of `known`.
async fn standings(
    vault: &dyn Vault,
    known: &[KnownVersion],
    held: &BTreeSet<Uuid>,
) -> Result<Vec<(KnownVersion, Standing)>, VaultError> {
    let mut shares = known.chunks(known.len().div_ceil(AT_ONCE).max(1));
    let mut share = || {
        let share = shares.next().unwrap_or_default();
        async move {
            let mut found = Vec::with_capacity(share.len());
            for one in share {
                found.push((*one, standing(vault, one, held.contains(&one.version)).await?));
            }
            Ok::<_, VaultError>(found)
        }
    };
    let (first, second, third, fourth) = tokio::try_join!(share(), share(), share(), share())?;
    Ok([first, second, third, fourth].concat())
}

async fn standing(
    vault: &dyn Vault,
    known: &KnownVersion,
    held: bool,
) -> Result<Standing, VaultError> {
    if known.purging {
        return Ok(Standing::Purging);
    }
    let missing = if known.destroyed { Standing::Gone } else { Standing::Lost };
    match (known.pending, held) {
        (true, true) => return Ok(Standing::Unfinished),
        (true, false) => return Ok(Standing::NeverMade),
        (false, false) => return Ok(missing),
        (false, true) => {}
    }
    let found = match vault.check_value(known.version).await {
        Ok(found) => found,
        // It was there a moment ago.
        Err(VaultError::NotFound) => return Ok(missing),
        Err(other) => return Err(other),
    };
    Ok(match known.check_value {
        None => Standing::Unproven(found),
        Some(kept) if kept == found => Standing::Good,
        Some(_) => Standing::OtherKey,
    })
}

/// Nothing is made and nothing is changed. What is signed could be neither a token nor an anchor.
pub async fn pair(vault: &dyn Vault, known: &SigningKey) -> Result<Pair, VaultError> {
    match vault.sign(known.id, PROOF).await {
        Ok(signature) if known.public.verifies(PROOF, &signature) => {}
        Ok(_) => return Ok(Pair::OtherKey),
        Err(VaultError::NotFound) => return Ok(Pair::Lost),
        Err(other) => return Err(other),
    }
    match vault.public_half(known.id).await {
        Ok(public) if public == known.public => Ok(Pair::Good),
        Ok(_) | Err(VaultError::NotFound) => Ok(Pair::NoPublicHalf),
        Err(other) => Err(other),
    }
}
