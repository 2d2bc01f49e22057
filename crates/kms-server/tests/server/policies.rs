//! Policies: a service ID's roles in one instance or for one key, and what everything else looks like to it.

use crate::harness::{Server, new_key};
use kms_server::app::Settings;
use kms_server::http::KEY_ROUTES;
use kms_server::policy::{Action, Grant, Role, Scope, permits};
use serde_json::json;
use std::time::Duration;
use uuid::Uuid;

fn on_key(server: &Server, role: Role, key: &str) -> Grant {
    Grant { role, scope: Scope::Key { instance: server.instance(), key: key.parse().unwrap() } }
}

/// What a request to a route with a key in its path needs to succeed.
fn body(action: Action, wdek: &str) -> String {
    match action {
        Action::Unwrap => json!({ "ciphertext": wdek }).to_string(),
        _ => String::new(),
    }
}

#[tokio::test]
async fn a_role_for_one_key_is_a_role_for_that_key_alone() {
    let at_once = Settings { min_purge_wait: Duration::ZERO, ..Server::settings() };
    let server = Server::start_with(at_once).await;
    let admin = server.admin().await;
    let absent = Uuid::from_u128(1).to_string();
    let routes = || KEY_ROUTES.iter().filter(|route| route.path.contains("{id}"));
    for role in Role::ALL {
        let other = server.create_id(&admin, "other").await;
        let (foreign, _) = server.wrap(&admin, &other, "AAAA").await;
        for route in routes() {
            let mine = server.create_id(&admin, "mine").await;
            let (wdek, _) = server.wrap(&admin, &mine, "AAAA").await;
            if route.action == Action::EnableKey {
                let path = format!("/keys/{mine}/actions/disable");
                assert_eq!(server.call(&admin, "POST", &path, "").await.status, 204);
            }
            if route.action == Action::PurgeKey {
                let path = format!("/keys/{mine}");
                assert_eq!(server.call(&admin, "DELETE", &path, "").await.status, 204);
            }
            let (_, token) = server.identity_with(&[on_key(&server, role, &mine)]).await;
            let ask = |key: &str, wdek: &str| {
                let (path, body) = (route.path.replace("{id}", key), body(route.action, wdek));
                let (server, token) = (&server, &token);
                async move { server.call(token, route.method, &path, &body).await }
            };
            let (there, nothing) = (ask(&other, &foreign).await, ask(&absent, &foreign).await);
            assert_eq!((there.status, &there.body), (nothing.status, &nothing.body), "{route:?}");
            assert!(
                [404, 200].contains(&there.status) && there.status == 404 || route.method == "HEAD"
            );
            let answer = ask(&mine, &wdek).await;
            let expected = if permits(role, route.action) { 200..300 } else { 401..402 };
            assert!(expected.contains(&answer.status), "{role:?} {route:?}: {answer:?}");
        }
    }
}

#[tokio::test]
async fn a_list_shows_what_its_reader_may_see() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let mut keys = Vec::new();
    for name in ["one", "two", "three"] {
        keys.push(server.create_id(&admin, name).await);
    }
    let grants = [
        on_key(&server, Role::Reader, &keys[0]),
        on_key(&server, Role::Editor, &keys[1]),
        // May wrap, but a viewer lists nothing.
        on_key(&server, Role::Viewer, &keys[2]),
    ];
    let (_, token) = server.identity_with(&grants).await;
    let listed = server.call(&token, "GET", "/keys?totalCount=true", "").await.json();
    let mut shown: Vec<_> = listed["resources"]
        .as_array()
        .unwrap()
        .iter()
        .map(|key| key["id"].as_str().unwrap())
        .collect();
    shown.sort_unstable();
    let mut wanted: Vec<_> = keys[..2].iter().map(String::as_str).collect();
    wanted.sort_unstable();
    assert_eq!((shown, &listed["metadata"]["totalCount"]), (wanted, &json!(2)));
    let page = server.call(&token, "GET", "/keys?limit=1&offset=1", "").await.json();
    assert_eq!(page["resources"].as_array().unwrap().len(), 1);
    let counted = server.call(&token, "HEAD", "/keys", "").await;
    assert_eq!(counted.header("key-total"), Some("2"));
    assert_eq!(server.call(&token, "POST", "/keys", &new_key("mine")).await.status, 401);
    let (_, viewer) = server.identity_with(&grants[2..]).await;
    assert_eq!(server.call(&viewer, "GET", "/keys", "").await.status, 401);
}

