//! Check values, and the token they were seen in.

use super::rows::{nanoseconds, stamp, time_of, uuid};
use super::{SqliteStore, expect_one, number};
use crate::store::{Adopted, Custody, KnownVersion, StoreError};
use crate::uses;
use async_trait::async_trait;
use kms_hsm::CheckValue;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;
use time::OffsetDateTime;
use uuid::Uuid;

#[async_trait]
impl Custody for SqliteStore {
    async fn known_versions(&self) -> Result<Vec<KnownVersion>, StoreError> {
        let rows = sqlx::query(
            "SELECT k.instance_id, k.id AS key_id, v.id, v.number IS NULL AS pending,
                    k.purge_begun_at IS NOT NULL AS purging, k.state = 5 AS destroyed,
                    v.created_at, v.check_value
             FROM key_versions v JOIN keys k ON k.id = v.key_id
             ORDER BY k.instance_id, k.id, v.created_at, v.id",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(known_version).collect()
    }

    async fn most_gcm_uses(&self) -> Result<u64, StoreError> {
        let most: Option<i64> = sqlx::query_scalar(
            "SELECT MAX(v.gcm_uses) FROM key_versions v JOIN keys k ON k.id = v.key_id
             WHERE k.deleted_at IS NULL AND v.number = (
                 SELECT MAX(number) FROM key_versions WHERE key_id = k.id)",
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(most.unwrap_or_default().unsigned_abs())
    }

    async fn next_expiry(&self, now: OffsetDateTime) -> Result<Option<OffsetDateTime>, StoreError> {
        let next: Option<i64> = sqlx::query_scalar(
            "SELECT MIN(expires_at) FROM keys WHERE state = 1 AND expires_at > ?",
        )
        .bind(nanoseconds(now)?)
        .fetch_one(&self.pool)
        .await?;
        next.map(time_of).transpose()
    }

    async fn keep_check_value(&self, version: Uuid, value: CheckValue) -> Result<(), StoreError> {
        let done = sqlx::query(
            "UPDATE key_versions SET check_value = ?1
             WHERE id = ?2 AND (check_value IS NULL OR check_value = ?1)",
        )
        .bind(value.as_slice())
        .bind(version.to_string())
        .execute(&self.pool)
        .await?;
        expect_one(done.rows_affected(), "the version does not exist or has another check value")
    }

    async fn adopt_version(&self, adopted: &Adopted) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        // Below the first number: a lower one than any wraps with.
        let done = sqlx::query(
            "INSERT INTO key_versions (id, key_id, number, created_at, check_value, gcm_uses)
             SELECT ?1, k.id, coalesce(min(v.number), 2) - 1, ?3, ?4, ?5
             FROM keys k LEFT JOIN key_versions v ON v.key_id = k.id WHERE k.id = ?2 GROUP BY k.id
             ON CONFLICT (id) DO UPDATE SET number = excluded.number, gcm_uses = excluded.gcm_uses,
                 check_value = excluded.check_value
             WHERE number IS NULL AND key_id = excluded.key_id
                 AND coalesce(check_value, excluded.check_value) = excluded.check_value",
        )
        .bind(adopted.version.to_string())
        .bind(adopted.key.to_string())
        .bind(nanoseconds(adopted.at)?)
        .bind(adopted.check_value.as_slice())
        .bind(number(uses::LIMIT)?)
        .execute(&mut *tx)
        .await?;
        expect_one(done.rows_affected(), "the key does not exist, or knows the version otherwise")?;
        sqlx::query("UPDATE keys SET state = 1 WHERE id = ? AND state = -1")
            .bind(adopted.key.to_string())
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }

    async fn token_serial(&self) -> Result<Option<String>, StoreError> {
        let row = sqlx::query("SELECT serial FROM token").fetch_optional(&self.pool).await?;
        Ok(row.map(|row| row.try_get("serial")).transpose()?)
    }

    async fn keep_token_serial(&self, serial: &str) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO token (one, serial) VALUES (1, ?)
             ON CONFLICT (one) DO UPDATE SET serial = excluded.serial",
        )
        .bind(serial)
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

fn known_version(row: &SqliteRow) -> Result<KnownVersion, StoreError> {
    let version = uuid(row, "id")?;
    let value: Option<Vec<u8>> = row.try_get("check_value")?;
    let value = value.map(CheckValue::try_from).transpose();
    Ok(KnownVersion {
        instance: uuid(row, "instance_id")?,
        key: uuid(row, "key_id")?,
        version,
        pending: row.try_get("pending")?,
        purging: row.try_get("purging")?,
        destroyed: row.try_get("destroyed")?,
        created_at: stamp(row, "created_at")?,
        check_value: value
            .map_err(|_| StoreError::Corrupt(format!("the check value of {version}")))?,
    })
}
