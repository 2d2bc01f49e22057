//! What a rotation must not break: old data, whatever becomes of the version that wraps now, and the interval between two.

use crate::harness::faulty_store::{Fault, Step};
use crate::harness::{Server, health};
use kms_core::wdek::WdekVersion;
use kms_server::app::Settings;
use kms_server::policy::{Role, Scope};
use kms_server::store::Store;
use kms_server::uses::LIMIT;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

#[tokio::test]
async fn old_data_opens_although_the_active_version_is_lost() {
    let lose = async |server: &Server, version| server.vault.lose_version(version);
    opens_old_data(WdekVersion::V2_1_0, lose, 500).await;
    opens_old_data(WdekVersion::V4_0_0, lose, 500).await;
}

#[tokio::test]
async fn old_data_opens_although_the_active_version_is_under_another_key() {
    let replace = async |server: &Server, version| server.vault.replace_version(version).unwrap();
    opens_old_data(WdekVersion::V2_1_0, replace, 500).await;
}

/// A refusal would be taken for a withdrawal by the plug-in, which drops its DEKs then.
#[tokio::test]
async fn old_data_opens_although_the_active_version_is_used_up() {
    let use_up = async |server: &Server, version| {
        server.store.reserve_gcm_uses(version, LIMIT, LIMIT).await.unwrap();
    };
    opens_old_data(WdekVersion::V4_0_0, use_up, 409).await;
}

/// After a change of the version that wraps which leaves it wrapping no more, but with this status.
async fn opens_old_data(format: WdekVersion, spoil: impl AsyncFn(&Server, Uuid), status: u16) {
    let settings = Settings { wdek_version: format, ..Server::settings() };
    let server = Server::start_with(settings).await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (wdek, first) = server.wrap(&token, &id, PLAINTEXT).await;
    assert_eq!(server.rotate(&token, &id).await.status, 204);
    let well = server.unwrap(&token, &id, &wdek).await.json();
    let second = well["rewrappedKeyVersion"]["id"].as_str().unwrap().parse().unwrap();
    // Its check value is compared at a start.
    let server = server.restart().await;
    spoil(&server, second).await;
    let server = server.restart().await;

    let wrap = format!("/keys/{id}/actions/wrap");
    assert_eq!(server.call(&token, "POST", &wrap, "{}").await.status, status);
    let opened = server.unwrap(&token, &id, &wdek).await;
    assert_eq!(opened.status, 200, "{opened:?}");
    let opened = opened.json();
    assert_eq!(
        (&opened["plaintext"], &opened["keyVersion"]["id"]),
        (&PLAINTEXT.into(), &first.into())
    );
    assert_eq!(
        (&opened["ciphertext"], &opened["rewrappedKeyVersion"]),
        (&Value::Null, &Value::Null)
    );
    let metrics = health(&server, "/metrics", "*/*").await;
    assert!(metrics.contains("kms_server_rewraps_failed_total 1"), "{metrics}");

    // What must fail still does.
    let (_, stranger) =
        server.identity(Role::Writer, Scope::Instance(server.other_instance().await)).await;
    assert!(server.unwrap(&stranger, &id, &wdek).await.status >= 400);
    let act = |action: &'static str| {
        let path = format!("/keys/{id}/actions/{action}");
        let (server, token) = (&server, &token);
        async move { server.call(token, "POST", &path, "").await.status }
    };
    assert_eq!(act("disable").await, 204);
    assert_eq!(server.unwrap(&token, &id, &wdek).await.status, 409);
    assert_eq!(act("enable").await, 204);
    // A rotation is the way out.
    assert_eq!(act("rotate").await, 204);
    let opened = server.unwrap(&token, &id, &wdek).await.json();
    assert!(opened["ciphertext"].is_string(), "{opened}");
    server.call(&token, "DELETE", &format!("/keys/{id}"), "").await;
    assert_eq!(server.unwrap(&token, &id, &wdek).await.status, 410);
}

#[tokio::test]
async fn of_two_rotations_at_once_the_interval_allows_one() {
    // One is past its first look at the interval and waits for the HSM, or past its last one and waits for the database.
    for step in [Step::BeginVersion, Step::ActivateVersion] {
        of_two_rotations_one_is_done(step).await;
    }
}

async fn of_two_rotations_one_is_done(step: Step) {
    let interval = Duration::from_secs(3600);
    let hourly = Settings { min_rotation_interval: interval, ..Server::settings() };
    let (server, replica) = Server::start_pair_with(hourly).await;
    let (server, replica) = (Arc::new(server), replica);
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    server.store.set_fault(Some(Fault::Hold(step)));
    let late = {
        let (server, token, id) = (server.clone(), token.clone(), id.clone());
        tokio::spawn(async move { server.rotate(&token, &id).await })
    };
    server.store.holds().await;
    assert_eq!(replica.rotate(&token, &id).await.status, 204);
    server.store.set_fault(None);
    let late = late.await.unwrap();
    assert_eq!(late.status, 409, "{late:?}");
    let path = format!("/keys/{id}/versions");
    let versions = server.call(&token, "GET", &path, "").await.json();
    assert_eq!(versions["resources"].as_array().unwrap().len(), 2, "{versions}");
}
