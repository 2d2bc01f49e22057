//! Gives a CRK a new version, which wraps from then on. All older ones keep unwrapping.

use super::import_key::check_length;
use super::{Call, Error, Subject, active_key, keep_check_value, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::{Key, Version};
use crate::token::random_uuid;
use kms_core::secret::SecretBytes;
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
    let version = new_version(app, &key, material).await?;
    let _gate = app.gates.change(key.id).await;
    put_in_charge(app, call, &key, version).await?;
    let subject = Subject { target: Some(key.id), version: Some(version) };
    record(app, call, Action::RotateKey, subject).await
}

/// Takes its time in the HSM, and changes nothing that anybody sees.
async fn new_version(app: &App, key: &Key, material: Option<SecretBytes>) -> Result<Uuid, Error> {
    let material = match (key.imported, material) {
        (true, None) => return Err(Error::PayloadRequired),
        (false, Some(_)) => return Err(Error::PayloadUnwanted),
        (_, material) => material,
    };
    material.as_ref().map_or(Ok(()), check_length)?;
    let version = Version { id: random_uuid(&*app.vault).await?, created_at: app.now() };
    app.store.begin_version(key.id, &version).await?;
    match material {
        Some(material) => app.vault.import_version(version.id, material).await?,
        None => app.vault.create_version(version.id).await?,
    }
    keep_check_value(app, version.id).await?;
    Ok(version.id)
}

async fn put_in_charge(app: &App, call: &Call, key: &Key, version: Uuid) -> Result<(), Error> {
    // It may have been disabled or deleted while the HSM was at work.
    active_key(app, call, key.id).await?;
    Ok(app.store.activate_version(key.id, version, app.now()).await?)
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
