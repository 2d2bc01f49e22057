//! From KMS v1 (or from local keys, or from nothing) to KMS v2: in which step each block of the configuration is,
//! and the one thing to do next. It is read off the file and the census; nothing is remembered between two runs.
//!
//! The order of the steps is what keeps every object readable on every API server: a provider must be able to read
//! everywhere before it writes anywhere, and must read until nothing written by it is left.

use serde::Serialize;

use super::Row;
use super::judge::State;
use crate::source::encryption_config::{Block, EncryptionConfig, Provider};

/// Where one block is, and what comes next.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Advice {
    pub(super) resources: Vec<String>,
    pub(super) step: Step,
    /// Objects that are not current.
    pub(super) left: u64,
    pub(super) is: String,
    pub(super) next: Option<String>,
    pub(super) command: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Step {
    /// Something cannot be read with this file. Comes before every other step.
    Repair,
    AddV2,
    WriteThroughV2,
    Rewrite,
    RemoveOld,
    Done,
}

impl Step {
    /// "step 2 of 4"; nothing where there is no way to count.
    pub(super) fn place(self) -> &'static str {
        match self {
            Step::Repair => "repair first",
            Step::AddV2 => "step 1 of 4",
            Step::WriteThroughV2 => "step 2 of 4",
            Step::Rewrite => "step 3 of 4",
            Step::RemoveOld => "step 4 of 4",
            Step::Done => "done",
        }
    }
}

/// Advice for each block that has to do with a KMS plug-in and whose resources were all `looked` at.
pub(super) fn plan(config: &EncryptionConfig, looked: &[String], rows: &[Row]) -> Vec<Advice> {
    let whole = |block: &&Block| block.resources.iter().all(|resource| looked.contains(resource));
    let advice = |block: &Block| {
        let of_block = |row: &&Row| config.block_of(&row.resource) == Some(block);
        let rows: Vec<&Row> = rows.iter().filter(of_block).collect();
        let kms = |provider| matches!(provider, &Provider::KmsV1 { .. } | &Provider::KmsV2 { .. });
        let from_v1 = rows.iter().any(|row| row.provider.starts_with("kms v1"));
        (from_v1 || block.providers.iter().any(kms)).then(|| advise(config, block, &rows))
    };
    config.blocks.iter().filter(whole).filter_map(advice).collect()
}

fn advise(config: &EncryptionConfig, block: &Block, rows: &[&Row]) -> Advice {
    let sum = |wanted: fn(&State) -> bool| -> u64 {
        rows.iter().filter(|row| wanted(&row.judged)).map(|row| row.objects).sum()
    };
    let objects = sum(|_| true);
    let left = sum(|state| matches!(state, State::Left(_)));
    let unreadable = sum(|state| matches!(state, State::Unreadable(_)));
    let writer = block.writer();
    let v2 = block.providers.iter().find(|provider| matches!(provider, Provider::KmsV2 { .. }));
    let others = names(block.providers.iter().filter(|provider| Some(*provider) != v2));
    let mut advice = Advice {
        resources: block.resources.clone(),
        step: Step::Done,
        left: left + unreadable,
        is: String::new(),
        next: None,
        command: None,
    };
    let mut say = |step, is, next| {
        (advice.step, advice.is, advice.next) = (step, is, Some(next));
    };
    match v2 {
        _ if unreadable > 0 => say(
            Step::Repair,
            format!("{unreadable} of {objects} objects cannot be read with this file ({}).", writers(rows)),
            "Put the provider that wrote them back into the list, behind the first, on every API server, before \
             anything else is done. A value that is damaged shows with kmsctl inspect; restore it from a backup."
                .to_owned(),
        ),
        None => say(
            Step::AddV2,
            format!("{writer} writes; KMS v2 is not in the list."),
            format!(
                "On every API server add a kms provider with apiVersion: v2, a name of its own and the same endpoint \
                 BEHIND {writer}, and let the server load the file. Go on only when all of them have."
            ),
        ),
        Some(v2) if v2 != writer => say(
            Step::WriteThroughV2,
            format!("{writer} writes; {v2} reads."),
            format!(
                "When EVERY API server has loaded this file, move {v2} to the first place on every API server. \
                 Leave {others} in the list: what they wrote must stay readable."
            ),
        ),
        Some(v2) if left > 0 => {
            let stale = left_resources(rows);
            say(
                Step::Rewrite,
                format!("{v2} writes; {left} of {objects} objects are still to be rewritten."),
                format!("When EVERY API server has loaded this file, write {stale} again:"),
            );
            advice.command =
                Some(format!("kubectl get {stale} --all-namespaces -o json | kubectl replace -f -"));
        }
        Some(v2) if !others.is_empty() => say(
            Step::RemoveOld,
            format!("{v2} wrote all {objects} objects; {others} reads nothing any more."),
            format!("Take {others} out of the list on every API server.{}", gate(config, block)),
        ),
        Some(v2) => {
            advice.is = format!("{v2} wrote all {objects} objects, and nothing else is in the list.");
        }
    }
    advice
}

