//! Disabled and enabled keys: what each state allows, and that no use slips past a change of it (check-then-act).

use crate::harness::Server;
use crate::harness::http::Answer;
use kms_hsm::VaultError;
use kms_hsm::memory::Fault;
use serde_json::{Value, json};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use uuid::Uuid;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

async fn act(server: &Server, token: &str, key: &str, action: &str) -> Answer {
    server.call(token, "POST", &format!("/keys/{key}/actions/{action}"), "").await
}

fn refused(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert!(answer.message().ends_with(&format!("({code})")), "{answer:?}");
}

#[tokio::test]
async fn a_disabled_key_neither_wraps_nor_unwraps_until_it_is_enabled() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (wdek, version) = server.wrap(&token, &id, PLAINTEXT).await;
    refused(&act(&server, &token, &id, "enable").await, 409, "KEY_ACTION_INVALID_STATE_ERR");
    let disabled = act(&server, &token, &id, "disable").await;
    assert_eq!((disabled.status, disabled.body.as_str()), (204, ""));
    for action in ["wrap", "rotate", "disable"] {
        let answer = act(&server, &token, &id, action).await;
        refused(&answer, 409, "KEY_ACTION_INVALID_STATE_ERR");
    }
    let answer = server.unwrap(&token, &id, &wdek).await;
    refused(&answer, 409, "KEY_ACTION_INVALID_STATE_ERR");
    let shown = server.call(&token, "GET", &format!("/keys/{id}"), "").await.json();
    assert_eq!(shown["resources"][0]["state"], 2);
    for (query, found) in [("", 1), ("?state=2", 1), ("?state=1,3", 0)] {
        let listed = server.call(&token, "GET", &format!("/keys{query}"), "").await.json();
        assert_eq!(listed["resources"].as_array().unwrap().len(), found, "{query}");
    }
    // The body that one of IBM's clients sends, in the form that the on-premises product knows.
    let enabled = server.call(&token, "POST", &format!("/keys/{id}?action=enable"), "null").await;
    assert_eq!((enabled.status, enabled.body.as_str()), (204, ""));
    assert_eq!(server.unwrap(&token, &id, &wdek).await.json()["plaintext"], PLAINTEXT);
    assert_eq!(server.wrap(&token, &id, PLAINTEXT).await.1, version);
    for action in ["disable_key", "enable_key"] {
        assert!(server.audit().contains(&format!(r#""action":"{action}","outcome":"done""#)));
    }
}

#[tokio::test]
async fn a_disabled_key_stays_disabled_through_expiry_and_restart_and_can_be_deleted() {
    let server = Server::start().await;
    let token = server.admin().await;
    let end = "2027-01-15T08:30:00Z";
    let body = crate::harness::new_key("short")
        .replace("\"name\"", &format!("\"expirationDate\":\"{end}\",\"name\""));
    let made = server.call(&token, "POST", "/keys", &body).await.json();
    let id = made["resources"][0]["id"].as_str().unwrap().to_owned();
    let (wdek, _) = server.wrap(&token, &id, PLAINTEXT).await;
    assert_eq!(act(&server, &token, &id, "disable").await.status, 204);
    server.clock.advance(Duration::from_secs(1800));
    let server = server.restart().await;
    let token = server.admin().await;
    // An expired key unwraps; a disabled one must not become that by waiting.
    let answer = server.unwrap(&token, &id, &wdek).await;
    refused(&answer, 409, "KEY_ACTION_INVALID_STATE_ERR");
    assert_eq!(act(&server, &token, &id, "enable").await.status, 204);
    assert_eq!(server.unwrap(&token, &id, &wdek).await.json()["plaintext"], PLAINTEXT);
    refused(&act(&server, &token, &id, "disable").await, 409, "KEY_ACTION_INVALID_STATE_ERR");

    let id = server.create_id(&token, "doomed").await;
    assert_eq!(act(&server, &token, &id, "disable").await.status, 204);
    assert_eq!(server.call(&token, "DELETE", &format!("/keys/{id}"), "").await.status, 204);
    for action in ["disable", "enable"] {
        refused(&act(&server, &token, &id, action).await, 410, "KEY_DELETED_ERR");
    }
}

#[tokio::test]
async fn pitfall_12_a_use_that_looked_before_is_answered_and_recorded_before_the_change_that_forbids_it()
 {
    for (usage, change, code) in [
        ("wrap", "disable", "KEY_ACTION_INVALID_STATE_ERR"),
        ("unwrap", "disable", "KEY_ACTION_INVALID_STATE_ERR"),
        ("wrap", "delete", "KEY_DELETED_ERR"),
        ("unwrap", "delete", "KEY_DELETED_ERR"),
    ] {
        let server = Arc::new(Server::start().await);
        let token = server.admin().await;
        let id = server.create_id(&token, "crk").await;
        let key: Uuid = id.parse().unwrap();
        let wdek = server.wrap(&token, &id, PLAINTEXT).await.0;
        let body = json!({"ciphertext": wdek}).to_string();
        let body = if usage == "wrap" { String::new() } else { body };
        let spawn = |method: &'static str, path: String, body: &str| -> JoinHandle<Answer> {
            let (server, token, body) = (server.clone(), token.clone(), body.to_owned());
            tokio::spawn(async move { server.call(&token, method, &path, &body).await })
        };
        let use_path = format!("/keys/{id}/actions/{usage}");
        server.vault.set_fault(Some(Fault::Hang));
        let early = spawn("POST", use_path.clone(), &body);
        until_waiting(|| server.app.gates.change(key)).await;
        let changed = match change {
            "delete" => spawn("DELETE", format!("/keys/{id}"), ""),
            _ => spawn("POST", format!("/keys/{id}/actions/disable"), ""),
        };
        until_waiting(|| server.app.gates.use_of(key)).await;
        assert!(!changed.is_finished(), "the use in flight has looked at the key already");
        let late = spawn("POST", use_path, &body);
        server.vault.set_fault(None);
        assert_eq!(early.await.unwrap().status, 200);
        assert_eq!(changed.await.unwrap().status, 204);
        assert!(late.await.unwrap().message().ends_with(&format!("({code})")));
        let expected = [
            "create_key begun".to_owned(),
            "create_key done".to_owned(),
            "wrap done".to_owned(),
            format!("{usage} done"),
            format!("{change}_key begun"),
            format!("{change}_key done"),
            format!("{usage} {code}"),
        ];
        assert_eq!(recorded(&server), expected);
    }
}

/// Returns once whoever asks for this gate has to wait.
async fn until_waiting<T, F: Future<Output = T>>(gate: impl Fn() -> F) {
    let waiting = async {
        while timeout(Duration::ZERO, gate()).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(60), waiting).await.unwrap();
}

/// `action outcome` of each record about a key, in the order of the log.
fn recorded(server: &Server) -> Vec<String> {
    let audit = server.audit();
    let records = audit.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records
        .filter(|record| record["target"].is_string())
        .map(|record| {
            let text = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
            format!("{} {}", text("action"), text("outcome"))
        })
        .collect()
}

/// Another server has just made it, and this one's session does not see it yet.
#[tokio::test]
async fn a_key_that_comes_into_the_hsms_sight_a_moment_later_is_not_lost() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (wdek, _) = server.wrap(&token, &id, "AAAA").await;
    let hides = |calls: usize| {
        let error = VaultError::NotFound;
        server.vault.set_fault(Some(Fault::FailNext { calls, error }));
    };
    // With its plaintext, nothing else is asked of the HSM.
    let (given, sealed) = (json!({ "plaintext": PLAINTEXT }), json!({ "ciphertext": wdek }));
    for (action, body) in [("wrap", given), ("unwrap", sealed)] {
        let body = &body.to_string();
        let path = format!("/keys/{id}/actions/{action}");
        hides(3);
        let answer = server.call(&token, "POST", &path, body).await;
        assert_eq!(answer.status, 200, "{action}: {answer:?}");
        hides(4);
        let answer = server.call(&token, "POST", &path, body).await;
        assert_eq!(answer.status, 500, "{action}: {answer:?}");
        // From now on it is not waited for, until it was seen again.
        hides(1);
        let answer = server.call(&token, "POST", &path, body).await;
        assert_eq!(answer.status, 500, "{action}: {answer:?}");
        let answer = server.call(&token, "POST", &path, body).await;
        assert_eq!(answer.status, 200, "{action}: {answer:?}");
    }
}
