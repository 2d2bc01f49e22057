//! What an operator sees and turns: certificates that are renewed while the server runs, limits, and what the health
//! port says.

use crate::harness::{Server, http, make_certificates};
use kms_hsm::VaultError;
use kms_hsm::memory::Fault;
use kms_server::limits::Settings;
use kms_server::tls::{Files, Tls};
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// The server's own certificate, as a new connection sees it.
async fn shown(server: &Server) -> Vec<u8> {
    let stream = http::connect(server.keys, &server.ca()).await;
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

fn certificate(file: &Path) -> Vec<u8> {
    CertificateDer::from_pem_file(file).unwrap().to_vec()
}

async fn health(server: &Server, path: &str, accept: &str) -> String {
    let mut stream = TcpStream::connect(server.health).await.unwrap();
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// The answer of the health port that has `wanted` in it, within half a minute.
async fn eventually(server: &Server, path: &str, wanted: &str) -> String {
    let mut last = String::new();
    for _ in 0..300 {
        last = health(server, path, "*/*").await;
        if last.contains(wanted) {
            return last;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{wanted:?} never was in {path}: {last}");
}

#[tokio::test]
async fn a_renewed_certificate_serves_without_a_restart_and_a_bad_one_never() {
    let server = Server::start().await;
    let path = |name: &str| server.dir.path().join(name);
    let first = certificate(&path("tls.crt"));
    assert_eq!(shown(&server).await, first);
    let old = http::connect(server.keys, &server.ca()).await;

    // Renewed by another CA, as far as the certificate: the key still is the old one.
    let old_key = fs::read(path("tls.key")).unwrap();
    let old_ca = fs::read(path("ca.crt")).unwrap();
    make_certificates(server.dir.path());
    let new_key_pem = fs::read(path("tls.key")).unwrap();
    let new_ca = fs::read(path("ca.crt")).unwrap();
    fs::write(path("tls.key"), old_key).unwrap();
    fs::write(path("ca.crt"), old_ca).unwrap();
    let refused = "certificate_reloads_total{outcome=\"refused\"}";
    eventually(&server, "/metrics", refused).await;
    assert_eq!(shown(&server).await, first, "what serves, serves on");

    fs::write(path("ca.crt"), new_ca).unwrap();
    fs::write(path("tls.key"), new_key_pem).unwrap();
    eventually(&server, "/metrics", "certificate_reloads_total{outcome=\"loaded\"} 1").await;
    assert_eq!(shown(&server).await, certificate(&path("tls.crt")));
    assert_ne!(shown(&server).await, first);

    // A connection from before goes on.
    let mut old = old;
    old.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = old.read_to_end(&mut answer).await;
    assert!(answer.starts_with(b"HTTP/1.1 404"));
}

#[tokio::test]
async fn with_a_ca_for_clients_the_key_api_is_for_those_that_it_signed() {
    let folder = tempfile::tempdir().unwrap();
    make_certificates(folder.path());
    let path = |name: &str| folder.path().join(name);
    let client_key = rcgen::KeyPair::generate().unwrap();
    let mut client = rcgen::CertificateParams::new(vec!["plug-in".into()]).unwrap();
    client.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let client = client.self_signed(&client_key).unwrap();
    fs::write(path("clients.crt"), client.pem()).unwrap();
    let tls = Tls::open(Files {
        certificate: path("tls.crt"),
        key: path("tls.key"),
        client_ca: Some(path("clients.crt")),
    })
    .unwrap();
    let key = || PrivateKeyDer::from_pem_slice(client_key.serialize_pem().as_bytes()).unwrap();
    let known = || Some((vec![client.der().clone()], key()));
    assert!(handshake(&tls, true, &path("ca.crt"), known()).await, "signed by the CA for clients");
    assert!(!handshake(&tls, true, &path("ca.crt"), None).await, "no certificate, no key API");
    assert!(handshake(&tls, false, &path("ca.crt"), None).await, "tokens are for everybody");
    let strange_key = rcgen::KeyPair::generate().unwrap();
    let strange = rcgen::CertificateParams::new(vec!["plug-in".into()]).unwrap();
    let strange = strange.self_signed(&strange_key).unwrap();
    let pem = PrivateKeyDer::from_pem_slice(strange_key.serialize_pem().as_bytes()).unwrap();
    let unknown = Some((vec![strange.der().clone()], pem));
    assert!(!handshake(&tls, true, &path("ca.crt"), unknown).await, "signed by somebody else");
}

/// Whether both sides agree.
async fn handshake(
    tls: &Tls,
    keys: bool,
    ca: &Path,
    client: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
) -> bool {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    let acceptor = if keys { tls.keys() } else { tls.tokens() };
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let (server, _client) = tokio::join!(
        acceptor.accept(ours),
        TlsConnector::from(Arc::new(config)).connect(name, theirs)
    );
    server.is_ok()
}

#[tokio::test]
async fn each_part_is_named_in_what_readiness_says() {
    let server = Server::start().await;
    let good = eventually(&server, "/readyz", "200 OK").await;
    assert!(good.ends_with("\r\n\r\ndatabase: ok\nHSM: ok\naudit: ok\nclock: ok\n"), "{good}");
    let cause = VaultError::Unavailable { cause: "pulled out".into() };
    server.vault.set_fault(Some(Fault::Fail(cause)));
    let bad = eventually(&server, "/readyz", "503 ").await;
    let lines = "database: ok\nHSM: the HSM is not available: pulled out\naudit: ok\nclock: ok\n";
    assert!(bad.ends_with(lines), "{bad}");
    let json = health(&server, "/readyz", "application/json").await;
    let json: serde_json::Value =
        serde_json::from_str(json.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(json["ready"], false);
    assert_eq!(json["parts"]["HSM"], "the HSM is not available: pulled out");
    assert_eq!(json["parts"]["database"], "ok");
    let metrics = health(&server, "/metrics", "*/*").await;
    for sample in
        ["kms_server_part_ready{part=\"HSM\"} 0", "kms_server_part_ready{part=\"audit\"} 1"]
    {
        assert!(metrics.contains(sample), "{sample} is not in {metrics}");
    }
}

/// An HSM that hangs must not hold up the news of it: five seconds is what a load balancer may be late.
#[tokio::test]
async fn a_part_that_hangs_is_not_ready_within_five_seconds() {
    let server = Server::start().await;
    eventually(&server, "/readyz", "200 OK").await;
    server.vault.set_fault(Some(Fault::Hang));
    let late = tokio::time::timeout(
        Duration::from_secs(5),
        eventually(&server, "/readyz", "HSM: has not answered within 2 s"),
    );
    assert!(late.await.is_ok());
    assert!(health(&server, "/livez", "*/*").await.contains("200 OK"));
}

#[tokio::test]
async fn an_instance_with_too_many_requests_is_told_when_to_come_again() {
    let limits = Settings { rate_per_instance: 3, ..Settings::default() };
    let server = Server::start_limited(limits).await;
    let token = server.admin().await;
    for _ in 0..3 {
        assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    }
    let records = server.audit().lines().count();
    let refused = server.call(&token, "GET", "/keys", "").await;
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("2")), "{refused:?}");
    assert!(refused.message().contains("TOO_MANY_REQUESTS_ERR"), "{refused:?}");
    assert_eq!(server.audit().lines().count(), records, "no flood of the audit log");
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
    for _ in 0..500 {
        if server.app.limits.connections() < 2 {
            let _third = http::connect(server.keys, &server.ca()).await;
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the place of a closed connection is not given away");
}

async fn closed_at_once(address: SocketAddr) -> bool {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await;
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
