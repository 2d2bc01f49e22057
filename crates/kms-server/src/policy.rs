//! Who may do what: the one place that decides, asked by every operation before it touches store or vault.
//!
//! Roles mean here what they mean in the service whose API this is. No other file compares a role with anything.

use std::fmt;
use uuid::Uuid;

/// Everything that can be asked of this server with a token. Each has its own line in [`permits`], so that a new one
/// cannot borrow the permission of another by accident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    CountKeys,
    ListKeys,
    CreateKey,
    ImportKey,
    ReadKey,
    ReadMetadata,
    ListVersions,
    Wrap,
    Unwrap,
    RotateKey,
    DeleteKey,
    ListInstances,
    CreateInstance,
    ListServiceIds,
    CreateServiceId,
    ListApiKeys,
    CreateApiKey,
    DeleteApiKey,
}

impl Action {
    /// The name in audit records, metrics and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Action::CountKeys => "count_keys",
            Action::ListKeys => "list_keys",
            Action::CreateKey => "create_key",
            Action::ImportKey => "import_key",
            Action::ReadKey => "read_key",
            Action::ReadMetadata => "read_metadata",
            Action::ListVersions => "list_versions",
            Action::Wrap => "wrap",
            Action::Unwrap => "unwrap",
            Action::RotateKey => "rotate_key",
            Action::DeleteKey => "delete_key",
            Action::ListInstances => "list_instances",
            Action::CreateInstance => "create_instance",
            Action::ListServiceIds => "list_service_ids",
            Action::CreateServiceId => "create_service_id",
            Action::ListApiKeys => "list_api_keys",
            Action::CreateApiKey => "create_api_key",
            Action::DeleteApiKey => "delete_api_key",
        }
    }
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
        Administrator, ClusterAdministrator, Editor, KmipAdapterManager, Manager, Reader,
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
        Action::DeleteKey => administrators || matches!(role, Manager),
        Action::ListInstances
        | Action::CreateInstance
        | Action::ListServiceIds
        | Action::CreateServiceId
        | Action::ListApiKeys
        | Action::CreateApiKey
        | Action::DeleteApiKey => administrators,
    }
}

/// Where something is done or allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
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
            Scope::Instance(id) => Some(id),
            Scope::Everywhere => None,
        }
    }

    /// True when a right in `self` is a right in `other`.
    #[must_use]
    pub fn covers(self, other: Scope) -> bool {
        self == Scope::Everywhere || self == other
    }
}

/// One role, in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    pub role: Role,
    pub scope: Scope,
}

/// Who asks: a service ID, through one of its API keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub service_id: Uuid,
    pub api_key: Uuid,
    pub grant: Grant,
}

impl Caller {
    /// The name in tokens, in `createdBy` and in audit records.
    #[must_use]
    pub fn iam_id(&self) -> String {
        iam_id(self.service_id)
    }
}

/// `iam-ServiceId-<uuid>`.
#[must_use]
pub fn iam_id(service_id: Uuid) -> String {
    format!("iam-ServiceId-{service_id}")
}

/// Lets `caller` do `action` in `scope`.
///
/// # Errors
/// [`Denied`], the same whether the instance exists or not.
pub fn allow(caller: &Caller, action: Action, scope: Scope) -> Result<(), Denied> {
    if permits(caller.grant.role, action) && caller.grant.scope.covers(scope) {
        return Ok(());
    }
    Err(Denied { action })
}

/// The caller has no right to do this here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no right to {action}")]
pub struct Denied {
    action: Action,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(role: Role, scope: Scope) -> Caller {
        Caller {
            service_id: Uuid::from_u128(1),
            api_key: Uuid::from_u128(2),
            grant: Grant { role, scope },
        }
    }

    #[test]
    fn a_right_in_one_instance_is_none_in_another_or_everywhere() {
        let (mine, other) =
            (Scope::Instance(Uuid::from_u128(7)), Scope::Instance(Uuid::from_u128(8)));
        let caller = caller(Role::Administrator, mine);
        assert_eq!(allow(&caller, Action::Wrap, mine), Ok(()));
        assert!(allow(&caller, Action::Wrap, other).is_err());
        assert!(allow(&caller, Action::CreateInstance, Scope::Everywhere).is_err());
    }

    #[test]
    fn a_right_everywhere_is_a_right_in_each_instance() {
        let caller = caller(Role::Viewer, Scope::Everywhere);
        assert_eq!(allow(&caller, Action::Unwrap, Scope::Instance(Uuid::from_u128(9))), Ok(()));
        assert!(allow(&caller, Action::DeleteKey, Scope::Instance(Uuid::from_u128(9))).is_err());
    }

    #[test]
    fn the_on_premises_roles_are_steps_of_one_ladder() {
        let ladder = [Role::Viewer, Role::Editor, Role::Administrator, Role::ClusterAdministrator];
        let wanted = [
            (Action::Wrap, [true, true, true, true]),
            (Action::Unwrap, [true, true, true, true]),
            (Action::ListKeys, [false, true, true, true]),
            (Action::CreateKey, [false, true, true, true]),
            (Action::RotateKey, [false, false, true, true]),
            (Action::DeleteKey, [false, false, true, true]),
            (Action::CreateServiceId, [false, false, true, true]),
        ];
        for (action, row) in wanted {
            assert_eq!(ladder.map(|role| permits(role, action)), row, "{action}");
        }
    }

    #[test]
    fn role_names_are_read_back_and_nothing_else_is() {
        for role in Role::ALL {
            assert_eq!(Role::parse(role.name()), Some(role));
        }
        assert_eq!(Role::parse("manager"), None);
        assert_eq!(Role::parse(""), None);
    }
}
