//! What is left when the server stops in the middle of something, and what the next start makes of it.

use crate::harness::faulty_store::{Fault, Step};
use crate::harness::{Server, new_key};
use kms_hsm::memory;
use kms_hsm::{Vault, VaultError};
use kms_server::reconcile::{Difference, differences};
use serde_json::json;
use std::collections::BTreeSet;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
const AWAY: &str = "Unavailable: Experiencing delays. Please try again in few minutes.";

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
    for (fault, visible, unfinished) in [
        (Fault::Before(Step::BeginKey), 0, 0),
        (Fault::After(Step::BeginKey), 0, 0),
        (Fault::Before(Step::ActivateKey), 0, 1),
        (Fault::After(Step::ActivateKey), 1, 0),
    ] {
        let server = Server::start().await;
        let token = server.admin().await;
        let before = server.create_id(&token, "before").await;
        let (wdek, _) = server.wrap(&token, &before, PLAINTEXT).await;
        server.store.set_fault(Some(fault));
        let answer = server.call(&token, "POST", "/keys", &new_key("doomed")).await;
        assert_eq!((answer.status, answer.message().as_str()), (503, AWAY), "{fault:?}");

        let server = server.restart().await;
        let token = server.admin().await;
        assert_eq!(listed(&server, &token).await.len(), 1 + visible, "{fault:?}");
        for id in listed(&server, &token).await {
            let (fresh, _) = server.wrap(&token, &id, PLAINTEXT).await;
            assert_eq!(server.unwrap(&token, &id, &fresh).await.json()["plaintext"], PLAINTEXT);
        }
        assert_eq!(server.unwrap(&token, &before, &wdek).await.json()["plaintext"], PLAINTEXT);
        let found = differences(&*server.vault, &*server.store).await.unwrap();
        let left = found.iter().filter(|one| matches!(one, Difference::Unfinished(_))).count();
        assert_eq!((left, found.len()), (unfinished, unfinished), "{fault:?}: {found:?}");
        let held = server.vault.versions().await.unwrap().len();
        assert_eq!(held, 1 + visible + unfinished, "{fault:?}: nothing is deleted in the HSM");
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
        assert_eq!((answer.status, answer.message().as_str()), (503, AWAY), "{method} {path}");
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
    assert_eq!(differences(&*server.vault, &*server.store).await.unwrap(), []);
    let id = server.create_id(&token, "crk").await;
    let (wdek, version) = server.wrap(&token, &id, PLAINTEXT).await;
    let (stranger, part) = (uuid::Uuid::from_u128(1), uuid::Uuid::from_u128(2));
    server.vault.create_version(stranger).await.unwrap();
    server.vault.leave_incomplete(part);
    server.vault.lose_version(version.parse().unwrap());
    let found = differences(&*server.vault, &*server.store).await.unwrap();
    assert!(matches!(found[0], Difference::Lost(at) if at.version.to_string() == version));
    assert_eq!(found[1..], [Difference::Unknown(stranger), Difference::Incomplete(part)]);
    // A version that the HSM lost is the operator's problem and must not look like a bad WDEK.
    assert_eq!(server.unwrap(&token, &id, &wdek).await.status, 500);
    assert_eq!(server.vault.versions().await.unwrap(), [stranger], "nothing was repaired");
    let empty = memory::MemoryVault::new();
    let found = differences(&empty, &*server.store).await.unwrap();
    assert!(matches!(found[..], [Difference::Lost(_), Difference::SigningKey(_)]), "{found:?}");
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
