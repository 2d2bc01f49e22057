//! One record as one line for people.

use kms_core::audit::{ANCHOR, Content, Line};

use crate::output::printable;

/// Above the lines that [`human`] makes.
pub(super) const TITLES: &str = "TIME                            SEQ  NODE          ACTION            OUTCOME           DETAILS";

pub(super) fn human(line: &Line<'_>) -> String {
    let (action, outcome, details) = match &line.content {
        Content::Anchor(anchor) => {
            let covers = format!("covers all up to {}, key {}", anchor.head().seq, anchor.key());
            (ANCHOR, "signed", covers)
        }
        Content::Event(event) => {
            let id = |id: &Option<uuid::Uuid>| id.map(|id| id.to_string());
            let parts = [
                ("by", event.caller.as_deref().map(str::to_owned)),
                ("api-key", id(&event.api_key)),
                ("instance", id(&event.instance)),
                ("on", id(&event.target)),
                ("version", id(&event.version)),
                ("rewrapped with", id(&event.rewrapped)),
                ("of service ID", id(&event.service_id)),
                ("grant", event.grant.as_deref().map(|grant| format!("{grant:?}"))),
                ("uid", event.correlation.as_deref().map(str::to_owned)),
                ("from", event.peer.as_deref().map(str::to_owned)),
                ("times", event.count.map(|count| count.to_string())),
            ];
            let parts = parts.into_iter().filter_map(|(name, value)| Some((name, value?)));
            let parts: Vec<_> = parts.map(|(name, value)| format!("{name} {value}")).collect();
            (&*event.action, &*event.outcome, parts.join("  "))
        }
    };
    let (at, node) = (line.at(), line.node());
    printable(&format!(
        "{at:<30} {:>4}  {node:<12}  {action:<16}  {outcome:<16}  {details}",
        line.seq
    ))
    .trim_end()
    .to_owned()
}
