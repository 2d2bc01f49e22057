//! Somebody can always manage the server: what would take the last one away is refused, whoever asks, and wherever. And
//! what is left of a service ID that is deleted.

use crate::harness::Server;
use crate::harness::http::Answer;
use kms_core::clock::Clock;
use kms_server::policy::{Caller, Grant, Role, Scope};
use kms_server::store::{Access, ApiKey, StoreError};
use serde_json::json;
use std::time::Duration;
use uuid::Uuid;

const EVERYWHERE: Grant = Grant { role: Role::ClusterAdministrator, scope: Scope::Everywhere };

/// The administrator that each server begins with.
struct First {
    server: Server,
    token: String,
    service_id: String,
    api_key: String,
}

impl First {
    async fn of(server: Server) -> First {
        let token = server.admin().await;
        let service_id = server.made.admin.service_id.to_string();
        let listed = server.manage(&token, "GET", "/v1/apikeys", "").await.json();
        let mut keys = listed["apikeys"].as_array().unwrap().iter();
        let mine = keys.find(|key| key["service_id"] == format!("ServiceId-{service_id}"));
        let api_key = mine.unwrap()["id"].as_str().unwrap().to_owned();
        First { server, token, service_id, api_key }
    }

    async fn ask(&self, method: &str, path: String) -> Answer {
        self.server.manage(&self.token, method, &path, "").await
    }

    /// Each way to take the first administrator away.
    fn ends(&self) -> [(&'static str, String); 4] {
        [
            ("POST", format!("/v1/apikeys/{}/lock", self.api_key)),
            ("DELETE", format!("/v1/apikeys/{}", self.api_key)),
            ("DELETE", format!("/v1/policies/Policy-{}", self.service_id)),
            ("DELETE", format!("/v1/serviceids/ServiceId-{}", self.service_id)),
        ]
    }

    async fn stays(&self, why: &str) {
        for (method, path) in self.ends() {
            let answer = self.ask(method, path.clone()).await;
            assert_eq!(answer.status, 409, "{why}: {method} {path}: {answer:?}");
            assert!(answer.body.contains("ClusterAdministrator"), "{why}: {answer:?}");
        }
        let server = &self.server;
        assert_eq!(
            server.manage(&server.admin().await, "GET", "/v1/policies", "").await.status,
            200
        );
    }
}

#[tokio::test]
async fn the_last_administrator_who_can_log_in_is_not_taken_away() {
    let first = First::of(Server::start().await).await;
    let server = &first.server;
    first.stays("there is no other").await;
    server.identity(Role::Administrator, Scope::Everywhere).await;
    server.identity(Role::ClusterAdministrator, Scope::Instance(server.instance())).await;
    first.stays("others reach less far").await;
    let (other, _) = server.identity_with(&[EVERYWHERE]).await;
    let key = other.api_key().unwrap();
    assert_eq!(first.ask("POST", format!("/v1/apikeys/ApiKey-{key}/lock")).await.status, 204);
    server.profile(other.service_id).await;
    first.stays("the other's API key is locked, and its profile hangs on an issuer").await;
    assert_eq!(first.ask("DELETE", format!("/v1/apikeys/ApiKey-{key}/lock")).await.status, 204);
    let [(method, path), ..] = first.ends();
    assert_eq!(first.ask(method, path).await.status, 204, "now there is another");
}

#[tokio::test]
async fn each_administrator_may_go_when_there_is_another() {
    for way in 0..4 {
        let first = First::of(Server::start().await).await;
        let (_, token) = first.server.identity_with(&[EVERYWHERE]).await;
        let (method, path) = first.ends()[way].clone();
        assert_eq!(first.ask(method, path.clone()).await.status, 204, "{method} {path}");
        assert_eq!(first.server.manage(&token, "GET", "/v1/policies", "").await.status, 200);
    }
}

#[tokio::test]
async fn the_last_administrators_api_key_is_rotated_or_replaced() {
    let first = First::of(Server::start().await).await;
    let (server, path) = (&first.server, format!("/v1/apikeys/{}/rotate", first.api_key));
    let overlap = json!({"overlap_seconds": 60}).to_string();
    let rotated = server.manage(&first.token, "POST", &path, &overlap).await;
    assert_eq!(rotated.status, 200, "{rotated:?}");
    server.clock.advance(Duration::from_secs(60));
    let secret = rotated.json()["apikey"].as_str().unwrap().to_owned();
    let answer = server.ask_token(&secret).await;
    let token = answer.json()["access_token"].as_str().unwrap().to_owned();
    let service_id = format!("ServiceId-{}", first.service_id);
    let new = json!({"name": "second", "service_id": service_id}).to_string();
    let made = server.manage(&token, "POST", "/v1/apikeys", &new).await.json();
    let old = format!("/v1/apikeys/{}", first.api_key);
    assert_eq!(server.manage(&token, "DELETE", &old, "").await.status, 204);
    let answer = server.ask_token(made["apikey"].as_str().unwrap()).await;
    let token = answer.json()["access_token"].as_str().unwrap().to_owned();
    let last = format!("/v1/apikeys/{}", made["id"].as_str().unwrap());
    assert_eq!(server.manage(&token, "DELETE", &last, "").await.status, 409);
}

#[tokio::test]
async fn rotations_whose_answers_are_lost_do_not_lock_the_last_administrator_out() {
    let first = First::of(Server::start().await).await;
    let (server, path) = (&first.server, format!("/v1/apikeys/{}/rotate", first.api_key));
    let rotate = async |seconds: u32| {
        let overlap = json!({"overlap_seconds": seconds}).to_string();
        server.manage(&server.admin().await, "POST", &path, &overlap).await
    };
    for too_short in [0, 59] {
        let refused = rotate(too_short).await;
        assert_eq!(refused.status, 409, "{refused:?}");
        assert!(refused.body.contains("give an overlap of at least 60 seconds"), "{refused:?}");
    }
    for _ in 0..3 {
        // Nobody reads the answer: the next one logs in with the secret from before them all.
        assert_eq!(rotate(60).await.status, 200);
    }
    let last = rotate(60).await.json()["apikey"].as_str().unwrap().to_owned();
    server.clock.advance(Duration::from_secs(60));
    assert_eq!(server.ask_token(&last).await.status, 200);
    assert_eq!(server.ask_token(server.made.admin.api_key.expose()).await.status, 400);
    server.identity_with(&[EVERYWHERE]).await;
    let token = server.ask_token(&last).await.json()["access_token"].as_str().unwrap().to_owned();
    let rotated = server.manage(&token, "POST", &path, "").await;
    assert_eq!(rotated.status, 200, "there is another: {rotated:?}");
}

/// A database from before this rule, or one that somebody has repaired by hand.
#[tokio::test]
async fn what_is_lost_already_is_in_nobodys_way() {
    let server = Server::start().await;
    let (other, _) = server.identity(Role::Viewer, Scope::Everywhere).await;
    let options = sqlx::sqlite::SqliteConnectOptions::new();
    let options = options.filename(server.dir.path().join("kms.db"));
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    let lock = "UPDATE api_keys SET locked_at = 1 WHERE service_id = ?";
    let admin = server.made.admin.service_id.to_string();
    sqlx::query(lock).bind(&admin).execute(&pool).await.unwrap();
    let now = server.clock.wall().into();
    assert!(server.store.revoke_api_key(other.api_key().unwrap(), now).await.unwrap());
    let policy = server.store.remove_policy(server.made.admin.service_id).await;
    assert!(matches!(policy, Err(StoreError::Conflict(_))), "but the role stays with somebody");
}

/// Each on its own connections, as two processes are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_administrators_who_end_each_other_on_two_servers_one_stays() {
    let (one, two) = Server::start_pair().await;
    let mut left = one.made.admin.service_id;
    for round in 0..24 {
        let (other, _) = one.identity_with(&[EVERYWHERE]).await;
        let (here, there) =
            (ends(&one, round % 3, left), ends(&two, round / 3 % 3, other.service_id));
        let ended = tokio::join!(here, there);
        match ended {
            (Ok(true), Err(StoreError::Conflict(_))) => left = other.service_id,
            (Err(StoreError::Conflict(_)), Ok(true)) => {}
            other => panic!("round {round}: {other:?}"),
        }
        let good = one.store.service_id(left).await.unwrap().unwrap();
        assert_eq!(good.grants(), [EVERYWHERE], "round {round}");
        let keys = one.store.api_keys().await.unwrap();
        let mine = |key: &&ApiKey| key.service_id == left && key.locked_at.is_none();
        assert_eq!(keys.iter().filter(mine).count(), 1, "round {round}");
    }
}

