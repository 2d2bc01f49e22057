//! Service IDs, policies and credentials in SQLite.

use super::rows::{caller, nanoseconds, optional_stamp, service_ids, stamp, uuid};
use super::{SqliteStore, Tx};
use crate::policy::{ApiKeySecret, Caller, Credential, Role};
use crate::store::{Access, ApiKey, ApiKeyHash, NewSecret, Policy, Profile, ServiceId, StoreError};
use async_trait::async_trait;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;
use time::OffsetDateTime;
use uuid::Uuid;

/// Whoever gets no answer to a rotation has time to ask for another one.
const LONG_ENOUGH: time::Duration = time::Duration::minutes(1);

#[async_trait]
impl Access for SqliteStore {
    async fn add_service_id(&self, service_id: &ServiceId) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        insert_service_id(&mut tx, service_id).await?;
        Ok(tx.commit().await?)
    }

    async fn service_ids(&self) -> Result<Vec<ServiceId>, StoreError> {
        let rows = sqlx::query(
            "SELECT s.id, s.name, s.description, s.instance_id AS home, s.created_at,
                    p.id AS policy, p.role, p.instance_id, p.key_id, p.created_at AS granted_at
             FROM service_ids s LEFT JOIN policies p ON p.service_id = s.id
             ORDER BY s.created_at, s.id, p.created_at, p.id",
        )
        .fetch_all(&self.pool)
        .await?;
        service_ids(&rows)
    }

    async fn service_id(&self, id: Uuid) -> Result<Option<ServiceId>, StoreError> {
        let rows = sqlx::query(
            "SELECT s.id, s.name, s.description, s.instance_id AS home, s.created_at,
                    p.id AS policy, p.role, p.instance_id, p.key_id, p.created_at AS granted_at
             FROM service_ids s LEFT JOIN policies p ON p.service_id = s.id
             WHERE s.id = ? ORDER BY p.created_at, p.id",
        )
        .bind(id.to_string())
        .fetch_all(&self.pool)
        .await?;
        Ok(service_ids(&rows)?.pop())
    }

    async fn remove_service_id(&self, id: Uuid) -> Result<bool, StoreError> {
        let mut tx = self.write().await?;
        let before = administrators(&mut tx, None).await?;
        let mut removed = 0;
        for statement in [
            "DELETE FROM profiles WHERE service_id = ?",
            "DELETE FROM api_keys WHERE service_id = ?",
            "DELETE FROM policies WHERE service_id = ?",
            "DELETE FROM service_ids WHERE id = ?",
        ] {
            let done = sqlx::query(statement).bind(id.to_string()).execute(&mut *tx).await?;
            removed = done.rows_affected();
        }
        before.outlived_by(administrators(&mut tx, None).await?)?;
        tx.commit().await?;
        Ok(removed == 1)
    }

    async fn add_policy(&self, policy: &Policy) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        insert_policy(&mut tx, policy).await?;
        Ok(tx.commit().await?)
    }

    async fn remove_policy(&self, id: Uuid) -> Result<bool, StoreError> {
        let mut tx = self.write().await?;
        let before = administrators(&mut tx, None).await?;
        let done = sqlx::query("DELETE FROM policies WHERE id = ?")
            .bind(id.to_string())
            .execute(&mut *tx)
            .await?;
        before.outlived_by(administrators(&mut tx, None).await?)?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    async fn add_api_key(&self, key: &ApiKey, hash: &ApiKeyHash) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        insert_api_key(&mut tx, key, hash).await?;
        Ok(tx.commit().await?)
    }

    async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, service_id, name, created_at, rotated_at, locked_at FROM api_keys
             WHERE revoked_at IS NULL ORDER BY created_at, id",
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
                    rotated_at: optional_stamp(row, "rotated_at")?,
                    locked_at: optional_stamp(row, "locked_at")?,
                })
            })
            .collect()
    }

    async fn lock_api_key(&self, id: Uuid, at: Option<OffsetDateTime>) -> Result<bool, StoreError> {
        let mut tx = self.write().await?;
        let before = administrators(&mut tx, None).await?;
        let done = sqlx::query(
            "UPDATE api_keys SET locked_at = ?1
             WHERE id = ?2 AND revoked_at IS NULL AND (locked_at IS NULL) = (?1 IS NOT NULL)",
        )
        .bind(at.map(nanoseconds).transpose()?)
        .bind(id.to_string())
        .execute(&mut *tx)
        .await?;
        before.outlived_by(administrators(&mut tx, None).await?)?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    async fn rotate_api_key(&self, id: Uuid, new: &NewSecret) -> Result<bool, StoreError> {
        let mut tx = self.write().await?;
        if new.old_until.is_none_or(|end| end < new.at + LONG_ENOUGH) {
            let before = administrators(&mut tx, None).await?;
            before.rotated_into(administrators(&mut tx, Some(id)).await?)?;
        }
        // Where the caller logged in with the secret before the newest, nobody may have got the newest: then it is that
        // one which ends, with its tokens. Two generations on, none of them is good for either of the others.
        let done = sqlx::query(
            "UPDATE api_keys SET hash = ?1, rotated_at = ?2, old_until = ?3,
                    generation = generation + CASE WHEN ?5 = generation - 1 AND old_hash IS NOT NULL THEN 2 ELSE 1 END,
                    old_hash = CASE WHEN ?3 IS NULL THEN NULL
                                    WHEN ?5 = generation - 1 AND old_hash IS NOT NULL THEN old_hash
                                    ELSE hash END
             WHERE id = ?4 AND revoked_at IS NULL",
        )
        .bind(new.hash.as_slice())
        .bind(nanoseconds(new.at)?)
        .bind(new.old_until.map(nanoseconds).transpose()?)
        .bind(id.to_string())
        .bind(new.by.filter(|by| by.api_key == id).map(|by| by.generation))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    async fn revoke_api_key(&self, id: Uuid, at: OffsetDateTime) -> Result<bool, StoreError> {
        let mut tx = self.write().await?;
        let before = administrators(&mut tx, None).await?;
        let done =
            sqlx::query("UPDATE api_keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL")
                .bind(nanoseconds(at)?)
                .bind(id.to_string())
                .execute(&mut *tx)
                .await?;
        before.outlived_by(administrators(&mut tx, None).await?)?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    async fn add_profile(&self, profile: &Profile) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO profiles (id, service_id, name, issuer, subject, created_at)
             VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(profile.id.to_string())
        .bind(profile.service_id.to_string())
        .bind(&profile.name)
        .bind(&profile.issuer)
        .bind(&profile.subject)
        .bind(nanoseconds(profile.created_at)?)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    async fn profiles(&self) -> Result<Vec<Profile>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, service_id, name, issuer, subject, created_at FROM profiles
             ORDER BY created_at, id",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(Profile {
                    id: uuid(row, "id")?,
                    service_id: uuid(row, "service_id")?,
                    name: row.try_get("name")?,
                    issuer: row.try_get("issuer")?,
                    subject: row.try_get("subject")?,
                    created_at: stamp(row, "created_at")?,
                })
            })
            .collect()
    }

    async fn remove_profile(&self, id: Uuid) -> Result<bool, StoreError> {
        let done = sqlx::query("DELETE FROM profiles WHERE id = ?")
            .bind(id.to_string())
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    async fn caller_by_hash(
        &self,
        hash: &ApiKeyHash,
        now: OffsetDateTime,
    ) -> Result<Option<Caller>, StoreError> {
        let rows = sqlx::query(
            "SELECT s.id, a.id AS api_key, a.generation - (a.hash <> ?1) AS generation,
                    p.role, p.instance_id, p.key_id
             FROM api_keys a JOIN service_ids s ON s.id = a.service_id
                  LEFT JOIN policies p ON p.service_id = s.id
             WHERE (a.hash = ?1 OR (a.old_hash = ?1 AND a.old_until > ?2))
               AND a.revoked_at IS NULL AND a.locked_at IS NULL",
        )
        .bind(hash.as_slice())
        .bind(nanoseconds(now)?)
        .fetch_all(&self.pool)
        .await?;
        caller(&rows, api_key)
    }

    async fn caller(
        &self,
        service_id: Uuid,
        secret: &ApiKeySecret,
        now: OffsetDateTime,
    ) -> Result<Option<Caller>, StoreError> {
        let ask = async {
            let rows = sqlx::query(
                "SELECT s.id, a.id AS api_key, ?3 AS generation, p.role, p.instance_id, p.key_id,
                        CASE WHEN a.generation > ?3 THEN a.old_until END AS until
                 FROM api_keys a JOIN service_ids s ON s.id = a.service_id
                      LEFT JOIN policies p ON p.service_id = s.id
                 WHERE a.id = ?1 AND s.id = ?2
                   AND (a.generation = ?3 OR (a.generation = ?3 + 1 AND a.old_until IS NOT NULL))
                   AND a.revoked_at IS NULL AND a.locked_at IS NULL",
            )
            .bind(secret.api_key.to_string())
            .bind(service_id.to_string())
            .bind(secret.generation)
            .fetch_all(&self.pool)
            .await?;
            known(&rows)
        };
        let known = self.callers.get(&self.wal_index, (service_id, *secret), ask).await?;
        Ok(known.filter(|known| known.until.is_none_or(|end| end > now)).map(|known| known.caller))
    }

    async fn caller_by_profile(&self, id: Uuid) -> Result<Option<Caller>, StoreError> {
        let ask = async {
            let rows = sqlx::query(
                "SELECT s.id, f.id AS profile, p.role, p.instance_id, p.key_id
                 FROM profiles f JOIN service_ids s ON s.id = f.service_id
                      LEFT JOIN policies p ON p.service_id = s.id
                 WHERE f.id = ?",
            )
            .bind(id.to_string())
            .fetch_all(&self.pool)
            .await?;
            caller(&rows, |row| Ok(Credential::Profile(uuid(row, "profile")?)))
        };
        self.profiles.get(&self.wal_index, id, ask).await
    }
}

