//! What is left when the server stops in the middle of something, and what the next start makes of it.

use crate::harness::faulty_store::{Fault, Step};
use crate::harness::{Server, crowd, new_key};
use kms_core::secret::SecretBytes;
use kms_hsm::memory;
use kms_hsm::{Vault, VaultError};
use kms_server::reconcile::{Comparison, Pair, Standing, compare};
use kms_server::store::Custody;
use serde_json::json;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
const DATABASE_AWAY: &str =
    "Unavailable: Experiencing delays. Please try again in few minutes. (DATABASE_UNAVAILABLE_ERR)";
const HSM_AWAY: &str =
    "Unavailable: Experiencing delays. Please try again in few minutes. (HSM_UNAVAILABLE_ERR)";

/// What is not as it should be.
async fn left(vault: &dyn Vault, server: &Server) -> (Vec<Standing>, Comparison) {
    let found = compare(vault, &*server.store).await.unwrap();
    let standings = found.versions.iter().map(|(_, standing)| *standing);
    (standings.filter(|standing| *standing != Standing::Good).collect(), found)
}

fn hsm_fails() -> memory::Fault {
    memory::Fault::Fail(VaultError::Unavailable { cause: "pulled out".into() })
}

async fn listed(server: &Server, token: &str) -> BTreeSet<String> {
    let list = server.call(token, "GET", "/keys", "").await.json();
    let ids = list["resources"].as_array().unwrap().iter();
    ids.map(|key| key["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_crash_while_a_key_is_made_leaves_no_half_key_behind() {
    let (never, unfinished) = (Some(Standing::NeverMade), Some(Standing::Unfinished));
    for (fault, visible, expected) in [
        (Fault::Before(Step::BeginKey), 0, None),
        (Fault::After(Step::BeginKey), 0, never),
        (Fault::Before(Step::KeepCheckValue), 0, unfinished),
        (Fault::After(Step::KeepCheckValue), 0, unfinished),
        (Fault::Before(Step::ActivateKey), 0, unfinished),
        (Fault::After(Step::ActivateKey), 1, None),
    ] {
        let server = Server::start().await;
        let token = server.admin().await;
        let before = server.create_id(&token, "before").await;
        let (wdek, _) = server.wrap(&token, &before, PLAINTEXT).await;
        server.store.set_fault(Some(fault));
        let answer = server.call(&token, "POST", "/keys", &new_key("doomed")).await;
        assert_eq!((answer.status, answer.message().as_str()), (503, DATABASE_AWAY), "{fault:?}");

        let server = server.restart().await;
        let token = server.admin().await;
        assert_eq!(listed(&server, &token).await.len(), 1 + visible, "{fault:?}");
        for id in listed(&server, &token).await {
            let (fresh, _) = server.wrap(&token, &id, PLAINTEXT).await;
            assert_eq!(server.unwrap(&token, &id, &fresh).await.json()["plaintext"], PLAINTEXT);
        }
        assert_eq!(server.unwrap(&token, &before, &wdek).await.json()["plaintext"], PLAINTEXT);
        let (found, _) = left(&*server.vault, &server).await;
        assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "{fault:?}");
        let held = server.vault.versions().await.unwrap().len();
        let kept = 1 + visible + usize::from(expected == unfinished);
        assert_eq!(held, kept, "{fault:?}: nothing is deleted in the HSM");
    }
}

#[tokio::test]
async fn a_crash_while_a_key_is_rotated_leaves_the_old_version_in_charge() {
    for (fault, rotated) in [
        (Fault::Before(Step::BeginVersion), false),
        (Fault::After(Step::BeginVersion), false),
        (Fault::Before(Step::ActivateVersion), false),
        (Fault::After(Step::ActivateVersion), true),
    ] {
        let server = Server::start().await;
        let token = server.admin().await;
        let id = server.create_id(&token, "crk").await;
        let (wdek, version) = server.wrap(&token, &id, PLAINTEXT).await;
        server.store.set_fault(Some(fault));
        assert_eq!(server.rotate(&token, &id).await.status, 503, "{fault:?}");

        let server = server.restart().await;
        let token = server.admin().await;
        let (_, now) = server.wrap(&token, &id, PLAINTEXT).await;
        assert_eq!(now != version, rotated, "{fault:?}");
        assert_eq!(server.unwrap(&token, &id, &wdek).await.json()["plaintext"], PLAINTEXT);
        assert_eq!(server.rotate(&token, &id).await.status, 204, "the way forward is open");
        assert_eq!(server.unwrap(&token, &id, &wdek).await.json()["plaintext"], PLAINTEXT);
    }
}

#[tokio::test]
async fn an_hsm_that_fails_changes_nothing_that_can_be_seen() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (wdek, version) = server.wrap(&token, &id, PLAINTEXT).await;
    server.vault.set_fault(Some(hsm_fails()));
    for (method, path, body) in [
        ("POST", "/keys".to_owned(), new_key("doomed")),
        ("POST", format!("/keys/{id}/actions/rotate"), String::new()),
        ("POST", format!("/keys/{id}/actions/wrap"), String::new()),
        ("POST", format!("/keys/{id}/actions/unwrap"), json!({"ciphertext": wdek}).to_string()),
    ] {
        let answer = server.call(&token, method, &path, &body).await;
        assert_eq!((answer.status, answer.message().as_str()), (503, HSM_AWAY), "{method} {path}");
        assert!(!answer.body.contains("pulled out"));
        assert_eq!(answer.header("retry-after"), Some("2"));
    }
    let no_token = server.ask_token(server.made.admin.api_key.expose()).await;
    assert_eq!(no_token.status, 503);
    server.vault.set_fault(None);
    assert_eq!(listed(&server, &token).await, BTreeSet::from([id.clone()]));
    assert_eq!(server.wrap(&token, &id, PLAINTEXT).await.1, version);
    assert_eq!(server.unwrap(&token, &id, &wdek).await.json()["plaintext"], PLAINTEXT);
}

