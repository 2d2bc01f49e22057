//! What the alert rules and the boards in `deploy/monitoring` name, for the tests of both daemons: they must name only
//! what a daemon publishes, and the board must leave nothing of it out. No daemon is built with this.
//!
//! This reads names and labels out of PromQL and understands no more of it; Prometheus itself judges the expressions, in
//! the end-to-end tests.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Names of samples, each with the names of its labels.
pub type Samples = BTreeMap<String, BTreeSet<String>>;

/// What Prometheus adds to every sample.
const OF_PROMETHEUS: [&str; 2] = ["instance", "job"];

/// The rules in a file of Prometheus.
///
/// # Errors
/// Says what is missing.
pub fn rules(yaml: &str) -> Result<Vec<Value>, String> {
    let file: Value = serde_saphyr::from_str(yaml).map_err(|error| error.to_string())?;
    let groups = file["groups"].as_array().ok_or("no groups")?;
    let rules: Vec<Value> =
        groups.iter().filter_map(|group| group["rules"].as_array()).flatten().cloned().collect();
    if rules.is_empty() { Err("no rules".to_owned()) } else { Ok(rules) }
}

/// What a rule asks.
///
/// # Errors
/// Names the rule that asks nothing.
pub fn asked(rules: &[Value]) -> Result<Vec<String>, String> {
    rules.iter().map(expression).collect()
}

/// What the panels of a Grafana board ask.
///
/// # Errors
/// Says what is missing.
pub fn board(json: &str) -> Result<Vec<String>, String> {
    let board: Value = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let panels = board["panels"].as_array().ok_or("no panels")?.iter();
    let targets = panels.filter_map(|panel| panel["targets"].as_array()).flatten();
    targets.map(expression).collect()
}

fn expression(of: &Value) -> Result<String, String> {
    of["expr"].as_str().map(str::to_owned).ok_or_else(|| format!("no expression in {of}"))
}

/// What a scrape shows.
#[must_use]
pub fn scraped(text: &str, prefixes: &[&str]) -> Samples {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples.flat_map(|line| used(line, prefixes)).collect()
}

/// The metrics in `text` whose names begin with one of `prefixes`, each with the labels that are matched: of an
/// expression, or of a scrape.
#[must_use]
pub fn used(text: &str, prefixes: &[&str]) -> Samples {
    let mut used = Samples::new();
    let mut rest = text;
    while let Some(start) = prefixes.iter().filter_map(|prefix| begin(rest, prefix)).min() {
        let (name, behind) = name(&rest[start..]);
        let labels = used.entry(name.to_owned()).or_default();
        rest = behind;
        if let Some(matchers) = behind.strip_prefix('{') {
            let (matchers, behind) = matchers.split_once('}').unwrap_or((matchers, ""));
            labels.extend(matchers.split(',').map(|one| name_of_label(one).to_owned()));
            rest = behind;
        }
    }
    used
}

/// What of `expressions` is neither in `published` nor one of `foreign`, by name or by label.
#[must_use]
pub fn unpublished(
    expressions: &[String],
    prefixes: &[&str],
    foreign: &[&str],
    published: &Samples,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for expression in expressions {
        let prefixes: Vec<&str> = prefixes.iter().chain(foreign).copied().collect();
        let used = used(expression, &prefixes);
        if used.is_empty() {
            wrong.push(format!("{expression} uses no metric"));
        }
        for (name, labels) in used.into_iter().filter(|(name, _)| !foreign.contains(&&**name)) {
            let Some(known) = published.get(&name) else {
                wrong.push(format!("{name} of {expression} is not published"));
                continue;
            };
            let strange = labels
                .into_iter()
                .filter(|label| !known.contains(label) && !OF_PROMETHEUS.contains(&&**label));
            wrong.extend(strange.map(|label| format!("{name} of {expression} has no {label}")));
        }
    }
    wrong
}

/// What of `published` is in none of `expressions`. Of a histogram, its buckets are looked for.
#[must_use]
pub fn not_shown(
    expressions: &[String],
    prefixes: &[&str],
    published: &Samples,
) -> BTreeSet<String> {
    let shown: BTreeSet<String> =
        expressions.iter().flat_map(|expression| used(expression, prefixes).into_keys()).collect();
    let names = published.keys().map(|name| {
        let histogram = name.strip_suffix("_sum").or_else(|| name.strip_suffix("_count"));
        histogram.map_or_else(|| name.clone(), |histogram| format!("{histogram}_bucket"))
    });
    names.filter(|name| !shown.contains(name)).collect()
}

/// Where a name with this prefix begins, and not in the middle of another.
fn begin(text: &str, prefix: &str) -> Option<usize> {
    let starts = text.match_indices(prefix).map(|(start, _)| start);
    starts.filter(|start| !text[..*start].ends_with(is_of_name)).min()
}

fn name(text: &str) -> (&str, &str) {
    text.split_at(text.find(|char| !is_of_name(char)).unwrap_or(text.len()))
}

fn name_of_label(matcher: &str) -> &str {
    name(matcher.trim()).0
}

fn is_of_name(char: char) -> bool {
    char.is_ascii_alphanumeric() || char == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(all: &[(&str, &[&str])]) -> Samples {
        all.iter()
            .map(|(name, labels)| {
                ((*name).to_owned(), labels.iter().map(|label| (*label).to_owned()).collect())
            })
            .collect()
    }

    #[test]
    fn names_and_labels_are_found_wherever_they_stand_in_an_expression() {
        let text = "sum by (le) (rate(own_a_total{x=~\"a|b\", y!=\"\"}[5m])) / own_b > up{job=\"own\"} and not_own_c";
        let wanted = [("own_a_total", &["x", "y"][..]), ("own_b", &[]), ("up", &["job"])];
        assert_eq!(used(text, &["own_", "up"]), samples(&wanted));
    }

    #[test]
    fn what_is_not_published_and_what_is_not_shown_are_named() {
        let published = samples(&[
            ("own_a", &["x"]),
            ("own_b", &[]),
            ("own_seconds_bucket", &["le"]),
            ("own_seconds_sum", &[]),
        ]);
        let asked =
            ["own_a{x=\"\",job=\"\"} > up", "own_c", "own_b{y=\"\"}", "1"].map(str::to_owned);
        assert_eq!(
            unpublished(&asked, &["own_"], &["up"], &published),
            [
                "own_c of own_c is not published",
                "own_b of own_b{y=\"\"} has no y",
                "1 uses no metric"
            ]
        );
        assert_eq!(
            not_shown(&asked, &["own_"], &published),
            BTreeSet::from(["own_seconds_bucket".to_owned()])
        );
    }

    #[test]
    fn a_file_without_rules_or_panels_is_a_mistake() {
        let file =
            "groups: [{name: a, rules: [{alert: A, expr: up}]}, {name: b, rules: [{alert: B}]}]";
        let rules = rules(file).unwrap();
        assert_eq!(asked(&rules[..1]).unwrap(), ["up"]);
        assert_eq!(asked(&rules).unwrap_err(), "no expression in {\"alert\":\"B\"}");
        for empty in ["{}", "groups: []", "groups: [{name: a}]", "["] {
            assert!(super::rules(empty).is_err(), "{empty}");
        }
        assert_eq!(board("{\"panels\":[{},{\"targets\":[{\"expr\":\"up\"}]}]}").unwrap(), ["up"]);
        assert!(board("{}").is_err());
    }
}
