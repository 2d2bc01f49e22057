//! Between rows and the store's types. What this server never wrote is refused, not guessed at.

use crate::policy::{Caller, Credential, Grant, Reach, Role, Scope};
use crate::store::{Key, KeyState, Policy, ServiceId, SigningKey, StoreError, Version, Wanted};
use kms_hsm::RsaPublic;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;
use time::OffsetDateTime;
use uuid::Uuid;

pub(super) fn signing_key(row: &SqliteRow) -> Result<SigningKey, StoreError> {
    Ok(SigningKey {
        id: uuid(row, "id")?,
        public: RsaPublic { n: row.try_get("modulus")?, e: row.try_get("exponent")? },
        created_at: stamp(row, "created_at")?,
    })
}

pub(super) fn key(row: &SqliteRow) -> Result<Key, StoreError> {
    let tags: String = row.try_get("tags")?;
    Ok(Key {
        id: uuid(row, "id")?,
        instance: uuid(row, "instance_id")?,
        name: row.try_get("name")?,
        description: row.try_get("description")?,
        tags: serde_json::from_str(&tags)
            .map_err(|e| StoreError::Corrupt(format!("keys.tags: {e}")))?,
        imported: row.try_get("imported")?,
        marked: marked(row.try_get("state")?)?,
        expires_at: optional_stamp(row, "expires_at")?,
        created_at: stamp(row, "created_at")?,
        created_by: row.try_get("created_by")?,
        rotated_at: optional_stamp(row, "rotated_at")?,
        deleted_at: optional_stamp(row, "deleted_at")?,
        deleted_by: row.try_get("deleted_by")?,
        purge_begun_at: optional_stamp(row, "purge_begun_at")?,
        version: Version {
            id: uuid(row, "version_id")?,
            created_at: stamp(row, "version_created_at")?,
        },
    })
}

/// An unknown state must never turn into a usable one: it stops the call.
fn marked(state: i64) -> Result<KeyState, StoreError> {
    match state {
        1 => Ok(KeyState::Active),
        2 => Ok(KeyState::Suspended),
        5 => Ok(KeyState::Destroyed),
        other => Err(StoreError::Corrupt(format!("keys.state: {other}"))),
    }
}

/// The service IDs of rows that hold one policy each, or none, ordered by service ID.
pub(super) fn service_ids(rows: &[SqliteRow]) -> Result<Vec<ServiceId>, StoreError> {
    let mut found: Vec<ServiceId> = Vec::new();
    for row in rows {
        let id = uuid(row, "id")?;
        if found.last().is_none_or(|last| last.id != id) {
            found.push(ServiceId {
                id,
                name: row.try_get("name")?,
                description: row.try_get("description")?,
                home: Scope::of(optional_uuid(row, "home")?),
                policies: Vec::new(),
                created_at: stamp(row, "created_at")?,
            });
        }
        if let (Some(last), Some(policy)) = (found.last_mut(), policy(row, id)?) {
            last.policies.push(policy);
        }
    }
    Ok(found)
}

fn policy(row: &SqliteRow, service_id: Uuid) -> Result<Option<Policy>, StoreError> {
    let Some(grant) = grant(row)? else { return Ok(None) };
    let (id, created_at) = (uuid(row, "policy")?, stamp(row, "granted_at")?);
    Ok(Some(Policy { id, service_id, grant, created_at }))
}

/// The caller of rows that hold one of their grants each, or none; `None` without a row.
pub(super) fn caller(
    rows: &[SqliteRow],
    credential: impl FnOnce(&SqliteRow) -> Result<Credential, StoreError>,
) -> Result<Option<Caller>, StoreError> {
    let Some(first) = rows.first() else { return Ok(None) };
    let grants = rows.iter().filter_map(|row| grant(row).transpose());
    let grants = grants.collect::<Result<_, _>>()?;
    Ok(Some(Caller { service_id: uuid(first, "id")?, credential: credential(first)?, grants }))
}

/// `None` where an outer join found no policy.
fn grant(row: &SqliteRow) -> Result<Option<Grant>, StoreError> {
    let Some(role): Option<String> = row.try_get("role")? else { return Ok(None) };
    // An unknown role must never turn into "everywhere" or into nothing: it stops the call.
    let role =
        Role::parse(&role).ok_or_else(|| StoreError::Corrupt(format!("policies.role: {role}")))?;
    let scope = match (optional_uuid(row, "instance_id")?, optional_uuid(row, "key_id")?) {
        (instance, None) => Scope::of(instance),
        (Some(instance), Some(key)) => Scope::Key { instance, key },
        (None, Some(key)) => {
            return Err(StoreError::Corrupt(format!("a policy for {key} without an instance")));
        }
    };
    Ok(Some(Grant { role, scope }))
}

pub(super) fn optional_uuid(row: &SqliteRow, column: &str) -> Result<Option<Uuid>, StoreError> {
    let text: Option<String> = row.try_get(column)?;
    text.map(|text| parse_uuid(&text)).transpose()
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

pub(super) fn optional_stamp(
    row: &SqliteRow,
    column: &str,
) -> Result<Option<OffsetDateTime>, StoreError> {
    let nanoseconds: Option<i64> = row.try_get(column)?;
    nanoseconds.map(time_of).transpose()
}

pub(super) fn time_of(nanoseconds: i64) -> Result<OffsetDateTime, StoreError> {
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

/// A JSON list of ids, or nothing where all keys are meant.
pub(super) fn reach(wanted: &Wanted) -> Option<String> {
    match &wanted.reach {
        Reach::All => None,
        Reach::Only(keys) => {
            let ids: Vec<String> = keys.iter().map(|id| format!("\"{id}\"")).collect();
            Some(format!("[{}]", ids.join(",")))
        }
    }
}

/// SQLITE_CONSTRAINT_TRIGGER: a trigger of ours has said no.
const TRIGGER: &str = "1811";

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(e) if e.is_unique_violation() => {
                StoreError::Conflict("the name is taken".into())
            }
            sqlx::Error::Database(e) if e.is_foreign_key_violation() => {
                StoreError::Conflict("what it belongs to does not exist".into())
            }
            sqlx::Error::Database(e) if e.code().as_deref() == Some(TRIGGER) => {
                StoreError::Conflict(e.message().into())
            }
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnNotFound(_) => {
                StoreError::Corrupt(error.to_string())
            }
            other => StoreError::Unavailable(other.to_string()),
        }
    }
}
