//! What every store promises, whatever it is made of, and what only the SQLite file promises.

use kms_hsm::RsaPublic;
use kms_server::policy::{ApiKeySecret, Credential, Grant, Reach, Role, Scope};
use kms_server::store::{
    Access, ApiKey, Custody, FirstContent, Instance, KeyState, NewKey, NewSecret, Page, ServiceId,
    SigningKey, SqliteStore, Store, StoreError, Version, Wanted,
};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use time::OffsetDateTime;
use uuid::Uuid;

const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

async fn open(dir: &TempDir) -> (PathBuf, SqliteStore) {
    let file = dir.path().join("kms.db");
    let store = SqliteStore::open(&file, true).await.unwrap();
    (file, store)
}

/// A secret of the API key in the first content.
fn secret(generation: u32) -> ApiKeySecret {
    ApiKeySecret { api_key: id(3), generation }
}

fn first() -> FirstContent {
    let scope = Scope::Instance(id(1));
    let grant = Grant { role: Role::Viewer, scope };
    let owner = ServiceId::with(id(2), "viewer".into(), grant, NOW);
    let key = ApiKey::new(id(3), id(2), "viewer".into(), NOW);
    FirstContent {
        instance: Instance { id: id(1), name: "default".into(), created_at: NOW },
        signing_key: SigningKey {
            id: id(4),
            public: RsaPublic { n: vec![5; 256], e: vec![1, 0, 1] },
            created_at: NOW,
        },
        service_ids: vec![(owner, key, [6; 32])],
    }
}

fn new_key(n: u128) -> NewKey {
    NewKey {
        id: id(n),
        instance: id(1),
        name: "crk".into(),
        description: Some("of a test".into()),
        tags: vec!["a".into(), "\"b\"".into()],
        imported: true,
        expires_at: Some(NOW + time::Duration::nanoseconds(123)),
        created_at: NOW,
        created_by: "iam-ServiceId-x".into(),
        version: id(n + 1000),
    }
}

fn wanted(states: &[KeyState]) -> Wanted {
    Wanted { states: states.to_vec(), now: NOW, reach: Reach::All }
}

#[tokio::test]
async fn the_first_content_is_put_in_once_and_found_again() {
    let dir = TempDir::new().unwrap();
    let (file, store) = open(&dir).await;
    assert!(store.signing_key().await.unwrap().is_none());
    store.initialise(&first()).await.unwrap();
    assert!(matches!(store.initialise(&first()).await, Err(StoreError::Conflict(_))));
    drop(store);
    let store = SqliteStore::open(&file, false).await.unwrap();
    assert_eq!(store.signing_key().await.unwrap(), Some(first().signing_key));
    assert_eq!(store.instances().await.unwrap(), [first().instance]);
    let caller = store.caller_by_hash(&[6; 32], NOW).await.unwrap().unwrap();
    assert_eq!((caller.service_id, caller.api_key()), (id(2), Some(id(3))));
    assert_eq!(store.caller(id(2), &secret(1), NOW).await.unwrap(), Some(caller));
    assert_eq!(store.caller(id(9), &secret(1), NOW).await.unwrap(), None);
    assert_eq!(store.caller(id(2), &secret(2), NOW).await.unwrap(), None);
    assert_eq!(store.caller_by_hash(&[7; 32], NOW).await.unwrap(), None);
    assert!(store.revoke_api_key(id(3), NOW).await.unwrap());
    assert!(!store.revoke_api_key(id(3), NOW).await.unwrap());
    assert_eq!(store.caller(id(2), &secret(1), NOW).await.unwrap(), None);
    assert_eq!(store.caller_by_hash(&[6; 32], NOW).await.unwrap(), None);
}