#[tokio::test]
async fn an_instance_is_known_to_who_has_a_role_in_it_or_for_a_key_of_it() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = server.create_id(&admin, "crk").await;
    let (_, token) = server.identity_with(&[on_key(&server, Role::Reader, &key)]).await;
    let other = server.other_instance().await;
    let path = format!("/keys/{key}");
    let foreign = server.call_in(other, &token, "GET", &path, "").await;
    let nowhere = server.call_in(Uuid::from_u128(1), &token, "GET", &path, "").await;
    assert_eq!((foreign.status, &foreign.body), (400, &nowhere.body));
    assert_eq!(server.call(&token, "GET", &format!("{path}/metadata"), "").await.status, 200);
}

#[tokio::test]
async fn a_policy_holds_from_the_next_call_on_and_ends_with_the_next_call() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = server.create_id(&admin, "crk").await;
    let (owner, token) = server.identity(Role::Viewer, Scope::Instance(server.instance())).await;
    let path = format!("/keys/{key}");
    assert_eq!(server.call(&token, "GET", &path, "").await.status, 401);
    let new = json!({
        "service_id": format!("ServiceId-{}", owner.service_id), "role": "ReaderPlus",
        "instance_id": server.instance(), "key_id": key,
    });
    let made = server.manage(&admin, "POST", "/v1/policies", &new.to_string()).await;
    assert_eq!(made.status, 201, "{made:?}");
    assert_eq!(server.call(&token, "GET", &path, "").await.status, 200);
    let listed = server.manage(&admin, "GET", "/v1/policies", "").await.json();
    assert!(listed["policies"].as_array().unwrap().contains(&made.json()));
    let policy = format!("/v1/policies/{}", made.json()["id"].as_str().unwrap());
    assert_eq!(server.manage(&admin, "DELETE", &policy, "").await.status, 204);
    assert_eq!(server.call(&token, "GET", &path, "").await.status, 401);
    // Nothing but the log tells who had given whom what, now that the policy is gone.
    let grant = format!("ReaderPlus of key {key} of instance {}", server.instance());
    let mine = format!("iam-ServiceId-{}", server.made.admin.service_id);
    let of = owner.service_id;
    for (action, outcome) in [
        ("create_policy", "begun"),
        ("create_policy", "done"),
        ("delete_policy", "begun"),
        ("delete_policy", "done"),
    ] {
        let told = |line: &&str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["action"] == action
                && line["outcome"] == outcome
                && line["caller"] == mine
                && line["service_id"] == of.to_string()
                && line["grant"] == grant
        };
        let audit = server.audit();
        assert!(audit.lines().any(|line| told(&line)), "{action} {outcome}: {audit}");
    }
    assert_eq!(server.manage(&admin, "DELETE", &policy, "").await.status, 404);
    for action in ["create_policy", "delete_policy"] {
        assert!(server.audit().contains(&format!(r#""action":"{action}","outcome":"done""#)));
    }
}

#[tokio::test]
async fn without_any_policy_a_service_id_may_nothing() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let (owner, token) = server.identity(Role::Editor, Scope::Instance(server.instance())).await;
    let policy = format!("/v1/policies/Policy-{}", owner.service_id);
    assert_eq!(server.manage(&admin, "DELETE", &policy, "").await.status, 204);
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 400);
    assert_eq!(server.manage(&token, "GET", "/v1/policies", "").await.status, 403);
    let listed = server.manage(&admin, "GET", "/v1/serviceids", "").await;
    assert!(listed.body.contains(&owner.service_id.to_string()), "and can be given one again");
}

