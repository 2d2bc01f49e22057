//! The operator's client of the token service.

use std::sync::Arc;
use std::time::Duration;

use kms_api::client::{Call, Management, USER_AGENT};
use kms_api::rest::{NewApiKey, NewInstance, NewServiceId};
use kms_api::token::{ApiKeySource, TokenSettings, TokenSource};
use kms_core::clock::ManualClock;
use kms_core::secret::SecretText;
use serde_json::json;

use crate::server::{Asked, Reply, Server};

fn answer(asked: &Asked) -> Reply {
    let id = json!({"id": "ServiceId-1", "iam_id": "iam-ServiceId-1", "name": "node", "role": "Viewer",
        "created_at": "2026-01-01T00:00:00Z"});
    let key = json!({"id": "ApiKey-1", "name": "k", "service_id": "ServiceId-1",
        "created_at": "2026-01-01T00:00:00Z", "apikey": "shown-once"});
    let instance = json!({"id": "i", "name": "default", "created_at": "2026-01-01T00:00:00Z"});
    match (asked.method.as_str(), asked.path.as_str()) {
        ("POST", "/identity/token") => Reply::ok(json!({"access_token": "t", "expires_in": 3600})),
        ("GET", "/v1/serviceids") => Reply::ok(json!({"serviceids": [id]})),
        ("POST", "/v1/serviceids") => Reply::Json(201, id.to_string()),
        ("GET", "/v1/apikeys") => Reply::ok(json!({"apikeys": []})),
        ("POST", "/v1/apikeys") => Reply::Json(201, key.to_string()),
        ("DELETE", "/v1/apikeys/ApiKey-1") => Reply::Json(204, String::new()),
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
    let url = format!("{}/identity/token", server.url());
    let settings = TokenSettings { url: url.clone(), ca: Some(server.ca.clone()) };
    let key = ApiKeySource::Inline(SecretText::new("admin-key".to_owned()));
    let tokens = TokenSource::new(&settings, key, Arc::new(ManualClock::new())).unwrap();
    let management = Management::new(&url, Some(&server.ca), USER_AGENT, tokens).unwrap();
    let call = Call::within(Duration::from_secs(30));

    assert_eq!(management.instances(call).await.unwrap()[0].name, "default");
    let new = NewInstance { name: "default".to_owned() };
    assert_eq!(management.create_instance(&new, call).await.unwrap().id, "i");
    assert_eq!(management.service_ids(call).await.unwrap()[0].role, "Viewer");
    let new = NewServiceId {
        name: "node".to_owned(),
        description: None,
        role: "Viewer".to_owned(),
        instance_id: Some("i".to_owned()),
    };
    assert_eq!(management.create_service_id(&new, call).await.unwrap().id, "ServiceId-1");
    assert!(management.api_keys(call).await.unwrap().is_empty());
    let new = NewApiKey { name: "k".to_owned(), service_id: "ServiceId-1".to_owned() };
    let key = management.create_api_key(&new, call).await.unwrap();
    assert_eq!(key.apikey.unwrap().expose(), "shown-once");
    management.revoke_api_key("ApiKey-1", call).await.unwrap();
    let refused = management.revoke_api_key("another", call).await.unwrap_err();
    assert_eq!(refused.to_string(), "BXNIM0513E:You are not authorized");
    let sent = &server.asked()[4].body;
    assert_eq!(sent, r#"{"name":"node","role":"Viewer","instance_id":"i"}"#);
}