/// With the last KMS v1 provider goes what only it needs.
fn gate(config: &EncryptionConfig, block: &Block) -> &'static str {
    let v1 = |block: &Block| {
        block.providers.iter().any(|provider| matches!(provider, Provider::KmsV1 { .. }))
    };
    if !v1(block) || config.blocks.iter().any(|other| other != block && v1(other)) {
        return "";
    }
    " With it goes --feature-gates=KMSv1=true. Backups of etcd from before need both again, and the root key's versions."
}

fn names<'a>(providers: impl Iterator<Item = &'a Provider>) -> String {
    providers.map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn writers(rows: &[&Row]) -> String {
    let mut writers: Vec<_> = rows
        .iter()
        .filter(|row| matches!(row.judged, State::Unreadable(_)))
        .map(|row| row.provider.as_str())
        .collect();
    writers.dedup();
    writers.join(", ")
}

fn left_resources(rows: &[&Row]) -> String {
    let mut left: Vec<_> = rows
        .iter()
        .filter(|row| matches!(row.judged, State::Left(_)))
        .map(|row| row.resource.as_str())
        .collect();
    left.dedup();
    left.join(",")
}

#[cfg(test)]
mod tests {
    use super::super::census::{Census, Found};
    use super::super::judge::{Expected, KeyIds};
    use super::super::rows;
    use super::*;

    const V1: &str = "kms: {name: old}";
    const V2: &str = "kms: {apiVersion: v2, name: new, endpoint: 'unix:///s'}";
    const IDENTITY: &str = "identity: {}";

    fn v1() -> Found {
        Found::KmsV1 { provider: "old".to_owned(), crk_version: None }
    }

    fn v2(key_id: &str) -> Found {
        Found::KmsV2 { provider: "new".to_owned(), key_id: key_id.to_owned(), seed: true }
    }

    /// The only advice for a file with these providers and one secret for each of `found`.
    fn advised(providers: &[&str], found: &[Found]) -> Advice {
        let list: String =
            providers.iter().map(|provider| format!("      - {provider}\n")).collect();
        let text = format!(
            "kind: EncryptionConfiguration\nresources:\n  - resources: [secrets]\n    providers:\n{list}"
        );
        let config = EncryptionConfig::parse(&text).unwrap();
        let mut census = Census::default();
        for found in found {
            census.count("secrets", b"/registry/secrets/a/b", found.clone());
        }
        let key_ids = KeyIds::Given("now".to_owned());
        let expected = Expected { config: Some(config.clone()), key_ids };
        let mut advice = plan(&config, &["secrets".to_owned()], &rows(&expected, census));
        assert_eq!(advice.len(), 1);
        advice.remove(0)
    }

    #[test]
    fn each_step_is_recognised_and_names_the_next() {
        let first = advised(&[V1, IDENTITY], &[v1(), v1()]);
        assert_eq!((first.step, first.left), (Step::AddV2, 0));
        assert!(first.next.unwrap().contains("BEHIND kms v1 old"));

        let second = advised(&[V1, V2, IDENTITY], &[v1(), v1()]);
        assert_eq!((second.step, second.left), (Step::WriteThroughV2, 0));
        assert!(second.next.unwrap().contains("Leave kms v1 old, identity"));

        let third = advised(&[V2, V1, IDENTITY], &[v1(), v2("now"), v2("before"), Found::Identity]);
        assert_eq!((third.step, third.left), (Step::Rewrite, 3));
        let command = "kubectl get secrets --all-namespaces -o json | kubectl replace -f -";
        assert_eq!(third.command.as_deref(), Some(command));

        let fourth = advised(&[V2, V1, IDENTITY], &[v2("now"), v2("now")]);
        assert_eq!((fourth.step, fourth.left), (Step::RemoveOld, 0));
        let next = fourth.next.unwrap();
        assert!(next.contains("Take kms v1 old, identity out") && next.contains("KMSv1=true"));

        let done = advised(&[V2], &[v2("now")]);
        assert_eq!((done.step, done.next, done.command), (Step::Done, None, None));
    }

    #[test]
    fn what_cannot_be_read_comes_before_every_step() {
        for providers in [&[V2][..], &[V2, IDENTITY], &[IDENTITY]] {
            let advice = advised(providers, &[v1(), v2("now")]);
            assert_eq!(advice.step, Step::Repair, "{providers:?}");
            assert!(advice.is.contains("kms v1 old"), "{}", advice.is);
        }
        assert_eq!(advised(&[V2], &[Found::Identity]).step, Step::Repair);
    }

    #[test]
    fn identity_that_is_still_in_the_list_is_the_last_to_go() {
        let advice = advised(&[V2, IDENTITY], &[v2("now")]);
        assert_eq!(advice.step, Step::RemoveOld);
        assert!(!advice.next.unwrap().contains("KMSv1"));
    }

    #[test]
    fn a_block_that_was_not_looked_at_whole_gets_no_advice() {
        let text = format!(
            "kind: EncryptionConfiguration\nresources:\n  - resources: [secrets, pods]\n    providers: [{{{V2}}}]\n"
        );
        let config = EncryptionConfig::parse(&text).unwrap();
        assert_eq!(plan(&config, &["secrets".to_owned()], &[]), []);
    }
}
