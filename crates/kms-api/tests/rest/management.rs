//! The operator's client of the token service.

use std::sync::Arc;
use std::time::Duration;

use kms_api::client::{Call, Management, USER_AGENT};
use kms_api::rest::{NewApiKey, NewInstance, NewPolicy, NewProfile, NewServiceId, Rotation};
use kms_api::token::{Credential, TokenSettings, TokenSource};
use kms_core::clock::ManualClock;
use kms_core::secret::SecretText;
use serde_json::json;

use crate::server::{Asked, Reply, Server};

fn answer(asked: &Asked) -> Reply {
    let policy = json!({"id": "Policy-1", "service_id": "ServiceId-1", "role": "Viewer",
        "created_at": "2026-01-01T00:00:00Z"});
    let profile = json!({"id": "Profile-1", "iam_id": "iam-Profile-1", "name": "n", "issuer": "i",
        "service_id": "ServiceId-1", "subject": "s", "created_at": "2026-01-01T00:00:00Z"});
    let id = json!({"id": "ServiceId-1", "iam_id": "iam-ServiceId-1", "name": "node",
        "policies": [policy], "created_at": "2026-01-01T00:00:00Z"});
    let key = json!({"id": "ApiKey-1", "name": "k", "service_id": "ServiceId-1",
        "created_at": "2026-01-01T00:00:00Z", "apikey": "shown-once"});
    let instance = json!({"id": "i", "name": "default", "created_at": "2026-01-01T00:00:00Z"});
    match (asked.method.as_str(), asked.path.as_str()) {
        ("POST", "/identity/token") => Reply::ok(json!({"access_token": "t", "expires_in": 3600})),
        ("GET", "/v1/serviceids") => Reply::ok(json!({"serviceids": [id]})),
        ("POST", "/v1/serviceids") => Reply::Json(201, id.to_string()),
        ("DELETE", "/v1/serviceids/ServiceId-1") => Reply::Json(204, String::new()),
        ("GET", "/v1/apikeys") => Reply::ok(json!({"apikeys": []})),
        ("POST", "/v1/apikeys") => Reply::Json(201, key.to_string()),
        ("DELETE", "/v1/apikeys/ApiKey-1") => Reply::Json(204, String::new()),
        ("POST" | "DELETE", "/v1/apikeys/ApiKey-1/lock") => Reply::Json(204, String::new()),
        ("POST", "/v1/apikeys/ApiKey-1/rotate") => Reply::ok(key),
        ("GET", "/v1/policies") => Reply::ok(json!({"policies": [policy]})),
        ("POST", "/v1/policies") => Reply::Json(201, policy.to_string()),
        ("GET", "/v1/profiles") => Reply::ok(json!({"profiles": [profile]})),
        ("POST", "/v1/profiles") => Reply::Json(201, profile.to_string()),
        ("DELETE", "/v1/policies/Policy-1" | "/v1/profiles/Profile-1") => {
            Reply::Json(204, String::new())
        }
        ("GET", "/v1/instances") => Reply::ok(json!({"instances": [instance]})),
        ("POST", "/v1/instances") => Reply::Json(201, instance.to_string()),
        _ => Reply::Json(
            403,
            json!({"errorCode": "BXNIM0513E", "errorMessage": "You are not authorized."})
                .to_string(),
        ),
    }
}

#[tokio::test]
async fn instances_service_ids_and_api_keys_are_managed_beside_the_token_endpoint() {
    let server = Server::start(|_, asked| answer(asked)).await;
    let management = management(&server);
    let call = Call::within(Duration::from_secs(30));

    assert_eq!(management.instances(call).await.unwrap()[0].name, "default");
    let new = NewInstance { name: "default".to_owned() };
    assert_eq!(management.create_instance(&new, call).await.unwrap().id, "i");
    assert_eq!(management.service_ids(call).await.unwrap()[0].policies[0].role, "Viewer");
    let new = NewServiceId {
        name: "node".to_owned(),
        description: None,
        role: "Viewer".to_owned(),
        instance_id: Some("i".to_owned()),
        key_id: None,
    };
    assert_eq!(management.create_service_id(&new, call).await.unwrap().id, "ServiceId-1");
    assert!(management.api_keys(call).await.unwrap().is_empty());
    let new = NewApiKey { name: "k".to_owned(), service_id: "ServiceId-1".to_owned() };
    let key = management.create_api_key(&new, call).await.unwrap();
    assert_eq!(key.apikey.unwrap().expose(), "shown-once");
    management.revoke_api_key("ApiKey-1", call).await.unwrap();
    let refused = management.revoke_api_key("another", call).await.unwrap_err();
    assert_eq!(refused.to_string(), "BXNIM0513E:You are not authorized");
    management.delete_service_id("ServiceId-1", call).await.unwrap();
    assert!(management.delete_service_id("another", call).await.is_err());
    let sent = &server.asked()[4].body;
    assert_eq!(sent, r#"{"name":"node","role":"Viewer","instance_id":"i"}"#);
}

#[tokio::test]
async fn api_keys_are_locked_and_rotated_and_policies_and_profiles_managed() {
    let server = Server::start(|_, asked| answer(asked)).await;
    let management = management(&server);
    let call = Call::within(Duration::from_secs(30));
    management.lock_api_key("ApiKey-1", call).await.unwrap();
    management.unlock_api_key("ApiKey-1", call).await.unwrap();
    let rotation = Rotation { overlap_seconds: 60 };
    let rotated = management.rotate_api_key("ApiKey-1", &rotation, call).await.unwrap();
    assert_eq!(rotated.apikey.unwrap().expose(), "shown-once");
    assert_eq!(server.asked().last().unwrap().body, r#"{"overlap_seconds":60}"#);

    let new = NewPolicy {
        service_id: "ServiceId-1".to_owned(),
        role: "Viewer".to_owned(),
        instance_id: Some("i".to_owned()),
        key_id: Some("k".to_owned()),
    };
    let made = management.create_policy(&new, call).await.unwrap();
    assert_eq!(management.policies(call).await.unwrap(), [made]);
    management.delete_policy("Policy-1", call).await.unwrap();
    let new = NewProfile { namespace: Some("ns".to_owned()), ..NewProfile::default() };
    let made = management.create_profile(&new, call).await.unwrap();
    assert_eq!(management.profiles(call).await.unwrap(), [made]);
    management.delete_profile("Profile-1", call).await.unwrap();
    assert!(management.delete_policy("another", call).await.is_err());
}

fn management(server: &Server) -> Management {
    let url = format!("{}/identity/token", server.url());
    let settings = TokenSettings { url: url.clone(), ca: Some(server.ca.clone()) };
    let key = Credential::ApiKey(SecretText::new("admin-key".to_owned()));
    let tokens = TokenSource::new(&settings, key, Arc::new(ManualClock::new())).unwrap();
    Management::new(&url, Some(&server.ca), USER_AGENT, tokens).unwrap()
}