/// Ends an administrator in one of the ways.
async fn ends(server: &Server, way: u32, service_id: Uuid) -> Result<bool, StoreError> {
    let keys = server.store.api_keys().await?;
    let key = keys.iter().find(|key| key.service_id == service_id).unwrap().id;
    let now = server.clock.wall().into();
    match way {
        0 => server.store.lock_api_key(key, Some(now)).await,
        1 => server.store.revoke_api_key(key, now).await,
        _ => server.store.remove_service_id(service_id).await,
    }
}

#[tokio::test]
async fn a_deleted_service_id_and_its_tokens_end_with_the_next_call_on_every_server() {
    let (one, two) = Server::start_pair().await;
    let admin = one.admin().await;
    let scope = Scope::Instance(one.instance());
    let grants = [Role::Editor, Role::Manager].map(|role| Grant { role, scope });
    let (owner, token): (Caller, String) = one.identity_with(&grants).await;
    let (stays, other) = one.identity_with(&grants).await;
    let profile = one.profile(owner.service_id).await;
    for server in [&one, &two] {
        assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
        assert!(server.store.caller_by_profile(profile).await.unwrap().is_some());
    }
    let path = format!("/v1/serviceids/ServiceId-{}", owner.service_id);
    assert_eq!(one.manage(&admin, "DELETE", &path, "").await.status, 204);
    for server in [&two, &one] {
        assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 401);
        assert!(server.store.caller_by_profile(profile).await.unwrap().is_none());
        let again = server.ask_token(&owner.api_key().unwrap().to_string()).await;
        assert_eq!((again.status, &again.json()["errorCode"]), (400, &json!("BXNIM0415E")));
        assert_eq!(server.call(&other, "GET", "/keys", "").await.status, 200, "nobody else's");
    }
    for list in ["serviceids", "apikeys", "policies", "profiles"] {
        let listed = one.manage(&admin, "GET", &format!("/v1/{list}"), "").await.body;
        assert!(!listed.contains(&owner.service_id.to_string()), "{listed}");
        let left = list == "profiles" || listed.contains(&stays.service_id.to_string());
        assert!(left, "{listed}");
    }
    assert_eq!(one.manage(&admin, "DELETE", &path, "").await.status, 404);
    for outcome in ["begun", "done"] {
        let record = format!(r#""action":"delete_service_id","outcome":"{outcome}""#);
        assert_eq!(one.audit().matches(&record).count(), 1);
    }
}