/// By what the whole server can be managed.
#[derive(Debug, Clone, Copy)]
struct Administrators {
    /// Whoever could log in.
    policies: i64,
    /// That are good now.
    api_keys: i64,
}

/// As it would be without the API key `without`.
async fn administrators(tx: &mut Tx, without: Option<Uuid>) -> Result<Administrators, StoreError> {
    let row = sqlx::query(
        "WITH them AS (SELECT service_id FROM policies WHERE role = ?1 AND instance_id IS NULL)
         SELECT (SELECT count(*) FROM them) AS policies,
                (SELECT count(*) FROM api_keys WHERE revoked_at IS NULL AND locked_at IS NULL AND id IS NOT ?2
                     AND service_id IN (SELECT service_id FROM them)) AS api_keys",
    )
    .bind(Role::ClusterAdministrator.name())
    .bind(without.map(|id| id.to_string()))
    .fetch_one(&mut **tx)
    .await?;
    Ok(Administrators { policies: row.try_get("policies")?, api_keys: row.try_get("api_keys")? })
}

impl Administrators {
    /// Whether a change that leaves `after` may be committed. What is lost already is in nobody's way.
    fn outlived_by(self, after: Administrators) -> Result<(), StoreError> {
        let why = if ends(self.policies, after.policies) {
            "this is the last ClusterAdministrator of the server, without whom nobody can manage it: give another \
             service ID that role and an API key first"
        } else if ends(self.api_keys, after.api_keys) {
            "without this, no ClusterAdministrator of the server can log in by an API key, and nobody can manage it for \
             good: make or unlock another one's API key first"
        } else {
            return Ok(());
        };
        Err(StoreError::Conflict(why.into()))
    }

