use super::*;

fn caller(grants: &[(Role, Scope)]) -> Caller {
    Caller {
        service_id: Uuid::from_u128(1),
        credential: Credential::ApiKey(ApiKeySecret { api_key: Uuid::from_u128(2), generation: 1 }),
        grants: grants.iter().map(|&(role, scope)| Grant { role, scope }).collect(),
    }
}

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn key(instance: u128, key: u128) -> Scope {
    Scope::Key { instance: id(instance), key: id(key) }
}

#[test]
fn a_right_in_one_instance_is_none_in_another_or_everywhere() {
    let (mine, other) = (Scope::Instance(id(7)), Scope::Instance(id(8)));
    let caller = caller(&[(Role::Administrator, mine)]);
    assert_eq!(allow(&caller, Action::Wrap, mine), Ok(()));
    assert_eq!(allow(&caller, Action::Wrap, key(7, 1)), Ok(()));
    for elsewhere in [other, key(8, 1), Scope::Everywhere] {
        assert!(allow(&caller, Action::Wrap, elsewhere).is_err());
    }
    assert!(sees(&caller, mine) && sees(&caller, key(7, 1)));
    assert!(!sees(&caller, other) && !sees(&caller, key(8, 1)));
}

#[test]
fn a_right_everywhere_is_a_right_in_each_instance() {
    let caller = caller(&[(Role::Viewer, Scope::Everywhere)]);
    for scope in [Scope::Instance(id(9)), key(9, 1)] {
        assert_eq!(allow(&caller, Action::Unwrap, scope), Ok(()));
        assert!(allow(&caller, Action::DeleteKey, scope).is_err());
    }
}

#[test]
fn a_right_for_one_key_is_none_for_another_and_none_for_the_instance() {
    let caller = caller(&[(Role::Manager, key(7, 1)), (Role::Reader, key(7, 2))]);
    assert_eq!(allow(&caller, Action::DeleteKey, key(7, 1)), Ok(()));
    assert_eq!(allow(&caller, Action::Wrap, key(7, 2)), Ok(()));
    for scope in [key(7, 2), key(7, 3), key(8, 1), Scope::Instance(id(7)), Scope::Everywhere] {
        assert!(allow(&caller, Action::DeleteKey, scope).is_err(), "{scope:?}");
    }
    assert!(
        sees(&caller, Scope::Instance(id(7))),
        "the instance of a key is known to who may use it"
    );
    assert!(!sees(&caller, key(7, 3)) && !sees(&caller, Scope::Instance(id(8))));
}

#[test]
fn roles_add_up_and_each_holds_in_its_own_place() {
    let here = Scope::Instance(id(7));
    let caller = caller(&[(Role::Viewer, here), (Role::Manager, key(7, 1))]);
    assert_eq!(allow(&caller, Action::Wrap, key(7, 5)), Ok(()));
    assert_eq!(allow(&caller, Action::DeleteKey, key(7, 1)), Ok(()));
    assert!(allow(&caller, Action::DeleteKey, key(7, 5)).is_err());
    assert_eq!(allow_somewhere(&caller, Action::DeleteKey), Ok(()));
    assert!(allow_somewhere(&caller, Action::CreateInstance).is_err());
}

#[test]
fn what_is_listed_is_what_a_listing_role_reaches() {
    let both = [(Role::Reader, key(7, 1)), (Role::Editor, key(7, 2)), (Role::Viewer, key(7, 3))];
    let only = Reach::Only(BTreeSet::from([id(1), id(2)]));
    assert_eq!(reach(&caller(&both), Action::ListKeys, id(7)), Ok(only));
    assert!(reach(&caller(&both), Action::ListKeys, id(8)).is_err());
    assert!(reach(&caller(&both[2..]), Action::ListKeys, id(7)).is_err());
    let all = [both[0], (Role::Reader, Scope::Instance(id(7)))];
    assert_eq!(reach(&caller(&all), Action::ListKeys, id(7)), Ok(Reach::All));
}

