//! The key service's client: what it sends, and what it makes of each way to fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kms_api::client::{
    Call, ClientSettings, Error, KeyProtect, KeyQuery, NewKey, SetupError, USER_AGENT,
};
use kms_api::token::{Credential, TokenSettings, TokenSource};
use kms_api::trace::TraceParent;
use kms_core::clock::ManualClock;
use kms_core::secret::SecretText;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::server::{Asked, Reply, Server};

const INSTANCE: &str = "11111111-2222-3333-4444-555555555555";
const CRK: &str = "0a0a0a0a-0000-4000-8000-000000000001";
const SOON: Duration = Duration::from_millis(300);
const LATE: Duration = Duration::from_secs(30);

/// A server whose token endpoint gives out `token-0`, `token-1`, ... and whose other requests are the script's.
async fn start(
    script: impl Fn(usize, &Asked) -> Reply + Send + Sync + 'static,
) -> (Server, KeyProtect) {
    let (tokens, keys) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let server = Server::start(move |_, asked| {
        if asked.path == "/oidc/token" {
            let number = tokens.fetch_add(1, Ordering::SeqCst);
            let token = format!("token-{number}");
            return Reply::ok(json!({"access_token": token, "expires_in": 3600}));
        }
        script(keys.fetch_add(1, Ordering::SeqCst), asked)
    })
    .await;
    let client = client(&server, &server.url());
    (server, client)
}

fn client(server: &Server, url: &str) -> KeyProtect {
    KeyProtect::new(&settings(server, url), tokens(server)).unwrap()
}

fn settings(server: &Server, url: &str) -> ClientSettings {
    ClientSettings {
        url: url.to_owned(),
        instance_id: INSTANCE.to_owned(),
        ca: Some(server.ca.clone()),
        max_connections: 2,
        user_agent: USER_AGENT.to_owned(),
    }
}

fn tokens(server: &Server) -> TokenSource {
    let url = format!("{}/oidc/token", server.url());
    let settings = TokenSettings { url, ca: Some(server.ca.clone()) };
    let key = Credential::ApiKey(SecretText::new("an-api-key".to_owned()));
    TokenSource::new(&settings, key, Arc::new(ManualClock::new())).unwrap()
}

fn asked_of_keys(server: &Server) -> Vec<Asked> {
    server.asked().into_iter().filter(|asked| asked.path != "/oidc/token").collect()
}

const TRACE: &str = "00-0123456789abcdef0123456789abcdef-fedcba9876543210-01";

fn wrapped() -> Reply {
    Reply::ok(json!({"ciphertext": "V0RFSw==", "plaintext": "REVL", "keyVersion": {"id": "v1"}}))
}

async fn wrap(client: &KeyProtect, deadline: Duration) -> Result<(), Error> {
    client.wrap(CRK, None, &[], Call::within(deadline)).await.map(drop)
}

#[tokio::test]
async fn wrap_sends_what_every_dialect_of_the_service_needs() {
    let (server, client) = start(|_, _| wrapped()).await;
    let trace = TraceParent::parse(TRACE);
    let call = Call { deadline: LATE, correlation_id: Some("uid-1"), trace };
    let aad = ["first".to_owned(), String::new()];
    let answer = client.wrap(CRK, Some(b"a dek"), &aad, call).await.unwrap();

    assert_eq!(answer.ciphertext, "V0RFSw==");
    assert_eq!(answer.plaintext.unwrap().expose(), "REVL");
    assert_eq!(answer.key_version.unwrap().id, "v1");
    let asked = &asked_of_keys(&server)[0];
    assert_eq!(asked.method, "POST");
    assert_eq!(asked.path, format!("/api/v2/keys/{CRK}?action=wrap"));
    let header = |name: &str| asked.headers.get(name).map(String::as_str);
    assert_eq!(header("icp-instance"), Some(INSTANCE));
    assert_eq!(header("bluemix-instance"), Some(INSTANCE));
    assert_eq!(header("correlation-id"), Some("uid-1"));
    assert_eq!(header("traceparent"), Some(TRACE));
    assert_eq!(header("authorization"), Some("Bearer token-0"));
    assert_eq!(header("user-agent"), Some(USER_AGENT));
    let body: Value = serde_json::from_str(&asked.body).unwrap();
    assert_eq!(body, json!({"plaintext": "YSBkZWs=", "aad": ["first", ""]}));
}

