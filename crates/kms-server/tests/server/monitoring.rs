//! The alert rules and the board for this server in `deploy/monitoring` name only what it publishes, and leave nothing
//! of it out.

use kms_daemon::monitoring::{self, Samples, asked, not_shown, scraped, unpublished};
use kms_hsm::{Circuit, Statistics, Times};
use kms_server::audit::Lag;
use kms_server::failures::Cause;
use kms_server::health::{Health, Parts};
use kms_server::limits::{Settings, TooMuch};
use kms_server::metrics::{Metrics, Snapshot};
use kms_server::token::NotValid;
use serde_json::Value;
use std::collections::BTreeSet;
use std::time::{Duration, UNIX_EPOCH};

/// What this server's own metrics begin with, and those of others that are used too.
const OWN: [&str; 1] = ["kms_server_"];
const FOREIGN: [&str; 1] = ["up"];

#[test]
fn rules_and_board_name_only_what_is_published() {
    let expressions = [asked(&rules()).unwrap(), board()].concat();
    assert_eq!(unpublished(&expressions, &OWN, &FOREIGN, &published()), Vec::<String>::new());
}

#[test]
fn the_board_shows_everything_that_is_published() {
    assert_eq!(not_shown(&board(), &OWN, &published()), BTreeSet::new());
}

#[test]
fn every_alert_says_how_bad_it_is_and_what_it_means() {
    for rule in rules() {
        let severity = rule["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning"].contains(&severity), "{rule}");
        for text in ["summary", "description"] {
            assert!(!rule["annotations"][text].as_str().unwrap().is_empty(), "{rule}");
        }
    }
}

/// Every metric once, as a scrape would show it.
fn published() -> Samples {
    let metrics = Metrics::new();
    let took = Duration::from_millis(1);
    metrics.answered("wrap", 200, took);
    let parts: Parts = Health::unknown().last();
    metrics.ready(&parts);
    metrics.recorded(true, took);
    metrics.login_refused(Cause::ApiKey);
    metrics.token_refused(NotValid::Expired);
    metrics.anchored(true, UNIX_EPOCH);
    metrics.certificate_reloaded(true);
    let counted = Statistics {
        functions: [("C_Encrypt".to_owned(), Times::default())].into(),
        codes: [("CKR_DEVICE_ERROR".to_owned(), 1)].into(),
        ..Statistics::default()
    };
    metrics.hsm(Circuit::Closed, Some(counted));
    let text = metrics.render(&Snapshot {
        connections: 0,
        requests: 0,
        limits: Settings::default(),
        refused: TooMuch::ALL.map(|limit| (limit, 0)),
        audit_syncs: 0,
        audit: Lag::default(),
        certificate_ends: None,
    });
    scraped(&text, &OWN)
}

fn rules() -> Vec<Value> {
    monitoring::rules(&read("kms-server-alerts.yaml")).unwrap()
}

fn board() -> Vec<String> {
    monitoring::board(&read("kms-server-dashboard.json")).unwrap()
}

fn read(name: &str) -> String {
    let path = format!("{}/../../deploy/monitoring/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap()
}
