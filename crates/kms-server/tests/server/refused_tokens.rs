//! Tokens that are refused are in the audit log, by the reason and never themselves; a flood of them is not.

use crate::forged_tokens::{Parts, signed_by_a_stranger, signed_with_our_header};
use crate::harness::{Server, http};
use kms_core::clock::Clock;
use kms_server::ops::refused::record_rest;
use kms_server::policy::{Role, Scope};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

/// The records of refused tokens: outcome, who said it, and how many they stand for.
fn refusals(server: &Server) -> Vec<(String, Value, Option<u64>)> {
    let audit = server.audit();
    let records = audit.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let refused = records.filter(|record| record["action"] == "use_token");
    refused
        .map(|record| {
            assert!(record["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{record}");
            for unproven in ["caller", "api_key", "instance", "target"] {
                assert_eq!(record[unproven], Value::Null, "{record}");
            }
            let outcome = record["outcome"].as_str().unwrap().to_owned();
            (outcome, record["correlation"].clone(), record["count"].as_u64())
        })
        .collect()
}

async fn show(server: &Server, address: SocketAddr, token: &str, uid: &str) -> http::Answer {
    let (bearer, instance) = (format!("Bearer {token}"), server.instance().to_string());
    let headers =
        [("authorization", &*bearer), ("icp-instance", &*instance), ("correlation-id", uid)];
    let path = if address == server.keys { "/api/v2/keys" } else { "/v1/apikeys" };
    http::ask(address, &server.ca(), "GET", path, &headers, "").await
}

/// One for each reason that there is, by the reason.
async fn one_of_each(server: &Server) -> Vec<(&'static str, String)> {
    let admin = server.admin().await;
    let (owner, locked) = server.identity(Role::Administrator, Scope::Everywhere).await;
    let path = format!("/v1/apikeys/{}/lock", owner.api_key().unwrap());
    assert_eq!(server.manage(&admin, "POST", &path, "").await.status, 204);
    let now = server.clock.wall().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (text, _) = admin.rsplit_once('.').unwrap();
    let mut tokens = vec![
        ("TOKEN_FOREIGN", "canary-header.canary-claims.canary-signature".to_owned()),
        ("TOKEN_SIGNATURE", signed_by_a_stranger(text)),
        ("TOKEN_REVOKED", locked),
    ];
    for (code, change) in [
        ("TOKEN_ISSUER", json!({"iss": "https://canary.test/identity"})),
        ("TOKEN_AUDIENCE", json!({"aud": "canary-service"})),
        ("TOKEN_EXPIRED", json!({"iat": now - 100, "nbf": now - 100, "exp": now - 6})),
        ("TOKEN_TIMES", json!({"nbf": now + 61})),
        ("TOKEN_CLAIMS", json!({"iam_id": "IBMid-canary"})),
    ] {
        let claims = Parts::of(&admin).claims(change);
        tokens.push((code, signed_with_our_header(server, &admin, &claims).await));
    }
    tokens
}

#[tokio::test]
async fn who_shows_a_token_that_is_refused_is_in_the_audit_log_by_the_reason() {
    let server = Server::start().await;
    let tokens = one_of_each(&server).await;
    let expected = show(&server, server.keys, "x", "").await;
    let mut said = refusals(&server);
    assert_eq!(said.pop().unwrap().0, "TOKEN_FOREIGN");
    assert_eq!(said, []);
    for (address, listener) in [(server.keys, "keys"), (server.tokens, "tokens")] {
        for (code, token) in &tokens {
            let uid = format!("uid-{listener}-{code}");
            let answer = show(&server, address, token, &uid).await;
            assert_eq!(answer.status, 401, "{answer:?}");
            if address == server.keys {
                assert_eq!(answer.body, expected.body, "outside all are one");
            }
            // It is there when the answer is.
            let last = refusals(&server).pop().unwrap();
            assert_eq!(last, ((*code).to_owned(), json!(uid), None));
        }
    }
    let metrics = http::plain(server.health, "/metrics").await;
    for (code, _) in &tokens {
        let times = if *code == "TOKEN_FOREIGN" { 3 } else { 2 };
        let sample = format!("kms_server_tokens_refused_total{{cause=\"{code}\"}} {times}\n");
        assert!(metrics.contains(&sample), "{sample} is not in {metrics}");
    }
    let audit = server.audit();
    for (code, token) in &tokens {
        for part in token.split('.') {
            assert!(!audit.contains(part), "a part of {code}: {audit}");
        }
    }
    assert!(!audit.contains("canary"), "{audit}");
}

#[tokio::test]
async fn no_token_at_all_and_one_that_is_good_are_no_refused_token() {
    let server = Server::start().await;
    let token = server.admin().await;
    assert_eq!(show(&server, server.keys, &token, "good").await.status, 200);
    let without = http::ask(server.keys, &server.ca(), "GET", "/api/v2/keys", &[], "").await;
    assert_eq!(without.status, 401);
    record_rest(&server.app).await;
    assert_eq!(refusals(&server), []);
}

#[tokio::test]
async fn a_flood_of_refused_tokens_is_a_few_records_and_harms_nobody_else() {
    let server = Server::start().await;
    let good = server.admin().await;
    let before = server.app.audit.head().seq;
    for number in 0..200 {
        let address = if number % 2 == 0 { server.keys } else { server.tokens };
        assert_eq!(
            show(&server, address, "canary-header.canary-claims.canary-signature", "flood")
                .await
                .status,
            401
        );
    }
    server.clock.advance(Duration::from_secs(3606));
    for _ in 0..10 {
        assert_eq!(show(&server, server.keys, &good, "late").await.status, 401);
    }
    // The bound is for each door: who fills the one hides nobody at the other.
    assert_eq!(server.ask_token("nobody-has-this-one").await.status, 400);
    record_rest(&server.app).await;
    record_rest(&server.app).await;
    let own = |code: &str, uid: &str| (code.to_owned(), json!(uid), None);
    let rest = |code: &str, count| (code.to_owned(), Value::Null, Some(count));
    let mut said = refusals(&server);
    // Reasons are in no order.
    said[6..].sort_by_key(|(_, _, count)| *count);
    let (foreign, expired) = ("TOKEN_FOREIGN", "TOKEN_EXPIRED");
    let mut expected = vec![own(foreign, "flood"); 3];
    expected.extend(vec![own(expired, "late"); 3]);
    expected.extend([rest(expired, 7), rest(foreign, 197)]);
    assert_eq!(said, expected);
    assert!(server.audit().contains("UNKNOWN_API_KEY"));
    assert!(!server.audit().contains("canary"));
    // 8 of tokens, one of the login, and anchors.
    let after = server.app.audit.head().seq;
    assert!(after - before <= 9 + 3, "{} records", after - before);
    let good = server.admin().await;
    assert_eq!(show(&server, server.keys, &good, "good").await.status, 200);
}

#[tokio::test]
async fn a_refused_token_that_cannot_be_recorded_is_answered_as_such_and_recorded_later() {
    let server = Server::start().await;
    let log = server.app.audit.path().to_owned();
    let aside = log.with_extension("aside");
    std::fs::rename(&log, &aside).unwrap();
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    let answer = show(&server, server.keys, "x.y.z", "unrecorded").await;
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.body.contains("AUDIT_UNAVAILABLE_ERR"), "{answer:?}");
    std::fs::remove_file(&log).unwrap();
    std::fs::rename(&aside, &log).unwrap();
    assert_eq!(refusals(&server), []);
    record_rest(&server.app).await;
    assert_eq!(refusals(&server), [("TOKEN_FOREIGN".to_owned(), Value::Null, Some(1))]);
}

/// While the disk hangs each of them would wait for it, one behind the other; and so would the end of the service.
#[tokio::test]
async fn the_rest_that_cannot_be_recorded_is_tried_once_and_not_lost() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let forged = signed_by_a_stranger(admin.rsplit_once('.').unwrap().0);
    for _ in 0..5 {
        server.ask_token("nobody-has-this-one").await;
        show(&server, server.keys, "x.y.z", "flood").await;
        show(&server, server.keys, &forged, "flood").await;
    }
    let log = server.app.audit.path().to_owned();
    let aside = log.with_extension("aside");
    std::fs::rename(&log, &aside).unwrap();
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    record_rest(&server.app).await;
    let metrics = http::plain(server.health, "/metrics").await;
    let sample = "kms_server_audit_records_total{outcome=\"failed\"} 1\n";
    assert!(metrics.contains(sample), "{metrics}");
    std::fs::remove_file(&log).unwrap();
    std::fs::rename(&aside, &log).unwrap();
    record_rest(&server.app).await;
    let together = refusals(&server).into_iter().filter_map(|(_, _, count)| count);
    assert_eq!(together.collect::<Vec<_>>(), [2, 2]);
    assert_eq!(server.audit().matches("\"count\":2").count(), 3);
}
