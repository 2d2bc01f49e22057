//! Who may do what: the one place that decides, asked by every operation before it touches store or vault.
//!
//! Roles mean here what they mean in the service whose API this is. No other file compares a role with anything.

use std::collections::BTreeSet;
use std::fmt;
use uuid::Uuid;

macro_rules! actions {
    ($($action:ident = $name:literal,)*) => {
        /// Everything that can be asked of this server with a token. Each has its own line in [`permits`], so that a
        /// new one cannot borrow the permission of another by accident.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Action { $($action,)* }

        impl Action {
            pub const ALL: &[Action] = &[$(Action::$action,)*];

            /// The name in audit records, metrics and logs.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Action::$action => $name,)* }
            }
        }
    };
}

actions! {
    CountKeys = "count_keys",
    ListKeys = "list_keys",
    CreateKey = "create_key",
    ImportKey = "import_key",
    ReadKey = "read_key",
    ReadMetadata = "read_metadata",
    ListVersions = "list_versions",
    Wrap = "wrap",
    Unwrap = "unwrap",
    RotateKey = "rotate_key",
    DisableKey = "disable_key",
    EnableKey = "enable_key",
    DeleteKey = "delete_key",
    PurgeKey = "purge_key",
    ListInstances = "list_instances",
    CreateInstance = "create_instance",
    ListServiceIds = "list_service_ids",
    CreateServiceId = "create_service_id",
    DeleteServiceId = "delete_service_id",
    ListPolicies = "list_policies",
    CreatePolicy = "create_policy",
    DeletePolicy = "delete_policy",
    ListProfiles = "list_profiles",
    CreateProfile = "create_profile",
    DeleteProfile = "delete_profile",
    ListApiKeys = "list_api_keys",
    CreateApiKey = "create_api_key",
    LockApiKey = "lock_api_key",
    UnlockApiKey = "unlock_api_key",
    RotateApiKey = "rotate_api_key",
    DeleteApiKey = "delete_api_key",
}

/// The roles of the cloud service, and those of the on-premises product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    Reader,
    ReaderPlus,
    Writer,
    Manager,
    KeyPurge,
    KmipAdapterManager,
    Viewer,
    Editor,
    Administrator,
    ClusterAdministrator,
}

impl Role {
    pub const ALL: [Role; 10] = [
        Role::Reader,
        Role::ReaderPlus,
        Role::Writer,
        Role::Manager,
        Role::KeyPurge,
        Role::KmipAdapterManager,
        Role::Viewer,
        Role::Editor,
        Role::Administrator,
        Role::ClusterAdministrator,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Reader => "Reader",
            Role::ReaderPlus => "ReaderPlus",
            Role::Writer => "Writer",
            Role::Manager => "Manager",
            Role::KeyPurge => "KeyPurge",
            Role::KmipAdapterManager => "KmipAdapterManager",
            Role::Viewer => "Viewer",
            Role::Editor => "Editor",
            Role::Administrator => "Administrator",
            Role::ClusterAdministrator => "ClusterAdministrator",
        }
    }

    /// `None` for a name that no role has; case matters.
    #[must_use]
    pub fn parse(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.name() == name)
    }
}

/// The table itself.
#[must_use]
pub fn permits(role: Role, action: Action) -> bool {
    use Role::{
        Administrator, ClusterAdministrator, Editor, KeyPurge, KmipAdapterManager, Manager, Reader,
        ReaderPlus, Viewer, Writer,
    };
    let administrators = matches!(role, Administrator | ClusterAdministrator);
    match action {
        Action::Wrap | Action::Unwrap | Action::ReadMetadata | Action::ListVersions => {
            administrators
                || matches!(role, Reader | ReaderPlus | Writer | Manager | Viewer | Editor)
        }
        Action::CountKeys | Action::ListKeys => {
            administrators
                || matches!(
                    role,
                    Reader | ReaderPlus | Writer | Manager | KmipAdapterManager | Editor
                )
        }
        Action::ReadKey => administrators || matches!(role, ReaderPlus | Writer | Manager | Editor),
        Action::CreateKey | Action::ImportKey => {
            administrators || matches!(role, Writer | Manager | Editor)
        }
        Action::RotateKey => administrators || matches!(role, Writer | Manager),
        Action::DisableKey | Action::EnableKey | Action::DeleteKey => {
            administrators || matches!(role, Manager)
        }
        // Nobody destroys a key and removes its last trace by one role.
        Action::PurgeKey => role == KeyPurge,
        Action::ListInstances
        | Action::CreateInstance
        | Action::ListServiceIds
        | Action::CreateServiceId
        | Action::DeleteServiceId
        | Action::ListPolicies
        | Action::CreatePolicy
        | Action::DeletePolicy
        | Action::ListProfiles
        | Action::CreateProfile
        | Action::DeleteProfile
        | Action::ListApiKeys
        | Action::CreateApiKey
        | Action::LockApiKey
        | Action::UnlockApiKey
        | Action::RotateApiKey
        | Action::DeleteApiKey => administrators,
    }
}

/// Where something is done or allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// One key of one instance.
    Key {
        instance: Uuid,
        key: Uuid,
    },
    Instance(Uuid),
    /// Every instance, including those to come.
    Everywhere,
}