#[tokio::test]
async fn a_key_is_invisible_until_it_is_active_and_comes_back_as_it_was_written() {
    let dir = TempDir::new().unwrap();
    let (_, store) = open(&dir).await;
    store.initialise(&first()).await.unwrap();
    let new = new_key(10);
    store.begin_key(&new).await.unwrap();
    assert!(store.key(id(1), id(10)).await.unwrap().is_none());
    assert_eq!(store.count_keys(id(1), &wanted(&[KeyState::Active])).await.unwrap(), 0);
    assert!(store.known_versions().await.unwrap()[0].pending);
    assert!(matches!(store.activate_key(id(10), id(9)).await, Err(StoreError::Conflict(_))));
    store.activate_key(id(10), id(1010)).await.unwrap();
    assert!(matches!(store.activate_key(id(10), id(1010)).await, Err(StoreError::Conflict(_))));
    let key = store.key(id(1), id(10)).await.unwrap().unwrap();
    assert_eq!((&key.name, &key.description, &key.tags), (&new.name, &new.description, &new.tags));
    assert_eq!((key.imported, key.expires_at), (true, new.expires_at));
    assert_eq!(key.version, Version { id: id(1010), created_at: NOW });
    assert!(store.key(id(2), id(10)).await.unwrap().is_none(), "not in another instance");
    let page = Page { limit: 10, offset: 0 };
    assert_eq!(store.keys(id(1), &wanted(&[KeyState::Active]), page).await.unwrap(), [key]);
    let later = Wanted { now: NOW + time::Duration::SECOND, ..wanted(&[KeyState::Deactivated]) };
    assert_eq!(store.count_keys(id(1), &later).await.unwrap(), 1, "expired by then");
}

#[tokio::test]
async fn versions_are_newest_first_and_a_destroyed_key_gets_no_more() {
    let dir = TempDir::new().unwrap();
    let (_, store) = open(&dir).await;
    store.initialise(&first()).await.unwrap();
    store.begin_key(&new_key(10)).await.unwrap();
    store.activate_key(id(10), id(1010)).await.unwrap();
    let version = |n| Version { id: id(n), created_at: NOW };
    for n in [30, 20, 40] {
        store.begin_version(id(10), &version(n)).await.unwrap();
    }
    for n in [20, 30] {
        store.activate_version(id(10), id(n), NOW, None).await.unwrap();
    }
    let versions = store.versions(id(1), id(10)).await.unwrap();
    assert_eq!(versions, [version(30), version(20), version(1010)]);
    assert!(store.delete_key(id(1), id(10), NOW, "me").await.unwrap());
    assert!(!store.delete_key(id(1), id(10), NOW, "me").await.unwrap());
    let late = store.activate_version(id(10), id(40), NOW, None).await;
    assert!(matches!(late, Err(StoreError::Conflict(_))));
    assert_eq!(store.versions(id(1), id(10)).await.unwrap().len(), 3);
    let key = store.key(id(1), id(10)).await.unwrap().unwrap();
    assert_eq!((key.marked, key.deleted_by.as_deref()), (KeyState::Destroyed, Some("me")));
}

#[tokio::test]
async fn what_belongs_to_nothing_is_refused() {
    let dir = TempDir::new().unwrap();
    let (_, store) = open(&dir).await;
    store.initialise(&first()).await.unwrap();
    let orphan = NewKey { instance: id(99), ..new_key(10) };
    assert!(matches!(store.begin_key(&orphan).await, Err(StoreError::Conflict(_))));
    let key = ApiKey::new(id(50), id(99), "x".into(), NOW);
    assert!(matches!(store.add_api_key(&key, &[1; 32]).await, Err(StoreError::Conflict(_))));
    let twin = Instance { id: id(98), ..first().instance };
    assert!(matches!(store.add_instance(&twin).await, Err(StoreError::Conflict(_))));
}

#[tokio::test]
async fn the_file_is_private_and_a_missing_one_is_not_made_by_accident() {
    let dir = TempDir::new().unwrap();
    let (file, store) = open(&dir).await;
    store.initialise(&first()).await.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&file), 0o600);
    assert_eq!(mode(&dir.path().join("kms.db-wal")), 0o600);
    store.close().await;
    assert!(!dir.path().join("kms.db-wal").exists(), "a backup of the one file is complete");
    let absent = dir.path().join("absent.db");
    assert!(matches!(SqliteStore::open(&absent, false).await, Err(StoreError::Unavailable(_))));
    assert!(!absent.exists());
}

#[tokio::test]
async fn a_role_that_nobody_knows_stops_the_call() {
    let dir = TempDir::new().unwrap();
    let (file, store) = open(&dir).await;
    store.initialise(&first()).await.unwrap();
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&file);
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    sqlx::query("UPDATE policies SET role = 'Emperor'").execute(&pool).await.unwrap();
    assert!(matches!(store.caller(id(2), &secret(1), NOW).await, Err(StoreError::Corrupt(_))));
}