#[tokio::test]
async fn nobody_gives_or_takes_a_right_beyond_their_own() {
    let server = Server::start().await;
    let (here, there) = (server.instance(), server.other_instance().await);
    let admin = server.admin().await;
    let key = server.create_id(&admin, "crk").await;
    let (_, token) = server
        .identity_with(&[
            Grant { role: Role::Administrator, scope: Scope::Instance(here) },
            Grant { role: Role::Viewer, scope: Scope::Instance(there) },
        ])
        .await;
    let viewer = |scope| Grant { role: Role::Viewer, scope };
    let (mine, _) = server.identity_with(&[viewer(Scope::Instance(here))]).await;
    let (theirs, _) = server.identity_with(&[viewer(Scope::Instance(there))]).await;
    let (both, _) = server
        .identity_with(&[viewer(Scope::Instance(here)), viewer(Scope::Instance(there))])
        .await;
    let absent = Uuid::from_u128(1);
    let grant = |who: Uuid, place: serde_json::Value| {
        let mut new = json!({"service_id": format!("ServiceId-{who}"), "role": "Manager"});
        new.as_object_mut().unwrap().extend(place.as_object().unwrap().clone());
        let (server, token) = (&server, &token);
        async move { server.manage(token, "POST", "/v1/policies", &new.to_string()).await.status }
    };
    let in_key = |key: &str| json!({"instance_id": here, "key_id": key});
    assert_eq!(grant(mine.service_id, json!({"instance_id": here})).await, 201);
    assert_eq!(grant(mine.service_id, in_key(&key)).await, 201);
    assert_eq!(grant(mine.service_id, in_key(&absent.to_string())).await, 404);
    assert_eq!(grant(mine.service_id, json!({"key_id": key})).await, 400);
    for place in [json!({"instance_id": there}), json!({"instance_id": absent}), json!({})] {
        assert_eq!(grant(mine.service_id, place.clone()).await, 403, "{place}");
    }
    for who in [theirs.service_id, both.service_id, absent] {
        assert_eq!(grant(who, json!({"instance_id": here})).await, 404);
    }
    let listed = server.manage(&token, "GET", "/v1/policies", "").await.body;
    assert!(listed.contains(&mine.service_id.to_string()));
    for hidden in [&theirs, &both] {
        assert!(!listed.contains(&hidden.service_id.to_string()));
        let path = format!("/v1/policies/Policy-{}", hidden.service_id);
        assert_eq!(server.manage(&token, "DELETE", &path, "").await.status, 404);
        let new = json!({"name": "x", "service_id": format!("ServiceId-{}", hidden.service_id)});
        let answer = server.manage(&token, "POST", "/v1/apikeys", &new.to_string()).await;
        assert_eq!(answer.status, 404, "its API key would reach further than the caller");
        let path = format!("/v1/serviceids/ServiceId-{}", hidden.service_id);
        assert_eq!(server.manage(&token, "DELETE", &path, "").await.status, 404);
    }
}

#[tokio::test]
async fn a_service_id_can_be_made_for_one_key() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = server.create_id(&admin, "crk").await;
    let new = json!({
        "name": "node", "role": "Viewer", "instance_id": server.instance(), "key_id": key,
    });
    let made = server.manage(&admin, "POST", "/v1/serviceids", &new.to_string()).await;
    assert_eq!(made.status, 201, "{made:?}");
    let made = made.json();
    assert_eq!(made["policies"][0]["key_id"], json!(key));
    assert_eq!(made["instance_id"], json!(server.instance()));
    let mut absent = new.clone();
    absent["key_id"] = json!(Uuid::from_u128(1));
    let refused = server.manage(&admin, "POST", "/v1/serviceids", &absent.to_string()).await;
    assert_eq!(refused.status, 404);
}
