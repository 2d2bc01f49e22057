//! `NODE_ID`: whose chain goes on and whose begins anew, with the real binary.

use crate::harness::rig::{Rig, stderr};
use serde_json::Value;
use std::fs;

/// Without a name, with one that is no name, with another one, and with one that another process has.
#[tokio::test]
async fn a_chain_goes_on_under_its_own_name_and_under_no_other() {
    let Some(mut rig) = Rig::bare() else { return };
    name(&rig, None);
    let made = rig.run(&["init", "-o", "json"]);
    assert!(made.status.success(), "{}", stderr(&made));
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    rig.api_key = made["admin"]["api_key"].as_str().unwrap().to_owned();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let kept = fs::read_to_string(rig.path("audit.node")).unwrap();
    assert_eq!(kept.trim(), host.trim(), "the name of the first start is kept");
    assert_eq!(first_and_last(&rig), ((1, kept.trim().to_owned()), 1));

    name(&rig, Some("two words"));
    let refused = rig.run(&["--check-config"]);
    assert!(!refused.status.success());
    assert!(stderr(&refused).contains("SERVER_CONFIG.NODE_ID must be 1 to 63 letters"));

    // The old name, said aloud, is the old name.
    name(&rig, Some(kept.trim()));
    rig.start().await;
    rig.admin().await;
    let shared = rig.run(&[]);
    assert!(!shared.status.success());
    let said = stderr(&shared);
    assert!(said.contains("audit.log: another process writes to it"), "{said}");
    let (_, before) = first_and_last(&rig);
    assert!(before > 1);
    rig.kill();

    name(&rig, Some("kms-0"));
    let renamed = rig.run(&[]);
    assert!(!renamed.status.success());
    let said = stderr(&renamed);
    assert!(
        said.contains(&format!("is of node {:?}, and this server is node \"kms-0\"", kept.trim())),
        "{said}"
    );
    assert!(said.contains("set NODE_ID to the former, or move the file away"), "{said}");

    fs::rename(rig.path("audit.log"), rig.path("audit.log.of-before")).unwrap();
    rig.start().await;
    rig.admin().await;
    assert_eq!(
        first_and_last(&rig).0,
        (1, "kms-0".to_owned()),
        "a chain of its own, from its beginning"
    );
    rig.kill();

    // And back: the other chain is where it was.
    fs::rename(rig.path("audit.log"), rig.path("audit.log.of-kms-0")).unwrap();
    fs::rename(rig.path("audit.log.of-before"), rig.path("audit.log")).unwrap();
    name(&rig, Some(kept.trim()));
    rig.start().await;
    rig.admin().await;
    let ((first, node), after) = first_and_last(&rig);
    assert_eq!((first, node.as_str()), (1, kept.trim()));
    assert!(after > before, "{after} after {before}");
    rig.kill();
}

fn name(rig: &Rig, node: Option<&str>) {
    rig.configure("process");
    let file = rig.path("kms-server.yaml");
    let text = fs::read_to_string(&file).unwrap();
    let lines = text.lines().filter(|line| !line.contains("NODE_ID"));
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    let named = node.map(|node| format!("  NODE_ID: \"{node}\"\n")).unwrap_or_default();
    fs::write(&file, text.replace("  AUDIT_FILE", &format!("{named}  AUDIT_FILE"))).unwrap();
}

/// Number and node of the first record, and the number of the last.
fn first_and_last(rig: &Rig) -> ((u64, String), u64) {
    let text = fs::read_to_string(rig.path("audit.log")).unwrap();
    let record = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    let first = record(text.lines().next().unwrap());
    let last = record(text.lines().last().unwrap());
    let seq = |record: &Value| record["seq"].as_u64().unwrap();
    ((seq(&first), first["node"].as_str().unwrap().to_owned()), seq(&last))
}
