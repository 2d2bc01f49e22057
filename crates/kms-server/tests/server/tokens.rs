//! The token service's refusals, and management of instances, service IDs and API keys.

use crate::harness::{Server, http};
use kms_core::secret::SecretText;
use kms_server::policy::{Role, Scope};
use serde_json::json;

#[tokio::test]
async fn refusals_read_as_those_of_the_cloud_service() {
    let server = Server::start().await;
    let grant = "grant_type=urn:ibm:params:oauth:grant-type:apikey";
    for (path, form, code, message) in [
        (
            "/oidc/token",
            format!("{grant}&apikey=nobody"),
            "BXNIM0415E",
            "Provided API key could not be found.",
        ),
        (
            "/identity/token",
            format!("{grant}&apikey=nobody"),
            "BXNIM0415E",
            "Provided API key could not be found.",
        ),
        ("/oidc/token", grant.to_owned(), "BXNIM0109E", "Property missing or empty."),
        ("/oidc/token", String::new(), "BXNIM0109E", "Property missing or empty."),
    ] {
        let answer = http::ask(server.tokens, &server.ca(), "POST", path, &[], &form).await;
        assert_eq!(answer.status, 400, "{form}");
        assert_eq!(answer.json()["errorCode"], code, "{form}");
        assert_eq!(answer.json()["errorMessage"], message);
        assert!(answer.json()["context"].is_object());
    }
    let form = "grant_type=password&username=u&password=SECRET";
    let other = http::ask(server.tokens, &server.ca(), "POST", "/oidc/token", &[], form).await;
    assert_eq!(other.status, 400);
    assert!(other.message().contains("grants other than an API key"), "{other:?}");
    assert!(!other.body.contains("SECRET"));
    let get = http::ask(server.tokens, &server.ca(), "GET", "/oidc/token", &[], "").await;
    assert_eq!((get.status, &get.json()["errorCode"]), (405, &json!("BXNIM0060E")));
}

#[tokio::test]
async fn an_api_key_is_shown_once_and_works_until_it_is_revoked() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let new = json!({"name": "cluster-1", "role": "Viewer", "instance_id": server.instance()});
    let owner = server.manage(&admin, "POST", "/v1/serviceids", &new.to_string()).await;
    assert_eq!(owner.status, 201, "{owner:?}");
    let id = owner.json()["id"].as_str().unwrap().to_owned();
    let new = json!({"name": "node-1", "service_id": id}).to_string();
    let made = server.manage(&admin, "POST", "/v1/apikeys", &new).await.json();
    let text = made["apikey"].as_str().unwrap();
    assert_eq!(text.len(), 43, "256 bits in base64");
    let token = server.token(&SecretText::new(text.to_owned())).await;
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 401, "a viewer lists nothing");

    let listed = server.manage(&admin, "GET", "/v1/apikeys", "").await;
    assert!(listed.body.contains(made["id"].as_str().unwrap()));
    assert!(!listed.body.contains(text) && !server.audit().contains(text));
    let database = std::fs::read(server.dir.path().join("kms.db-wal")).unwrap();
    let found = database.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(!found, "the database holds a hash only");
    let listed = server.manage(&admin, "GET", "/v1/serviceids", "").await.json();
    assert!(listed["serviceids"].as_array().unwrap().contains(&owner.json()));
}

#[tokio::test]
async fn an_administrator_of_one_instance_manages_that_instance_only() {
    let server = Server::start().await;
    let other = server.other_instance().await;
    let (mine, token) =
        server.identity(Role::Administrator, Scope::Instance(server.instance())).await;
    let (theirs, _) = server.identity(Role::Viewer, Scope::Instance(other)).await;
    let (global, _) = server.identity(Role::Viewer, Scope::Everywhere).await;

    let list = server.manage(&token, "GET", "/v1/serviceids", "").await.body;
    assert!(list.contains(&mine.service_id.to_string()));
    for hidden in [&theirs, &global] {
        assert!(!list.contains(&hidden.service_id.to_string()));
        let new = json!({"name": "x", "service_id": format!("ServiceId-{}", hidden.service_id)});
        let answer = server.manage(&token, "POST", "/v1/apikeys", &new.to_string()).await;
        assert_eq!(answer.status, 404);
        let path = format!("/v1/apikeys/ApiKey-{}", hidden.api_key().unwrap());
        assert_eq!(server.manage(&token, "DELETE", &path, "").await.status, 404);
    }
    let instances = server.manage(&token, "GET", "/v1/instances", "").await.json();
    assert_eq!(instances["instances"].as_array().unwrap().len(), 1);
    for (path, body) in [
        ("/v1/instances", json!({"name": "mine too"})),
        ("/v1/serviceids", json!({"name": "x", "role": "Viewer"})),
        ("/v1/serviceids", json!({"name": "x", "role": "Viewer", "instance_id": other})),
    ] {
        let answer = server.manage(&token, "POST", path, &body.to_string()).await;
        assert_eq!(answer.status, 403, "{path} {body}");
    }
    let new = json!({"name": "x", "role": "Editor", "instance_id": server.instance()});
    assert_eq!(server.manage(&token, "POST", "/v1/serviceids", &new.to_string()).await.status, 201);
}

#[tokio::test]
async fn management_says_what_is_wrong() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let absent = "00000000-0000-4000-8000-000000000000";
    let taken = json!({"name": "default"});
    assert_eq!(
        server.manage(&admin, "POST", "/v1/instances", &taken.to_string()).await.status,
        409
    );
    for (path, body, status) in [
        ("/v1/serviceids", json!({"name": "x", "role": "Emperor"}), 400),
        ("/v1/serviceids", json!({"name": "", "role": "Viewer"}), 400),
        ("/v1/serviceids", json!({"name": "x", "role": "Viewer", "instance_id": "here"}), 400),
        ("/v1/serviceids", json!({"name": "x", "role": "Viewer", "instance_id": absent}), 409),
        ("/v1/serviceids", json!({"name": "x", "role": "Viewer", "colour": "red"}), 400),
        ("/v1/apikeys", json!({"name": "x", "service_id": absent}), 404),
        ("/v1/apikeys", json!({"name": "x", "service_id": "me"}), 400),
    ] {
        let answer = server.manage(&admin, "POST", path, &body.to_string()).await;
        assert_eq!(answer.status, status, "{path} {body}: {answer:?}");
        assert!(!answer.message().is_empty());
    }
    assert_eq!(server.manage(&admin, "DELETE", "/v1/apikeys/me", "").await.status, 404);
    assert_eq!(server.manage(&admin, "GET", "/v1/users", "").await.status, 404);
}
