//! `kms-server restore`: puts a backup of the database in the place of one that is gone, once the token was seen to
//! hold its keys. A database that is there is never overwritten, and the token is only looked at.

use crate::backup::{BackupError, failed, half, publish, remove, verify};
use crate::reconcile::{Comparison, ReconcileError, compare};
use crate::store::{SqliteStore, Store, StoreError};
use kms_hsm::Vault;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Why nothing was restored, or compared.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(
        "{} is there already, and a restore never overwrites a database. Move it away, or name another DATABASE_URL",
        .0.display()
    )]
    Exists(PathBuf),
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the backup cannot be compared with the token: {0}")]
    Compare(#[from] ReconcileError),
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
) -> Result<Comparison, RestoreError> {
    if !check && database.exists() {
        return Err(RestoreError::Exists(database.to_owned()));
    }
    verify(from)?;
    let half = half(if check { from } else { database });
    let found = look(vault, from, &half).await;
    let wanted = !check && found.as_ref().is_ok_and(|found| found.verdict().is_ok());
    let placed = if wanted { publish(&half, database) } else { Ok(()) };
    for side in ["", "-wal", "-shm"] {
        let mut name = half.clone().into_os_string();
        name.push(side);
        remove(Path::new(&name))?;
    }
    placed?;
    found
}

/// On a copy: a backup of an older server is brought up to date there, and stays as it is itself.
async fn look(vault: &dyn Vault, from: &Path, half: &Path) -> Result<Comparison, RestoreError> {
    remove(half)?;
    copy_private(from, half)?;
    let store = SqliteStore::open(half, false).await?;
    let found = compare(vault, &store).await;
    store.close().await;
    Ok(found?)
}

fn copy_private(from: &Path, to: &Path) -> Result<(), BackupError> {
    let mut source = File::open(from).map_err(failed(from))?;
    let target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to);
    let mut target = target.map_err(failed(to))?;
    std::io::copy(&mut source, &mut target).map_err(failed(to))?;
    Ok(())
}