    /// Whether the secret of an API key may end at once, which leaves `after` until its next one has arrived.
    fn rotated_into(self, after: Administrators) -> Result<(), StoreError> {
        if !ends(self.api_keys, after.api_keys) {
            return Ok(());
        }
        let why = format!(
            "this is the last API key by which a ClusterAdministrator of the server can log in, and if the answer with its \
             new secret were lost, nobody could manage it for good: give an overlap of at least {} seconds",
            LONG_ENOUGH.whole_seconds()
        );
        Err(StoreError::Conflict(why))
    }
}

fn ends(before: i64, after: i64) -> bool {
    before > 0 && after == 0
}

/// A caller by one secret of an API key, and when that ends because there is a newer one. No time is in the question,
/// so the answer stays right while time passes.
#[derive(Debug, Clone)]
pub(super) struct Known {
    caller: Caller,
    until: Option<OffsetDateTime>,
}

fn known(rows: &[SqliteRow]) -> Result<Option<Known>, StoreError> {
    let Some(caller) = caller(rows, api_key)? else { return Ok(None) };
    let until = rows.first().map(|row| optional_stamp(row, "until")).transpose()?.flatten();
    Ok(Some(Known { caller, until }))
}

fn api_key(row: &SqliteRow) -> Result<Credential, StoreError> {
    let generation: i64 = row.try_get("generation")?;
    let generation = u32::try_from(generation)
        .map_err(|_| StoreError::Corrupt(format!("api_keys.generation: {generation}")))?;
    Ok(Credential::ApiKey(ApiKeySecret { api_key: uuid(row, "api_key")?, generation }))
}

pub(super) async fn insert_service_id(
    tx: &mut Tx,
    service_id: &ServiceId,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO service_ids (id, name, description, instance_id, created_at)
         VALUES (?, ?, ?, ?, ?)",
    )
    .bind(service_id.id.to_string())
    .bind(&service_id.name)
    .bind(&service_id.description)
    .bind(service_id.home.instance().map(|id| id.to_string()))
    .bind(nanoseconds(service_id.created_at)?)
    .execute(&mut **tx)
    .await?;
    for policy in &service_id.policies {
        insert_policy(tx, policy).await?;
    }
    Ok(())
}

async fn insert_policy(tx: &mut Tx, policy: &Policy) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO policies (id, service_id, role, instance_id, key_id, created_at)
         VALUES (?, ?, ?, ?, ?, ?)",
    )
    .bind(policy.id.to_string())
    .bind(policy.service_id.to_string())
    .bind(policy.grant.role.name())
    .bind(policy.grant.scope.instance().map(|id| id.to_string()))
    .bind(policy.grant.scope.key().map(|id| id.to_string()))
    .bind(nanoseconds(policy.created_at)?)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

pub(super) async fn insert_api_key(
    tx: &mut Tx,
    key: &ApiKey,
    hash: &ApiKeyHash,
) -> Result<(), StoreError> {
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
