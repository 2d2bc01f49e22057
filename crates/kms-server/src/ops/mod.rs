//! What the server does, one verb in one file. Each reads the same way: the policy allows, the store knows, the vault
//! does, the audit record is durable, the answer goes out. A verb that changes something writes a record before, too.
//! Nothing here knows HTTP or JSON.

pub mod api_keys;
pub mod create_key;
pub mod delete_key;
pub mod disable_key;
pub mod enable_key;
pub mod get_key;
pub mod import_key;
pub mod instances;
pub mod issue_token;
pub mod list_keys;
pub mod policies;
pub mod profiles;
pub mod purge_key;
pub mod refused;
pub mod rotate_key;
pub mod service_ids;
pub mod unwrap;
pub mod wrap;

use crate::app::App;
use crate::audit::{AuditError, Outcome, Record};
use crate::issuers::LoginError;
use crate::limits::TooMuch;
use crate::policy::{self, Action, Caller, Denied, Scope};
use crate::store::{Key, KeyState, StoreError};
use kms_hsm::VaultError;
use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;
use uuid::Uuid;

/// A call by somebody whose token was good, before it is known what they may do.
#[derive(Debug, Clone)]
pub struct Call {
    pub caller: Caller,
    /// Where: the instance named in the request, or the whole server.
    pub scope: Scope,
    pub origin: Origin,
}

/// Where a call comes from, as its record says it.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The other end of the connection. Behind a proxy that is the proxy: what a header says of others is a claim.
    pub peer: SocketAddr,
    /// The caller's own name for the call.
    pub correlation: Option<String>,
}

impl Call {
    /// The same call, about another place.
    fn at(&self, scope: Scope) -> Call {
        Call { scope, ..self.clone() }
    }

    fn allow(&self, action: Action) -> Result<(), Denied> {
        policy::allow(&self.caller, action, self.scope)
    }

    /// Asked before the store is: whoever has no role for this key hears the same whether it exists or not.
    fn allow_key(&self, action: Action, key: Uuid) -> Result<(), Error> {
        let scope = Scope::Key { instance: self.instance()?, key };
        match policy::allow(&self.caller, action, scope) {
            Err(_) if !policy::sees(&self.caller, scope) => Err(Error::KeyNotFound),
            allowed => Ok(allowed?),
        }
    }

    /// The instance of a call to the key API.
    fn instance(&self) -> Result<Uuid, Error> {
        self.scope.instance().ok_or(Error::NoInstance)
    }
}

