//! The store in one SQLite file: WAL, every commit flushed before it is acknowledged, foreign keys on.
//!
//! Each statement is a constant; values reach the database as parameters only.

mod rows;

use super::{
    ApiKey, ApiKeyHash, FirstContent, Instance, Key, KnownVersion, NewKey, Page, ServiceId,
    SigningKey, Store, StoreError, Version, Wanted,
};
use crate::policy::Caller;
use async_trait::async_trait;
use kms_hsm::RsaPublic;
use rows::{caller, key, nanoseconds, service_id, stamp, states, uuid};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Row, SqlSafeStr, Sqlite, Transaction};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;
use time::OffsetDateTime;
use uuid::Uuid;

/// Readers run beside the one writer; more connections than this only queue inside SQLite.
const CONNECTIONS: u32 = 4;
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct SqliteStore {
    pool: SqlitePool,
}

impl SqliteStore {
    /// Opens `file` and brings its tables up to date.
    ///
    /// # Errors
    /// `Unavailable` when the file is missing (unless `create`) or cannot be used, or was written by a newer server.
    pub async fn open(file: &Path, create: bool) -> Result<Self, StoreError> {
        if create {
            make_private(file)
                .map_err(|e| StoreError::Unavailable(format!("{}: {e}", file.display())))?;
        }
        let options = SqliteConnectOptions::new()
            .filename(file)
            .create_if_missing(false)
            .journal_mode(SqliteJournalMode::Wal)
            // FULL: a commit that was acknowledged survives a power cut, in WAL mode too.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let pool = SqlitePoolOptions::new()
            .max_connections(CONNECTIONS)
            .connect_with(options)
            .await
            .map_err(|e| StoreError::Unavailable(format!("{}: {e}", file.display())))?;
        migrations()
            .run(&pool)
            .await
            .map_err(|e| StoreError::Unavailable(format!("{}: {e}", file.display())))?;
        Ok(Self { pool })
    }

    async fn write(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        // A deferred transaction that turns into a writer can fail at once where this one waits its turn.
        Ok(self.pool.begin_with("BEGIN IMMEDIATE").await?)
    }
}

/// Nobody but the server's user reads who may do what. SQLite gives its side files the same mode.
fn make_private(file: &Path) -> std::io::Result<()> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(file).map(drop)
}

