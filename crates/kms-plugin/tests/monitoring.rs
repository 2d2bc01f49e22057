//! The alert rules and the Grafana board in `deploy/monitoring` name only what the plug-in publishes, and leave nothing
//! of it out.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly, as tests do")]

use std::collections::BTreeSet;
use std::time::Duration;

use kms_daemon::monitoring::{self, Samples, asked, not_shown, scraped, unpublished};
use kms_plugin::metrics::{Metrics, Snapshot};
use prometheus_client::registry::Registry;
use serde_json::Value;

/// What the plug-in's own metrics begin with.
const OWN: [&str; 1] = ["kmsplugin_"];
/// The metrics of others that are used too: Prometheus' own, and kube-apiserver's view of the key_id.
const FOREIGN: [&str; 2] =
    ["up", "apiserver_envelope_encryption_key_id_hash_status_last_timestamp_seconds"];

#[test]
fn rules_and_board_name_only_what_is_published() {
    let expressions = [asked(&rules()).unwrap(), board()].concat();
    assert_eq!(unpublished(&expressions, &OWN, &FOREIGN, &published()), Vec::<String>::new());
}

#[test]
fn the_board_shows_everything_that_is_published() {
    assert_eq!(not_shown(&board(), &OWN, &published()), BTreeSet::new());
}

/// What Grafana would show wrongly without a word.
#[test]
fn the_board_is_whole() {
    let board: Value = serde_json::from_str(&read("grafana-dashboard.json")).unwrap();
    let variables = board["templating"]["list"].as_array().unwrap();
    let variables: BTreeSet<_> =
        variables.iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(variables, BTreeSet::from(["datasource", "instance"]));
    let (mut ids, mut cells) = (BTreeSet::new(), BTreeSet::new());
    for panel in board["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "a second panel with this id: {panel}");
        let [x, y, w, h] =
            ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap());
        assert!(w > 0 && h > 0 && x + w <= 24, "{panel}");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(cells.insert(cell), "it covers another panel: {panel}");
        }
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        assert_eq!(targets.is_empty(), panel["type"] == "row", "{panel}");
        let names: BTreeSet<_> = targets.iter().map(|target| target["refId"].to_string()).collect();
        assert_eq!(names.len(), targets.len(), "{panel}");
        for target in &targets {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{target}");
            for used in target["expr"].as_str().unwrap().split('$').skip(1) {
                let used: String = used.chars().take_while(is_name).collect();
                assert!(["instance", "__rate_interval"].contains(&&*used), "{used} in {target}");
            }
        }
    }
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
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry, "eu");
    metrics.requests("v2", "Encrypt").answered("OK", Duration::from_millis(1));
    metrics.provider_call("wrap", "ok", Duration::from_millis(1));
    metrics.open("hit");
    metrics.v1_unauthenticated();
    metrics.probe(true);
    metrics.key_id("sha256:00".into());
    metrics.config_reload(true);
    let text = metrics.render(&registry, Snapshot::default());
    scraped(&text, &OWN)
}

fn rules() -> Vec<Value> {
    monitoring::rules(&read("alerts.yaml")).unwrap()
}

fn board() -> Vec<String> {
    monitoring::board(&read("grafana-dashboard.json")).unwrap()
}

fn read(name: &str) -> String {
    let path = format!("{}/../../deploy/monitoring/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap()
}

fn is_name(char: &char) -> bool {
    char.is_ascii_alphanumeric() || *char == '_'
}
