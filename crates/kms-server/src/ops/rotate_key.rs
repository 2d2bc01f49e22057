//! Gives a CRK a new version, which wraps from then on. All older ones keep unwrapping.

use super::import_key::check_length;
use super::{Call, Error, Subject, active_key, announce, keep_check_value, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::{Key, Version};
use crate::token::random_uuid;
use kms_core::secret::SecretBytes;
use std::time::Duration;
use uuid::Uuid;

/// # Errors
/// `Denied`, `KeyNotFound`, `KeyDeleted`, `KeyState`, `PayloadRequired`, `PayloadUnwanted`, `RotatedTooSoon`, and those
/// of HSM, database and audit log.
pub async fn rotate_key(
    app: &App,
    call: &Call,
    key: Uuid,
    material: Option<SecretBytes>,
) -> Result<(), Error> {
    call.allow_key(Action::RotateKey, key)?;
    let key = active_key(app, call, key).await?;
    check_interval(app, &key)?;
    let version = new_version(app, call, &key, material).await?;
    let _gate = app.gates.change(key.id).await;
    put_in_charge(app, call, &key, version).await?;
    let subject = Subject { target: Some(key.id), version: Some(version), ..Subject::default() };
    record(app, call, Action::RotateKey, subject).await
}

/// Takes its time in the HSM, and changes nothing that anybody sees.
async fn new_version(
    app: &App,
    call: &Call,
    key: &Key,
    material: Option<SecretBytes>,
) -> Result<Uuid, Error> {
    let material = match (key.imported, material) {
        (true, None) => return Err(Error::PayloadRequired),
        (false, Some(_)) => return Err(Error::PayloadUnwanted),
        (_, material) => material,
    };
    material.as_ref().map_or(Ok(()), check_length)?;
    let version = Version { id: random_uuid(&*app.vault).await?, created_at: app.now() };
    let subject = Subject { target: Some(key.id), version: Some(version.id), ..Subject::default() };
    announce(app, call, Action::RotateKey, subject).await?;
    app.store.begin_version(key.id, &version).await?;
    match material {
        Some(material) => app.vault.import_version(version.id, material).await?,
        None => app.vault.create_version(version.id).await?,
    }
    keep_check_value(app, version.id).await?;
    Ok(version.id)
}

async fn put_in_charge(app: &App, call: &Call, key: &Key, version: Uuid) -> Result<(), Error> {
    // It may have been disabled, deleted or rotated by somebody else while the HSM was at work.
    let key = active_key(app, call, key.id).await?;
    check_interval(app, &key)?;
    // Another server on this database has a gate of its own.
    let minimum = app.settings.min_rotation_interval;
    let unless_since = (!minimum.is_zero()).then(|| app.now().saturating_sub(signed(minimum)));
    Ok(app.store.activate_version(key.id, version, app.now(), unless_since).await?)
}

fn signed(time: Duration) -> time::Duration {
    time::Duration::try_from(time).unwrap_or(time::Duration::MAX)
}

/// The interval counts from the previous rotation, not from the creation.
fn check_interval(app: &App, key: &Key) -> Result<(), Error> {
    let minimum = app.settings.min_rotation_interval;
    match key.rotated_at {
        Some(last) if app.now() < last + minimum => {
            Err(Error::RotatedTooSoon { minimum: minimum.as_secs() })
        }
        _ => Ok(()),
    }
}
