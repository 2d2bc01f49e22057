//! The store in one SQLite file: WAL, every commit flushed before it is acknowledged, foreign keys on.
//!
//! Each statement is a constant; values reach the database as parameters only.

mod access;
mod copy;
mod custody;
mod purge;
mod recent;
mod rows;
mod trail;

use super::{
    FirstContent, Instance, Key, NewKey, Page, Reserved, SigningKey, Store, StoreError, Version,
    Wanted,
};
use crate::policy::{ApiKeySecret, Caller};
use access::{Known, insert_api_key, insert_service_id};
use async_trait::async_trait;
pub use copy::sides;
use recent::{Recent, WalIndex};
use rows::{key, nanoseconds, reach, signing_key, stamp, states, uuid};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Connection, Row, SqlSafeStr, Sqlite, Transaction};
use std::collections::HashSet;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;
use uuid::Uuid;

/// Readers run beside the one writer; more connections than this only queue inside SQLite.
const CONNECTIONS: u32 = 4;
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct SqliteStore {
    pool: SqlitePool,
    /// Instances that were found once. None is ever removed, so each is looked for once, not with every request.
    instances: Mutex<HashSet<Uuid>>,
    wal_index: WalIndex,
    /// By instance and id.
    keys: Recent<(Uuid, Uuid), Key>,
    callers: Recent<(Uuid, ApiKeySecret), Known>,
    profiles: Recent<Uuid, Caller>,
}

impl SqliteStore {
    /// Opens `file` and brings its tables up to date.
    ///
    /// # Errors
    /// `Unavailable` when the file is missing (unless `create`) or cannot be used, or was written by a newer server.
    pub async fn open(file: &Path, create: bool) -> Result<Self, StoreError> {
        if create {
            refuse_remains(file)?;
            make_private(file)
                .map_err(|e| StoreError::Unavailable(format!("{}: {e}", file.display())))?;
        }
        // What belongs to a database lies beside the file itself, wherever links to it are.
        let real = file
            .canonicalize()
            .map_err(|e| StoreError::Unavailable(format!("{}: {e}", file.display())))?;
        let options = SqliteConnectOptions::new()
            .filename(&real)
            .create_if_missing(false)
            .journal_mode(SqliteJournalMode::Wal)
            // FULL: a commit that was acknowledged survives a power cut, in WAL mode too.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        // The pool opens two at once, and two that turn one file to WAL fail with "database is locked".
        let alone = async { options.connect().await?.close().await };
        alone.await.map_err(|e| StoreError::Unavailable(format!("{}: {e}", file.display())))?;
        let pool = SqlitePoolOptions::new()
            .max_connections(CONNECTIONS)
            // A file does not hang up. Asking first would be one more way to another thread and back, for each query.
            .test_before_acquire(false)
            // With the last connection SQLite removes the WAL index.
            .min_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options)
            .await
            .map_err(|e| StoreError::Unavailable(format!("{}: {e}", file.display())))?;
        migrations()
            .run(&pool)
            .await
            .map_err(|e| StoreError::Unavailable(format!("{}: {e}", file.display())))?;
        let wal_index = WalIndex::proven(&pool, &real).await.unwrap_or_else(|error| {
            tracing::warn!("The database is asked with every request, since nothing can be written to it: {error}");
            WalIndex::none()
        });
        Ok(Self { wal_index, ..Self::over(pool) })
    }

    fn over(pool: SqlitePool) -> Self {
        Self {
            pool,
            instances: Mutex::default(),
            wal_index: WalIndex::none(),
            keys: Recent::new(),
            callers: Recent::new(),
            profiles: Recent::new(),
        }
    }

    async fn write(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        // A deferred transaction that turns into a writer can fail at once where this one waits its turn.
        Ok(self.pool.begin_with("BEGIN IMMEDIATE").await?)
    }
}

fn lock(instances: &Mutex<HashSet<Uuid>>) -> MutexGuard<'_, HashSet<Uuid>> {
    instances.lock().unwrap_or_else(PoisonError::into_inner)
}

/// SQLite would read what is left of a database that is gone into the new one, or remove it.
fn refuse_remains(file: &Path) -> Result<(), StoreError> {
    if file.is_symlink() && !file.exists() {
        return Err(StoreError::Unavailable(format!(
            "{} is a link to a database that is not there: bring that back, or remove the link",
            file.display()
        )));
    }
    let left = sides(file).into_iter().find(|side| !file.exists() && side.exists());
    left.map_or(Ok(()), |side| {
        Err(StoreError::Unavailable(format!(
            "{} is there and {} is not: move it away together with its database",
            side.display(),
            file.display()
        )))
    })
}