impl Scope {
    #[must_use]
    pub fn of(instance: Option<Uuid>) -> Scope {
        instance.map_or(Scope::Everywhere, Scope::Instance)
    }

    #[must_use]
    pub fn instance(self) -> Option<Uuid> {
        match self {
            Scope::Key { instance, .. } | Scope::Instance(instance) => Some(instance),
            Scope::Everywhere => None,
        }
    }

    #[must_use]
    pub fn key(self) -> Option<Uuid> {
        match self {
            Scope::Key { key, .. } => Some(key),
            Scope::Instance(_) | Scope::Everywhere => None,
        }
    }

    /// True when a right in `self` is a right in `other`.
    #[must_use]
    pub fn covers(self, other: Scope) -> bool {
        match self {
            Scope::Everywhere => true,
            Scope::Instance(_) => self.instance() == other.instance(),
            Scope::Key { .. } => self == other,
        }
    }
}

/// One role, in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    pub role: Role,
    pub scope: Scope,
}

/// What proved who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential {
    ApiKey(ApiKeySecret),
    /// A trusted profile, by a token of somebody else's issuer.
    Profile(Uuid),
}

/// One of the secrets that an API key has had: 1 is its first generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApiKeySecret {
    pub api_key: Uuid,
    pub generation: u32,
}

/// Who asks: a service ID with all that was granted to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub service_id: Uuid,
    pub credential: Credential,
    pub grants: Vec<Grant>,
}

impl Caller {
    /// The name in tokens, in `createdBy` and in audit records.
    #[must_use]
    pub fn iam_id(&self) -> String {
        match self.credential {
            Credential::ApiKey(_) => iam_id(self.service_id),
            Credential::Profile(profile) => format!("{PROFILE_PREFIX}{profile}"),
        }
    }

    #[must_use]
    pub fn api_key(&self) -> Option<Uuid> {
        match self.credential {
            Credential::ApiKey(secret) => Some(secret.api_key),
            Credential::Profile(_) => None,
        }
    }
}

/// What a service ID is called in tokens: this, and its UUID.
pub const SERVICE_ID_PREFIX: &str = "iam-ServiceId-";
/// The same for a trusted profile.
pub const PROFILE_PREFIX: &str = "iam-Profile-";

/// `iam-ServiceId-<uuid>`.
#[must_use]
pub fn iam_id(service_id: Uuid) -> String {
    format!("{SERVICE_ID_PREFIX}{service_id}")
}

/// Lets `caller` do `action` in `scope`.
///
/// # Errors
/// [`Denied`], the same whether what the scope names exists or not.
pub fn allow(caller: &Caller, action: Action, scope: Scope) -> Result<(), Denied> {
    let allows = |grant: &Grant| permits(grant.role, action) && grant.scope.covers(scope);
    if caller.grants.iter().any(allows) { Ok(()) } else { Err(Denied { action }) }
}

/// Lets `caller` do `action` in some place or other; which ones, [`allow`] must be asked for each.
///
/// # Errors
/// [`Denied`].
pub fn allow_somewhere(caller: &Caller, action: Action) -> Result<(), Denied> {
    let allows = |grant: &Grant| permits(grant.role, action);
    if caller.grants.iter().any(allows) { Ok(()) } else { Err(Denied { action }) }
}

/// Whether `caller` may know that this instance or key exists: some role of theirs holds there, whatever it permits.
/// Who has a role for one key of an instance may know of the instance.
#[must_use]
pub fn sees(caller: &Caller, scope: Scope) -> bool {
    let at_or_in = |grant: &Grant| grant.scope.covers(scope) || scope.covers(grant.scope);
    caller.grants.iter().any(at_or_in)
}

/// The keys of an instance that something may be done with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    All,
    /// These, if they exist.
    Only(BTreeSet<Uuid>),
}

/// Which keys of `instance` the caller may do `action` with.
///
/// # Errors
/// [`Denied`] when no grant permits it for any key there.
pub fn reach(caller: &Caller, action: Action, instance: Uuid) -> Result<Reach, Denied> {
    if allow(caller, action, Scope::Instance(instance)).is_ok() {
        return Ok(Reach::All);
    }
    let mine = caller.grants.iter().filter(|grant| permits(grant.role, action));
    let here = mine.filter(|grant| grant.scope.instance() == Some(instance));
    let keys: BTreeSet<Uuid> = here.filter_map(|grant| grant.scope.key()).collect();
    if keys.is_empty() { Err(Denied { action }) } else { Ok(Reach::Only(keys)) }
}

/// Whether `caller` may do `action`, which concerns a service ID that lives in `home` and holds `grants`. Whoever can
/// make a credential of a service ID can do all that it can, so nobody manages one that reaches further than they do.
#[must_use]
pub fn manages(caller: &Caller, action: Action, home: Scope, grants: &[Grant]) -> bool {
    let scopes = grants.iter().map(|grant| grant.scope).chain([home]);
    scopes.into_iter().all(|scope| allow(caller, action, scope).is_ok())
}

/// The caller has no right to do this here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no right to {action}")]
pub struct Denied {
    action: Action,
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = self.role.name();
        match self.scope {
            Scope::Key { instance, key } => write!(f, "{role} of key {key} of instance {instance}"),
            Scope::Instance(instance) => write!(f, "{role} of instance {instance}"),
            Scope::Everywhere => write!(f, "{role} of every instance"),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests;
