//! `kmsplugin --new-crk-version`: makes a CRK version in the HSM and gives it a name. Nothing uses it before the
//! configuration names it, so that it can be on every node first.

use std::io;

use kms_daemon::settings::Mistakes;
use kms_hsm::pkcs11::Pkcs11Vault;
use kms_hsm::{Vault, VaultError};
use uuid::Uuid;

use crate::config::Source;
use crate::provider::pkcs11::settings;

/// The bytes of a UUID.
const ID_LEN: usize = 16;

/// Why there is no new version.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The operator must change the configuration.
    #[error(transparent)]
    Configuration(#[from] Mistakes),
    #[error(transparent)]
    Hsm(#[from] VaultError),
    /// The operating system refused what every process may have.
    #[error("the process cannot run: {0}")]
    Process(#[from] io::Error),
}

/// Makes the version; what it is called is chosen by the HSM's random source.
///
/// # Errors
/// See [`Failure`].
pub fn make(source: &Source) -> Result<Uuid, Failure> {
    let missing = || Mistakes(vec!["PKCS11 is missing: the section that names the HSM".into()]);
    let hsm = source.read()?.hsm.ok_or_else(missing)?;
    let vault = Pkcs11Vault::open(settings(&hsm))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    Ok(runtime.block_on(create(&vault))?)
}

async fn create(vault: &dyn Vault) -> Result<Uuid, VaultError> {
    let random = vault.random(ID_LEN).await?;
    let bytes = random.as_slice().try_into();
    let bytes = bytes.map_err(|_| VaultError::Policy("too few random bytes".to_owned()))?;
    let id = uuid::Builder::from_random_bytes(bytes).into_uuid();
    vault.create_version(id).await?;
    Ok(id)
}