/// Nobody but the server's user reads who may do what. SQLite gives its side files the same mode.
fn make_private(file: &Path) -> std::io::Result<()> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(file).map(drop)
}

fn migrations() -> Migrator {
    let texts = [
        ("initial", include_str!("../../../migrations/0001_initial.sql")),
        ("gcm uses", include_str!("../../../migrations/0002_gcm_uses.sql")),
        ("access", include_str!("../../../migrations/0003_access.sql")),
        ("audit anchors", include_str!("../../../migrations/0004_audit_anchors.sql")),
        ("check values", include_str!("../../../migrations/0005_check_values.sql")),
        ("purge", include_str!("../../../migrations/0006_purge.sql")),
    ];
    let migrations = (1..).zip(texts).map(|(number, (name, text))| {
        Migration::new(number, name.into(), MigrationType::Simple, text.into_sql_str(), false)
    });
    Migrator::with_migrations(migrations.collect())
}

#[async_trait]
impl Store for SqliteStore {
    async fn probe(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT count(*) FROM instances").fetch_one(&self.pool).await?;
        Ok(())
    }

    async fn close(&self) {
        // Folds the write-ahead log into the one file.
        self.pool.close().await;
    }

    async fn initialise(&self, first: &FirstContent) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        let there: i64 = sqlx::query(
            "SELECT (SELECT count(*) FROM instances) + (SELECT count(*) FROM service_ids)
                  + (SELECT count(*) FROM signing_keys) + (SELECT count(*) FROM keys)",
        )
        .fetch_one(&mut *tx)
        .await?
        .try_get(0)?;
        if there != 0 {
            return Err(StoreError::Conflict("the database is already initialised".into()));
        }
        insert_instance(&mut tx, &first.instance).await?;
        insert_signing_key(&mut tx, &first.signing_key).await?;
        for (service_id, api_key, hash) in &first.service_ids {
            insert_service_id(&mut tx, service_id).await?;
            insert_api_key(&mut tx, api_key, hash).await?;
        }
        Ok(tx.commit().await?)
    }

    async fn signing_key(&self) -> Result<Option<SigningKey>, StoreError> {
        sqlx::query(
            "SELECT id, modulus, exponent, created_at FROM signing_keys
             ORDER BY created_at DESC LIMIT 1",
        )
        .fetch_optional(&self.pool)
        .await?
        .map(|row| signing_key(&row))
        .transpose()
    }

    async fn add_signing_key(&self, key: &SigningKey) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        // The newest is in charge, also where the one before was made under a clock that was ahead.
        sqlx::query("UPDATE signing_keys SET created_at = ?1 - 1 WHERE created_at >= ?1")
            .bind(nanoseconds(key.created_at)?)
            .execute(&mut *tx)
            .await?;
        insert_signing_key(&mut tx, key).await?;
        Ok(tx.commit().await?)
    }

    async fn add_instance(&self, instance: &Instance) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        insert_instance(&mut tx, instance).await?;
        Ok(tx.commit().await?)
    }

    async fn instances(&self) -> Result<Vec<Instance>, StoreError> {
        let rows =
            sqlx::query("SELECT id, name, created_at FROM instances ORDER BY created_at, id")
                .fetch_all(&self.pool)
                .await?;
        rows.iter()
            .map(|row| {
                Ok(Instance {
                    id: uuid(row, "id")?,
                    name: row.try_get("name")?,
                    created_at: stamp(row, "created_at")?,
                })
            })
            .collect()
    }

    async fn instance_exists(&self, id: Uuid) -> Result<bool, StoreError> {
        if lock(&self.instances).contains(&id) {
            return Ok(true);
        }
        let found = sqlx::query("SELECT 1 FROM instances WHERE id = ?")
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
        if found.is_some() {
            lock(&self.instances).insert(id);
        }
        Ok(found.is_some())
    }

    async fn begin_key(&self, key: &NewKey) -> Result<(), StoreError> {
        let tags = serde_json::to_string(&key.tags)
            .map_err(|e| StoreError::Conflict(format!("tags: {e}")))?;
        let mut tx = self.write().await?;
        sqlx::query(
            "INSERT INTO keys (id, instance_id, name, description, tags, imported, state,
                               expires_at, created_at, created_by)
             VALUES (?, ?, ?, ?, ?, ?, -1, ?, ?, ?)",
        )
        .bind(key.id.to_string())
        .bind(key.instance.to_string())
        .bind(&key.name)
        .bind(&key.description)
        .bind(tags)
        .bind(key.imported)
        .bind(key.expires_at.map(nanoseconds).transpose()?)
        .bind(nanoseconds(key.created_at)?)
        .bind(&key.created_by)
        .execute(&mut *tx)
        .await?;
        let first = Version { id: key.version, created_at: key.created_at };
        insert_version(&mut tx, key.id, &first).await?;
        Ok(tx.commit().await?)
    }

    async fn activate_key(&self, key: Uuid, version: Uuid) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        let done = sqlx::query("UPDATE keys SET state = 1 WHERE id = ? AND state = -1")
            .bind(key.to_string())
            .execute(&mut *tx)
            .await?;
        expect_one(done.rows_affected(), "the key is not pending")?;
        number_version(&mut tx, key, version).await?;
        Ok(tx.commit().await?)
    }

    async fn begin_version(&self, key: Uuid, version: &Version) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        insert_version(&mut tx, key, version).await?;
        Ok(tx.commit().await?)
    }

    async fn activate_version(
        &self,
        key: Uuid,
        version: Uuid,
        at: OffsetDateTime,
        unless_since: Option<OffsetDateTime>,
    ) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE keys SET rotated_at = ?1 WHERE id = ?2 AND state = 1
                 AND (?3 IS NULL OR rotated_at IS NULL OR rotated_at <= ?3)",
        )
        .bind(nanoseconds(at)?)
        .bind(key.to_string())
        .bind(unless_since.map(nanoseconds).transpose()?)
        .execute(&mut *tx)
        .await?;
        expect_one(done.rows_affected(), "the key is no longer active, or was rotated meanwhile")?;
        number_version(&mut tx, key, version).await?;
        Ok(tx.commit().await?)
    }

    async fn reserve_gcm_uses(
        &self,
        version: Uuid,
        uses: u64,
        limit: u64,
    ) -> Result<Reserved, StoreError> {
        let mut tx = self.write().await?;
        let before: Option<i64> =
            sqlx::query_scalar("SELECT gcm_uses FROM key_versions WHERE id = ?")
                .bind(version.to_string())
                .fetch_optional(&mut *tx)
                .await?;
        let before =
            before.ok_or_else(|| StoreError::Conflict("the version does not exist".into()))?;
        let before = before.unsigned_abs();
        let granted = uses.min(limit.saturating_sub(before));
        if granted > 0 {
            sqlx::query("UPDATE key_versions SET gcm_uses = gcm_uses + ? WHERE id = ?")
                .bind(number(granted)?)
                .bind(version.to_string())
                .execute(&mut *tx)
                .await?;
            tx.commit().await?;
        }
        Ok(Reserved { granted, total: before + granted })
    }

    async fn return_gcm_uses(&self, uses: &[(Uuid, u64)]) -> Result<(), StoreError> {
        if uses.is_empty() {
            return Ok(());
        }
        let mut tx = self.write().await?;
        for (version, uses) in uses {
            sqlx::query("UPDATE key_versions SET gcm_uses = max(gcm_uses - ?, 0) WHERE id = ?")
                .bind(number(*uses)?)
                .bind(version.to_string())
                .execute(&mut *tx)
                .await?;
        }
        Ok(tx.commit().await?)
    }

    async fn key(&self, instance: Uuid, id: Uuid) -> Result<Option<Key>, StoreError> {
        let ask = async {
            let row = sqlx::query(
                "SELECT k.*, v.id AS version_id, v.created_at AS version_created_at
                 FROM keys k JOIN key_versions v ON v.key_id = k.id
                 WHERE k.instance_id = ? AND k.id = ? AND k.state <> -1 AND v.number IS NOT NULL
                 ORDER BY v.number DESC LIMIT 1",
            )
            .bind(instance.to_string())
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
            row.as_ref().map(key).transpose()
        };
        self.keys.get(&self.wal_index, (instance, id), ask).await
    }

    async fn keys(
        &self,
        instance: Uuid,
        wanted: &Wanted,
        page: Page,
    ) -> Result<Vec<Key>, StoreError> {
        let rows = sqlx::query(
            "SELECT k.*, v.id AS version_id, v.created_at AS version_created_at
             FROM keys k JOIN key_versions v ON v.key_id = k.id AND v.number =
                  (SELECT max(number) FROM key_versions WHERE key_id = k.id)
             WHERE k.instance_id = ? AND k.state <> -1
               AND CASE WHEN k.state = 1 AND k.expires_at <= ? THEN 3 ELSE k.state END
                   IN (SELECT value FROM json_each(?))
               AND (?4 IS NULL OR k.id IN (SELECT value FROM json_each(?4)))
             ORDER BY k.id LIMIT ?5 OFFSET ?6",
        )
        .bind(instance.to_string())
        .bind(nanoseconds(wanted.now)?)
        .bind(states(wanted))
        .bind(reach(wanted))
        .bind(page.limit)
        .bind(page.offset)
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(key).collect()
    }

    async fn count_keys(&self, instance: Uuid, wanted: &Wanted) -> Result<u64, StoreError> {
        let row = sqlx::query(
            "SELECT count(*) FROM keys k WHERE k.instance_id = ? AND k.state <> -1
               AND CASE WHEN k.state = 1 AND k.expires_at <= ? THEN 3 ELSE k.state END
                   IN (SELECT value FROM json_each(?))
               AND (?4 IS NULL OR k.id IN (SELECT value FROM json_each(?4)))",
        )
        .bind(instance.to_string())
        .bind(nanoseconds(wanted.now)?)
        .bind(states(wanted))
        .bind(reach(wanted))
        .fetch_one(&self.pool)
        .await?;
        let count: i64 = row.try_get(0)?;
        u64::try_from(count).map_err(|_| StoreError::Corrupt("a negative count".into()))
    }

    async fn versions(&self, instance: Uuid, key: Uuid) -> Result<Vec<Version>, StoreError> {
        let rows = sqlx::query(
            "SELECT v.id, v.created_at FROM key_versions v JOIN keys k ON k.id = v.key_id
             WHERE k.instance_id = ? AND k.id = ? AND k.state <> -1 AND v.number IS NOT NULL
             ORDER BY v.number DESC",
        )
        .bind(instance.to_string())
        .bind(key.to_string())
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| Ok(Version { id: uuid(row, "id")?, created_at: stamp(row, "created_at")? }))
            .collect()
    }

    async fn suspend_key(
        &self,
        instance: Uuid,
        id: Uuid,
        suspended: bool,
    ) -> Result<bool, StoreError> {
        let (from, to) = if suspended { (1, 2) } else { (2, 1) };
        let done =
            sqlx::query("UPDATE keys SET state = ? WHERE instance_id = ? AND id = ? AND state = ?")
                .bind(to)
                .bind(instance.to_string())
                .bind(id.to_string())
                .bind(from)
                .execute(&self.pool)
                .await?;
        Ok(done.rows_affected() == 1)
    }

    async fn delete_key(
        &self,
        instance: Uuid,
        id: Uuid,
        at: OffsetDateTime,
        by: &str,
    ) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE keys SET state = 5, deleted_at = ?, deleted_by = ?
             WHERE instance_id = ? AND id = ? AND state IN (1, 2)",
        )
        .bind(nanoseconds(at)?)
        .bind(by)
        .bind(instance.to_string())
        .bind(id.to_string())
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    async fn begin_purge(
        &self,
        instance: Uuid,
        id: Uuid,
        at: OffsetDateTime,
    ) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        purge::begin(&mut tx, instance, id, at).await?;
        Ok(tx.commit().await?)
    }

    async fn finish_purge(
        &self,
        id: Uuid,
        versions: &[Uuid],
        at: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let mut tx = self.write().await?;
        let done = purge::finish(&mut tx, id, versions, at).await?;
        tx.commit().await?;
        Ok(done)
    }
}