#[tokio::test]
async fn unwrap_reads_the_answer_of_the_product_of_2019_too() {
    let (server, client) = start(|number, _| match number {
        0 => Reply::ok(json!({"plaintext": "REVL"})),
        _ => Reply::ok(json!({"plaintext": "REVL", "keyVersion": {"id": "v1"},
            "ciphertext": "TmV3", "rewrappedKeyVersion": {"id": "v2"}})),
    })
    .await;
    let old = client.unwrap(CRK, "V0RFSw==", &[], Call::within(LATE)).await.unwrap();
    let new = client.unwrap(CRK, "V0RFSw==", &[], Call::within(LATE)).await.unwrap();
    assert!(old.key_version.is_none() && old.ciphertext.is_none());
    assert_eq!(new.rewrapped_key_version.unwrap().id, "v2");
    assert_eq!(asked_of_keys(&server)[0].body, r#"{"ciphertext":"V0RFSw=="}"#);
}

#[tokio::test]
async fn keys_are_managed_below_a_url_with_a_path() {
    let key = json!({"id": CRK, "name": "crk", "extractable": false});
    let (server, _) = start(move |_, asked| match asked.method.as_str() {
        "DELETE" => Reply::Json(204, String::new()),
        _ if asked.path.ends_with("rotate") => Reply::Json(204, String::new()),
        _ => Reply::ok(json!({"metadata": {"collectionTotal": 1}, "resources": [key]})),
    })
    .await;
    let client = client(&server, &format!("{}/kms/", server.url()));
    let call = Call::within(LATE);
    let new = NewKey { name: "crk".to_owned(), ..NewKey::default() };
    let query = KeyQuery { limit: Some(10), states: vec![1, 5], ..KeyQuery::default() };

    assert_eq!(client.create_key(&new, call).await.unwrap().id.as_deref(), Some(CRK));
    assert_eq!(client.import_key(&new, &[7; 32], call).await.unwrap().extractable, Some(false));
    assert_eq!(client.list_keys(&query, call).await.unwrap().resources.len(), 1);
    assert_eq!(client.get_key("../a b", call).await.unwrap().name.as_deref(), Some("crk"));
    client.rotate_key(CRK, None, call).await.unwrap();
    client.disable_key(CRK, call).await.unwrap();
    client.enable_key(CRK, call).await.unwrap();
    client.delete_key(CRK, call).await.unwrap();
    client.purge_key(CRK, call).await.unwrap();

    let asked = asked_of_keys(&server);
    let seen: Vec<_> =
        asked.iter().map(|asked| format!("{} {}", asked.method, asked.path)).collect();
    assert_eq!(
        seen,
        [
            "POST /kms/api/v2/keys".to_owned(),
            "POST /kms/api/v2/keys".to_owned(),
            "GET /kms/api/v2/keys?limit=10&state=1,5".to_owned(),
            "GET /kms/api/v2/keys/%2E%2E%2Fa%20b".to_owned(),
            format!("POST /kms/api/v2/keys/{CRK}?action=rotate"),
            format!("POST /kms/api/v2/keys/{CRK}?action=disable"),
            format!("POST /kms/api/v2/keys/{CRK}?action=enable"),
            format!("DELETE /kms/api/v2/keys/{CRK}"),
            format!("DELETE /kms/api/v2/keys/{CRK}/purge"),
        ]
    );
    assert!(!asked[0].body.contains("payload") && asked[1].body.contains("payload"));
    assert_eq!(asked[4].body, "{}");
}

#[tokio::test]
async fn a_refusal_keeps_the_text_and_is_not_repeated() {
    let text = "Not Found: Wrap with key could not be performed: \
                Please see `reasons` for more details (KEY_NOT_FOUND_ERR)";
    let (server, client) = start(move |_, _| Reply::refusal(404, text)).await;
    let error = wrap(&client, LATE).await.unwrap_err();
    let code = Some("KEY_NOT_FOUND_ERR".to_owned());
    assert_eq!(error, Error::Refused { status: 404, code, reason: None, message: text.to_owned() });
    assert!(error.is_refusal());
    assert_eq!(asked_of_keys(&server).len(), 1);
}

#[tokio::test]
async fn a_401_gets_one_new_token_and_no_more() {
    let accepted = |_, asked: &Asked| match asked.headers["authorization"].as_str() {
        "Bearer token-1" => wrapped(),
        _ => Reply::refusal(401, "Unauthorized: The user does not have access"),
    };
    let (server, client) = start(accepted).await;
    wrap(&client, LATE).await.unwrap();
    assert_eq!(asked_of_keys(&server).len(), 2);

    let (server, client) = start(|_, _| Reply::refusal(401, "Unauthorized: no")).await;
    let error = wrap(&client, LATE).await.unwrap_err();
    assert_eq!(error.to_string(), "Unauthorized: no");
    assert_eq!(asked_of_keys(&server).len(), 2);
}

#[tokio::test]
async fn a_service_that_hangs_costs_the_deadline_and_no_more() {
    let (_server, client) =
        start(|number, _| if number == 0 { wrapped() } else { Reply::Hang }).await;
    wrap(&client, LATE).await.unwrap();
    let before = Instant::now();
    let error = wrap(&client, SOON).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
    assert!(error.is_outage() && error.to_string().contains("the key service at localhost:"));
    assert!(before.elapsed() >= SOON && before.elapsed() < LATE / 3);
}

#[tokio::test]
async fn callers_queued_behind_a_hanging_call_keep_their_own_deadline() {
    let (server, client) = start(|_, _| Reply::Hang).await;
    let client = Arc::new(client);
    let mut calls = JoinSet::new();
    for _ in 0..2 {
        let client = Arc::clone(&client);
        calls.spawn(async move { wrap(&client, LATE).await });
    }
    // One request for the token, then both connections are taken.
    server.has_been_asked(3).await;
    let error = wrap(&client, SOON).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
    assert_eq!(asked_of_keys(&server).len(), 2);
}

#[tokio::test]
async fn never_more_connections_than_allowed() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let (server, client) =
        start(move |_, _| Reply::When(Arc::clone(&held), Box::new(wrapped()))).await;
    let client = Arc::new(client);
    let mut calls = JoinSet::new();
    for _ in 0..32 {
        let client = Arc::clone(&client);
        calls.spawn(async move { wrap(&client, LATE).await });
    }
    // The answers come one by one, so that callers queue for a connection all the time.
    for done in 0..32 {
        server.has_been_asked(2 + done).await;
        gate.add_permits(1);
        calls.join_next().await.unwrap().unwrap().unwrap();
    }
    // One connection was the token's. A kept connection may come back a moment late and be replaced by a new one.
    let connections = asked_of_keys(&server).iter().map(|asked| asked.connection).max().unwrap();
    assert!(connections < 8, "{connections} connections for 32 calls");
}