fn migrations() -> Migrator {
    let initial = include_str!("../../../migrations/0001_initial.sql");
    Migrator::with_migrations(vec![Migration::new(
        1,
        "initial".into(),
        MigrationType::Simple,
        initial.into_sql_str(),
        false,
    )])
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
        .map(|row| {
            Ok(SigningKey {
                id: uuid(&row, "id")?,
                public: RsaPublic { n: row.try_get("modulus")?, e: row.try_get("exponent")? },
                created_at: stamp(&row, "created_at")?,
            })
        })
        .transpose()
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
        let found = sqlx::query("SELECT 1 FROM instances WHERE id = ?")
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
        Ok(found.is_some())
    }

    async fn add_service_id(&self, service_id: &ServiceId) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        insert_service_id(&mut tx, service_id).await?;
        Ok(tx.commit().await?)
    }

    async fn service_ids(&self) -> Result<Vec<ServiceId>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, name, description, role, instance_id, created_at FROM service_ids
             ORDER BY created_at, id",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(service_id).collect()
    }

    async fn service_id(&self, id: Uuid) -> Result<Option<ServiceId>, StoreError> {
        sqlx::query(
            "SELECT id, name, description, role, instance_id, created_at FROM service_ids
             WHERE id = ?",
        )
        .bind(id.to_string())
        .fetch_optional(&self.pool)
        .await?
        .as_ref()
        .map(service_id)
        .transpose()
    }

    async fn add_api_key(&self, key: &ApiKey, hash: &ApiKeyHash) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        insert_api_key(&mut tx, key, hash).await?;
        Ok(tx.commit().await?)
    }

    async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, service_id, name, created_at FROM api_keys WHERE revoked_at IS NULL
             ORDER BY created_at, id",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(ApiKey {
                    id: uuid(row, "id")?,
                    service_id: uuid(row, "service_id")?,
                    name: row.try_get("name")?,
                    created_at: stamp(row, "created_at")?,
                })
            })
            .collect()
    }

    async fn revoke_api_key(&self, id: Uuid, at: OffsetDateTime) -> Result<bool, StoreError> {
        let done =
            sqlx::query("UPDATE api_keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL")
                .bind(nanoseconds(at)?)
                .bind(id.to_string())
                .execute(&self.pool)
                .await?;
        Ok(done.rows_affected() == 1)
    }

    async fn caller_by_hash(&self, hash: &ApiKeyHash) -> Result<Option<Caller>, StoreError> {
        sqlx::query(
            "SELECT s.id, a.id AS api_key, s.role, s.instance_id
             FROM api_keys a JOIN service_ids s ON s.id = a.service_id
             WHERE a.hash = ? AND a.revoked_at IS NULL",
        )
        .bind(hash.as_slice())
        .fetch_optional(&self.pool)
        .await?
        .as_ref()
        .map(caller)
        .transpose()
    }

    async fn caller(&self, service_id: Uuid, api_key: Uuid) -> Result<Option<Caller>, StoreError> {
        sqlx::query(
            "SELECT s.id, a.id AS api_key, s.role, s.instance_id
             FROM api_keys a JOIN service_ids s ON s.id = a.service_id
             WHERE a.id = ? AND s.id = ? AND a.revoked_at IS NULL",
        )
        .bind(api_key.to_string())
        .bind(service_id.to_string())
        .fetch_optional(&self.pool)
        .await?
        .as_ref()
        .map(caller)
        .transpose()
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
    ) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        let done = sqlx::query("UPDATE keys SET rotated_at = ? WHERE id = ? AND state = 1")
            .bind(nanoseconds(at)?)
            .bind(key.to_string())
            .execute(&mut *tx)
            .await?;
        expect_one(done.rows_affected(), "the key is no longer active")?;
        number_version(&mut tx, key, version).await?;
        Ok(tx.commit().await?)
    }

    async fn key(&self, instance: Uuid, id: Uuid) -> Result<Option<Key>, StoreError> {
        sqlx::query(
            "SELECT k.*, v.id AS version_id, v.created_at AS version_created_at
             FROM keys k JOIN key_versions v ON v.key_id = k.id
             WHERE k.instance_id = ? AND k.id = ? AND k.state <> -1 AND v.number IS NOT NULL
             ORDER BY v.number DESC LIMIT 1",
        )
        .bind(instance.to_string())
        .bind(id.to_string())
        .fetch_optional(&self.pool)
        .await?
        .as_ref()
        .map(key)
        .transpose()
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
             ORDER BY k.id LIMIT ? OFFSET ?",
        )
        .bind(instance.to_string())
        .bind(nanoseconds(wanted.now)?)
        .bind(states(wanted))
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
                   IN (SELECT value FROM json_each(?))",
        )
        .bind(instance.to_string())
        .bind(nanoseconds(wanted.now)?)
        .bind(states(wanted))
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

    async fn delete_key(
        &self,
        instance: Uuid,
        id: Uuid,
        at: OffsetDateTime,
        by: &str,
    ) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE keys SET state = 5, deleted_at = ?, deleted_by = ?
             WHERE instance_id = ? AND id = ? AND state = 1",
        )
        .bind(nanoseconds(at)?)
        .bind(by)
        .bind(instance.to_string())
        .bind(id.to_string())
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    async fn known_versions(&self) -> Result<Vec<KnownVersion>, StoreError> {
        let rows = sqlx::query(
            "SELECT k.instance_id, k.id AS key_id, v.id, v.number IS NULL AS pending
             FROM key_versions v JOIN keys k ON k.id = v.key_id ORDER BY v.id",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(KnownVersion {
                    instance: uuid(row, "instance_id")?,
                    key: uuid(row, "key_id")?,
                    version: uuid(row, "id")?,
                    pending: row.try_get("pending")?,
                })
            })
            .collect()
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

async fn insert_service_id(tx: &mut Tx, service_id: &ServiceId) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO service_ids (id, name, description, role, instance_id, created_at)
         VALUES (?, ?, ?, ?, ?, ?)",
    )
    .bind(service_id.id.to_string())
    .bind(&service_id.name)
    .bind(&service_id.description)
    .bind(service_id.grant.role.name())
    .bind(service_id.grant.scope.instance().map(|id| id.to_string()))
    .bind(nanoseconds(service_id.created_at)?)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn insert_api_key(tx: &mut Tx, key: &ApiKey, hash: &ApiKeyHash) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO api_keys (id, service_id, name, hash, created_at) VALUES (?, ?, ?, ?, ?)",
    )
    .bind(key.id.to_string())
    .bind(key.service_id.to_string())
    .bind(&key.name)
    .bind(hash.as_slice())
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

fn expect_one(rows: u64, otherwise: &str) -> Result<(), StoreError> {
    if rows == 1 { Ok(()) } else { Err(StoreError::Conflict(otherwise.into())) }
}
