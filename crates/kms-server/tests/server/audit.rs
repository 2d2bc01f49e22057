//! The audit log of a running server: anchors, what is kept of them elsewhere, and what happens when something is away.

use crate::harness::faulty_store::Fault;
use crate::harness::{NODE, Server};
use kms_core::audit::anchor::{Anchor, PublicKey};
use kms_core::audit::verify::{Finding, Summary, Verifier};
use kms_hsm::VaultError;
use kms_hsm::memory;
use kms_server::audit::anchors::Anchors;
use kms_server::store::Trail;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const ANCHOR: &str = "\"action\":\"anchor\"";

fn log_file(server: &Server, suffix: &str) -> PathBuf {
    server.dir.path().join(format!("audit.log{suffix}"))
}

fn anchor_is_kept(server: &Server) -> bool {
    server.dir.path().join("audit.anchor").exists()
}

/// Each is awaited by looking: anchors are nobody's answer.
async fn eventually(what: &str, done: impl Fn() -> bool) {
    for _ in 0..1500 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} never came");
}

fn anchors(text: &str) -> usize {
    text.lines().filter(|line| line.contains(ANCHOR)).count()
}

/// Checks the files of the log, oldest first, with what the server wrote beside them.
fn verify(server: &Server, files: &[&str]) -> (Summary, Vec<Finding>) {
    let pem = fs::read_to_string(server.dir.path().join("audit.pem")).unwrap();
    let keys = [PublicKey::parse_pem(&pem).unwrap()];
    let witness = fs::read(server.dir.path().join("audit.anchor")).unwrap();
    let witness = Anchor::parse_line(witness.strip_suffix(b"\n").unwrap()).unwrap().into_owned();
    assert!(witness.is_signed_by(&keys[0]));
    let mut verifier = Verifier::new(&keys, Some(witness)).begin_at(1);
    let mut found = Vec::new();
    for file in files {
        verifier.next_file();
        for line in fs::read_to_string(log_file(server, file)).unwrap().lines() {
            verifier.line(line.as_bytes(), &mut found);
        }
    }
    let (summary, cut) = verifier.finish();
    found.extend(cut);
    (summary, found)
}

#[tokio::test]
async fn anchors_are_written_at_the_start_at_a_rotation_and_at_the_end() {
    let server = Server::start().await;
    eventually("the first anchor", || anchor_is_kept(&server)).await;
    assert_eq!(anchors(&server.audit()), 1);
    let token = server.admin().await;
    server.create_id(&token, "crk").await;

    fs::rename(log_file(&server, ""), log_file(&server, ".1")).unwrap();
    server.create_id(&token, "another").await;
    eventually("the anchor of the new file", || anchors(&server.audit()) == 1).await;
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);

    let server = server.restart().await;
    eventually("the anchor of the new process", || anchors(&server.audit()) == 3).await;
    let text = server.audit();
    let other = text.lines().collect::<Vec<_>>();
    let last = other.iter().rposition(|line| !line.contains(ANCHOR)).unwrap();
    assert!(other[last + 1].contains(ANCHOR), "an end without anchor: {text}");

    let (summary, found) = verify(&server, &[".1", ""]);
    assert_eq!(found, []);
    assert_eq!(summary.node.as_deref(), Some(NODE));
    assert_eq!((summary.anchors, summary.anchored), (4, summary.last - 1));
    // Whoever cuts the log is found by the copy of the anchor, and by the server itself.
    let whole = server.audit();
    let cut: String = whole.lines().take(1).map(|line| format!("{line}\n")).collect();
    fs::write(log_file(&server, ""), cut).unwrap();
    let (_, found) = verify(&server, &[".1", ""]);
    assert!(matches!(found[..], [Finding::Cut { .. }]), "{found:?}");
    // The database hears of an anchor behind the log.
    let known = async {
        loop {
            let head = server.store.audit_head(NODE).await.unwrap().unwrap();
            if head.seq == summary.last {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let patience = Duration::from_secs(15);
    tokio::time::timeout(patience, known).await.expect("the database knows the last record");
}

#[tokio::test]
async fn nothing_new_needs_no_anchor() {
    let server = Server::start().await;
    eventually("the first anchor", || anchor_is_kept(&server)).await;
    let token = server.admin().await;
    let mut writer = Anchors::new(&server.app);
    writer.anchor().await;
    let lines = || server.audit().lines().count();
    let before = lines();
    writer.anchor().await;
    assert_eq!(lines(), before);
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    writer.anchor().await;
    assert_eq!(lines(), before + 2);
}

#[tokio::test]
async fn without_the_hsm_records_go_on_and_the_anchor_follows() {
    let server = Server::start().await;
    let token = server.admin().await;
    eventually("the first anchor", || anchor_is_kept(&server)).await;
    let away = VaultError::Unavailable { cause: "pulled out".into() };
    server.vault.set_fault(Some(memory::Fault::Fail(away)));
    fs::rename(log_file(&server, ""), log_file(&server, ".1")).unwrap();
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    let failed = "kms_server_audit_anchors_total{outcome=\"failed\"}";
    while !metrics(&server).await.contains(failed) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    assert_eq!(anchors(&server.audit()), 0);
    server.vault.set_fault(None);
    eventually("the late anchor", || anchors(&server.audit()) == 1).await;
    eventually("its copy", || {
        let (summary, found) = verify(&server, &[".1", ""]);
        found.is_empty() && summary.anchored == summary.last - 1
    })
    .await;
}

#[tokio::test]
async fn without_the_database_anchors_are_written_and_kept_once_it_is_back() {
    let server = Server::start().await;
    eventually("the first anchor", || anchor_is_kept(&server)).await;
    let before = server.store.audit_head(NODE).await.unwrap().unwrap();
    let token = server.admin().await;
    server.store.set_fault(Some(Fault::Away));
    // Not even the caller is known without it: the log alone goes on.
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 503);
    server.store.set_fault(None);
    let server = server.restart().await;
    let after = server.store.audit_head(NODE).await.unwrap().unwrap();
    assert!(after.seq > before.seq);
}

async fn metrics(server: &Server) -> String {
    let mut stream = TcpStream::connect(server.health).await.unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}
