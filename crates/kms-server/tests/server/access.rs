//! Who may do what, over the wire: the matrix of every route, every role and every tenant, from the route table
//! itself.

use crate::harness::http::Answer;
use crate::harness::{Server, http, new_key};
use kms_core::clock::Clock;
use kms_server::http::{KEY_ROUTES, MANAGEMENT_ROUTES, Route};
use kms_server::issuers::{KeySource, Trusted};
use kms_server::policy::{Action, Role, Scope, permits};
use kms_server::store::Access;
use serde_json::json;
use uuid::Uuid;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
const OTHER_ISSUER: &str = "https://issuer.test";
const MATERIAL: &str = "AAECAwQFBgcICQoLDA0ODw==";

/// A key and a WDEK in `instance`, made by somebody who may.
struct Target {
    instance: Uuid,
    key: String,
    wdek: String,
}

impl Target {
    async fn make(server: &Server, admin: &str, instance: Uuid) -> Target {
        let made = server.call_in(instance, admin, "POST", "/keys", &new_key("target")).await;
        assert_eq!(made.status, 201, "{made:?}");
        let key = made.json()["resources"][0]["id"].as_str().unwrap().to_owned();
        let body = json!({"plaintext": PLAINTEXT}).to_string();
        let path = format!("/keys/{key}/actions/wrap");
        let wrapped = server.call_in(instance, admin, "POST", &path, &body).await;
        let wdek = wrapped.json()["ciphertext"].as_str().unwrap().to_owned();
        Target { instance, key, wdek }
    }

    async fn disable(&self, server: &Server, admin: &str) {
        let path = format!("/keys/{}/actions/disable", self.key);
        let answer = server.call_in(self.instance, admin, "POST", &path, "").await;
        assert_eq!(answer.status, 204, "{answer:?}");
    }

    /// A request to `route` that succeeds for whoever is allowed.
    async fn ask(&self, server: &Server, token: &str, route: &Route) -> Answer {
        let path = route.path.replace("{id}", &self.key);
        let body = match route.action {
            Action::CreateKey => new_key("made"),
            Action::Unwrap => json!({"ciphertext": self.wdek}).to_string(),
            _ => String::new(),
        };
        server.call_in(self.instance, token, route.method, &path, &body).await
    }
}

#[tokio::test]
async fn every_route_of_the_key_api_obeys_the_policy_for_every_role() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let (mine, foreign) = (server.instance(), server.other_instance().await);
    for role in Role::ALL {
        let (_, here) = server.identity(role, Scope::Instance(mine)).await;
        let (_, everywhere) = server.identity(role, Scope::Everywhere).await;
        for route in KEY_ROUTES {
            let allowed = permits(role, route.action);
            let expected = if allowed { 200..300 } else { 401..402 };
            for (token, instance) in [(&here, mine), (&everywhere, mine), (&everywhere, foreign)] {
                let target = Target::make(&server, &admin, instance).await;
                if route.action == Action::EnableKey {
                    target.disable(&server, &admin).await;
                }
                let answer = target.ask(&server, token, route).await;
                assert!(expected.contains(&answer.status), "{role:?} {route:?}: {answer:?}");
            }
        }
    }
}

#[tokio::test]
async fn pitfall_08_a_foreign_instance_looks_like_one_that_does_not_exist() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let foreign = Target::make(&server, &admin, server.other_instance().await).await;
    let nowhere = Target {
        instance: Uuid::from_u128(1),
        key: foreign.key.clone(),
        wdek: foreign.wdek.clone(),
    };
    for role in Role::ALL {
        let (_, token) = server.identity(role, Scope::Instance(server.instance())).await;
        for route in KEY_ROUTES {
            let refused = foreign.ask(&server, &token, route).await;
            let absent = nowhere.ask(&server, &token, route).await;
            assert_eq!(refused.status, 400, "{role:?} {route:?}");
            assert_eq!((refused.status, &refused.body), (absent.status, &absent.body));
        }
    }
    let refused = foreign.ask(&server, &server.viewer().await, &KEY_ROUTES[1]).await;
    assert_eq!(
        refused.message(),
        "Bad Request: Request requires valid Instance Header containing a valid UUID"
    );
}

#[tokio::test]
async fn a_key_of_another_instance_looks_like_one_that_does_not_exist() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let foreign = Target::make(&server, &admin, server.other_instance().await).await;
    let (key, wdek) = (foreign.key.clone(), foreign.wdek.clone());
    let misplaced = Target { instance: server.instance(), key, wdek: wdek.clone() };
    let absent = Target { instance: server.instance(), key: Uuid::from_u128(1).to_string(), wdek };
    // Even somebody with every right everywhere reaches a key through its own instance only.
    for route in KEY_ROUTES.iter().filter(|route| route.path.contains("{id}")) {
        let answer = misplaced.ask(&server, &admin, route).await;
        assert_eq!(answer.status, 404, "{route:?}: {answer:?}");
        assert_eq!(answer.body, absent.ask(&server, &admin, route).await.body);
    }
}

