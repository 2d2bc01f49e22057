//! API keys after they were made: locked, unlocked, and given a new secret.

use crate::harness::Server;
use crate::harness::faulty_store::{Fault, Step};
use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use kms_core::secret::SecretText;
use kms_server::policy::{Role, Scope};
use serde_json::{Value, json};
use std::time::Duration;

/// An API key of a service ID that may list keys.
async fn make(server: &Server, admin: &str) -> Value {
    let (owner, _) = server.identity(Role::Editor, Scope::Instance(server.instance())).await;
    let new = json!({"name": "node", "service_id": format!("ServiceId-{}", owner.service_id)});
    let made = server.manage(admin, "POST", "/v1/apikeys", &new.to_string()).await;
    assert_eq!(made.status, 201, "{made:?}");
    made.json()
}

fn path(key: &Value, verb: &str) -> String {
    format!("/v1/apikeys/{}/{verb}", key["id"].as_str().unwrap())
}

async fn status(server: &Server, token: &str) -> u16 {
    server.call(token, "GET", "/keys", "").await.status
}

async fn token_status(server: &Server, secret: &Value) -> (u16, Value) {
    let answer = server.ask_token(secret.as_str().unwrap()).await;
    (answer.status, answer.json()["errorCode"].clone())
}

fn secret(key: &Value) -> SecretText {
    SecretText::new(key["apikey"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_locked_api_key_and_its_tokens_are_useless_until_it_is_unlocked() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = make(&server, &admin).await;
    let token = server.token(&secret(&key)).await;
    assert_eq!(status(&server, &token).await, 200);
    assert_eq!(server.manage(&admin, "POST", &path(&key, "lock"), "").await.status, 204);
    assert_eq!(status(&server, &token).await, 401);
    // The same as for one that nobody has ever made.
    assert_eq!(token_status(&server, &key["apikey"]).await, (400, json!("BXNIM0415E")));
    assert_eq!(server.manage(&admin, "POST", &path(&key, "lock"), "").await.status, 409);
    let listed = server.manage(&admin, "GET", "/v1/apikeys", "").await.json();
    let shown = listed["apikeys"].as_array().unwrap().iter().find(|one| one["id"] == key["id"]);
    assert_eq!(shown.unwrap()["locked"], true);

    let server = server.restart().await;
    assert_eq!(status(&server, &token).await, 401, "after a restart, too");
    assert_eq!(server.manage(&admin, "DELETE", &path(&key, "lock"), "").await.status, 204);
    assert_eq!(status(&server, &token).await, 200);
    server.token(&secret(&key)).await;
    assert_eq!(server.manage(&admin, "DELETE", &path(&key, "lock"), "").await.status, 409);
    for action in ["lock_api_key", "unlock_api_key"] {
        assert!(server.audit().contains(&format!(r#""action":"{action}","outcome":"done""#)));
    }
}

#[tokio::test]
async fn a_rotated_api_key_keeps_its_id_and_its_old_secret_ends_with_its_tokens() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = make(&server, &admin).await;
    let old = server.token(&secret(&key)).await;
    let rotated = server.manage(&admin, "POST", &path(&key, "rotate"), "").await;
    assert_eq!(rotated.status, 200, "{rotated:?}");
    let rotated = rotated.json();
    assert_eq!((&rotated["id"], &rotated["service_id"]), (&key["id"], &key["service_id"]));
    assert_ne!(rotated["apikey"], key["apikey"]);
    assert_eq!(status(&server, &old).await, 401);
    assert_eq!(token_status(&server, &key["apikey"]).await, (400, json!("BXNIM0415E")));
    let new = server.token(&secret(&rotated)).await;
    assert_eq!(status(&server, &new).await, 200);
    let text = rotated["apikey"].as_str().unwrap();
    let database = std::fs::read(server.dir.path().join("kms.db-wal")).unwrap();
    assert!(!database.windows(text.len()).any(|window| window == text.as_bytes()));
    assert!(!server.audit().contains(text));
}

/// All that the server has on its disk, read by somebody who knows how an API key becomes a hash.
#[tokio::test]
async fn a_stolen_database_gives_no_api_key_away() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = make(&server, &admin).await;
    let body = json!({"overlap_seconds": 600}).to_string();
    let rotated = server.manage(&admin, "POST", &path(&key, "rotate"), &body).await.json();
    let good = [
        server.made.admin.api_key.clone(),
        server.made.viewer.api_key.clone(),
        secret(&key),
        secret(&rotated),
    ];
    let mut stolen = Vec::new();
    for file in std::fs::read_dir(server.dir.path()).unwrap() {
        stolen.extend(std::fs::read(file.unwrap().path()).unwrap());
    }
    let holds = |bytes: &[u8]| stolen.windows(bytes.len()).any(|window| window == bytes);
    for api_key in &good {
        server.token(api_key).await;
        let hash = digest(&SHA256, api_key.expose().as_bytes());
        assert!(holds(hash.as_ref()), "the search finds what is there");
        assert!(!holds(api_key.expose().as_bytes()), "the API key as it is sent");
        assert!(!holds(&BASE64URL.decode(api_key.expose()).unwrap()), "its random bytes");
        let hex: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        for shown in [BASE64URL.encode(hash), hex] {
            let answer = server.ask_token(&shown).await;
            assert_eq!(answer.json()["errorCode"], "BXNIM0415E", "a hash is no API key");
        }
    }
}

#[tokio::test]
async fn with_an_overlap_both_secrets_are_good_until_it_is_over() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = make(&server, &admin).await;
    let old = server.token(&secret(&key)).await;
    let body = json!({"overlap_seconds": 600}).to_string();
    let rotated = server.manage(&admin, "POST", &path(&key, "rotate"), &body).await.json();
    server.clock.advance(Duration::from_secs(599));
    let late = server.token(&secret(&key)).await;
    let new = server.token(&secret(&rotated)).await;
    for token in [&old, &late, &new] {
        assert_eq!(status(&server, token).await, 200);
    }
    server.clock.advance(Duration::from_secs(1));
    for token in [&old, &late] {
        assert_eq!(status(&server, token).await, 401, "a token does not outlive its secret");
    }
    assert_eq!(token_status(&server, &key["apikey"]).await, (400, json!("BXNIM0415E")));
    assert_eq!(status(&server, &new).await, 200);
    let week = json!({"overlap_seconds": 7 * 86_400 + 1}).to_string();
    assert_eq!(server.manage(&admin, "POST", &path(&key, "rotate"), &week).await.status, 400);
}

#[tokio::test]
async fn a_rotation_whose_answer_is_lost_is_done_again() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = make(&server, &admin).await;
    for (fault, kept) in
        [(Fault::Before(Step::RotateApiKey), true), (Fault::After(Step::RotateApiKey), false)]
    {
        server.store.set_fault(Some(fault));
        assert_eq!(server.manage(&admin, "POST", &path(&key, "rotate"), "").await.status, 503);
        server.store.set_fault(None);
        assert_eq!(server.ask_token(secret(&key).expose()).await.status == 200, kept, "{fault:?}");
    }
    let again = server.manage(&admin, "POST", &path(&key, "rotate"), "").await.json();
    server.token(&secret(&again)).await;
}

#[tokio::test]
async fn nobody_locks_or_rotates_the_api_keys_of_another_instance() {
    let server = Server::start().await;
    let (_, token) = server.identity(Role::Administrator, Scope::Instance(server.instance())).await;
    let (theirs, _) =
        server.identity(Role::Viewer, Scope::Instance(server.other_instance().await)).await;
    let absent = "00000000-0000-4000-8000-000000000000".to_owned();
    for (method, verb) in [("POST", "lock"), ("DELETE", "lock"), ("POST", "rotate")] {
        let ask = |id: String| {
            let path = format!("/v1/apikeys/ApiKey-{id}/{verb}");
            let (server, token) = (&server, &token);
            async move { server.manage(token, method, &path, "").await }
        };
        let foreign = ask(theirs.api_key().unwrap().to_string()).await;
        let nothing = ask(absent.clone()).await;
        assert_eq!((foreign.status, &foreign.body), (404, &nothing.body), "{method} {verb}");
    }
}