#[tokio::test]
async fn a_rotated_secret_lives_on_as_long_as_was_said_and_the_one_before_it_not_at_all() {
    let dir = TempDir::new().unwrap();
    let (_, store) = open(&dir).await;
    store.initialise(&first()).await.unwrap();
    let later = |seconds| NOW + time::Duration::seconds(seconds);
    let new = |hash: u8, old_until| NewSecret { hash: [hash; 32], at: NOW, old_until, by: None };
    assert!(store.rotate_api_key(id(3), &new(7, Some(later(60)))).await.unwrap());
    for (hash, generation) in [(6, 1), (7, 2)] {
        let caller = store.caller_by_hash(&[hash; 32], later(59)).await.unwrap().unwrap();
        assert_eq!(caller.credential, Credential::ApiKey(secret(generation)));
        assert!(store.caller(id(2), &secret(generation), later(59)).await.unwrap().is_some());
    }
    assert!(store.caller_by_hash(&[6; 32], later(60)).await.unwrap().is_none());
    assert!(store.caller(id(2), &secret(1), later(60)).await.unwrap().is_none());
    assert!(store.caller(id(2), &secret(2), later(60)).await.unwrap().is_some());
    assert!(store.rotate_api_key(id(3), &new(8, Some(later(60)))).await.unwrap());
    assert!(store.caller_by_hash(&[6; 32], NOW).await.unwrap().is_none(), "two secrets at most");
    assert!(store.rotate_api_key(id(3), &new(9, None)).await.unwrap());
    for (hash, generation) in [(6, 1), (7, 2), (8, 3)] {
        assert!(store.caller_by_hash(&[hash; 32], NOW).await.unwrap().is_none());
        assert!(store.caller(id(2), &secret(generation), NOW).await.unwrap().is_none());
    }
    assert!(store.lock_api_key(id(3), Some(NOW)).await.unwrap());
    assert!(!store.lock_api_key(id(3), Some(NOW)).await.unwrap());
    assert!(store.caller_by_hash(&[9; 32], NOW).await.unwrap().is_none());
    assert!(store.caller(id(2), &secret(4), NOW).await.unwrap().is_none());
    assert!(store.lock_api_key(id(3), None).await.unwrap());
    assert!(!store.lock_api_key(id(3), None).await.unwrap());
    assert!(store.caller(id(2), &secret(4), NOW).await.unwrap().is_some());
    assert!(store.revoke_api_key(id(3), NOW).await.unwrap());
    assert!(!store.rotate_api_key(id(3), &new(10, None)).await.unwrap());
    assert!(!store.lock_api_key(id(3), Some(NOW)).await.unwrap());
}

/// The answers to two rotations were lost: by the third the caller must still be able to log in.
#[tokio::test]
async fn who_rotates_with_the_older_secret_keeps_that_one_and_ends_the_other_with_its_tokens() {
    let dir = TempDir::new().unwrap();
    let (_, store) = open(&dir).await;
    store.initialise(&first()).await.unwrap();
    let end = NOW + time::Duration::seconds(60);
    let rotate = async |hash: u8, old_until, by| {
        let new = NewSecret { hash: [hash; 32], at: NOW, old_until, by };
        assert!(store.rotate_api_key(id(3), &new).await.unwrap());
    };
    let log_in = async |hash: u8| {
        let caller = store.caller_by_hash(&[hash; 32], NOW).await.unwrap();
        caller.map(|caller| caller.credential)
    };
    let known =
        async |generation| store.caller(id(2), &secret(generation), NOW).await.unwrap().is_some();
    rotate(7, Some(end), Some(secret(1))).await;
    rotate(8, Some(end), Some(secret(1))).await;
    assert_eq!(log_in(6).await, Some(Credential::ApiKey(secret(3))));
    assert_eq!(log_in(8).await, Some(Credential::ApiKey(secret(4))));
    assert_eq!(log_in(7).await, None);
    assert_eq!([known(1).await, known(2).await, known(3).await], [false, false, true]);
    rotate(9, Some(end), Some(secret(3))).await;
    assert!(log_in(6).await.is_some() && log_in(8).await.is_none());
    // With the newest it is the newest that stays, and another API key's secret says nothing about this one's.
    rotate(10, Some(end), Some(secret(6))).await;
    assert!(log_in(6).await.is_none() && log_in(9).await.is_some());
    let other = ApiKeySecret { api_key: id(77), generation: 6 };
    rotate(11, Some(end), Some(other)).await;
    assert!(log_in(9).await.is_none() && log_in(10).await.is_some());
    rotate(12, None, Some(secret(7))).await;
    assert!(log_in(10).await.is_none() && log_in(11).await.is_none() && log_in(12).await.is_some());
}

