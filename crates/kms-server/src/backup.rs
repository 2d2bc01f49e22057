//! `kms-server backup`: a copy of the database while the server runs, and beside it a manifest that says what must come
//! out of a restore. The keys themselves are in the HSM and are backed up there; neither file holds a secret that
//! unwraps anything, but the copy says who may do what, so both are for this user alone.

use crate::report::hex;
use crate::store::{Custody, SqliteStore, Store, StoreError, sides};
use aws_lc_rs::digest::{Context, SHA256};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Why there is no backup, or no good one.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("{} is there already: name another file", .0.display())]
    Exists(PathBuf),
    #[error("another backup or restore is writing {} at this moment", .0.display())]
    Busy(PathBuf),
    #[error("{}: {cause}", path.display())]
    File { path: PathBuf, cause: io::Error },
    #[error("{} is not the file that its manifest {} describes: it was changed or cut short", backup.display(), manifest.display())]
    Changed { backup: PathBuf, manifest: PathBuf },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The manifest of `backup`.
#[must_use]
pub fn manifest_of(backup: &Path) -> PathBuf {
    with(backup, ".manifest.json")
}

/// Copies `database` to `to`. Either both files are there afterwards, whole and on disk, or no `to`.
///
/// # Errors
/// [`BackupError`]. What is at `to` is never overwritten.
pub async fn backup(database: &Path, to: &Path, now: OffsetDateTime) -> Result<(), BackupError> {
    let manifest = manifest_of(to);
    for path in [to, &manifest] {
        if path.exists() {
            return Err(BackupError::Exists(path.to_owned()));
        }
    }
    let half = Half::of(to)?;
    let made = make(database, half.path(), &manifest, to, now).await;
    half.clear()?;
    made
}

/// Checks `backup` against its manifest, and says when it was made.
///
/// # Errors
/// `File` when one cannot be read, `Changed` when they do not belong together.
pub fn verify(backup: &Path) -> Result<String, BackupError> {
    let manifest = manifest_of(backup);
    let text = std::fs::read_to_string(&manifest).map_err(failed(&manifest))?;
    let told: Value = serde_json::from_str(&text).unwrap_or_default();
    if told["sha256"].as_str() == Some(&sha256(backup)?) {
        let made = told["created_at"].as_str();
        let made = made.filter(|made| OffsetDateTime::parse(made, &Rfc3339).is_ok());
        return Ok(made.unwrap_or("an unknown time").to_owned());
    }
    Err(BackupError::Changed { backup: backup.to_owned(), manifest })
}

/// Where a file is made before it gets its name. One process at a time: what lies there is nobody's, and is removed.
#[derive(Debug)]
pub(crate) struct Half {
    path: PathBuf,
    lock: (PathBuf, File),
}

impl Half {
    /// Takes the place for `file`, and clears away what was left there.
    ///
    /// # Errors
    /// `Busy` while another process has it.
    pub(crate) fn of(file: &Path) -> Result<Half, BackupError> {
        let path = with(file, ".half");
        // Beside it: to close a descriptor of the half itself would end SQLite's locks on it.
        let lock = with(&path, ".lock");
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&lock);
        let opened = file.map_err(failed(&lock))?;
        // Whoever had it may have removed the name meanwhile: then the lock keeps nobody out.
        let is_named = || -> io::Result<bool> {
            Ok(opened.metadata()?.ino() == std::fs::metadata(&lock)?.ino())
        };
        match opened.try_lock() {
            Err(TryLockError::Error(cause)) => return Err(BackupError::File { path: lock, cause }),
            Ok(()) if is_named().unwrap_or(false) => {}
            _ => return Err(BackupError::Busy(path)),
        }
        clear(&path)?;
        Ok(Half { path, lock: (lock, opened) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the place back, empty.
    pub(crate) fn clear(self) -> Result<(), BackupError> {
        clear(&self.path)?;
        let (name, _held) = &self.lock;
        remove(name)
    }
}

/// Its sides first: a file without them is whole, or no database yet.
fn clear(half: &Path) -> Result<(), BackupError> {
    sides(half).iter().try_for_each(|side| remove(side))?;
    remove(half)
}

fn with(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Gives a whole file its name, and the name to the disk. Does not take a name that is in use.
pub(crate) fn publish(half: &Path, as_: &Path) -> Result<(), BackupError> {
    File::open(half).and_then(|file| file.sync_all()).map_err(failed(half))?;
    // A link, unlike a rename, fails where somebody else was faster.
    std::fs::hard_link(half, as_).map_err(|cause| match cause.kind() {
        io::ErrorKind::AlreadyExists => BackupError::Exists(as_.to_owned()),
        _ => BackupError::File { path: as_.to_owned(), cause },
    })?;
    remove(half)?;
    let folder = as_.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed(folder))
}

/// Removes a file that may not be there.
pub(crate) fn remove(path: &Path) -> Result<(), BackupError> {
    match std::fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(BackupError::File { path: path.to_owned(), cause })
        }
        _ => Ok(()),
    }
}

pub(crate) fn failed(path: &Path) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.to_owned();
    move |cause| BackupError::File { path, cause }
}

async fn make(
    database: &Path,
    half: &Path,
    manifest: &Path,
    to: &Path,
    now: OffsetDateTime,
) -> Result<(), BackupError> {
    let live = SqliteStore::open_to_read(database).await?;
    live.copy_to(half).await?;
    // The copy is described, not the database, which has gone on meanwhile.
    let copy = SqliteStore::open_to_read(half).await?;
    let text = describe(&copy, half, now).await?;
    copy.close().await;
    write_private(manifest, &text)?;
    publish(half, to)
}

async fn describe(
    copy: &SqliteStore,
    file: &Path,
    now: OffsetDateTime,
) -> Result<String, BackupError> {
    let counts = copy.counts().await?;
    let versions = copy.known_versions().await?;
    let versions = versions.iter().map(|one| {
        json!({
            "instance": one.instance.to_string(),
            "key": one.key.to_string(),
            "version": one.version.to_string(),
            "pending": one.pending,
            "purging": one.purging,
            "check_value": one.check_value.map(hex),
        })
    });
    let manifest = json!({
        "format": 1,
        "created_at": now.format(&Rfc3339).unwrap_or_default(),
        "server": env!("CARGO_PKG_VERSION"),
        "schema": copy.schema().await?,
        "sha256": sha256(file)?,
        "token_serial": copy.token_serial().await?,
        "counts": {
            "instances": counts.instances,
            "keys": counts.keys,
            "versions": counts.versions,
            "service_ids": counts.service_ids,
            "api_keys": counts.api_keys,
        },
        "versions": versions.collect::<Vec<Value>>(),
    });
    Ok(format!("{manifest:#}\n"))
}

fn write_private(path: &Path, text: &str) -> Result<(), BackupError> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    })
    .map_err(failed(path))
}

fn sha256(path: &Path) -> Result<String, BackupError> {
    let mut file = File::open(path).map_err(failed(path))?;
    let (mut context, mut part) = (Context::new(&SHA256), vec![0; 1 << 16]);
    loop {
        match file.read(&mut part).map_err(failed(path))? {
            0 => break,
            len => context.update(part.get(..len).unwrap_or_default()),
        }
    }
    let digest = context.finish();
    Ok(digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}
