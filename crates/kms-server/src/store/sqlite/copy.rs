//! Whole databases: read as they are, and copied while others write to them.

use super::{BUSY_TIMEOUT, SqliteStore, make_private, migrations, number};
use crate::store::StoreError;
use sqlx::Row;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use std::path::{Path, PathBuf};

/// How many rows there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub instances: i64,
    pub keys: i64,
    pub versions: i64,
    pub service_ids: i64,
    pub api_keys: i64,
}

/// What SQLite keeps beside `database` and takes for a part of it, whichever file it finds there under that name.
#[must_use]
pub fn sides(database: &Path) -> [PathBuf; 3] {
    ["-wal", "-shm", "-journal"].map(|side| {
        let mut name = database.as_os_str().to_owned();
        name.push(side);
        name.into()
    })
}

impl SqliteStore {
    /// Opens `file` to look at it: nothing is changed in it, not even its tables brought up to date.
    ///
    /// # Errors
    /// `Unavailable` when the file cannot be read, or another version of the server wrote it.
    pub async fn open_to_read(file: &Path) -> Result<Self, StoreError> {
        let unavailable =
            |cause: String| StoreError::Unavailable(format!("{}: {cause}", file.display()));
        let options =
            SqliteConnectOptions::new().filename(file).read_only(true).busy_timeout(BUSY_TIMEOUT);
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(options)
            .await
            .map_err(|e| unavailable(e.to_string()))?;
        let store = Self::over(pool);
        let (found, ours) =
            (store.schema().await.map_err(|e| unavailable(e.to_string()))?, Self::newest_schema());
        if found == ours {
            return Ok(store);
        }
        Err(unavailable(format!(
            "its tables are of version {found}, and this program's of version {ours}: use the program that serves it"
        )))
    }

    /// Writes all that is committed now into `target`, which must not exist; whoever writes meanwhile is not held up.
    ///
    /// # Errors
    /// `Unavailable` when the copy cannot be written.
    pub async fn copy_to(&self, target: &Path) -> Result<(), StoreError> {
        // SQLite takes an empty file, and would make one that everybody may read.
        make_private(target)
            .map_err(|e| StoreError::Unavailable(format!("{}: {e}", target.display())))?;
        let name = target
            .to_str()
            .ok_or_else(|| StoreError::Unavailable(format!("{}: not UTF-8", target.display())))?;
        sqlx::query("VACUUM INTO ?").bind(name).execute(&self.pool).await?;
        Ok(())
    }

    /// Looks through the whole of `file`, which nobody uses, as it is on disk: no log beside it is read or made.
    ///
    /// # Errors
    /// `Corrupt`, with what SQLite says; `Unavailable` when the file cannot be read.
    pub async fn inspect(file: &Path) -> Result<(), StoreError> {
        let options = SqliteConnectOptions::new().filename(file).immutable(true).read_only(true);
        let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options).await?;
        let found: Vec<String> =
            sqlx::query_scalar("PRAGMA integrity_check(5)").fetch_all(&pool).await?;
        let strays = sqlx::query("PRAGMA foreign_key_check").fetch_all(&pool).await?.len();
        pool.close().await;
        if found != ["ok"] {
            return Err(StoreError::Corrupt(format!("{}: {}", file.display(), found.join("; "))));
        }
        match strays {
            0 => Ok(()),
            rows => Err(StoreError::Corrupt(format!(
                "{}: {rows} rows refer to others that are not there",
                file.display()
            ))),
        }
    }

    /// Adds `uses` to how often each version may have been used with AES-GCM, up to `limit`.
    ///
    /// # Errors
    /// The database cannot be written.
    pub async fn add_gcm_uses(&self, uses: u64, limit: u64) -> Result<(), StoreError> {
        sqlx::query("UPDATE key_versions SET gcm_uses = max(gcm_uses, min(gcm_uses + ?, ?))")
            .bind(number(uses)?)
            .bind(number(limit)?)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// The number of the last change of the tables.
    ///
    /// # Errors
    /// The database does not answer, or is none of a key service.
    pub async fn schema(&self) -> Result<i64, StoreError> {
        let row = sqlx::query("SELECT coalesce(max(version), 0) FROM _sqlx_migrations")
            .fetch_one(&self.pool)
            .await?;
        Ok(row.try_get(0)?)
    }

    /// That of this program.
    #[must_use]
    pub fn newest_schema() -> i64 {
        migrations().iter().map(|one| one.version).max().unwrap_or_default()
    }

    /// # Errors
    /// The database does not answer.
    pub async fn counts(&self) -> Result<Counts, StoreError> {
        let row = sqlx::query(
            "SELECT (SELECT count(*) FROM instances), (SELECT count(*) FROM keys),
                    (SELECT count(*) FROM key_versions), (SELECT count(*) FROM service_ids),
                    (SELECT count(*) FROM api_keys)",
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(Counts {
            instances: row.try_get(0)?,
            keys: row.try_get(1)?,
            versions: row.try_get(2)?,
            service_ids: row.try_get(3)?,
            api_keys: row.try_get(4)?,
        })
    }
}
