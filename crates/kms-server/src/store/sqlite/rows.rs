//! Between rows and the store's types. What this server never wrote is refused, not guessed at.

use crate::policy::{Caller, Grant, Role, Scope};
use crate::store::{Key, ServiceId, StoreError, Version, Wanted};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;
use time::OffsetDateTime;
use uuid::Uuid;

pub(super) fn key(row: &SqliteRow) -> Result<Key, StoreError> {
    let tags: String = row.try_get("tags")?;
    let state: i64 = row.try_get("state")?;
    Ok(Key {
        id: uuid(row, "id")?,
        instance: uuid(row, "instance_id")?,
        name: row.try_get("name")?,
        description: row.try_get("description")?,
        tags: serde_json::from_str(&tags)
            .map_err(|e| StoreError::Corrupt(format!("keys.tags: {e}")))?,
        imported: row.try_get("imported")?,
        destroyed: state == 5,
        expires_at: optional_stamp(row, "expires_at")?,
        created_at: stamp(row, "created_at")?,
        created_by: row.try_get("created_by")?,
        rotated_at: optional_stamp(row, "rotated_at")?,
        deleted_at: optional_stamp(row, "deleted_at")?,
        deleted_by: row.try_get("deleted_by")?,
        version: Version {
            id: uuid(row, "version_id")?,
            created_at: stamp(row, "version_created_at")?,
        },
    })
}

pub(super) fn service_id(row: &SqliteRow) -> Result<ServiceId, StoreError> {
    Ok(ServiceId {
        id: uuid(row, "id")?,
        name: row.try_get("name")?,
        description: row.try_get("description")?,
        grant: grant(row)?,
        created_at: stamp(row, "created_at")?,
    })
}

pub(super) fn caller(row: &SqliteRow) -> Result<Caller, StoreError> {
    Ok(Caller { service_id: uuid(row, "id")?, api_key: uuid(row, "api_key")?, grant: grant(row)? })
}

fn grant(row: &SqliteRow) -> Result<Grant, StoreError> {
    let role: String = row.try_get("role")?;
    // An unknown role must never turn into "everywhere" or into nothing: it stops the call.
    let role = Role::parse(&role)
        .ok_or_else(|| StoreError::Corrupt(format!("service_ids.role: {role}")))?;
    let instance: Option<String> = row.try_get("instance_id")?;
    let instance = instance.map(|text| parse_uuid(&text)).transpose()?;
    Ok(Grant { role, scope: Scope::of(instance) })
}

pub(super) fn uuid(row: &SqliteRow, column: &str) -> Result<Uuid, StoreError> {
    let text: String = row.try_get(column)?;
    parse_uuid(&text)
}

fn parse_uuid(text: &str) -> Result<Uuid, StoreError> {
    text.parse().map_err(|_| StoreError::Corrupt(format!("{text:?} is not a UUID")))
}

pub(super) fn stamp(row: &SqliteRow, column: &str) -> Result<OffsetDateTime, StoreError> {
    time_of(row.try_get(column)?)
}

fn optional_stamp(row: &SqliteRow, column: &str) -> Result<Option<OffsetDateTime>, StoreError> {
    let nanoseconds: Option<i64> = row.try_get(column)?;
    nanoseconds.map(time_of).transpose()
}

fn time_of(nanoseconds: i64) -> Result<OffsetDateTime, StoreError> {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(nanoseconds))
        .map_err(|e| StoreError::Corrupt(format!("a time: {e}")))
}

pub(super) fn nanoseconds(at: OffsetDateTime) -> Result<i64, StoreError> {
    i64::try_from(at.unix_timestamp_nanos())
        .map_err(|_| StoreError::Conflict(format!("{at} is out of range")))
}

pub(super) fn states(wanted: &Wanted) -> String {
    let numbers: Vec<String> = wanted.states.iter().map(|s| s.number().to_string()).collect();
    format!("[{}]", numbers.join(","))
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(e) if e.is_unique_violation() => {
                StoreError::Conflict("the name is taken".into())
            }
            sqlx::Error::Database(e) if e.is_foreign_key_violation() => {
                StoreError::Conflict("what it belongs to does not exist".into())
            }
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnNotFound(_) => {
                StoreError::Corrupt(error.to_string())
            }
            other => StoreError::Unavailable(other.to_string()),
        }
    }
}
