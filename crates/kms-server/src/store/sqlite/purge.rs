//! The only rows of keys that are ever removed: those of a destroyed one, in two steps with the HSM between them.

use super::rows::nanoseconds;
use super::{Tx, expect_one};
use crate::store::StoreError;
use time::OffsetDateTime;
use uuid::Uuid;

/// Notes since when; an earlier time stays.
pub(super) async fn begin(
    tx: &mut Tx,
    instance: Uuid,
    id: Uuid,
    at: OffsetDateTime,
) -> Result<(), StoreError> {
    let done = sqlx::query(
        "UPDATE keys SET purge_begun_at = coalesce(purge_begun_at, ?)
         WHERE instance_id = ? AND id = ? AND state = 5",
    )
    .bind(nanoseconds(at)?)
    .bind(instance.to_string())
    .bind(id.to_string())
    .execute(&mut **tx)
    .await?;
    expect_one(done.rows_affected(), "the key is not destroyed")
}

/// Removes the key with these versions, and the policies for it; its ids stay, as used up.
pub(super) async fn finish(
    tx: &mut Tx,
    id: Uuid,
    versions: &[Uuid],
    at: OffsetDateTime,
) -> Result<bool, StoreError> {
    let (key, at) = (id.to_string(), nanoseconds(at)?);
    let purging = "SELECT 1 FROM keys WHERE id = ? AND state = 5 AND purge_begun_at IS NOT NULL";
    if sqlx::query(purging).bind(&key).fetch_optional(&mut **tx).await?.is_none() {
        return Ok(false);
    }
    for version in versions {
        let version = version.to_string();
        let done = sqlx::query("DELETE FROM key_versions WHERE id = ? AND key_id = ?")
            .bind(&version)
            .bind(&key)
            .execute(&mut **tx)
            .await?;
        expect_one(done.rows_affected(), "a version is not of this key")?;
        use_up(tx, &version, at).await?;
    }
    sqlx::query("DELETE FROM policies WHERE key_id = ?").bind(&key).execute(&mut **tx).await?;
    let gone = sqlx::query(
        "DELETE FROM keys WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM key_versions WHERE key_id = ?1)",
    )
    .bind(&key)
    .execute(&mut **tx)
    .await?;
    expect_one(gone.rows_affected(), "the key has got one more version: purge it again")?;
    use_up(tx, &key, at).await?;
    Ok(true)
}

async fn use_up(tx: &mut Tx, id: &str, at: i64) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO purged (id, at) VALUES (?, ?)")
        .bind(id)
        .bind(at)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
