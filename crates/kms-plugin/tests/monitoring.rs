//! The alert rules and the Grafana board in `deploy/monitoring` name only what the plug-in publishes, and leave nothing
//! of it out.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly, as tests do")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kms_plugin::metrics::{Metrics, Snapshot};
use prometheus_client::registry::Registry;
use serde_json::Value;

/// The metrics of others that are used too: Prometheus' own, and kube-apiserver's view of the key_id.
const FOREIGN: [&str; 2] =
    ["up", "apiserver_envelope_encryption_key_id_hash_status_last_timestamp_seconds"];

/// Names of samples, each with the names of its labels.
type Samples = BTreeMap<String, BTreeSet<String>>;

#[test]
fn rules_and_board_name_only_what_is_published() {
    let published = published();
    for expression in alerts().into_iter().chain(board()) {
        let used = used(&expression);
        assert!(!used.is_empty(), "{expression} uses no metric");
        for (name, labels) in used {
            if FOREIGN.contains(&&*name) {
                continue;
            }
            let known = published.get(&name);
            let known = known.unwrap_or_else(|| panic!("{name} of {expression} is not published"));
            for label in labels {
                let of_prometheus = ["instance", "job"].contains(&&*label);
                assert!(of_prometheus || known.contains(&label), "{label} in {expression}");
            }
        }
    }
}

#[test]
fn the_board_shows_everything_that_is_published() {
    let shown: BTreeSet<_> =
        board().iter().flat_map(|expression| used(expression).into_keys()).collect();
    for name in published().into_keys() {
        let histogram = name.strip_suffix("_sum").or_else(|| name.strip_suffix("_count"));
        let name = histogram.map_or(name.clone(), |histogram| format!("{histogram}_bucket"));
        assert!(shown.contains(&name), "{name} is nowhere on the board");
    }
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
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples.flat_map(used).collect()
}

fn alerts() -> Vec<String> {
    rules().iter().map(|rule| rule["expr"].as_str().unwrap().to_owned()).collect()
}

fn rules() -> Vec<Value> {
    let file: Value = serde_saphyr::from_str(&read("alerts.yaml")).unwrap();
    file["groups"][0]["rules"].as_array().unwrap().clone()
}

fn board() -> Vec<String> {
    let board: Value = serde_json::from_str(&read("grafana-dashboard.json")).unwrap();
    let panels = board["panels"].as_array().unwrap().iter();
    let targets = panels.filter_map(|panel| panel["targets"].as_array()).flatten();
    targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect()
}

fn read(name: &str) -> String {
    let path = format!("{}/../../deploy/monitoring/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap()
}

/// The metrics in an expression, each with the labels that are matched.
fn used(expression: &str) -> Samples {
    let mut used = Samples::new();
    let mut rest = expression;
    while let Some(start) =
        FOREIGN.iter().chain(&["kmsplugin_"]).filter_map(|name| rest.find(name)).min()
    {
        let name: String = rest[start..].chars().take_while(is_name).collect();
        rest = &rest[start + name.len()..];
        let labels = used.entry(name).or_default();
        if let Some(matchers) = rest.strip_prefix('{') {
            let (matchers, after) = matchers.split_once('}').unwrap();
            rest = after;
            labels.extend(matchers.split(',').map(label));
        }
    }
    used
}

fn label(matcher: &str) -> String {
    matcher.trim().chars().take_while(is_name).collect()
}

fn is_name(char: &char) -> bool {
    char.is_ascii_alphanumeric() || *char == '_'
}
