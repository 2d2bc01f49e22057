//! `kms-server init`: a token, a database, the first instance, and two service IDs with one API key each.
//!
//! It never changes what is there. Where there is a token, it is used as it is; where there is a database with
//! anything in it, nothing is done.

use crate::audit::node::{self, NodeError};
use crate::audit::{Audit, AuditError, Outcome, Record};
use crate::config::{Config, Hsm};
use crate::ops::api_keys::random_api_key;
use crate::ops::issue_token::hash;
use crate::policy::{Grant, Role, Scope};
use crate::store::{
    ApiKey, ApiKeyHash, FirstContent, Instance, ServiceId, SigningKey, SqliteStore, Store,
    StoreError, Trail,
};
use crate::token::random_uuid;
use kms_core::clock::Clock;
use kms_core::secret::SecretText;
use kms_core::wdek::WdekVersion;
use kms_daemon::settings::read_secret;
use kms_hsm::pkcs11::{self, Pkcs11Vault, TokenChoice};
use kms_hsm::{Vault, VaultError};
use serde_json::json;
use std::sync::Arc;
use time::OffsetDateTime;
use uuid::Uuid;

/// What the operator needs to know afterwards, and is told once.
#[derive(Debug)]
pub struct Made {
    pub instance: Uuid,
    pub admin: Identity,
    pub viewer: Identity,
}

#[derive(Debug)]
pub struct Identity {
    pub service_id: Uuid,
    pub api_key: SecretText,
}

/// Why nothing was initialised.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error(
        "{database} is initialised already, and API keys are shown only once. Nothing was changed. Make more API keys \
         with `kmsctl`, or name another DATABASE_URL"
    )]
    Done { database: String },
    #[error("cannot read SO_PIN_FILE {path}: {cause}")]
    SoPin { path: String, cause: std::io::Error },
    #[error(
        "the API keys cannot be written out: {0}. Nothing was initialised: make room, or name another output, and run \
         `kms-server init` again. What was printed of them is worth nothing"
    )]
    Untold(std::io::Error),
    #[error("HSM: {0}")]
    Vault(#[from] VaultError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Audit(#[from] AuditError),
}

/// `tell` gets out what nobody can read again afterwards, before it counts.
///
/// # Errors
/// [`InitError`]. What was made in the HSM until then stays there, without a use.
pub async fn init(
    config: &Config,
    clock: Arc<dyn Clock>,
    tell: impl FnOnce(&Made) -> std::io::Result<()>,
) -> Result<(), InitError> {
    let store = SqliteStore::open(&config.server.database, true).await?;
    if store.signing_key().await?.is_some() {
        return Err(InitError::Done { database: config.server.database.display().to_string() });
    }
    let node = node::name(config.server.node_id.as_deref(), &config.server.audit_file)?;
    let audit = Audit::open(&config.server.audit_file, &node, None, clock.clone())?;
    make_token_where_asked(&config.hsm)?;
    let vault = open_vault(&config.hsm, config.operations.wdek_version)?;
    let made = fill(&store, &vault, &audit, clock.wall().into(), tell).await.map(drop);
    // From here on nobody can take the log away and have a new one begun.
    store.keep_audit_head(&node, audit.head()).await?;
    store.close().await;
    made
}

/// The vault that the configuration names.
///
/// # Errors
/// Library or PIN cannot be used.
pub fn open_vault(hsm: &Hsm, wdek_version: WdekVersion) -> Result<Pkcs11Vault, VaultError> {
    Pkcs11Vault::open(vault_settings(hsm, wdek_version))
}

/// What the configuration says about the vault.
#[must_use]
pub fn vault_settings(hsm: &Hsm, wdek_version: WdekVersion) -> pkcs11::Settings {
    pkcs11::Settings {
        library: hsm.library.clone(),
        token: hsm.token.clone(),
        pin: hsm.remembered_pin(),
        sessions: hsm.sessions,
        queue: hsm.queue,
        deadline: hsm.deadline,
        gcm: (wdek_version == WdekVersion::V4_0_0).then_some(hsm.iv_mode),
    }
}

