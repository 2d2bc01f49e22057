//! What one peer may take of the server, and that the others are served meanwhile: connections, requests, rates, sizes
//! and the time to send and to receive.

use crate::harness::faulty_store::{self, Step};
use crate::harness::issuer::Site;
use crate::harness::{Server, health, http, new_key};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kms_server::app;
use kms_server::limits::Settings;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Two creations are held in the middle: whoever comes then is refused before the token is looked at, and those two are
/// answered as soon as they can be.
#[tokio::test]
async fn requests_beyond_the_limit_are_refused_at_once_and_the_others_answered() {
    let limits = Settings { requests: 2, rate_per_instance: 0, ..Settings::default() };
    let server = Server::start_limited(limits).await;
    let token = server.admin().await;
    server.store.set_fault(Some(faulty_store::Fault::Hold(Step::BeginKey)));
    let body = new_key("slow");
    let slow = || server.call(&token, "POST", "/keys", &body);
    let beyond = async {
        until(&server, "both are worked on", |server| server.app.limits.requests() == 2).await;
        let refused = server.call(&token, "GET", "/keys", "").await;
        assert_eq!(
            (refused.status, refused.header("retry-after")),
            (503, Some("2")),
            "{refused:?}"
        );
        assert!(refused.message().contains("OVERLOADED_ERR"), "{refused:?}");
        let unknown = server.call("no.such.token", "GET", "/keys", "").await;
        assert_eq!(unknown.status, 503, "the limit comes before anything that costs: {unknown:?}");
        let login = server.ask_token("no-such-key").await;
        assert_eq!(login.status, 400, "logins have turns of their own: {login:?}");
        assert!(!server.audit().contains("OVERLOADED_ERR"), "no flood of the audit log");
        let metrics = health(&server, "/metrics", "*/*").await;
        for sample in
            ["kms_server_requests_in_progress 2", "limit_refusals_total{limit=\"requests\"} 2"]
        {
            assert!(metrics.contains(sample), "{sample} is not in {metrics}");
        }
        server.store.set_fault(None);
    };
    let (first, second, ()) = tokio::join!(slow(), slow(), beyond);
    assert_eq!((first.status, second.status), (201, 201), "{first:?} {second:?}");
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200, "the turns came back");
}

/// A head that never ends, byte by byte, and a connection on which nothing comes at all.
#[tokio::test]
async fn a_peer_that_sends_a_byte_now_and_then_loses_its_connection_and_the_others_are_served() {
    let idle = Duration::from_secs(3);
    let server = Server::start_limited(Settings { idle, ..Settings::default() }).await;
    let mut silent = http::connect(server.keys, &server.ca()).await;
    let mut served = http::connect(server.keys, &server.ca()).await;
    served.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut loris = http::connect(server.tokens, &server.ca()).await;
    let drip = async {
        // Ten times as long as it is allowed to take.
        for byte in b"GET /identity/keys HTTP/1.1\r\nx: ".iter().chain([b'y'; 70].iter()) {
            if loris.write_all(&[*byte]).await.is_err() || is_over(&mut loris).await {
                return true;
            }
            sleep(Duration::from_millis(300)).await;
        }
        false
    };
    let others = async {
        let token = server.admin().await;
        assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    };
    let (cut, ()) = tokio::join!(drip, others);
    assert!(cut, "a byte now and then keeps the connection");
    assert!(ends(&mut silent).await && ends(&mut served).await, "idle ones are kept for ever");
    until(&server, "every place is free", |server| server.app.limits.connections() == 0).await;
}

