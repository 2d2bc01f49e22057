//! `kms-server restore`: puts a backup of the database in the place of one that is gone, once the token was seen to
//! hold its keys. Nothing that is there is ever overwritten, and the token is only looked at.
//!
//! The database appears under its name whole, checked and on disk, or not at all; whatever a crash leaves lies under
//! another name, and the next restore clears it away.

use crate::audit::{Outcome, Record};
use crate::backup::{BackupError, Half, failed, publish, verify};
use crate::reconcile::{Comparison, ReconcileError, Standing, compare};
use crate::store::{SqliteStore, Store, StoreError, sides};
use crate::uses;
use kms_hsm::Vault;
use std::fmt::Write;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Why nothing was restored, or compared.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(
        "{} is there already, and a restore never overwrites a database. Move it away together with its -wal and -shm, or \
         name another DATABASE_URL",
        .0.display()
    )]
    Exists(PathBuf),
    /// SQLite would take it for a part of the backup.
    #[error(
        "{} is there and belongs to the database that was there before: it may hold what that database was told last. \
         Move it away together with that database, under a name that ends alike",
        .0.display()
    )]
    Side(PathBuf),
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the backup cannot be compared with the token: {0}")]
    Compare(#[from] ReconcileError),
}

/// What a restore found.
#[derive(Debug)]
pub struct Restored {
    pub found: Comparison,
    /// When the backup was made.
    pub made: String,
}

/// Compares the backup `from` with the token, and unless `check` puts it in the place of `database` when the token
/// holds its keys. Whether it did is in [`Comparison::verdict`].
///
/// # Errors
/// [`RestoreError`]. Then there is no new database.
pub async fn restore(
    vault: &dyn Vault,
    from: &Path,
    database: &Path,
    check: bool,
) -> Result<Restored, RestoreError> {
    if !check {
        is_free(database)?;
    }
    let made = verify(from)?;
    // Never beside the backup, which may be on a disk that nobody writes to.
    let half = Half::of(database)?;
    let restored = place(vault, from, half.path(), (!check).then_some(database)).await;
    half.clear()?;
    Ok(Restored { found: restored?, made })
}

/// By way of `half`.
async fn place(
    vault: &dyn Vault,
    from: &Path,
    half: &Path,
    database: Option<&Path>,
) -> Result<Comparison, RestoreError> {
    copy_private(from, half)?;
    // On a copy: a backup of an older server is brought up to date there, and stays as it is itself.
    let store = SqliteStore::open(half, false).await?;
    let found = compare(vault, &store).await;
    let margin = store.add_gcm_uses(uses::RESTORE_MARGIN, uses::LIMIT).await;
    // Folds the write-ahead log into the one file.
    store.close().await;
    let (found, ()) = (found?, margin?);
    SqliteStore::inspect(half).await?;
    if let (Some(database), Ok(())) = (database, found.verdict()) {
        is_free(database)?;
        publish(half, database)?;
    }
    Ok(found)
}

impl Restored {
    /// Rights and keys are as they were then: whoever reads the log must see that.
    #[must_use]
    pub fn record(&self) -> Record {
        let detail = Some(format!("backup of {}", self.made));
        Record { correlation: detail, ..Record::new("restore", Outcome::Done) }
    }

    /// What no comparison tells: how the backup differs from what was there after it.
    #[must_use]
    pub fn notes(&self) -> String {
        let Restored { found, made } = self;
        let mut text = format!(
            "The backup is of {made}. Whatever was destroyed, disabled, revoked or given since is as it was then:\n  \
             kmsctl audit query AUDIT_FILE --since {made} --action delete_key\n\
             and so with disable_key, delete_api_key, lock_api_key, rotate_api_key, delete_policy, delete_service_id: do it \
             again. What purge_key says is gone is there again without what the HSM held of it: delete it, too.\n"
        );
        let versions = found.versions.iter();
        let lost = versions.filter(|(_, standing)| *standing == Standing::Lost);
        for (at, _) in lost {
            let _ = writeln!(
                text,
                "Version {} of key {} is in the backup and not in the token: it was destroyed there since, or the token's \
                 own backup is older. It is not served.",
                at.version, at.key
            );
        }
        for (at, _) in found.versions.iter().filter(|(_, is)| *is == Standing::Unfinished) {
            let _ = writeln!(
                text,
                "Version {} of key {} was being made at the time of the backup, and is in the token. If the audit log has \
                 `done` for it (--action rotate_key, create_key), it has wrapped since, and what it wrapped cannot be \
                 unwrapped with this database. `kms-server adopt` gives it back to its key.",
                at.version, at.key
            );
        }
        for id in &found.unknown {
            let _ = writeln!(
                text,
                "Version {id} is in the token and not in the backup: it was made since. What it wrapped cannot be \
                 unwrapped with this database. `kms-server adopt` gives it back to its key. Rotate that key in any case, \
                 before plug-ins reach this server: those that seal under this version do not go back to an older one."
            );
        }
        text
    }
}

/// Neither the database is there nor what SQLite would take for a part of it.
fn is_free(database: &Path) -> Result<(), RestoreError> {
    // A link that leads nowhere is somebody's, too.
    let there = |path: &Path| path.symlink_metadata().is_ok();
    if there(database) {
        return Err(RestoreError::Exists(database.to_owned()));
    }
    match sides(database).into_iter().find(|side| there(side)) {
        Some(side) => Err(RestoreError::Side(side)),
        None => Ok(()),
    }
}

fn copy_private(from: &Path, to: &Path) -> Result<(), BackupError> {
    let mut source = File::open(from).map_err(failed(from))?;
    let target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to);
    let mut target = target.map_err(failed(to))?;
    std::io::copy(&mut source, &mut target).map_err(failed(to))?;
    Ok(())
}