/// Puts the first content into an empty `store`, once `tell` has told its secrets.
///
/// # Errors
/// `Store` with a conflict when the store is not empty.
pub async fn fill(
    store: &dyn Store,
    vault: &dyn Vault,
    audit: &Audit,
    now: OffsetDateTime,
    tell: impl FnOnce(&Made) -> std::io::Result<()>,
) -> Result<Made, InitError> {
    let id = random_uuid(vault).await?;
    let signing_key = SigningKey { id, public: vault.make_signing_key(id).await?, created_at: now };
    let instance =
        Instance { id: random_uuid(vault).await?, name: "default".into(), created_at: now };
    let everywhere = Grant { role: Role::ClusterAdministrator, scope: Scope::Everywhere };
    let here = Grant { role: Role::Viewer, scope: Scope::Instance(instance.id) };
    let (admin_rows, admin) = identity(vault, "admin", everywhere, now).await?;
    let (viewer_rows, viewer) = identity(vault, "viewer", here, now).await?;
    let made = Made { instance: instance.id, admin, viewer };
    let service_ids = vec![admin_rows, viewer_rows];
    tell(&made).map_err(InitError::Untold)?;
    store.initialise(&FirstContent { instance, signing_key, service_ids }).await?;
    audit.record(record(made.instance)).await?;
    Ok(made)
}

impl Made {
    /// For programs.
    #[must_use]
    pub fn json(&self) -> String {
        let identity = |one: &Identity| {
            json!({
                "service_id": format!("ServiceId-{}", one.service_id),
                "api_key": one.api_key.expose(),
            })
        };
        json!({
            "instance_id": self.instance.to_string(),
            "admin": identity(&self.admin),
            "viewer": identity(&self.viewer),
        })
        .to_string()
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        format!(
            "Instance      {}\n\
             Administrator ServiceId-{}\n  API key     {}\n\
             Viewer        ServiceId-{}\n  API key     {}\n\n\
             The API keys are not shown again. The plug-in needs the viewer's; keep the administrator's apart from it.",
            self.instance,
            self.admin.service_id,
            self.admin.api_key.expose(),
            self.viewer.service_id,
            self.viewer.api_key.expose(),
        )
    }
}

type Rows = (ServiceId, ApiKey, ApiKeyHash);

async fn identity(
    vault: &dyn Vault,
    name: &str,
    grant: Grant,
    now: OffsetDateTime,
) -> Result<(Rows, Identity), VaultError> {
    let service_id = ServiceId::with(random_uuid(vault).await?, name.into(), grant, now);
    let api_key = random_api_key(vault).await?;
    let named = ApiKey::new(random_uuid(vault).await?, service_id.id, name.into(), now);
    let identity = Identity { service_id: service_id.id, api_key };
    let hash = hash(&identity.api_key);
    Ok(((service_id, named, hash), identity))
}

/// With an SO PIN at hand a missing token is made. One that is there is never initialised again.
fn make_token_where_asked(hsm: &Hsm) -> Result<(), InitError> {
    let Some(path) = &hsm.so_pin_file else { return Ok(()) };
    let mut so_pin = read_secret(path)
        .map_err(|cause| InitError::SoPin { path: path.display().to_string(), cause })?;
    let so_pin = SecretText::new(std::mem::take(&mut *so_pin));
    // One that is named by serial or slot is there already.
    let TokenChoice::Label(label) = &hsm.token else { return Ok(()) };
    match pkcs11::init_token(&hsm.library, label, &so_pin, &hsm.pin) {
        Ok(token) => {
            tracing::info!("Made {token}.");
            hsm.remembered_pin().forget_refusals();
            Ok(())
        }
        Err(VaultError::Exists) => Ok(()),
        Err(other) => Err(other.into()),
    }
}

fn record(instance: Uuid) -> Record {
    Record { instance: Some(instance), ..Record::new("init", Outcome::Done) }
}
