//! `kmsctl audit`: on files as kms-server writes them, and as somebody left them who should not have.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256};
use kms_core::audit::anchor::{Anchor, PublicKey, Statement};
use kms_core::audit::{Content, Event, Link};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::program::{kmsctl, run, stderr, stdout};

/// The logs of two servers: one with a rotated file and anchors, one with a single file.
struct Logs {
    folder: TempDir,
    key: KeyPair,
}

struct Node<'l> {
    logs: &'l Logs,
    name: &'static str,
    link: Link,
    bytes: Vec<u8>,
}

impl Logs {
    fn new() -> Logs {
        let logs = Logs {
            folder: TempDir::new().unwrap(),
            key: KeyPair::generate(KeySize::Rsa2048).unwrap(),
        };
        // PKCS#1: SEQUENCE { INTEGER 0 ‖ modulus of 256 bytes, INTEGER 65537 }.
        let der = logs.key.public_key().as_ref();
        let public = PublicKey::from_parts(&der[9..265], &der[267..]).unwrap();
        fs::write(logs.path("audit.pem"), public.pem()).unwrap();
        let mut node = logs.node("one");
        node.records(1..=30);
        node.anchor();
        node.end_file("one.log.1");
        node.records(31..=60);
        node.anchor();
        node.end_file("one.log");
        let mut node = logs.node("two");
        node.records(1..=5);
        node.anchor();
        node.end_file("two.log");
        logs
    }