#[tokio::test]
async fn without_the_database_nobody_gets_in() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    server.store.set_fault(Some(Fault::Away));
    let path = format!("/keys/{id}/actions/wrap");
    assert_eq!(server.call(&token, "POST", &path, "").await.status, 503);
    assert_eq!(server.ask_token(server.made.admin.api_key.expose()).await.status, 503);
    server.store.set_fault(None);
    assert_eq!(server.call(&token, "POST", &path, "").await.status, 200);
}

#[tokio::test]
async fn every_difference_between_hsm_and_database_is_found() {
    let server = Server::start().await;
    let token = server.admin().await;
    let (none, found) = left(&*server.vault, &server).await;
    assert_eq!((none, found.is_bad(), found.has_leftovers()), (vec![], false, false));
    let id = server.create_id(&token, "crk").await;
    let (wdek, version) = server.wrap(&token, &id, PLAINTEXT).await;
    let (stranger, part) = (uuid::Uuid::from_u128(1), uuid::Uuid::from_u128(2));
    server.vault.create_version(stranger).await.unwrap();
    server.vault.leave_incomplete(part);
    server.vault.lose_version(version.parse().unwrap());
    let (standings, found) = left(&*server.vault, &server).await;
    assert_eq!(standings, [Standing::Lost]);
    assert_eq!((found.unknown, found.incomplete), (vec![stranger], vec![part]));
    // A version that the HSM lost is the operator's problem and must not look like a bad WDEK.
    assert_eq!(server.unwrap(&token, &id, &wdek).await.status, 500);
    assert_eq!(server.vault.versions().await.unwrap(), [stranger], "nothing was repaired");
    let empty = memory::MemoryVault::new();
    let (standings, found) = left(&empty, &server).await;
    assert_eq!((standings, found.signing_keys[0].pair), (vec![Standing::Lost], Pair::Lost));
    assert!(found.verdict().is_err());
    assert!(empty.versions().await.unwrap().is_empty(), "nothing was made in its place");
}

/// A version that another server has just made is waited for; one that is lost would hold a place among the requests each time.
#[tokio::test]
async fn a_version_that_was_looked_for_in_vain_is_asked_for_without_a_pause() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (_, version) = server.wrap(&token, &id, PLAINTEXT).await;
    let version = version.parse().unwrap();
    let vault = &server.app.vault;
    let wrap = async || {
        let (began, dek) = (Instant::now(), SecretBytes::new(vec![7; 32]));
        (vault.wrap(version, b"", dek).await.map(drop), began.elapsed())
    };
    tokio::time::pause();
    for _ in 0..2 {
        server.vault.lose_version(version);
        let (lost, took) = wrap().await;
        assert_eq!(lost, Err(VaultError::NotFound));
        assert!(took >= Duration::from_millis(300), "{took:?}: it may come into sight");
        for _ in 0..100 {
            assert_eq!(wrap().await, (Err(VaultError::NotFound), Duration::ZERO));
        }
        server.vault.create_version(version).await.unwrap();
        assert_eq!(wrap().await, (Ok(()), Duration::ZERO), "it is found as soon as it is there");
    }
}

#[tokio::test]
async fn every_version_is_compared_once_and_told_in_the_order_of_the_database() {
    let server = Server::start().await;
    let token = server.admin().await;
    let mut lost = BTreeSet::new();
    for number in 0..10 {
        let id = server.create_id(&token, "crk").await;
        let (_, version) = server.wrap(&token, &id, PLAINTEXT).await;
        if number % 3 == 2 {
            let version = version.parse().unwrap();
            server.vault.lose_version(version);
            lost.insert(version);
        }
        let known = server.store.known_versions().await.unwrap();
        let expected: Vec<_> = known
            .into_iter()
            .map(|one| {
                let lost = lost.contains(&one.version);
                (one, if lost { Standing::Lost } else { Standing::Good })
            })
            .collect();
        assert_eq!(left(&*server.vault, &server).await.1.versions, expected);
        assert_eq!(expected.len(), number + 1);
    }
}