type Tx = Transaction<'static, Sqlite>;

async fn insert_instance(tx: &mut Tx, instance: &Instance) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO instances (id, name, created_at) VALUES (?, ?, ?)")
        .bind(instance.id.to_string())
        .bind(&instance.name)
        .bind(nanoseconds(instance.created_at)?)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

async fn insert_signing_key(tx: &mut Tx, key: &SigningKey) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO signing_keys (id, modulus, exponent, created_at) VALUES (?, ?, ?, ?)")
        .bind(key.id.to_string())
        .bind(&key.public.n)
        .bind(&key.public.e)
        .bind(nanoseconds(key.created_at)?)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

async fn insert_version(tx: &mut Tx, key: Uuid, version: &Version) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO key_versions (id, key_id, created_at) VALUES (?, ?, ?)")
        .bind(version.id.to_string())
        .bind(key.to_string())
        .bind(nanoseconds(version.created_at)?)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Gives a pending version the next number of its key.
async fn number_version(tx: &mut Tx, key: Uuid, version: Uuid) -> Result<(), StoreError> {
    let done = sqlx::query(
        "UPDATE key_versions SET number =
             (SELECT coalesce(max(number), 0) + 1 FROM key_versions WHERE key_id = ?1)
         WHERE key_id = ?1 AND id = ?2 AND number IS NULL",
    )
    .bind(key.to_string())
    .bind(version.to_string())
    .execute(&mut **tx)
    .await?;
    expect_one(done.rows_affected(), "the version is not pending")
}

fn number(uses: u64) -> Result<i64, StoreError> {
    i64::try_from(uses).map_err(|_| StoreError::Conflict("too many uses".into()))
}

fn expect_one(rows: u64, otherwise: &str) -> Result<(), StoreError> {
    if rows == 1 { Ok(()) } else { Err(StoreError::Conflict(otherwise.into())) }
}