    fn node(&self, name: &'static str) -> Node<'_> {
        Node { logs: self, name, link: Link::start(), bytes: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn change(&self, name: &str, change: impl FnOnce(String) -> String) {
        let text = fs::read_to_string(self.path(name)).unwrap();
        fs::write(self.path(name), change(text)).unwrap();
    }

    /// Names of files become their paths.
    async fn audit(&self, arguments: &[&str]) -> Output {
        run(self.command(arguments), "").await
    }

    fn command(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = kmsctl(&["audit"]);
        command.args(arguments).current_dir(self.folder.path());
        command
    }
}

impl Node<'_> {
    fn add(&mut self, content: &Content<'_>) {
        let (line, link) = self.link.extend(content).unwrap();
        self.bytes.extend(line);
        self.link = link;
    }

    fn records(&mut self, numbers: std::ops::RangeInclusive<u32>) {
        for n in numbers {
            self.add(&Content::Event(Event {
                node: self.name.into(),
                at: format!("2026-01-01T00:{:02}:00Z", n % 60).into(),
                action: if n % 2 == 0 { "wrap" } else { "unwrap" }.into(),
                outcome: if n % 10 == 0 { "KEY_NOT_FOUND_ERR" } else { "done" }.into(),
                caller: Some(format!("iam-ServiceId-{}", n % 3).into()),
                target: Some(Uuid::from_u128(u128::from(n % 4))),
                correlation: Some(format!("uid-{n}").into()),
                // The first file is of before there were peers.
                peer: (n > 30).then(|| format!("192.0.2.{}:40{n:03}", n % 5).into()),
                ..Event::default()
            }));
        }
    }

    fn anchor(&mut self) {
        let at = "2026-01-01T01:00:00Z";
        let key = &self.logs.key;
        let statement = Statement { node: self.name, at, head: self.link, key: Uuid::from_u128(9) };
        let mut signature = vec![0; key.public_modulus_len()];
        key.sign(
            &RSA_PKCS1_SHA256,
            &SystemRandom::new(),
            &statement.signed_bytes(),
            &mut signature,
        )
        .unwrap();
        self.add(&Content::Anchor(Anchor::new(&statement, signature)));
    }

    fn end_file(&mut self, name: &str) {
        let last = self.bytes.split_inclusive(|byte| *byte == b'\n').next_back().unwrap();
        fs::write(self.logs.path(&format!("{}.anchor", self.name)), last).unwrap();
        fs::write(self.logs.path(name), std::mem::take(&mut self.bytes)).unwrap();
    }
}

/// All there is, in no order.
const ALL: [&str; 10] = [
    "verify",
    "one.log",
    "two.log",
    "one.log.1",
    "--key",
    "audit.pem",
    "--anchor",
    "one.anchor",
    "--anchor",
    "two.anchor",
];

#[tokio::test]
async fn logs_of_several_servers_and_files_are_sound() {
    let logs = Logs::new();
    let output = logs.audit(&ALL).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(
        stdout(&output),
        "node one: records 1 to 62 in 2 files, signed up to record 61 at 2026-01-01T01:00:00Z\n  \
           without an anchor for more than 90 s: 2 times, the longest for 3540 s, records 1 to 30, 2026-01-01T00:01:00Z to \
           2026-01-01T01:00:00Z\n\
         node two: records 1 to 6 in 1 file, signed up to record 5 at 2026-01-01T01:00:00Z\n  \
           without an anchor for more than 90 s: once, the longest for 3540 s, records 1 to 5, 2026-01-01T00:01:00Z to \
           2026-01-01T01:00:00Z\n"
    );
    let json = logs.audit(&[&ALL[..], &["-o", "json"]].concat()).await;
    let json: Value = serde_json::from_str(stdout(&json)).unwrap();
    assert_eq!((&json["sound"], &json["signatures"]), (&true.into(), &true.into()));
    assert_eq!(json["chains"][0]["files"], serde_json::json!(["one.log.1", "one.log"]));
    assert_eq!(json["chains"][0]["anchored"], 61);
    assert_eq!(
        (&json["chains"][0]["late"], &json["chains"][0]["longest"]["to"]),
        (&2.into(), &30.into())
    );
    let unsigned = logs.audit(&["verify", "two.log", "--first", "1"]).await;
    assert!(stdout(&unsigned).contains("1 anchors, not checked: give --key\n"));
}

#[tokio::test]
async fn tampering_is_told_with_file_line_and_record() {
    let logs = Logs::new();
    let drop_second = |text: String| {
        let kept = text.lines().enumerate().filter(|(n, _)| *n != 1).map(|(_, line)| line);
        kept.collect::<Vec<_>>().join("\n") + "\n"
    };
    logs.change("one.log", drop_second);
    logs.change("two.log", |text| text.replacen("uid-3", "uid-4", 1));
    let output = logs.audit(&ALL).await;
    assert_eq!(output.status.code(), Some(1));
    let said = stdout(&output);
    for wanted in [
        "one.log: line 2, record 34: record 33 is missing before this record\n",
        "two.log: line 4, record 4: this record does not follow from the one before it: record 3 was changed",
        "two.log: line 6, record 6: ",
    ] {
        assert_eq!(said.contains(wanted), !wanted.ends_with("6: "), "{wanted} in {said}");
    }
    assert!(stderr(&output).contains("2 findings"), "{}", stderr(&output));

    let json = logs.audit(&[&ALL[..], &["-o", "json"]].concat()).await;
    let json: Value = serde_json::from_str(stdout(&json)).unwrap();
    let first = &json["findings"][0];
    assert_eq!((&json["sound"], &json["found"]), (&false.into(), &2.into()));
    assert_eq!(
        (&first["file"], &first["line"], &first["sequence"]),
        (&"one.log".into(), &2.into(), &34.into())
    );
}

#[tokio::test]
async fn a_missing_end_and_a_missing_file_are_seen_against_the_anchor_kept_elsewhere() {
    let logs = Logs::new();
    logs.change("one.log", |text| text.lines().take(10).map(|line| format!("{line}\n")).collect());
    let output = logs.audit(&ALL).await;
    assert_eq!(output.status.code(), Some(1));
    let said = stdout(&output);
    assert!(said.contains("one.log: end: records 42 to 61 are missing at the end"), "{said}");
    let gone = ["verify", "one.log.1", "--anchor", "two.anchor", "--key", "audit.pem"];
    let output = logs.audit(&gone).await;
    assert!(stdout(&output).contains("no file: records 1 to 5 are missing"), "{output:?}");
    let between = logs.audit(&["verify", "one.log", "--first", "20"]).await;
    assert!(stdout(&between).contains("records 20 to 31 are missing before this record"));
}

#[tokio::test]
async fn what_cannot_be_found_out_is_no_outcome() {
    let logs = Logs::new();
    fs::write(logs.path("junk"), "junk\n").unwrap();
    for (arguments, says) in [
        (&["verify", "absent.log"][..], "absent.log: "),
        (&["verify", "one.log", "--key", "junk"], "junk: it is not a PEM file"),
        (&["verify", "one.log", "--anchor", "junk"], "junk: a line is not an anchor"),
        (&["verify", "one.log", "-"], "standard input is looked at alone"),
        (&["verify", "one.log", "--first", "0"], "--first"),
        (&["verify"], "required"),
    ] {
        let output = logs.audit(arguments).await;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(says), "{says} is not in {}", stderr(&output));
    }
    let other = Logs::new();
    fs::copy(other.path("audit.pem"), logs.path("other.pem")).unwrap();
    let output =
        logs.audit(&["verify", "one.log", "--key", "other.pem", "--anchor", "one.anchor"]).await;
    assert_eq!(output.status.code(), Some(2), "a forged anchor proves nothing");
    let output = logs.audit(&["verify", "one.log", "--key", "other.pem"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("not signed by the key"), "{}", stdout(&output));
}

#[tokio::test]
async fn standard_input_takes_the_place_of_files() {
    let logs = Logs::new();
    let text = fs::read_to_string(logs.path("one.log.1")).unwrap()
        + &fs::read_to_string(logs.path("one.log")).unwrap();
    let arguments = ["verify", "-", "--first", "1", "--key", "audit.pem", "--anchor", "one.anchor"];
    let output = run(logs.command(&arguments), &text).await;
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    let output = run(logs.command(&["query", "-", "--uid", "uid-7"]), &text).await;
    assert!(stdout(&output).contains("uid uid-7\n"));
}

#[tokio::test]
async fn records_are_found_by_each_of_their_members() {
    let logs = Logs::new();
    let files = ["query", "one.log.1", "one.log", "-o", "json"];
    let count = async |filter: &[&str]| {
        let output = logs.audit(&[&files[..], filter].concat()).await;
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        serde_json::from_str::<Value>(stdout(&output)).unwrap().as_array().unwrap().len()
    };
    let key = Uuid::from_u128(2).to_string();
    for (filter, expected) in [
        (&[][..], 62),
        (&["--action", "wrap"], 30),
        (&["--action", "anchor"], 2),
        (&["--outcome", "refused"], 6),
        (&["--outcome", "KEY_NOT_FOUND_ERR"], 6),
        (&["--outcome", "done"], 54),
        (&["--who", "ServiceId-1"], 20),
        (&["--key", &key], 15),
        (&["--uid", "uid-33"], 1),
        (&["--peer", "192.0.2.3"], 6),
        (&["--peer", "192.0.2.3:40033"], 1),
        (&["--peer", "192.0.2.3", "--action", "wrap"], 3),
        (&["--since", "2026-01-01T00:31:00Z", "--until", "2026-01-01T00:40:00.5Z"], 10),
        (&["--action", "wrap", "--who", "ServiceId-2", "--outcome", "refused"], 2),
        (&["--node", "two"], 0),
        (&["--since", "1h"], 0),
    ] {
        assert_eq!(count(filter).await, expected, "{filter:?}");
    }
    let table = logs.audit(&["query", "one.log", "--uid", "uid-33"]).await;
    assert_eq!(
        stdout(&table),
        "TIME                            SEQ  NODE          ACTION            OUTCOME           DETAILS\n\
         2026-01-01T00:33:00Z             34  one           unwrap            done              \
         by iam-ServiceId-0  on 00000000-0000-0000-0000-000000000001  uid uid-33  from 192.0.2.3:40033\n"
    );
    logs.change("one.log", |text| format!("junk\n{text}"));
    let output = logs.audit(&["query", "one.log", "--uid", "uid-33"]).await;
    assert!(stderr(&output).contains("1 lines are no audit records"), "{}", stderr(&output));
    for wrong in [["--since", "soon"], ["--peer", "somebody"]] {
        let output = logs.audit(&[&["query", "one.log"], &wrong[..]].concat()).await;
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("such as"), "{}", stderr(&output));
    }
}

#[tokio::test]
async fn refused_tokens_are_found_and_what_nobody_was_answered_is_no_refusal() {
    let logs = Logs::new();
    let mut node = logs.node("three");
    for (action, outcome, count) in [
        ("use_token", "TOKEN_EXPIRED", None),
        ("use_token", "TOKEN_SIGNATURE", Some(97)),
        ("issue_token", "UNKNOWN_API_KEY", None),
        ("wrap", "done", None),
        ("wrap", "unanswered", None),
    ] {
        node.add(&Content::Event(Event {
            node: "three".into(),
            at: "2026-01-01T00:00:00Z".into(),
            action: action.into(),
            outcome: outcome.into(),
            peer: Some("192.0.2.9:40000".into()),
            count,
            ..Event::default()
        }));
    }
    node.end_file("three.log");
    let seen = async |filter: &[&str]| {
        let output = logs.audit(&[&["query", "three.log"], filter].concat()).await;
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output).lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    let tokens = seen(&["--action", "use_token", "--outcome", "refused"]).await;
    assert_eq!(tokens.len(), 2, "{tokens:?}");
    assert!(tokens[0].ends_with("use_token         TOKEN_EXPIRED     from 192.0.2.9:40000"));
    assert!(tokens[1].ends_with("from 192.0.2.9:40000  times 97"), "{tokens:?}");
    assert_eq!(seen(&["--outcome", "refused"]).await.len(), 3);
    assert_eq!(seen(&["--outcome", "TOKEN_SIGNATURE"]).await.len(), 1);
    assert_eq!(seen(&["--outcome", "unanswered"]).await.len(), 1);
}

#[tokio::test]
async fn a_beginning_that_the_server_did_not_find_is_told_and_is_sound_where_it_is_read() {
    let logs = Logs::new();
    let mut node = logs.node("three");
    node.records(1..=20);
    node.end_file("three.log.1");
    node.records(21..=30);
    node.add(&Content::Event(Event {
        node: "three".into(),
        at: "2026-01-02T00:00:00Z".into(),
        action: "audit_past_missing".into(),
        outcome: "done".into(),
        correlation: Some("record 10 before record 21".into()),
        ..Event::default()
    }));
    node.end_file("three.log");
    let told = "did not find a file of the log where it was left: once, the last time at record 31, \
                2026-01-02T00:00:00Z: audit_past_missing (record 10 before record 21)";
    let both = logs.audit(&["verify", "three.log", "three.log.1", "--first", "1"]).await;
    assert_eq!(both.status.code(), Some(0), "{}", stderr(&both));
    assert!(stdout(&both).contains(told), "{}", stderr(&both));
    assert!(stdout(&both).contains("looked for above, from record 1 on"), "{}", stderr(&both));
    let alone = logs.audit(&["verify", "three.log"]).await;
    assert_eq!(alone.status.code(), Some(0), "{}", stderr(&alone));
    assert!(stdout(&alone).contains(told), "{}", stderr(&alone));
    let missing = "what was before record 21 is not among these files: check that you have it";
    assert!(stdout(&alone).contains(missing), "{}", stderr(&alone));
    let missing = logs.audit(&["verify", "three.log", "--first", "1"]).await;
    assert_eq!(missing.status.code(), Some(1), "{}", stderr(&missing));
    let json = logs.audit(&["verify", "three.log", "-o", "json"]).await;
    let json: Value = serde_json::from_str(stdout(&json)).unwrap();
    let chain = &json["chains"][0];
    assert_eq!((&chain["losses"], &chain["last_loss"]["record"]), (&json!(1), &json!(31)));
}

#[tokio::test]
async fn the_last_records_are_shown_and_those_that_come_also_behind_a_rotation() {
    let logs = Logs::new();
    let last = logs.audit(&["tail", "-n", "3", "one.log"]).await;
    let uids: Vec<_> =
        stdout(&last).lines().map(|line| line.rsplit("  ").next().unwrap()).collect();
    assert_eq!(uids[..2], ["from 192.0.2.4:40059", "from 192.0.2.0:40060"]);
    assert!(uids[2].starts_with("covers all up to 61, key "), "{uids:?}");
    let all = logs.audit(&["tail", "-n", "1000", "one.log", "-o", "json"]).await;
    assert_eq!(stdout(&all), fs::read_to_string(logs.path("one.log")).unwrap());

    let mut command = logs.command(&["tail", "-f", "-n", "0", "one.log"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut shown = BufReader::new(child.stdout.take().unwrap()).lines();
    let append = |name: &str, uid: u32| {
        let mut node = logs.node("one");
        node.records(uid..=uid);
        let mut file =
            fs::OpenOptions::new().append(true).create(true).open(logs.path(name)).unwrap();
        file.write_all(&node.bytes).unwrap();
    };
    // The first is seen once the program has begun to look; it is written until then.
    let (sender, seen) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        while let Some(Ok(line)) = shown.next() {
            sender.send(line).unwrap();
        }
    });
    let wait = Duration::from_millis(300);
    let first = (0..100).find_map(|_| {
        append("one.log", 41);
        seen.recv_timeout(wait).ok()
    });
    assert!(first.unwrap().contains("uid uid-41 "));
    fs::rename(logs.path("one.log"), logs.path("one.log.2")).unwrap();
    append("one.log", 42);
    let after = std::iter::repeat_with(|| seen.recv_timeout(wait * 200).unwrap());
    assert!(after.take(100).any(|line| line.contains("uid uid-42 ")));
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap();
}

/// A log is read in the memory of one line and of the hashes that an anchor may ask for, whatever its size.
/// `KEELSON_LONG=1` reads one GiB, and prints what that takes.
#[test]
fn a_log_of_any_size_is_verified_in_the_same_memory() {
    const MIB: u64 = 1024 * 1024;
    let long = std::env::var_os("KEELSON_LONG").is_some();
    let small = Cost::of_verifying(8 * MIB);
    let large = Cost::of_verifying(if long { 1024 * MIB } else { 64 * MIB });
    println!("{small:#?}\n{large:#?}");
    assert!(large.peak_kib < small.peak_kib + 4 * 1024, "{small:?} {large:?}");
    assert!(large.peak_kib < 32 * 1024, "{large:?}");
}

/// What the kernel says of one `kmsctl audit verify`.
#[derive(Debug)]
#[expect(dead_code, reason = "for people")]
struct Cost {
    records: u64,
    bytes: u64,
    peak_kib: u64,
    /// Of one core, in hundredths of a second.
    cpu: u64,
}

impl Cost {
    /// Through a pipe: when the last line is in it, all but the last 64 KiB have been read, and the program waits.
    fn of_verifying(least: u64) -> Cost {
        let logs = Logs::new();
        let mut command = logs.command(&["verify", "-", "--key", "audit.pem", "--first", "1"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        let mut node = logs.node("large");
        let mut bytes: u64 = 0;
        while bytes < least {
            node.records(1..=10_000);
            node.anchor();
            pipe.write_all(&node.bytes).unwrap();
            bytes += u64::try_from(node.bytes.len()).unwrap();
            node.bytes.clear();
        }
        let proc = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", child.id())).unwrap();
        let peak = proc("status");
        let peak = peak.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let peak_kib = peak.trim().strip_suffix(" kB").unwrap().parse().unwrap();
        // Behind the name, which may hold anything: user and system time are the 14th and 15th of all.
        let stat = proc("stat");
        let times = stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2);
        let cpu = times.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        drop(pipe);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stdout(&output));
        Cost { records: node.link.seq, bytes, peak_kib, cpu }
    }
}
