//! What somebody who is known may ask, and may fail to get, in a second and a minute: the audit log's disk, the HSM and the
//! others feel none of what is beyond.

use crate::harness::{Server, http};
use kms_server::limits::Settings;
use kms_server::ops::refused::record_rest;
use kms_server::policy::{Caller, Role, Scope};
use serde_json::Value;
use std::time::Duration;
use uuid::Uuid;

const TOO_OFTEN: &str = "TOO_MANY_REQUESTS_ERR";

/// Nothing is limited but what a test says.
fn unlimited() -> Settings {
    Server::settings().limits
}

/// Number of records, and the last ones that stand for several: what was refused, whom, and how often.
fn recorded(server: &Server) -> (usize, Vec<(String, String, u64)>) {
    let audit = server.audit();
    let records: Vec<Value> =
        audit.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // The first anchor comes when it likes.
    let records: Vec<_> = records.into_iter().filter(|one| one["action"] != "anchor").collect();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let together = records.iter().filter_map(|record| {
        Some((text(&record["outcome"]), text(&record["caller"]), record["count"].as_u64()?))
    });
    (records.len(), together.collect())
}

fn said(code: &str, caller: &Caller, count: u64) -> (String, String, u64) {
    (code.to_owned(), caller.iam_id(), count)
}

#[tokio::test]
async fn whoever_names_a_foreign_instance_again_and_again_is_stopped_and_nobody_else() {
    let limits = Settings { rate_per_caller: 5, rate_per_instance: 9, ..unlimited() };
    let server = Server::start_limited(limits).await;
    let admin = server.admin().await;
    let own = Scope::Instance(server.other_instance().await);
    let (caller, token) = server.identity(Role::Viewer, own).await;
    let ask = async || server.call(&token, "GET", "/keys", "").await;
    for _ in 0..5 {
        let refused = ask().await;
        assert!(refused.message().contains("Instance Header"), "{refused:?}");
    }
    let (before, _) = recorded(&server);
    for _ in 0..30 {
        let refused = ask().await;
        assert_eq!(
            (refused.status, refused.header("retry-after")),
            (429, Some("2")),
            "{refused:?}"
        );
        assert!(refused.message().contains(TOO_OFTEN), "{refused:?}");
    }
    // Whichever instance it names, and none of them has been used up by it.
    for _ in 0..2 {
        let anywhere = server.call_in(Uuid::nil(), &token, "GET", "/keys", "").await;
        assert_eq!(anywhere.status, 429, "{anywhere:?}");
    }
    assert_eq!(recorded(&server), (before, vec![]), "no flood of the audit log");
    for _ in 0..5 {
        assert_eq!(server.call(&admin, "GET", "/keys", "").await.status, 200);
    }
    record_rest(&server.app).await;
    let (_, together) = recorded(&server);
    assert_eq!(together, [said(TOO_OFTEN, &caller, 32)]);
    let metrics = http::plain(server.health, "/metrics").await;
    let sample = "kms_server_limit_refusals_total{limit=\"rate_per_caller\"} 32";
    assert!(metrics.contains(sample), "{metrics}");
    server.clock.advance(Duration::from_secs(1));
    assert_eq!(ask().await.status, 400, "a moment later it is answered again");
}

#[tokio::test]
async fn the_management_has_a_rate_for_each_caller() {
    let server =
        Server::start_limited(Settings { management_rate_per_caller: 4, ..unlimited() }).await;
    let admin = server.admin().await;
    let (caller, token) = server.identity(Role::Viewer, Scope::Everywhere).await;
    let ask = async || server.manage(&token, "GET", "/v1/apikeys", "").await;
    for _ in 0..4 {
        assert_eq!(ask().await.status, 403);
    }
    let (before, _) = recorded(&server);
    for _ in 0..20 {
        let refused = ask().await;
        assert_eq!(
            (refused.status, refused.header("retry-after")),
            (429, Some("2")),
            "{refused:?}"
        );
    }
    assert_eq!(recorded(&server), (before, vec![]), "no flood of the audit log");
    assert_eq!(server.manage(&admin, "GET", "/v1/apikeys", "").await.status, 200);
    record_rest(&server.app).await;
    assert_eq!(recorded(&server).1, [said(TOO_OFTEN, &caller, 20)]);
}

/// A login costs a signature of the HSM and a durable record.
#[tokio::test]
async fn logins_have_a_rate_for_each_caller_and_those_beyond_cost_neither_a_signature_nor_a_record()
{
    let server = Server::start_limited(Settings { login_rate_per_caller: 1, ..unlimited() }).await;
    // The first of five: so many seconds' worth.
    let (caller, _) = server.identity(Role::Viewer, Scope::Everywhere).await;
    let api_key = caller.api_key().unwrap().to_string();
    for _ in 0..4 {
        assert_eq!(server.ask_token(&api_key).await.status, 200);
    }
    let (before, _) = recorded(&server);
    for _ in 0..20 {
        let refused = server.ask_token(&api_key).await;
        assert_eq!(
            (refused.status, refused.header("retry-after")),
            (429, Some("2")),
            "{refused:?}"
        );
        assert!(refused.body.contains(TOO_OFTEN), "{refused:?}");
    }
    assert_eq!(recorded(&server), (before, vec![]), "no flood of the audit log");
    server.admin().await;
    record_rest(&server.app).await;
    assert_eq!(recorded(&server).1, [said(TOO_OFTEN, &caller, 20)]);
    server.clock.advance(Duration::from_secs(1));
    assert_eq!(server.ask_token(&api_key).await.status, 200);
}

#[tokio::test]
async fn of_what_is_refused_to_a_caller_the_first_have_records_and_all_others_one_a_minute() {
    let server = Server::start().await;
    let (caller, token) =
        server.identity(Role::Viewer, Scope::Instance(server.other_instance().await)).await;
    let (before, _) = recorded(&server);
    for _ in 0..75 {
        let refused = server.call(&token, "GET", "/keys", "").await;
        assert_eq!(refused.status, 400, "the answer stays the same: {refused:?}");
    }
    assert_eq!(recorded(&server), (before + 60, vec![]));
    record_rest(&server.app).await;
    record_rest(&server.app).await;
    assert_eq!(recorded(&server), (before + 61, vec![said("INVALID_INSTANCE", &caller, 15)]));
    server.call(&token, "GET", "/keys", "").await;
    assert_eq!(recorded(&server).0, before + 62, "the next minute begins anew");
}
