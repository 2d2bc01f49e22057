//! The alert rules and the board for this server in `deploy/monitoring` name only what it publishes, and leave nothing
//! of it out.

use kms_hsm::{Statistics, Times};
use kms_server::health::{Health, Parts};
use kms_server::limits::{Settings, TooMuch};
use kms_server::metrics::{Metrics, Snapshot};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Names of samples, each with the names of its labels.
type Samples = BTreeMap<String, BTreeSet<String>>;

#[test]
fn rules_and_board_name_only_what_is_published() {
    let published = published();
    for expression in rules().into_iter().chain(board()) {
        for (name, labels) in used(&expression) {
            let known = published.get(&name);
            let known = known.unwrap_or_else(|| panic!("{name} of {expression} is not published"));
            for label in labels {
                assert!(label == "instance" || known.contains(&label), "{label} in {expression}");
            }
        }
    }
}

#[test]
fn the_board_shows_everything_that_is_published() {
    let shown: BTreeSet<_> =
        board().iter().flat_map(|expression| used(expression).into_keys()).collect();
    assert!(rules().len() >= 10);
    for name in published().into_keys() {
        let histogram = name.strip_suffix("_sum").or_else(|| name.strip_suffix("_count"));
        let name = histogram.map_or(name.clone(), |histogram| format!("{histogram}_bucket"));
        assert!(shown.contains(&name), "{name} is nowhere on the board");
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
    metrics.certificate_reloaded(true);
    metrics.hsm(Some(Statistics {
        functions: [("C_Encrypt".to_owned(), Times::default())].into(),
        codes: [("CKR_DEVICE_ERROR".to_owned(), 1)].into(),
        ..Statistics::default()
    }));
    let text = metrics.render(&Snapshot {
        connections: 0,
        requests: 0,
        limits: Settings::default(),
        refused: TooMuch::ALL.map(|limit| (limit, 0)),
        audit_syncs: 0,
        certificate_ends: None,
    });
    text.lines().filter(|line| !line.starts_with('#')).flat_map(used).collect()
}

fn rules() -> Vec<String> {
    let text = read("kms-server-alerts.yaml");
    let lines: Vec<&str> = text.lines().collect();
    let pairs = lines.windows(2).filter(|pair| pair[0].trim() == "expr: >-");
    pairs.map(|pair| pair[1].trim().to_owned()).collect()
}

fn board() -> Vec<String> {
    let board: Value = serde_json::from_str(&read("kms-server-dashboard.json")).unwrap();
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
    while let Some(start) = rest.find("kms_server_") {
        let name: String = rest[start..].chars().take_while(is_name).collect();
        rest = &rest[start + name.len()..];
        let labels = used.entry(name).or_default();
        if let Some(matchers) = rest.strip_prefix('{') {
            let (matchers, after) = matchers.split_once('}').unwrap();
            rest = after;
            let label = |one: &str| one.trim().chars().take_while(is_name).collect();
            labels.extend(matchers.split(',').map(label));
        }
    }
    used
}

fn is_name(char: &char) -> bool {
    char.is_ascii_alphanumeric() || *char == '_'
}