#[tokio::test]
async fn a_kept_connection_closed_by_the_server_is_replaced_for_a_wrap() {
    for end in [|| Reply::Close, || Reply::Reset] {
        let (server, client) =
            start(move |number, _| if number == 1 { end() } else { wrapped() }).await;
        wrap(&client, LATE).await.unwrap();
        wrap(&client, LATE).await.unwrap();
        let asked = asked_of_keys(&server);
        assert_eq!(asked.len(), 3);
        assert_ne!(asked[1].connection, asked[2].connection);
    }
}

#[tokio::test]
async fn what_must_not_happen_twice_is_not_sent_twice() {
    let (server, client) = start(|_, _| Reply::Close).await;
    let new = NewKey { name: "crk".to_owned(), ..NewKey::default() };
    let call = Call::within(LATE);
    let errors = [
        client.create_key(&new, call).await.unwrap_err(),
        client.rotate_key(CRK, None, call).await.unwrap_err(),
        client.delete_key(CRK, call).await.unwrap_err(),
        client.purge_key(CRK, call).await.unwrap_err(),
    ];
    assert!(errors.iter().all(|error| matches!(error, Error::Unreachable { .. })), "{errors:?}");
    assert_eq!(asked_of_keys(&server).len(), errors.len());
}

#[tokio::test]
async fn a_connection_reset_again_and_again_is_an_outage() {
    let (server, client) = start(|_, _| Reply::Reset).await;
    let error = wrap(&client, LATE).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert_eq!(asked_of_keys(&server).len(), 2);
}