/// The tables as the version before policies left them: one role on each service ID.
#[tokio::test]
async fn the_one_role_of_an_older_database_becomes_the_first_policy() {
    let dir = TempDir::new().unwrap();
    let (file, store) = open(&dir).await;
    store.initialise(&first()).await.unwrap();
    store.close().await;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&file);
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    for statement in [
        "ALTER TABLE service_ids ADD COLUMN role TEXT NOT NULL DEFAULT 'Editor'",
        "DROP TABLE policies",
        "DROP TABLE profiles",
        "DROP INDEX api_keys_by_old_hash",
        "ALTER TABLE api_keys DROP COLUMN generation",
        "ALTER TABLE api_keys DROP COLUMN old_hash",
        "ALTER TABLE api_keys DROP COLUMN old_until",
        "ALTER TABLE api_keys DROP COLUMN rotated_at",
        "ALTER TABLE api_keys DROP COLUMN locked_at",
        "DELETE FROM _sqlx_migrations WHERE version = 3",
    ] {
        sqlx::query(statement).execute(&pool).await.unwrap();
    }
    pool.close().await;
    let store = SqliteStore::open(&file, false).await.unwrap();
    let caller = store.caller_by_hash(&[6; 32], NOW).await.unwrap().unwrap();
    let scope = Scope::Instance(id(1));
    assert_eq!(caller.grants, [Grant { role: Role::Editor, scope }]);
    assert_eq!(store.service_id(id(2)).await.unwrap().unwrap().home, scope);
}

/// The operator moved the file to another disk and left a link, and beside the link lies what a killed server left: the
/// WAL index of then, whole, and never written again.
#[tokio::test]
async fn a_change_counts_at_once_where_the_file_is_a_link_and_an_old_wal_index_lies_beside_it() {
    let (dir, big) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (file, store) = open(&dir).await;
    store.initialise(&first()).await.unwrap();
    let old = std::fs::read(dir.path().join("kms.db-shm")).unwrap();
    store.close().await;
    let moved = big.path().join("moved.db");
    std::fs::rename(&file, &moved).unwrap();
    std::os::unix::fs::symlink(&moved, &file).unwrap();
    std::fs::write(dir.path().join("kms.db-shm"), old).unwrap();
    let store = SqliteStore::open(&file, false).await.unwrap();
    let other = SqliteStore::open(&moved, false).await.unwrap();
    for (lock, found) in [(Some(NOW), false), (None, true), (Some(NOW), false)] {
        assert!(other.lock_api_key(id(3), lock).await.unwrap());
        let caller = store.caller(id(2), &secret(1), NOW).await.unwrap();
        assert_eq!(caller.is_some(), found, "{lock:?}");
    }
}

#[tokio::test]
async fn a_link_that_leads_nowhere_is_not_followed_to_a_new_database() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("kms.db");
    std::os::unix::fs::symlink(dir.path().join("gone.db"), &file).unwrap();
    std::fs::write(dir.path().join("gone.db-wal"), "what was told last").unwrap();
    let begun = SqliteStore::open(&file, true).await;
    assert!(matches!(begun, Err(StoreError::Unavailable(_))), "{begun:?}");
    assert!(!dir.path().join("gone.db").exists());
}

/// The pool opens more than one connection at once, and the first one has to turn the file to another way of writing.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_database_opens_always() {
    let dir = TempDir::new().unwrap();
    for number in 0..100 {
        let store = SqliteStore::open(&dir.path().join(format!("{number}.db")), true).await;
        store.unwrap().close().await;
    }
}