#[tokio::test]
async fn importing_needs_its_own_right() {
    let server = Server::start().await;
    let body =
        new_key("brought").replace("\"name\"", &format!("\"payload\":\"{MATERIAL}\",\"name\""));
    for role in Role::ALL {
        let (_, token) = server.identity(role, Scope::Everywhere).await;
        let answer = server.call(&token, "POST", "/keys", &body).await;
        let expected = if permits(role, Action::ImportKey) { 201 } else { 401 };
        assert_eq!(answer.status, expected, "{role:?}");
    }
}

#[tokio::test]
async fn every_route_of_management_obeys_the_policy_for_every_role() {
    let keys = KeySource::File("/dev/null".into());
    let trusted = Trusted { url: OTHER_ISSUER.into(), audience: "kms".into(), keys };
    let server = Server::start_trusting(Server::SETTINGS, vec![trusted]).await;
    let admin = server.admin().await;
    for role in Role::ALL {
        let (_, token) = server.identity(role, Scope::Everywhere).await;
        for route in MANAGEMENT_ROUTES {
            let (owner, _) = server.identity(Role::Viewer, Scope::Everywhere).await;
            let service_id = format!("ServiceId-{}", owner.service_id);
            let profile = server.profile(owner.service_id).await;
            let id = match route.action {
                // A service ID's first policy bears its id.
                Action::DeletePolicy => owner.service_id,
                Action::DeleteProfile => profile,
                _ => owner.api_key().unwrap(),
            };
            if route.action == Action::UnlockApiKey {
                let now = server.clock.wall().into();
                assert!(server.store.lock_api_key(id, Some(now)).await.unwrap());
            }
            let path = route.path.replace("{id}", &id.to_string());
            let body = match route.action {
                Action::CreateInstance => json!({"name": format!("{role:?}")}).to_string(),
                Action::CreateServiceId => json!({"name": "x", "role": "Viewer"}).to_string(),
                Action::CreateApiKey => json!({"name": "x", "service_id": service_id}).to_string(),
                Action::CreatePolicy => json!({"role": "Reader", "service_id": service_id}).to_string(),
                Action::CreateProfile => json!({
                    "name": format!("{role:?}"), "service_id": service_id, "issuer": OTHER_ISSUER, "subject": "x",
                })
                .to_string(),
                _ => String::new(),
            };
            let answer = server.manage(&token, route.method, &path, &body).await;
            let allowed = permits(role, route.action);
            let expected = if allowed { 200..300 } else { 403..404 };
            assert!(expected.contains(&answer.status), "{role:?} {route:?}: {answer:?}");
            if !allowed {
                assert_eq!(answer.json()["errorCode"], "BXNIM0513E");
            }
        }
    }
    assert_eq!(server.manage(&admin, "GET", "/v1/instances", "").await.status, 200);
}

#[tokio::test]
async fn without_a_token_nothing_is_answered() {
    let server = Server::start().await;
    let instance = server.instance().to_string();
    for route in KEY_ROUTES {
        let path = format!("/api/v2{}", route.path.replace("{id}", &instance));
        let headers = [("icp-instance", instance.as_str())];
        let ask = http::ask(server.keys, &server.ca(), route.method, &path, &headers, "").await;
        assert_eq!(ask.status, 401, "{route:?}");
    }
    for route in MANAGEMENT_ROUTES {
        let path = route.path.replace("{id}", &instance);
        let ask = http::ask(server.tokens, &server.ca(), route.method, &path, &[], "").await;
        assert_eq!(ask.status, 401, "{route:?}");
    }
}

#[tokio::test]
async fn a_revoked_api_key_ends_its_tokens_with_the_next_call() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let (caller, token) = server.identity(Role::Editor, Scope::Instance(server.instance())).await;
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    let path = format!("/v1/apikeys/ApiKey-{}", caller.api_key().unwrap());
    assert_eq!(server.manage(&admin, "DELETE", &path, "").await.status, 204);
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 401);
    let again = server.ask_token(&caller.api_key().unwrap().to_string()).await;
    assert_eq!((again.status, &again.json()["errorCode"]), (400, &json!("BXNIM0415E")));
    assert_eq!(server.manage(&admin, "DELETE", &path, "").await.status, 404);
}

#[tokio::test]
async fn refusals_are_in_the_audit_log() {
    let server = Server::start().await;
    let (caller, token) = server.identity(Role::Viewer, Scope::Instance(server.instance())).await;
    let answer = server.call(&token, "POST", "/keys", &new_key("mine")).await;
    assert_eq!(
        answer.message(),
        "Unauthorized: The user does not have access to the specified resource"
    );
    let audit = server.audit();
    let last = audit.lines().last().unwrap();
    for part in ["create_key", "UNAUTHORIZED_ERR", &caller.iam_id()] {
        assert!(last.contains(part), "{part} is not in {last}");
    }
}
