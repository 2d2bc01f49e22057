//! Heads and the key of the audit logs.

use super::SqliteStore;
use super::rows::{nanoseconds, signing_key};
use crate::store::{SigningKey, StoreError, Trail};
use async_trait::async_trait;
use kms_core::audit::{Hash, Link};
use sqlx::Row;

#[async_trait]
impl Trail for SqliteStore {
    async fn audit_head(&self, node: &str) -> Result<Option<Link>, StoreError> {
        let row = sqlx::query("SELECT seq, hash FROM audit_heads WHERE node = ?")
            .bind(node)
            .fetch_optional(&self.pool)
            .await?;
        row.map(|row| {
            let (seq, hash): (i64, String) = (row.try_get("seq")?, row.try_get("hash")?);
            let strange = || StoreError::Corrupt(format!("audit_heads of {node}"));
            Ok(Link {
                seq: u64::try_from(seq).map_err(|_| strange())?,
                hash: Hash::parse(&hash).ok_or_else(strange)?,
            })
        })
        .transpose()
    }

    async fn keep_audit_head(&self, node: &str, head: Link) -> Result<(), StoreError> {
        let seq = i64::try_from(head.seq)
            .map_err(|_| StoreError::Corrupt("an audit log without end".into()))?;
        let mut tx = self.write().await?;
        sqlx::query(
            "INSERT INTO audit_heads (node, seq, hash) VALUES (?, ?, ?)
             ON CONFLICT (node) DO UPDATE SET seq = excluded.seq, hash = excluded.hash
             WHERE excluded.seq > seq",
        )
        .bind(node)
        .bind(seq)
        .bind(head.hash.to_string())
        .execute(&mut *tx)
        .await?;
        Ok(tx.commit().await?)
    }

    async fn audit_key(&self) -> Result<Option<SigningKey>, StoreError> {
        sqlx::query("SELECT id, modulus, exponent, created_at FROM audit_keys")
            .fetch_optional(&self.pool)
            .await?
            .map(|row| signing_key(&row))
            .transpose()
    }

    async fn keep_audit_key(&self, key: &SigningKey) -> Result<SigningKey, StoreError> {
        let mut tx = self.write().await?;
        sqlx::query(
            "INSERT INTO audit_keys (one, id, modulus, exponent, created_at) VALUES (1, ?, ?, ?, ?)
             ON CONFLICT (one) DO NOTHING",
        )
        .bind(key.id.to_string())
        .bind(&key.public.n)
        .bind(&key.public.e)
        .bind(nanoseconds(key.created_at)?)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        let kept = self.audit_key().await?;
        kept.ok_or_else(|| StoreError::Corrupt("audit_keys is empty".into()))
    }

    async fn replace_audit_key(&self, key: &SigningKey) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        sqlx::query("UPDATE audit_keys SET id = ?, modulus = ?, exponent = ?, created_at = ?")
            .bind(key.id.to_string())
            .bind(&key.public.n)
            .bind(&key.public.e)
            .bind(nanoseconds(key.created_at)?)
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }
}
