//! Makes a CRK from key material that the caller brings. It enters the HSM wrapped and is unwrapped there.

use super::create_key::{Description, begin};
use super::{Call, Error, Subject, keep_check_value, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::Key;
use kms_core::secret::SecretBytes;

/// # Errors
/// `Denied`, `Field` (length of the material), and those of HSM, database and audit log.
pub async fn import_key(
    app: &App,
    call: &Call,
    asked: Description,
    material: SecretBytes,
) -> Result<Key, Error> {
    call.allow(Action::ImportKey)?;
    check_length(&material)?;
    let key = begin(app, call, Action::ImportKey, asked).await?;
    app.vault.import_version(key.version.id, material).await?;
    keep_check_value(app, key.version.id).await?;
    app.store.activate_key(key.id, key.version.id).await?;
    record(app, call, Action::ImportKey, Subject::key(&key)).await?;
    Ok(key)
}

/// AES has keys of three lengths.
pub(super) fn check_length(material: &SecretBytes) -> Result<(), Error> {
    match material.len() {
        16 | 24 | 32 => Ok(()),
        other => Err(Error::Field {
            name: "payload",
            why: format!("must hold 16, 24 or 32 bytes of key material, not {other}"),
        }),
    }
}
