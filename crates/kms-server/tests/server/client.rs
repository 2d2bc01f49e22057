//! Our own clients against our own server: what one writes the other reads.

use crate::harness::Server;
use kms_api::client::{
    Ca, Call, ClientSettings, Error, KeyProtect, KeyQuery, Management, NewKey, USER_AGENT,
};
use kms_api::rest::{NewApiKey, NewServiceId};
use kms_api::token::{Credential, TokenSettings, TokenSource};
use kms_core::clock::SystemClock;
use kms_core::secret::SecretText;
use std::sync::Arc;
use std::time::Duration;

const CALL: Call<'_> =
    Call { deadline: Duration::from_secs(20), correlation_id: Some("trace-1"), trace: None };

fn tokens(server: &Server, api_key: &SecretText) -> TokenSource {
    let url = format!("https://{}/oidc/token", server.tokens);
    let settings = TokenSettings { url, ca: Some(Ca::File(server.ca())) };
    let key = Credential::ApiKey(api_key.clone());
    TokenSource::new(&settings, key, Arc::new(SystemClock::new())).unwrap()
}

fn keys(server: &Server, api_key: &SecretText, instance_id: String) -> KeyProtect {
    let settings = ClientSettings {
        url: format!("https://{}", server.keys),
        instance_id,
        ca: Some(Ca::File(server.ca())),
        max_connections: 2,
        user_agent: USER_AGENT.into(),
    };
    KeyProtect::new(&settings, tokens(server, api_key)).unwrap()
}

#[tokio::test]
async fn the_key_client_does_everything_that_the_server_does() {
    let server = Server::start().await;
    let client = keys(&server, &server.made.admin.api_key, server.instance().to_string());
    let new = NewKey { name: "crk".into(), ..NewKey::default() };
    let id = client.create_key(&new, CALL).await.unwrap().id.unwrap();
    let made = client.wrap(&id, None, &[], CALL).await.unwrap();
    let opened = client.unwrap(&id, &made.ciphertext, &[], CALL).await.unwrap();
    assert_eq!(made.plaintext.unwrap().expose(), opened.plaintext.expose());
    client.rotate_key(&id, None, CALL).await.unwrap();
    let opened = client.unwrap(&id, &made.ciphertext, &[], CALL).await.unwrap();
    assert_ne!(opened.rewrapped_key_version, opened.key_version);
    assert!(opened.ciphertext.is_some());
    let listed = client.list_keys(&KeyQuery::default(), CALL).await.unwrap();
    assert_eq!(listed.resources.len(), 1);
    client.delete_key(&id, CALL).await.unwrap();
    let gone = client.unwrap(&id, &made.ciphertext, &[], CALL).await.unwrap_err();
    assert!(gone.is_refusal(), "{gone:?}");
    assert!(
        matches!(gone, Error::Refused { status: 410, code: Some(code), .. } if code == "KEY_DELETED_ERR")
    );
}

#[tokio::test]
async fn the_texts_that_operators_search_for_arrive() {
    let server = Server::start().await;
    let nobody = SecretText::new("nobody".into());
    let client = keys(&server, &nobody, server.instance().to_string());
    let refused = client.wrap("crk", None, &[], CALL).await.unwrap_err();
    assert_eq!(refused.to_string(), "BXNIM0415E:Provided API key could not be found");
    let viewer = &server.made.viewer.api_key;
    for instance in ["<INSTANCE_ID>", "00000000-0000-4000-8000-000000000000"] {
        let client = keys(&server, viewer, instance.to_owned());
        let refused = client.wrap("crk", None, &[], CALL).await.unwrap_err();
        assert_eq!(
            refused.to_string(),
            "Bad Request: Request requires valid Instance Header containing a valid UUID"
        );
    }
    let client = keys(&server, viewer, server.instance().to_string());
    let absent = client.wrap("00000000-0000-4000-8000-000000000000", None, &[], CALL).await;
    assert!(matches!(absent.unwrap_err(), Error::Refused { status: 404, .. }));
}

#[tokio::test]
async fn the_management_client_makes_and_revokes_api_keys() {
    let server = Server::start().await;
    let url = format!("https://{}/oidc/token", server.tokens);
    let (ca, source) = (Ca::File(server.ca()), tokens(&server, &server.made.admin.api_key));
    let client = Management::new(&url, Some(&ca), USER_AGENT, source).unwrap();
    let instance = client.instances(CALL).await.unwrap().remove(0);
    let new = NewServiceId {
        name: "cluster-1".into(),
        description: Some("first cluster".into()),
        role: "Viewer".into(),
        instance_id: Some(instance.id.clone()),
        key_id: None,
    };
    let owner = client.create_service_id(&new, CALL).await.unwrap();
    assert!(client.service_ids(CALL).await.unwrap().contains(&owner));
    let new = NewApiKey { name: "node-1".into(), service_id: owner.id };
    let key = client.create_api_key(&new, CALL).await.unwrap();
    let keyed = keys(&server, key.apikey.as_ref().unwrap(), instance.id);
    let missing = keyed.wrap("00000000-0000-4000-8000-000000000000", None, &[], CALL).await;
    assert!(matches!(missing.unwrap_err(), Error::Refused { status: 404, .. }));
    client.revoke_api_key(&key.id, CALL).await.unwrap();
    let refused = keyed.wrap("00000000-0000-4000-8000-000000000000", None, &[], CALL).await;
    // The client tries once more with a new token, and is told that there is none.
    let refused = refused.unwrap_err();
    assert_eq!(refused.to_string(), "BXNIM0415E:Provided API key could not be found");
    assert!(!client.api_keys(CALL).await.unwrap().iter().any(|one| one.id == key.id));
}