#[tokio::test]
async fn nobody_listening_is_an_outage() {
    let (server, _) = start(|_, _| wrapped()).await;
    // On an address that no other test listens on.
    let nowhere = std::net::TcpListener::bind("127.255.0.1:0").unwrap().local_addr().unwrap();
    let client = client(&server, &format!("https://{nowhere}"));
    let error = wrap(&client, LATE).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().to_lowercase().contains("refused"), "{error}");
}

#[tokio::test]
async fn a_server_of_another_ca_gets_no_token() {
    let (stranger, _) = start(|_, _| wrapped()).await;
    let (server, _) = start(|_, _| wrapped()).await;
    let client = client(&server, &stranger.url());
    let error = wrap(&client, LATE).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("certificate"), "{error}");
    assert!(stranger.asked().is_empty());
}

#[tokio::test]
async fn garbage_is_told_from_an_outage_and_never_quoted() {
    let huge = format!("HTTP/1.1 200 X\r\n\r\n{}", "x".repeat(2 << 20));
    let secret = r#"{"ciphertext": ["S2VlcE91dA=="], "plaintext": "S2VlcE91dA=="}"#;
    let replies: [fn(&str) -> Reply; 4] = [
        |_| Reply::Raw(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
        |_| Reply::Json(200, "<html>sign in</html>".to_owned()),
        |huge| Reply::Raw(huge.as_bytes().to_vec()),
        |_| Reply::Json(404, "<html>not here</html>".to_owned()),
    ];
    for reply in replies {
        let huge = huge.clone();
        let (_server, client) = start(move |_, _| reply(&huge)).await;
        let error = wrap(&client, LATE).await.unwrap_err();
        assert!(matches!(error, Error::BadAnswer { .. }), "{error:?}");
        assert!(!error.is_refusal());
    }
    let (_server, client) = start(move |_, _| Reply::ok(secret)).await;
    let error = wrap(&client, LATE).await.unwrap_err();
    assert!(matches!(error, Error::BadAnswer { .. }) && !format!("{error:?}").contains("S2V"));
}

#[tokio::test]
async fn an_answer_cut_short_is_not_taken_for_whole() {
    let cut = "HTTP/1.1 200 X\r\ncontent-length: 900\r\n\r\n{\"ciphertext\":\"V0RFSw==\"}";
    let (server, client) = start(move |_, _| Reply::Raw(cut.as_bytes().to_vec())).await;
    let error = wrap(&client, LATE).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    // An answer had begun, so the service did its work: asking again is the caller's decision.
    assert_eq!(asked_of_keys(&server).len(), 1);
}

#[tokio::test]
async fn a_correlation_id_that_is_no_header_text_is_replaced() {
    let (server, client) = start(|_, _| wrapped()).await;
    let call = Call { deadline: LATE, correlation_id: Some("a\r\nicp-instance: b"), trace: None };
    client.wrap(CRK, None, &[], call).await.unwrap();
    let sent = asked_of_keys(&server)[0].headers["correlation-id"].clone();
    assert!(uuid::Uuid::parse_str(&sent).is_ok(), "{sent}");
}

#[tokio::test]
async fn wrong_settings_are_named() {
    let server = Server::start(|_, _| Reply::Hang).await;
    let problem = |change: fn(&mut ClientSettings)| {
        let mut settings = settings(&server, &server.url());
        change(&mut settings);
        KeyProtect::new(&settings, tokens(&server)).unwrap_err()
    };
    let url = |error: SetupError| matches!(error, SetupError::Url { .. });
    assert!(url(problem(|settings| settings.url = "http://localhost:1".to_owned())));
    assert!(url(problem(|settings| settings.url = "localhost".to_owned())));
    assert!(url(problem(|settings| settings.url = "https://h/?a=b".to_owned())));
    assert!(problem(|settings| settings.ca = None).to_string().contains("ca-certificates.crt"));
    let no_file = problem(|settings| {
        settings.ca = Some(kms_api::client::Ca::File("/nonexistent/ca.crt".into()));
    });
    assert!(no_file.to_string().starts_with("the CA file /nonexistent/ca.crt cannot be used"));
    let empty = problem(|settings| settings.ca = Some(kms_api::client::Ca::Pem(Vec::new())));
    assert!(matches!(empty, SetupError::Ca { .. }));
    let header = problem(|settings| settings.instance_id = "a\nb".to_owned());
    assert!(matches!(header, SetupError::Header { .. }));
}
