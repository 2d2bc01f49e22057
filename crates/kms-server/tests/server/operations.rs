//! What an operator sees and turns: certificates that are renewed while the server runs, and what the health port says.

use crate::harness::faulty_store::{self, Step};
use crate::harness::{Server, health, http, make_certificates};
use kms_hsm::VaultError;
use kms_hsm::memory::Fault;
use kms_server::tls::{Files, Tls};
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
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

/// The answer of the health port that has `wanted` in it, within a minute.
async fn eventually(server: &Server, path: &str, wanted: &str) -> String {
    let mut last = String::new();
    for _ in 0..600 {
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

/// A part that hangs must not hold up the news of it: five seconds is what a load balancer may be late.
#[tokio::test]
async fn a_part_that_hangs_is_not_ready_within_five_seconds() {
    let server = Server::start().await;
    eventually(&server, "/readyz", "200 OK").await;
    let late = "HSM: has not answered within 2 s";
    let hang = |hangs: bool| server.vault.set_fault(hangs.then_some(Fault::Hang));
    let bad = soon_told(&server, late, hang).await;
    assert!(bad.ends_with(&format!("database: ok\n{late}\naudit: ok\nclock: ok\n")), "{bad}");
    assert!(health(&server, "/livez", "*/*").await.contains("200 OK"));
    server.vault.set_fault(None);
    eventually(&server, "/readyz", "200 OK").await;
}

#[tokio::test]
async fn a_database_that_hangs_or_fails_is_told_apart_from_the_rest() {
    let server = Server::start().await;
    eventually(&server, "/readyz", "200 OK").await;
    let late = "database: has not answered within 2 s";
    let hold = faulty_store::Fault::Hold(Step::Probe);
    let hang = |hangs: bool| server.store.set_fault(hangs.then_some(hold));
    let bad = soon_told(&server, late, hang).await;
    assert!(bad.ends_with(&format!("{late}\nHSM: ok\naudit: ok\nclock: ok\n")), "{bad}");
    assert!(health(&server, "/livez", "*/*").await.contains("200 OK"));
    server.store.set_fault(Some(faulty_store::Fault::Before(Step::Probe)));
    let bad = eventually(&server, "/readyz", "database: the database does not answer: ").await;
    assert!(bad.ends_with("\nHSM: ok\naudit: ok\nclock: ok\n"), "{bad}");
    server.store.set_fault(None);
    eventually(&server, "/readyz", "200 OK").await;
}

#[tokio::test]
async fn an_audit_log_that_cannot_be_written_is_told_apart_from_the_rest() {
    let server = Server::start().await;
    let token = server.admin().await;
    eventually(&server, "/readyz", "200 OK").await;
    let log = server.dir.path().join("audit.log");
    fs::rename(&log, server.dir.path().join("audit.log.1")).unwrap();
    fs::create_dir(&log).unwrap();
    let refused = server.call(&token, "GET", "/keys", "").await;
    assert!(refused.message().contains("AUDIT_UNAVAILABLE_ERR"), "{refused:?}");
    let bad = within_five_seconds(&server, "audit: cannot ").await;
    assert!(bad.contains("\r\n\r\ndatabase: ok\nHSM: ok\naudit: cannot "), "{bad}");
    assert!(bad.ends_with("\nclock: ok\n"), "{bad}");
    fs::remove_dir(&log).unwrap();
    eventually(&server, "/readyz", "200 OK").await;
}

/// The disk hangs at the opening of the next file: somebody holds a lease on it, and the kernel waits for them.
#[tokio::test]
async fn an_audit_disk_that_hangs_is_told_apart_from_the_rest() {
    let server = Server::start().await;
    let token = server.admin().await;
    eventually(&server, "/readyz", "200 OK").await;
    let log = server.dir.path().join("audit.log");
    fs::rename(&log, server.dir.path().join("audit.log.1")).unwrap();
    let Some(mut lease) = Lease::take(&log) else { return };
    let waits = server.call(&token, "GET", "/keys", "");
    let watch = async {
        for _ in 0..3000 {
            if server.app.audit.lag().waiting > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        server.clock.advance(Duration::from_secs(3));
        within_five_seconds(&server, "audit: its disk has not taken a record for 3 s").await
    };
    let (refused, bad) = tokio::join!(waits, watch);
    assert!(bad.contains("\r\n\r\ndatabase: ok\nHSM: ok\naudit: "), "{bad}");
    assert!(bad.ends_with("\nclock: ok\n"), "{bad}");
    assert!(refused.message().contains("AUDIT_UNAVAILABLE_ERR"), "{refused:?}");
    lease.release();
    eventually(&server, "/readyz", "200 OK").await;
}

/// Another process that makes everybody who opens a file wait, for as long as it lives.
struct Lease(Child);

impl Lease {
    /// Of a new file at `path`. `None`, with a notice, where there is no Python; fails where `CI=true`.
    fn take(path: &Path) -> Option<Lease> {
        // Not while somebody has it open, such as the child of another test between its fork and its exec.
        let script = "import fcntl, os, signal, sys, time\n\
                      signal.signal(signal.SIGIO, signal.SIG_IGN)\n\
                      file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)\n\
                      for _ in range(1000):\n\
                      \x20 try:\n\
                      \x20   fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n\
                      \x20   break\n\
                      \x20 except BlockingIOError: time.sleep(0.01)\n\
                      else: sys.exit('never leased')\n\
                      print('taken', flush=True)\n\
                      sys.stdin.read()\n";
        let mut command = Command::new("python3");
        command.arg("-c").arg(script).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let Ok(mut child) = command.spawn() else {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "apt-get install python3");
            eprintln!("skipped, no Python: apt-get install python3");
            return None;
        };
        let mut said = [0; 5];
        child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        assert_eq!(&said, b"taken");
        Some(Lease(child))
    }

    fn release(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.release();
    }
}

/// Within five seconds in one attempt at least: four of them are the look's own, and a machine with other work is late
/// now and then.
async fn soon_told(server: &Server, wanted: &str, hang: impl Fn(bool)) -> String {
    let mut seen = Vec::new();
    loop {
        hang(true);
        let began = tokio::time::Instant::now();
        let found = eventually(server, "/readyz", wanted).await;
        seen.push(began.elapsed());
        if began.elapsed() <= Duration::from_secs(5) {
            return found;
        }
        assert!(seen.len() < 5, "{wanted} after {seen:?}");
        hang(false);
        eventually(server, "/readyz", "200 OK").await;
    }
}

async fn within_five_seconds(server: &Server, wanted: &str) -> String {
    let found = tokio::time::timeout(Duration::from_secs(5), eventually(server, "/readyz", wanted));
    found.await.unwrap_or_else(|_| panic!("not within five seconds: {wanted}"))
}

/// The CA for clients is exchanged while the server runs: whom the new one has signed comes in, whom the old one has does
/// not, and a file that holds no CA changes nothing.
#[tokio::test]
async fn another_ca_for_clients_counts_from_the_next_connection_on() {
    let server = Server::start().await;
    let path = |name: &str| server.dir.path().join(name);
    let [old, new] = ["old", "new"].map(Member::new);
    fs::write(path("clients.crt"), &old.certificate).unwrap();
    let server = server.restart().await;
    assert!(old.is_let_in(&server).await && !new.is_let_in(&server).await);

    let path = |name: &str| server.dir.path().join(name);
    fs::write(path("clients.crt"), &new.certificate).unwrap();
    eventually(&server, "/metrics", "certificate_reloads_total{outcome=\"loaded\"} 1").await;
    assert!(new.is_let_in(&server).await && !old.is_let_in(&server).await);

    fs::write(path("clients.crt"), "no certificate").unwrap();
    eventually(&server, "/metrics", "certificate_reloads_total{outcome=\"refused\"} 1").await;
    assert!(new.is_let_in(&server).await && !old.is_let_in(&server).await);
}

/// A client, and the CA that signed its certificate in one.
struct Member {
    certificate: String,
    key: String,
}

impl Member {
    fn new(name: &str) -> Member {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut client = rcgen::CertificateParams::new(vec![name.into()]).unwrap();
        client.distinguished_name.push(rcgen::DnType::CommonName, name);
        client.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = client.self_signed(&key).unwrap().pem();
        Member { certificate, key: key.serialize_pem() }
    }

    /// Whether the key API answers it at all.
    async fn is_let_in(&self, server: &Server) -> bool {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(server.ca()).unwrap()).unwrap();
        let chain = vec![CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let stream = TcpStream::connect(server.keys).await.unwrap();
        let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, stream).await
        else {
            return false;
        };
        // In TLS 1.3 the client learns of a refusal with the first bytes that it reads.
        let asked = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let mut answer = Vec::new();
        let _ = stream.write_all(asked).await;
        let _ = stream.read_to_end(&mut answer).await;
        answer.starts_with(b"HTTP/1.1 404")
    }
}
