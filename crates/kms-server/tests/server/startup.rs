//! The binary itself, as far as it goes without an HSM: what it refuses to start with, and what it says then. And the
//! health port of a running server.

use crate::harness::faulty_store::{self, Step};
use crate::harness::rig::Rig;
use crate::harness::{Server, http};
use kms_core::crypto_module::CryptoModule;
use kms_hsm::VaultError;
use kms_hsm::memory::Fault;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kms-server")).args(arguments).output().unwrap()
}

fn config(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "SERVER_CONFIG:\n  TLS_CERT_FILE: \"{dir}/tls.crt\"\n  TLS_KEY_FILE: \"{dir}/tls.key\"\n  \
         DATABASE_URL: \"sqlite://{dir}/new.db\"\n  AUDIT_FILE: \"{dir}/audit.log\"\n\
         HSM:\n  PKCS11_LIBRARY: \"/nowhere/libpkcs11.so\"\n  TOKEN_LABEL: \"kms\"\n  PIN: \"1234\"\n"
    )
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn pitfall_20_a_server_that_authenticates_nobody_does_not_start() {
    let server = Server::start().await;
    let file = server.dir.path().join("kms.yaml");
    std::fs::write(&file, config(server.dir.path())).unwrap();
    let output = run(&["--config", file.to_str().unwrap()]);
    assert!(!output.status.success());
    let said = stderr(&output);
    assert!(said.contains("no authentication is configured"), "{said}");
    assert!(said.contains("kms-server init"), "{said}");
}

#[tokio::test]
async fn a_database_that_is_in_use_is_not_initialised_again() {
    let server = Server::start().await;
    let file = server.dir.path().join("kms.yaml");
    let text = config(server.dir.path()).replace("new.db", "kms.db");
    std::fs::write(&file, text).unwrap();
    let output = run(&["init", "--config", file.to_str().unwrap(), "-o", "json"]);
    assert!(!output.status.success());
    assert!(output.stdout.is_empty());
    assert!(stderr(&output).contains("is initialised already"), "{}", stderr(&output));
    let token = server.admin().await;
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
}

#[tokio::test]
async fn a_configuration_is_checked_without_starting_anything() {
    let server = Server::start().await;
    let file = server.dir.path().join("kms.yaml");
    let check = ["--check-config", "--config", file.to_str().unwrap()];
    std::fs::write(&file, config(server.dir.path())).unwrap();
    let good = run(&check);
    assert!(good.status.success(), "{}", stderr(&good));
    assert!(!server.dir.path().join("new.db").exists());

    let bad = config(server.dir.path()).replace("TLS_KEY_FILE", "TLS_KEYFILE").replace("1234", "");
    std::fs::write(&file, bad).unwrap();
    let refused = run(&check);
    assert!(!refused.status.success());
    for said in ["did you mean TLS_KEY_FILE?", "TLS_KEY_FILE is missing", "HSM.PIN is missing"] {
        assert!(stderr(&refused).contains(said), "{said:?} is not in {}", stderr(&refused));
    }

    let swapped = config(server.dir.path()).replace("tls.key", "ca.crt");
    std::fs::write(&file, swapped).unwrap();
    let refused = run(&check);
    assert!(!refused.status.success());
    assert!(stderr(&refused).contains("ca.crt"), "{}", stderr(&refused));
}

#[tokio::test]
async fn the_cryptographic_module_is_named_and_can_be_required() {
    let module = CryptoModule::linked();
    let version = run(&["--version"]);
    let expected = format!("kms-server {} ({module})\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8_lossy(&version.stdout), expected);

    let server = Server::start().await;
    let [name, version, fips] = module.labels().map(|(name, value)| format!("{name}=\"{value}\""));
    let sample = format!("kms_server_crypto_module_info{{{name},{version},{fips}}} 1");
    let metrics = probe(&server, "/metrics").await;
    assert!(metrics.contains(&sample), "{sample} is not in {metrics}");

    let file = server.dir.path().join("kms.yaml");
    let required = "SERVER_CONFIG:\n  FIPS_REQUIRED: true\n";
    let text = config(server.dir.path()).replace("SERVER_CONFIG:\n", required);
    std::fs::write(&file, text).unwrap();
    let started = stderr(&run(&["--config", file.to_str().unwrap()]));
    let refused = started.contains("SERVER_CONFIG.FIPS_REQUIRED is true, but this build");
    assert_ne!(refused, module.fips, "{started}");
    // What stops a build with the module is the next step of the start.
    assert_ne!(started.contains("no authentication is configured"), refused, "{started}");
}

#[test]
fn a_missing_configuration_is_named() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("absent.yaml");
    let output = run(&["--config", file.to_str().unwrap()]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("absent.yaml"), "{}", stderr(&output));
}

#[tokio::test]
async fn readiness_follows_the_hsm_and_liveness_does_not() {
    let server = Server::start().await;
    eventually(&server, "/readyz", "200 OK").await;
    let cause = VaultError::Unavailable { cause: "pulled out".into() };
    server.vault.set_fault(Some(Fault::Fail(cause)));
    let answer = eventually(&server, "/readyz", "503 ").await;
    assert!(answer.contains("HSM: the HSM is not available: pulled out"), "{answer}");
    assert!(probe(&server, "/livez").await.contains("200 OK"));
    assert!(probe(&server, "/metrics").await.contains("kms_server_ready 0"));
    server.vault.set_fault(None);
    eventually(&server, "/readyz", "200 OK").await;
}

#[tokio::test]
async fn a_peer_that_hangs_up_does_not_stop_an_operation_in_the_middle() {
    let server = Server::start().await;
    let token = server.admin().await;
    server.store.set_fault(Some(faulty_store::Fault::Hold(Step::BeginKey)));
    let body = crate::harness::new_key("orphan");
    let request = format!(
        "POST /api/v2/keys HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\
         icp-instance: {}\r\ncontent-length: {}\r\n\r\n{body}",
        server.instance(),
        body.len()
    );
    let mut stream = http::connect(server.keys, &server.ca()).await;
    stream.write_all(request.as_bytes()).await.unwrap();
    server.store.holds().await;
    // The connection is over before the HSM has made anything.
    stream.shutdown().await.unwrap();
    drop(stream);
    server.store.set_fault(None);
    for _ in 0..6000 {
        if server.audit().contains("create_key") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the key was never made: {}", server.audit());
}

async fn probe(server: &Server, path: &str) -> String {
    let mut stream = TcpStream::connect(server.health).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Asks until the answer is as wanted: the health check runs every few seconds.
async fn eventually(server: &Server, path: &str, wanted: &str) -> String {
    for _ in 0..3000 {
        let answer = probe(server, path).await;
        if answer.starts_with(&format!("HTTP/1.1 {wanted}")) {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{path} never answered {wanted}");
}

/// The API keys are shown once. Where they cannot be, they are none.
#[tokio::test]
async fn an_init_whose_output_is_lost_initialises_nothing_and_is_done_again() {
    let Some(rig) = Rig::bare() else { return };
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let lost = rig.command(&["init"]).stdout(full).output().unwrap();
    assert_eq!(lost.status.code(), Some(1), "{}", stderr(&lost));
    assert!(stderr(&lost).contains("Nothing was initialised: make room"), "{}", stderr(&lost));
    let made = rig.run(&["init", "-o", "json"]);
    assert!(made.status.success(), "{}", stderr(&made));
    assert!(String::from_utf8_lossy(&made.stdout).contains("api_key"));
    let twice = rig.run(&["init"]);
    assert!(stderr(&twice).contains("is initialised already"), "{}", stderr(&twice));
}
