//! `kms-server renew-key`: a new key pair in the place of one that the HSM has lost for good, or, for the one that signs
//! tokens, that was made under a clock that was ahead: no clock that is right is believed beside it. Nothing else ever makes
//! one where the database knows of one.
//!
//! Nothing is destroyed: what the HSM still holds of the old pair stays, and its public half is kept, so that anchors
//! that it has signed can be checked for ever.

use crate::audit::{Audit, AuditError, Outcome, Record};
use crate::health::TOLERANCE;
use crate::reconcile::{
    ANCHORS, Comparison, Pair, ReconcileError, Standing, TOKENS, compare, pair,
};
use crate::store::{SigningKey, Store, StoreError};
use crate::token::random_uuid;
use clap::ValueEnum;
use kms_core::audit::anchor::{KeyError, PublicKey};
use kms_hsm::{Vault, VaultError};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

/// Which key pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Signs {
    /// The one that signs access tokens. Those that it has signed are refused afterwards, and new ones are fetched.
    Tokens,
    /// The one that signs the anchors of the audit logs.
    Anchors,
}

/// What was done.
#[derive(Debug)]
pub struct Renewed {
    pub old: Uuid,
    pub new: Uuid,
    /// Where the old public half is: with it, what the old key has signed is checked.
    pub old_public: PathBuf,
}

/// The operator: nothing was renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    #[error("there is no key yet that signs {0}; the server makes it")]
    None(&'static str),
    #[error("the HSM signs {signs} with the key {id}, which is good. Nothing was made")]
    Good { id: Uuid, signs: &'static str },
    #[error(
        "this token holds none of the root keys of the database: it is empty or another one. Name the right token, or \
         restore the HSM's backup into this one, which may hold the lost key as well. Nothing was made"
    )]
    WrongToken,
    #[error("{}: {cause}. Nothing was made", path.display())]
    File { path: PathBuf, cause: io::Error },
    #[error("the key in the database cannot be used: {0}")]
    Key(#[from] KeyError),
    #[error("the HSM has made a key pair whose signatures are not good; it is not used")]
    Unproven,
    #[error(transparent)]
    Compare(#[from] ReconcileError),
    #[error("HSM: {0}")]
    Vault(#[from] VaultError),
    #[error("database: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Audit(#[from] AuditError),
}

impl Signs {
    fn what(self) -> &'static str {
        match self {
            Signs::Tokens => TOKENS,
            Signs::Anchors => ANCHORS,
        }
    }
}

/// Makes the new pair, has it sign once, and puts it in the place of the old one. No server on this database may run:
/// each knows the key that was there when it started.
///
/// # Errors
/// [`RenewError`].
pub async fn renew(
    vault: &dyn Vault,
    store: &dyn Store,
    audit: &Audit,
    signs: Signs,
    now: OffsetDateTime,
) -> Result<Renewed, RenewError> {
    let old = match signs {
        Signs::Tokens => store.signing_key().await?,
        Signs::Anchors => store.audit_key().await?,
    };
    let old = old.ok_or(RenewError::None(signs.what()))?;
    // The anchors' key has no say in what the time is.
    let is_ahead = signs == Signs::Tokens && old.created_at > now + TOLERANCE;
    let is_good = pair(vault, &old).await?.signs();
    if is_good && !is_ahead {
        return Err(RenewError::Good { id: old.id, signs: signs.what() });
    }
    if is_another_token(&compare(vault, store).await?) {
        return Err(RenewError::WrongToken);
    }
    let old_public = keep(&old, audit.path())?;
    audit.record(record(old.id, Outcome::Begun)).await?;
    let id = random_uuid(vault).await?;
    let public = vault.make_signing_key(id).await?;
    // The newest is in charge, also where the clock went back. Where only its time is wrong, that is what is mended.
    let newest = now.max(old.created_at + Duration::NANOSECOND);
    let created_at = if is_good { now } else { newest };
    let new = SigningKey { id, public, created_at };
    if pair(vault, &new).await? != Pair::Good {
        return Err(RenewError::Unproven);
    }
    match signs {
        Signs::Tokens => store.add_signing_key(&new).await?,
        Signs::Anchors => store.replace_audit_key(&new).await?,
    }
    audit.record(record(id, Outcome::Done)).await?;
    Ok(Renewed { old: old.id, new: id, old_public })
}

/// A key pair that is missing from the wrong token is not lost.
fn is_another_token(found: &Comparison) -> bool {
    let good = found.count(|one| matches!(one, Standing::Good | Standing::Unproven(_)));
    let gone =
        found.count(|one| matches!(one, Standing::Lost | Standing::Gone | Standing::OtherKey));
    good == 0 && gone > 0
}

/// Beside the audit log, where the one in use is.
fn keep(old: &SigningKey, audit_file: &Path) -> Result<PathBuf, RenewError> {
    let path = audit_file.with_extension(format!("{}.pem", old.id));
    let pem = PublicKey::from_parts(&old.public.n, &old.public.e)?.pem();
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .and_then(|mut file| file.write_all(pem.as_bytes()).and_then(|()| file.sync_all()));
    written.map_err(|cause| RenewError::File { path: path.clone(), cause })?;
    Ok(path)
}

fn record(target: Uuid, outcome: Outcome) -> Record {
    Record { target: Some(target), ..Record::new("renew_key", outcome) }
}
