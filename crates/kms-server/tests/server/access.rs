//! Who may do what, over the wire: the matrix of every route, every role and every tenant, from the route table
//! itself.

use crate::harness::http::Answer;
use crate::harness::{Server, http, new_key};
use kms_core::clock::Clock;
use kms_server::app::Settings;
use kms_server::http::{KEY_ROUTES, MANAGEMENT_ROUTES, Route};
use kms_server::issuers::{KeySource, Trusted};
use kms_server::policy::{Action, Grant, Role, Scope, permits};
use kms_server::store::Access;
use serde_json::json;
use std::time::Duration;
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

    /// As it must be for `action` to succeed.
    async fn prepare(&self, server: &Server, admin: &str, action: Action) {
        match action {
            Action::EnableKey => self.disable(server, admin).await,
            Action::PurgeKey => {
                let path = format!("/keys/{}", self.key);
                let answer = server.call_in(self.instance, admin, "DELETE", &path, "").await;
                assert_eq!(answer.status, 204, "{answer:?}");
            }
            _ => {}
        }
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

fn purging_at_once() -> Settings {
    Settings { min_purge_wait: Duration::ZERO, ..Server::settings() }
}

#[tokio::test]
async fn every_route_of_the_key_api_obeys_the_policy_for_every_role() {
    let server = Server::start_with(purging_at_once()).await;
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
                target.prepare(&server, &admin, route.action).await;
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
    let every = [Role::ClusterAdministrator, Role::KeyPurge];
    let every = every.map(|role| Grant { role, scope: Scope::Everywhere });
    let (_, token) = server.identity_with(&every).await;
    // Even somebody with every right everywhere reaches a key through its own instance only.
    for route in KEY_ROUTES.iter().filter(|route| route.path.contains("{id}")) {
        let answer = misplaced.ask(&server, &token, route).await;
        assert_eq!(answer.status, 404, "{route:?}: {answer:?}");
        assert_eq!(answer.body, absent.ask(&server, &token, route).await.body);
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

/// What a request to a management route speaks of.
struct Managed {
    service_id: Uuid,
    api_key: Uuid,
    profile: Uuid,
    instance: Option<Uuid>,
}

impl Managed {
    /// A service ID with a policy, an API key and a profile.
    async fn make(server: &Server, scope: Scope) -> Managed {
        let (owner, _) = server.identity(Role::Viewer, scope).await;
        let (service_id, api_key) = (owner.service_id, owner.api_key().unwrap());
        let profile = server.profile(service_id).await;
        Managed { service_id, api_key, profile, instance: scope.instance() }
    }

    fn absent() -> Managed {
        let id = Uuid::from_u128(1);
        Managed { service_id: id, api_key: id, profile: id, instance: Some(id) }
    }

    /// A request to `route` that succeeds for whoever is allowed. `name` is taken only once.
    async fn ask(&self, server: &Server, token: &str, route: &Route, name: &str) -> Answer {
        let id = match route.action {
            // A service ID's first policy bears its id.
            Action::DeletePolicy | Action::DeleteServiceId => self.service_id,
            Action::DeleteProfile => self.profile,
            _ => self.api_key,
        };
        let path = route.path.replace("{id}", &id.to_string());
        let service_id = format!("ServiceId-{}", self.service_id);
        let mut body = match route.action {
            Action::CreateInstance => json!({"name": name}),
            Action::CreateServiceId => json!({"name": "x", "role": "Viewer"}),
            Action::CreateApiKey => json!({"name": "x", "service_id": service_id}),
            Action::CreatePolicy => json!({"role": "Reader", "service_id": service_id}),
            Action::CreateProfile => {
                json!({"name": name, "service_id": service_id, "issuer": OTHER_ISSUER, "subject": "x"})
            }
            _ => json!(null),
        };
        let placed = [Action::CreateServiceId, Action::CreatePolicy].contains(&route.action);
        if let (Some(instance), true) = (self.instance, placed) {
            body["instance_id"] = json!(instance);
        }
        let body = if body.is_null() { String::new() } else { body.to_string() };
        server.manage(token, route.method, &path, &body).await
    }
}

async fn trusting_another_issuer() -> Server {
    let keys = KeySource::File("/dev/null".into());
    let issuers = vec![Trusted { url: OTHER_ISSUER.into(), audience: "kms".into(), keys }];
    Server::start_with(Settings { issuers, ..Server::settings() }).await
}

#[tokio::test]
async fn every_route_of_management_obeys_the_policy_for_every_role() {
    let server = trusting_another_issuer().await;
    let admin = server.admin().await;
    for role in Role::ALL {
        let (_, token) = server.identity(role, Scope::Everywhere).await;
        for route in MANAGEMENT_ROUTES {
            let target = Managed::make(&server, Scope::Everywhere).await;
            if route.action == Action::UnlockApiKey {
                let now = server.clock.wall().into();
                assert!(server.store.lock_api_key(target.api_key, Some(now)).await.unwrap());
            }
            let answer = target.ask(&server, &token, route, &format!("{role:?}")).await;
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
async fn pitfall_08_who_manages_one_instance_sees_nothing_of_another() {
    let server = trusting_another_issuer().await;
    let foreign = Managed::make(&server, Scope::Instance(server.other_instance().await)).await;
    let absent = Managed::absent();
    let hidden = [foreign.service_id, foreign.api_key, foreign.profile, foreign.instance.unwrap()];
    for role in Role::ALL {
        let (_, token) = server.identity(role, Scope::Instance(server.instance())).await;
        for route in MANAGEMENT_ROUTES {
            let there = foreign.ask(&server, &token, route, "there").await;
            let nowhere = absent.ask(&server, &token, route, "nowhere").await;
            assert_eq!((there.status, &there.body), (nowhere.status, &nowhere.body), "{route:?}");
            let listed = route.method == "GET" && permits(role, route.action);
            let expected = if listed { 200..201 } else { 403..405 };
            assert!(expected.contains(&there.status), "{role:?} {route:?}: {there:?}");
            let told = hidden.iter().find(|id| there.body.contains(&id.to_string()));
            assert_eq!(told, None, "{role:?} {route:?}: {there:?}");
        }
    }
    let everything = server.manage(&server.admin().await, "GET", "/v1/serviceids", "").await;
    assert!(everything.body.contains(&foreign.service_id.to_string()), "it is there");
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
    // The server may have written an anchor meanwhile.
    let last = audit.lines().rfind(|line| !line.contains(r#""action":"anchor""#)).unwrap();
    for part in ["create_key", "UNAUTHORIZED_ERR", &caller.iam_id()] {
        assert!(last.contains(part), "{part} is not in {last}");
    }
}

/// Else whoever fills the log's disk first gives themselves rights, or destroys keys, without a trace.
#[tokio::test]
async fn where_no_record_can_be_kept_nothing_is_changed() {
    let server = trusting_another_issuer().await;
    let admin = server.admin().await;
    let target = Target::make(&server, &admin, server.instance()).await;
    let managed = Managed::make(&server, Scope::Everywhere).await;
    let log = server.dir.path().join("audit.log");
    std::fs::rename(&log, log.with_extension("kept")).unwrap();
    std::fs::create_dir(&log).unwrap();
    // Each commit goes there.
    let commits = || std::fs::read(server.dir.path().join("kms.db-wal")).unwrap();
    let before = commits();
    for route in KEY_ROUTES {
        let answer = target.ask(&server, &admin, route).await;
        assert_eq!(answer.status, 503, "{route:?}: {answer:?}");
        assert!(commits() == before, "{route:?} has changed something");
    }
    for route in MANAGEMENT_ROUTES {
        let answer = managed.ask(&server, &admin, route, "unrecorded").await;
        assert_eq!(answer.status, 503, "{route:?}: {answer:?}");
        assert!(commits() == before, "{route:?} has changed something");
    }
}

#[tokio::test]
async fn a_change_is_recorded_before_it_is_made_and_when_it_is_done() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let target = Target::make(&server, &admin, server.instance()).await;
    let path = format!("/keys/{}", target.key);
    assert_eq!(server.call(&admin, "DELETE", &path, "").await.status, 204);
    for action in ["create_key", "delete_key"] {
        let audit = server.audit();
        let outcomes: Vec<_> = audit
            .lines()
            .filter(|line| line.contains(&format!(r#""action":"{action}""#)))
            .filter(|line| line.contains(&target.key))
            .map(|line| ["begun", "done"].map(|it| line.contains(&format!(r#""outcome":"{it}""#))))
            .collect();
        assert_eq!(outcomes, [[true, false], [false, true]], "{action}: {audit}");
    }
}
