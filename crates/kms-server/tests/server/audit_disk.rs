//! A disk under the audit log that hangs, and one that takes what is written and does not keep it.

use crate::harness::rig::Rig;
use crate::harness::{Server, http};
use kms_server::app::Settings;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

/// Bar A3. The deadline is one that a loaded machine keeps; that the default is below a second is said by the unit tests.
#[tokio::test]
async fn a_disk_that_hangs_refuses_at_once_once_it_is_known_and_nobody_needs_to_help_when_it_is_back()
 {
    let audit_deadline = Duration::from_secs(5);
    let server = Server::start_with(Settings { audit_deadline, ..Server::settings() }).await;
    let token = server.admin().await;
    server.disk.hang(true);
    let first = ask(&server, &token, "waited").await;
    refused(&first);
    let waiting = server.app.audit.lag().waiting;
    for _ in 0..20 {
        refused(&ask(&server, &token, "not-waited").await);
    }
    assert_eq!(server.app.audit.lag().waiting, waiting, "nothing gathers behind it");
    readiness(&server, "503 Service Unavailable").await;

    server.disk.hang(false);
    readiness(&server, "200 OK").await;
    assert_eq!(ask(&server, &token, "after").await.status, 200);
    // What the first one asked for was recorded too late, and the log says so.
    assert_eq!(outcomes(&server, "waited"), ["done", "unanswered"]);
    assert_eq!(outcomes(&server, "not-waited"), Vec::<String>::new());
    assert_eq!(outcomes(&server, "after"), ["done"]);
}

async fn ask(server: &Server, token: &str, uid: &str) -> http::Answer {
    let (bearer, instance) = (format!("Bearer {token}"), server.instance().to_string());
    let headers =
        [("authorization", &*bearer), ("icp-instance", &*instance), ("correlation-id", uid)];
    http::ask(server.keys, &server.ca(), "GET", "/api/v2/keys", &headers, "").await
}

fn refused(answer: &http::Answer) {
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("2")), "{answer:?}");
    assert!(answer.body.contains("AUDIT_UNAVAILABLE_ERR"), "{answer:?}");
}

fn outcomes(server: &Server, uid: &str) -> Vec<String> {
    let audit = server.audit();
    let records = audit.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of_it = records.filter(|record| record["correlation"] == uid);
    of_it.map(|record| record["outcome"].as_str().unwrap().to_owned()).collect()
}

async fn readiness(server: &Server, wanted: &str) {
    let mut last = String::new();
    for _ in 0..3000 {
        last = http::plain(server.health, "/readyz").await;
        if last.contains(wanted) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never {wanted}: {last}");
}

/// Bar A1, with the binary as it is shipped. /dev/null takes every byte; the system refuses to sync it. So whoever answers
/// without a sync, or before it, answers here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_real_server_answers_nothing_whose_record_it_could_write_and_not_sync() {
    let Some(mut rig) = Rig::make() else { return };
    rig.start().await;
    let mut client = rig.admin().await;
    let key = client.create("synced").await.unwrap();
    let dek = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
    assert_eq!(client.wrap(&key, dek).await.unwrap().status, 200);
    let (log, aside, null) = (rig.path("audit.log"), rig.path("audit.log.1"), rig.path("null"));
    // In one step: at no moment is there no file.
    fs::hard_link(&log, &aside).unwrap();
    symlink("/dev/null", &null).unwrap();
    fs::rename(&null, &log).unwrap();
    fs::write(&log, "it takes what is written").unwrap();
    for _ in 0..5 {
        let answer = client.wrap(&key, dek).await.unwrap();
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(answer.body.contains("AUDIT_UNAVAILABLE_ERR"), "{answer:?}");
        let api_key = rig.api_key.clone();
        assert_eq!(client.log_in(&api_key).await, Some(503));
    }
    rig.becomes("503 Service Unavailable").await;
    fs::rename(&aside, &log).unwrap();
    rig.becomes("200 OK").await;
    assert_eq!(client.wrap(&key, dek).await.unwrap().status, 200);
}