#[test]
fn nobody_manages_what_reaches_further_than_they_do() {
    let (here, there) = (Scope::Instance(id(7)), Scope::Instance(id(8)));
    let grant = |scope| Grant { role: Role::Viewer, scope };
    let admin = caller(&[(Role::Administrator, here), (Role::Viewer, there)]);
    let may = |home, grants: &[Grant]| manages(&admin, Action::CreateApiKey, home, grants);
    assert!(may(here, &[]) && may(here, &[grant(here), grant(key(7, 1))]));
    assert!(!may(there, &[]), "a role that does not permit it does not count");
    assert!(!may(Scope::Everywhere, &[]));
    assert!(!may(here, &[grant(here), grant(there)]));
    assert!(!may(here, &[grant(Scope::Everywhere)]));
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
        (Action::DisableKey, [false, false, true, true]),
        (Action::EnableKey, [false, false, true, true]),
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

/// Written out, and compared with the table in the code: whoever changes what a role may do changes it in two places,
/// and a new action that borrows another's permission is seen.
#[test]
fn pitfall_09_each_action_has_its_own_permission() {
    const USES: &str =
        "Reader ReaderPlus Writer Manager Viewer Editor Administrator ClusterAdministrator";
    const LISTS: &str = "Reader ReaderPlus Writer Manager KmipAdapterManager Editor Administrator ClusterAdministrator";
    const READS: &str = "ReaderPlus Writer Manager Editor Administrator ClusterAdministrator";
    const MAKES: &str = "Writer Manager Editor Administrator ClusterAdministrator";
    const MANAGES: &str = "Manager Administrator ClusterAdministrator";
    const ADMINISTERS: &str = "Administrator ClusterAdministrator";
    let snapshot = [
        ("count_keys", LISTS),
        ("list_keys", LISTS),
        ("create_key", MAKES),
        ("import_key", MAKES),
        ("read_key", READS),
        ("read_metadata", USES),
        ("list_versions", USES),
        ("wrap", USES),
        ("unwrap", USES),
        ("rotate_key", "Writer Manager Administrator ClusterAdministrator"),
        ("disable_key", MANAGES),
        ("enable_key", MANAGES),
        ("delete_key", MANAGES),
        ("purge_key", "KeyPurge"),
        ("list_instances", ADMINISTERS),
        ("create_instance", ADMINISTERS),
        ("list_service_ids", ADMINISTERS),
        ("create_service_id", ADMINISTERS),
        ("delete_service_id", ADMINISTERS),
        ("list_policies", ADMINISTERS),
        ("create_policy", ADMINISTERS),
        ("delete_policy", ADMINISTERS),
        ("list_profiles", ADMINISTERS),
        ("create_profile", ADMINISTERS),
        ("delete_profile", ADMINISTERS),
        ("list_api_keys", ADMINISTERS),
        ("create_api_key", ADMINISTERS),
        ("lock_api_key", ADMINISTERS),
        ("unlock_api_key", ADMINISTERS),
        ("rotate_api_key", ADMINISTERS),
        ("delete_api_key", ADMINISTERS),
    ];
    let permitted = |action: Action| {
        let names = Role::ALL.into_iter().filter(|&role| permits(role, action)).map(Role::name);
        (action.name(), names.collect::<Vec<_>>().join(" "))
    };
    let found: Vec<_> = Action::ALL.iter().map(|&action| permitted(action)).collect();
    let wanted: Vec<_> = snapshot.map(|(name, roles)| (name, roles.to_owned())).to_vec();
    assert_eq!(found, wanted);
}

/// `docs/access.md`: the roles stand in the head of its first table, the actions in code style in the first column.
#[test]
fn pitfall_09_the_documents_say_what_each_role_may() {
    const DOCUMENT: &str =
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/access.md"));
    let cells = |line: &'static str| line.trim_matches('|').split('|').map(str::trim);
    let mut lines = DOCUMENT.lines().skip_while(|line| !line.starts_with("| may |"));
    let roles: Vec<Vec<&str>> =
        cells(lines.next().unwrap()).skip(1).map(|cell| cell.split(", ").collect()).collect();
    let named: BTreeSet<_> = roles.iter().flatten().copied().collect();
    assert_eq!(named, Role::ALL.map(Role::name).into());
    let mut told = Vec::new();
    for line in lines.skip(1).take_while(|line| line.starts_with('|')) {
        let mut cells = cells(line);
        let actions: Vec<_> = cells.next().unwrap().split('`').skip(1).step_by(2).collect();
        let yes: Vec<_> = cells.map(|cell| cell == "yes").collect();
        assert_eq!(yes.len(), roles.len(), "{line}");
        for name in actions {
            let action = Action::ALL.iter().find(|action| action.name() == name).copied();
            let action = action.unwrap_or_else(|| panic!("there is no action {name}"));
            for (roles, &yes) in roles.iter().zip(&yes) {
                for role in roles {
                    let role = Role::parse(role).unwrap();
                    assert_eq!(permits(role, action), yes, "{role:?} and {name}");
                }
            }
            told.push(name);
        }
    }
    told.sort_unstable();
    let mut all: Vec<_> = Action::ALL.iter().map(|action| action.name()).collect();
    all.sort_unstable();
    assert_eq!(told, all, "each action once");
}