/// Why an operation was not done, grouped by who must act.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    // The caller sends something else.
    #[error("{name} {why}")]
    Field { name: &'static str, why: String },
    #[error("{name} {why}")]
    Query { name: &'static str, why: String },
    #[error("this key was imported: rotating it needs the new key material as payload")]
    PayloadRequired,
    #[error("this key was generated in the HSM: rotating it takes no payload")]
    PayloadUnwanted,
    #[error("the ciphertext is invalid or corrupted, or the associated data differs")]
    NotAuthentic,
    #[error("not built into this server: {0}")]
    NotBuilt(&'static str),
    // The caller names something else, or somebody grants them the right.
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("no instance of this id may be used by this caller")]
    NoInstance,
    #[error("key does not exist")]
    KeyNotFound,
    #[error("key has already been deleted")]
    KeyDeleted,
    #[error("key is not in a valid state")]
    KeyState,
    #[error("the key was rotated less than {minimum} s ago")]
    RotatedTooSoon { minimum: u64 },
    #[error("the key may be purged {} s after it was destroyed", wait.as_secs())]
    PurgedTooSoon { wait: Duration },
    #[error("the active version of this key was used as often as is safe: rotate the key")]
    UsedUp,
    #[error("{0} does not exist")]
    NotFound(&'static str),
    #[error("{0}")]
    Conflict(String),
    #[error("Provided API key could not be found")]
    UnknownApiKey,
    #[error("{}", LoginError::NotTrusted)]
    NotTrusted,
    /// Only who holds a genuine token is told.
    #[error("no profile of that name trusts the subject of this token")]
    NoProfile,
    // The caller waits a moment.
    #[error(transparent)]
    TooMuch(#[from] TooMuch),
    // The operator looks at the HSM, the database or the audit log.
    #[error("HSM: {0}")]
    Vault(VaultError),
    #[error("database: {0}")]
    Store(StoreError),
    #[error(transparent)]
    Audit(#[from] AuditError),
    // The operator looks at the issuer of somebody's token.
    #[error("{0}")]
    IssuerAway(LoginError),
}

impl From<LoginError> for Error {
    fn from(error: LoginError) -> Self {
        match error {
            LoginError::NotTrusted => Error::NotTrusted,
            LoginError::Unavailable { .. } => Error::IssuerAway(error),
        }
    }
}

impl From<VaultError> for Error {
    fn from(error: VaultError) -> Self {
        Error::Vault(error)
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict(why) => Error::Conflict(why),
            other => Error::Store(other),
        }
    }
}

/// Lets a call into its instance: one that exists and that the caller has any right in. Both failures look alike, so
/// that nobody learns which instances there are.
///
/// # Errors
/// `NoInstance`, and those of the database.
pub async fn enter_instance(app: &App, call: &Call) -> Result<(), Error> {
    let id = call.instance()?;
    if policy::sees(&call.caller, call.scope) && app.store.instance_exists(id).await? {
        Ok(())
    } else {
        Err(Error::NoInstance)
    }
}

/// What a record names besides the caller.
#[derive(Debug, Default, Clone)]
struct Subject {
    target: Option<Uuid>,
    version: Option<Uuid>,
    /// The version that an unwrapped DEK was wrapped with again.
    rewrapped: Option<Uuid>,
    service_id: Option<Uuid>,
    grant: Option<String>,
}

impl Subject {
    fn of(target: Uuid) -> Subject {
        Subject { target: Some(target), ..Subject::default() }
    }

    /// Something of a service ID. It is named, because a deleted one is nowhere else.
    fn of_service_id(service_id: Uuid, target: Uuid) -> Subject {
        Subject { service_id: Some(service_id), ..Subject::of(target) }
    }

    fn granting(self, grant: impl Display) -> Subject {
        Subject { grant: Some(grant.to_string()), ..self }
    }

    fn key(key: &Key) -> Subject {
        let version = Some(key.version.id);
        Subject { target: Some(key.id), version, ..Subject::default() }
    }
}

/// Writes that `action` was done. Every operation ends with it.
async fn record(app: &App, call: &Call, action: Action, subject: Subject) -> Result<(), Error> {
    write(app, call, action, subject, Outcome::Done).await
}

/// Writes that `action` is about to be done. What changes anything begins with it: else whoever fills the disk of the log
/// first could give themselves rights, or destroy keys, without a trace; and so could a crash before the last record.
///
/// # Errors
/// When the record cannot be written: then nothing is changed.
async fn announce(app: &App, call: &Call, action: Action, subject: Subject) -> Result<(), Error> {
    write(app, call, action, subject, Outcome::Begun).await
}

async fn write(
    app: &App,
    call: &Call,
    action: Action,
    subject: Subject,
    outcome: Outcome,
) -> Result<(), Error> {
    let record = Record {
        caller: Some(call.caller.iam_id()),
        api_key: call.caller.api_key(),
        instance: call.scope.instance(),
        target: subject.target,
        version: subject.version,
        rewrapped: subject.rewrapped,
        service_id: subject.service_id,
        grant: subject.grant,
        correlation: call.origin.correlation.clone(),
        peer: Some(call.origin.peer),
        ..Record::new(action.name(), outcome)
    };
    durable(app, record).await
}

/// Returns when `record` is on disk; counts it, and how long that took.
async fn durable(app: &App, record: Record) -> Result<(), Error> {
    let began = app.clock.now();
    let written = app.audit.record(record).await;
    app.metrics.recorded(written.is_ok(), app.clock.now().saturating_sub(began));
    Ok(written?)
}

/// Notes by what `version` is known again, before anything is wrapped with it.
async fn keep_check_value(app: &App, version: Uuid) -> Result<(), Error> {
    let value = app.vault.check_value(version).await?;
    Ok(app.store.keep_check_value(version, value).await?)
}

/// The key `id`, if it may be changed.
async fn living_key(app: &App, call: &Call, id: Uuid) -> Result<Key, Error> {
    let key = app.store.key(call.instance()?, id).await?.ok_or(Error::KeyNotFound)?;
    match key.state(app.now()) {
        KeyState::Destroyed => Err(Error::KeyDeleted),
        KeyState::Active | KeyState::Suspended | KeyState::Deactivated => Ok(key),
    }
}

/// The key `id`, if what it wrapped may be unwrapped.
async fn opening_key(app: &App, call: &Call, id: Uuid) -> Result<Key, Error> {
    let key = living_key(app, call, id).await?;
    match key.state(app.now()) {
        KeyState::Active | KeyState::Deactivated => Ok(key),
        KeyState::Suspended | KeyState::Destroyed => Err(Error::KeyState),
    }
}

/// The key `id`, if it may be used for new things.
async fn active_key(app: &App, call: &Call, id: Uuid) -> Result<Key, Error> {
    let key = living_key(app, call, id).await?;
    match key.state(app.now()) {
        KeyState::Active => Ok(key),
        KeyState::Suspended | KeyState::Deactivated | KeyState::Destroyed => Err(Error::KeyState),
    }
}