/// With one turn for everybody: a body that does not come holds none, whoever sends it.
#[tokio::test]
async fn a_body_that_does_not_come_is_given_up() {
    let limits = Settings { requests: 1, rate_per_instance: 0, ..Settings::default() };
    let server = Server::start_limited(limits).await;
    let token = server.admin().await;
    let mut stranger = http::connect(server.tokens, &server.ca()).await;
    let head = "POST /oidc/token HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n";
    stranger.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..5 {
        stranger.write_all(b"x").await.unwrap();
        sleep(Duration::from_millis(100)).await;
        assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200, "the turn is free");
    }
    let mut known = http::connect(server.keys, &server.ca()).await;
    let head = format!(
        "POST /api/v2/keys HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\
         icp-instance: {}\r\ncontent-length: 100\r\n\r\n",
        server.instance()
    );
    known.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..5 {
        known.write_all(b"x").await.unwrap();
        sleep(Duration::from_millis(100)).await;
        assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200, "the turn is free");
    }
    for stream in [&mut stranger, &mut known] {
        let answer = timeout(Duration::from_secs(20), read(stream)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    }
    assert_eq!(server.app.limits.requests(), 0);
    assert!(server.audit().contains("BAD_BODY_ERR"), "who is known is recorded");
}

/// As many as one address may open, each with a login that is announced and does not come.
#[tokio::test]
async fn logins_that_do_not_come_take_nothing_from_the_key_api() {
    let settings = Settings { rate_per_instance: 0, ..Settings::default() };
    // The last places are for those who are served from the same address.
    let held = settings.connections_per_address - 16;
    let server = Server::start_limited(Settings { requests: 2, logins: 2, ..settings }).await;
    let token = server.admin().await;
    let key = server.create_id(&token, "crk").await;
    let head = "POST /oidc/token HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n";
    let mut silent = Vec::new();
    for _ in 0..held {
        let mut stream = http::connect(server.tokens, &server.ca()).await;
        stream.write_all(head.as_bytes()).await.unwrap();
        silent.push(stream);
    }
    for _ in 0..20 {
        server.wrap(&token, &key, "AAAA").await;
    }
    server.admin().await;
    for stream in &mut silent {
        let answer = timeout(Duration::from_secs(20), read(stream)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    }
    assert!(server.app.limits.refused().iter().all(|(_, count)| *count == 0));
}

/// Every turn of the logins is taken by some that hang.
#[tokio::test]
async fn logins_beyond_their_limit_are_refused_and_the_key_api_goes_on() {
    let site = Site::start().await;
    site.hang();
    let issuers = vec![site.trusted()];
    let limits = Settings { logins: 2, requests: 1, rate_per_instance: 0, ..Settings::default() };
    let server = Server::start_with(app::Settings { issuers, limits, ..Server::settings() }).await;
    let token = server.admin().await;
    let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = part(json!({"alg": "RS256", "kid": "1"}));
    let garbage = format!("{header}.{}.AAAA", part(json!({"iss": site.url})));
    let grant = "urn:ietf:params:oauth:grant-type:jwt-bearer";
    let form = format!("grant_type={grant}&assertion={garbage}&profile_name=x");
    let (ca, none) = (server.ca(), []);
    let log_in = || http::ask(server.tokens, &ca, "POST", "/oidc/token", &none, &form);
    let beyond = async {
        until(&server, "both are worked on", |server| server.app.limits.logins() == 2).await;
        let refused = log_in().await;
        assert_eq!((refused.status, refused.header("retry-after")), (503, Some("2")));
        assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
        assert_eq!(server.app.limits.logins(), 2, "they still are");
    };
    let (first, second, ()) = tokio::join!(log_in(), log_in(), beyond);
    for login in [first, second] {
        assert!(login.body.contains("ISSUER_UNAVAILABLE_ERR"), "{login:?}");
    }
}

/// Asks on and on and takes no answer.
#[tokio::test]
async fn a_peer_that_takes_no_answer_loses_its_connection() {
    let server = Server::start().await;
    let mut deaf = http::connect(server.keys, &server.ca()).await;
    let asked = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".repeat(100);
    // Until the buffers of both sides are full.
    while let Ok(written) = timeout(Duration::from_secs(2), deaf.write_all(&asked)).await {
        written.unwrap();
    }
    assert_eq!(server.app.limits.connections(), 1);
    until(&server, "the place is free", |server| server.app.limits.connections() == 0).await;
}

/// Whatever HTTP/2 has limits for (streams, resets, settings) is not there to be limited.
#[tokio::test]
async fn http_2_is_not_spoken() {
    let server = Server::start().await;
    for address in [server.keys, server.tokens] {
        let mut roots = rustls::RootCertStore::empty();
        let ca = std::fs::read(server.ca()).unwrap();
        use rustls::pki_types::pem::PemObject;
        roots.add(rustls::pki_types::CertificateDer::from_pem_slice(&ca).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let refused = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        assert!(refused.is_err(), "agreed on HTTP/2");

        let mut unasked = http::connect(address, &server.ca()).await;
        let settings = b"\0\0\0\x04\0\0\0\0\0";
        let preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], settings].concat();
        unasked.write_all(&preface).await.unwrap();
        let answer = timeout(Duration::from_secs(20), read(&mut unasked)).await.unwrap();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer:?}");
    }
}