#[tokio::test]
async fn many_rotations_and_wraps_at_once_agree_on_one_history() {
    let server = std::sync::Arc::new(Server::start().await);
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let mut tasks = Vec::new();
    for n in 0..12 {
        let (server, token, id) = (server.clone(), token.clone(), id.clone());
        tasks.push(tokio::spawn(async move {
            if n % 3 == 0 {
                assert_eq!(server.rotate(&token, &id).await.status, 204);
            }
            server.wrap(&token, &id, PLAINTEXT).await
        }));
    }
    let mut wrapped = Vec::new();
    for task in tasks {
        wrapped.push(task.await.unwrap());
    }
    let path = format!("/keys/{id}/versions");
    let versions = server.call(&token, "GET", &path, "").await.json();
    assert_eq!(versions["resources"].as_array().unwrap().len(), 5);
    for (wdek, _) in &wrapped {
        assert_eq!(server.unwrap(&token, &id, wdek).await.json()["plaintext"], PLAINTEXT);
    }
}

#[tokio::test]
async fn a_version_whose_key_is_another_one_is_not_used_and_the_others_are() {
    let server = Server::start().await;
    let token = server.admin().await;
    let (good, bad) =
        (server.create_id(&token, "good").await, server.create_id(&token, "bad").await);
    let (wdek, _) = server.wrap(&token, &good, PLAINTEXT).await;
    let (lost, version) = server.wrap(&token, &bad, PLAINTEXT).await;
    server.vault.replace_version(version.parse().unwrap()).unwrap();
    let server = server.restart().await;
    let token = server.admin().await;
    assert_eq!(server.unwrap(&token, &good, &wdek).await.json()["plaintext"], PLAINTEXT);
    for verb in ["wrap", "unwrap"] {
        let body = json!({ "ciphertext": lost }).to_string();
        let body = if verb == "wrap" { "" } else { body.as_str() };
        let path = format!("/keys/{bad}/actions/{verb}");
        let answer = server.call(&token, "POST", &path, body).await;
        assert_eq!(answer.status, 500, "{verb}: {answer:?}");
    }
    let (standings, _) = left(&*server.vault, &server).await;
    assert_eq!(standings, [Standing::OtherKey]);
    assert_eq!(server.rotate(&token, &bad).await.status, 204, "a new version is the way out");
    assert_eq!(
        server.call(&token, "POST", &format!("/keys/{bad}/actions/wrap"), "").await.status,
        200
    );
}

#[tokio::test]
async fn versions_from_before_check_values_get_theirs_at_the_start() {
    let server = Server::start().await;
    let token = server.admin().await;
    server.create_id(&token, "old").await;
    let options =
        sqlx::sqlite::SqliteConnectOptions::new().filename(server.dir.path().join("kms.db"));
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    sqlx::query("UPDATE key_versions SET check_value = NULL").execute(&pool).await.unwrap();
    pool.close().await;
    let (standings, _) = left(&*server.vault, &server).await;
    assert!(matches!(standings[..], [Standing::Unproven(_)]), "{standings:?}");
    let server = server.restart().await;
    let (standings, found) = left(&*server.vault, &server).await;
    assert_eq!((standings, found.seen_in.as_deref()), (vec![], Some("memory")));
}

#[tokio::test]
async fn fifty_rotations_leave_every_wdek_to_the_version_that_it_names() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let mut made = Vec::new();
    for _ in 0..50 {
        made.push(server.wrap(&token, &id, PLAINTEXT).await);
        assert_eq!(server.rotate(&token, &id).await.status, 204);
    }
    let versions: BTreeSet<&String> = made.iter().map(|(_, version)| version).collect();
    assert_eq!(versions.len(), 50);
    for (wdek, version) in &made {
        let asked = server.vault.unwraps();
        let opened = server.unwrap(&token, &id, wdek).await.json();
        assert_eq!(opened["plaintext"], PLAINTEXT);
        assert_eq!(opened["keyVersion"]["id"], *version);
        assert_eq!(server.vault.unwraps(), asked + 1, "no version is tried in vain");
    }
}

#[tokio::test]
async fn a_hundred_creators_of_one_name_get_a_hundred_keys_and_no_data_is_lost() {
    let server = std::sync::Arc::new(Server::start().await);
    let token = server.admin().await;
    let create = || {
        let (server, token) = (server.clone(), token.clone());
        async move {
            let id = server.create_id(&token, "one name").await;
            (server.wrap(&token, &id, PLAINTEXT).await.0, id)
        }
    };
    let began = tokio::time::Instant::now();
    let mut made = vec![create().await];
    let turns = std::sync::Arc::new(Semaphore::new(crowd(began.elapsed())));
    let mut tasks = JoinSet::new();
    for _ in 1..100 {
        let (create, turns) = (create(), turns.clone());
        tasks.spawn(async move {
            let _turn = turns.acquire().await.unwrap();
            create.await
        });
    }
    made.extend(tasks.join_all().await);
    let mut ids = BTreeSet::new();
    for (wdek, id) in made {
        assert_eq!(server.unwrap(&token, &id, &wdek).await.json()["plaintext"], PLAINTEXT);
        ids.insert(id);
    }
    // A key's name is no identity in this API: it is the id that is never given twice.
    assert_eq!(ids.len(), 100);
    let (standings, found) = left(&*server.vault, &server).await;
    assert_eq!((standings, found.versions.len()), (vec![], 100));
}