#[tokio::test]
async fn an_instance_with_too_many_requests_is_told_when_to_come_again() {
    let limits = Settings { rate_per_instance: 3, ..Settings::default() };
    let server = Server::start_limited(limits).await;
    let token = server.admin().await;
    for _ in 0..3 {
        assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    }
    // Without the anchors, which come by themselves.
    let of_requests = |line: &&str| !line.contains(r#""action":"anchor""#);
    let records = server.audit().lines().filter(of_requests).count();
    let refused = server.call(&token, "GET", "/keys", "").await;
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("2")), "{refused:?}");
    assert!(refused.message().contains("TOO_MANY_REQUESTS_ERR"), "{refused:?}");
    let now = server.audit().lines().filter(of_requests).count();
    assert_eq!(now, records, "no flood of the audit log");
    let metrics = health(&server, "/metrics", "*/*").await;
    let sample = "kms_server_limit_refusals_total{limit=\"rate_per_instance\"} 1";
    assert!(metrics.contains(sample), "{metrics}");
    server.clock.advance(Duration::from_secs(1));
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed() {
    let limits = Settings { connections_per_address: 2, ..Settings::default() };
    let server = Server::start_limited(limits).await;
    let first = http::connect(server.keys, &server.ca()).await;
    let _second = http::connect(server.tokens, &server.ca()).await;
    assert!(closed_at_once(server.keys).await, "the third of one address");
    drop(first);
    until(&server, "a place is free", |server| server.app.limits.connections() < 2).await;
    let _third = http::connect(server.keys, &server.ca()).await;
}

async fn closed_at_once(address: SocketAddr) -> bool {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let read = timeout(Duration::from_secs(20), stream.read(&mut [0; 1])).await;
    matches!(read, Ok(Ok(0) | Err(_)))
}

#[tokio::test]
async fn heads_and_bodies_have_a_limit() {
    let server = Server::start().await;
    let token = server.admin().await;
    let long = "x".repeat(100_000);
    let ca = server.ca();
    let ask = async |headers: &[(&str, &str)]| {
        http::ask(server.keys, &ca, "GET", "/api/v2/keys", headers, "").await.status
    };
    assert_eq!(ask(&[("x-long", &long)]).await, 431);
    let many: Vec<String> = (0..100).map(|number| format!("x-{number}")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "1")).collect();
    assert_eq!(ask(&many).await, 431);
    let big = " ".repeat(64 * 1024 + 1);
    let refused = server.call(&token, "POST", "/keys", &big).await;
    assert_eq!(refused.status, 413, "{refused:?}");
}

/// What comes until the server ends the connection.
async fn read(stream: &mut TlsStream<TcpStream>) -> String {
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text).await;
    String::from_utf8(text).unwrap()
}

/// Whether the server ends the connection by itself.
async fn ends(stream: &mut TlsStream<TcpStream>) -> bool {
    timeout(Duration::from_secs(60), read(stream)).await.is_ok()
}

/// Whether the server has ended it already.
async fn is_over(stream: &mut TlsStream<TcpStream>) -> bool {
    let read = timeout(Duration::from_millis(1), stream.read(&mut [0; 1])).await;
    matches!(read, Ok(Ok(0) | Err(_)))
}

async fn until(server: &Server, what: &str, holds: impl Fn(&Server) -> bool) {
    for _ in 0..6000 {
        if holds(server) {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("not within a minute: {what}");
}
