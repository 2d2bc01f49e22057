//! The audit log of a running server: anchors, what is kept of them elsewhere, and what happens when something is away.

use crate::harness::faulty_store::Fault;
use crate::harness::{NODE, Server, http};
use kms_core::audit::anchor::{Anchor, PublicKey};
use kms_core::audit::verify::{Finding, Summary, Verifier};
use kms_core::audit::{Content, Event, Link, parse};
use kms_core::clock::Clock;
use kms_hsm::VaultError;
use kms_hsm::memory;
use kms_server::audit::anchors::Anchors;
use kms_server::audit::{Outcome, Record};
use kms_server::store::Trail;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const UNANCHORED: &str = "kms_server_audit_unanchored_records";
const ANCHORED_AT: &str = "kms_server_audit_anchor_timestamp_seconds";
const ANCHOR: &str = "\"action\":\"anchor\"";

fn log_file(server: &Server, suffix: &str) -> PathBuf {
    server.dir.path().join(format!("audit.log{suffix}"))
}

fn anchor_is_kept(server: &Server) -> bool {
    server.dir.path().join("audit.anchor").exists()
}

/// Each is awaited by looking: anchors are nobody's answer.
async fn eventually(what: &str, done: impl Fn() -> bool) {
    for _ in 0..6000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} never came");
}

fn anchors(text: &str) -> usize {
    text.lines().filter(|line| line.contains(ANCHOR)).count()
}

/// Checks the files of the log, oldest first, with what the server wrote beside them.
fn verify(server: &Server, files: &[&str]) -> (Summary, Vec<Finding>) {
    let pem = fs::read_to_string(server.dir.path().join("audit.pem")).unwrap();
    let keys = [PublicKey::parse_pem(&pem).unwrap()];
    let witness = fs::read(server.dir.path().join("audit.anchor")).unwrap();
    let witness = Anchor::parse_line(witness.strip_suffix(b"\n").unwrap()).unwrap().into_owned();
    assert!(witness.is_signed_by(&keys[0]));
    let mut verifier = Verifier::new(&keys, Some(witness)).begin_at(1);
    let mut found = Vec::new();
    for file in files {
        verifier.next_file();
        for line in fs::read_to_string(log_file(server, file)).unwrap().lines() {
            verifier.line(line.as_bytes(), &mut found);
        }
    }
    let (summary, cut) = verifier.finish();
    found.extend(cut);
    (summary, found)
}

#[tokio::test]
async fn anchors_are_written_at_the_start_at_a_rotation_and_at_the_end() {
    let server = Server::start().await;
    eventually("the first anchor", || anchor_is_kept(&server)).await;
    assert_eq!(anchors(&server.audit()), 1);
    let token = server.admin().await;
    server.create_id(&token, "crk").await;

    fs::rename(log_file(&server, ""), log_file(&server, ".1")).unwrap();
    server.create_id(&token, "another").await;
    eventually("the anchor of the new file", || anchors(&server.audit()) == 1).await;
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);

    let server = server.restart().await;
    eventually("the anchor of the new process", || anchors(&server.audit()) == 3).await;
    let text = server.audit();
    let other = text.lines().collect::<Vec<_>>();
    let last = other.iter().rposition(|line| !line.contains(ANCHOR)).unwrap();
    assert!(other[last + 1].contains(ANCHOR), "an end without anchor: {text}");

    let (summary, found) = verify(&server, &[".1", ""]);
    assert_eq!(found, []);
    assert_eq!(summary.node.as_deref(), Some(NODE));
    assert_eq!((summary.anchors, summary.anchored), (4, summary.last - 1));
    // Whoever cuts the log is found by the copy of the anchor, and by the server itself.
    let whole = server.audit();
    let cut: String = whole.lines().take(1).map(|line| format!("{line}\n")).collect();
    fs::write(log_file(&server, ""), cut).unwrap();
    let (_, found) = verify(&server, &[".1", ""]);
    assert!(matches!(found[..], [Finding::Cut { .. }]), "{found:?}");
    // The database hears of an anchor behind the log.
    let known = async {
        loop {
            let head = server.store.audit_head(NODE).await.unwrap().unwrap();
            if head.seq == summary.last {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let patience = Duration::from_secs(60);
    tokio::time::timeout(patience, known).await.expect("the database knows the last record");
}

#[tokio::test]
async fn nothing_new_needs_no_anchor() {
    let server = Server::start().await;
    eventually("the first anchor", || anchor_is_kept(&server)).await;
    let token = server.admin().await;
    let mut writer = Anchors::new(&server.app);
    writer.anchor().await;
    let lines = || server.audit().lines().count();
    let before = lines();
    writer.anchor().await;
    assert_eq!(lines(), before);
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    writer.anchor().await;
    assert_eq!(lines(), before + 2);
}

#[tokio::test]
async fn without_the_hsm_records_go_on_and_the_anchor_follows() {
    let server = Server::start().await;
    let token = server.admin().await;
    eventually("the first anchor", || anchor_is_kept(&server)).await;
    let away = VaultError::Unavailable { cause: "pulled out".into() };
    server.vault.set_fault(Some(memory::Fault::Fail(away)));
    fs::rename(log_file(&server, ""), log_file(&server, ".1")).unwrap();
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    let failed = "kms_server_audit_anchors_total{outcome=\"failed\"}";
    while !metrics(&server).await.contains(failed) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    assert_eq!(anchors(&server.audit()), 0);
    server.vault.set_fault(None);
    eventually("the late anchor", || anchors(&server.audit()) == 1).await;
    eventually("its copy", || {
        let (summary, found) = verify(&server, &[".1", ""]);
        found.is_empty() && summary.anchored == summary.last - 1
    })
    .await;
}

#[tokio::test]
async fn without_the_database_anchors_are_written_and_kept_once_it_is_back() {
    let server = Server::start().await;
    eventually("the first anchor", || anchor_is_kept(&server)).await;
    let before = server.store.audit_head(NODE).await.unwrap().unwrap();
    let token = server.admin().await;
    server.store.set_fault(Some(Fault::Away));
    // Not even the caller is known without it: the log alone goes on.
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 503);
    server.store.set_fault(None);
    let server = server.restart().await;
    let after = server.store.audit_head(NODE).await.unwrap().unwrap();
    assert!(after.seq > before.seq);
}

/// Bar A2, in virtual time: whatever second a record is from, an anchor covers it within a minute.
#[tokio::test(start_paused = true)]
async fn an_anchor_comes_within_a_minute_of_each_record() {
    let held = hold_time();
    let server = Server::start().await;
    let mut when = Times::new(&server);
    for _ in 0..300 {
        when.record(&server).await;
        when.wait_for_work(&server).await;
        pass(&server, 1).await;
    }
    drop(held);

    let text = server.audit();
    let lines: Vec<_> = text.lines().map(|line| parse(line.as_bytes()).unwrap()).collect();
    let anchors: Vec<_> = lines
        .iter()
        .filter_map(|line| match &line.content {
            Content::Anchor(anchor) => Some((anchor.head().seq, moment(anchor.at()))),
            Content::Event(_) => None,
        })
        .collect();
    let minute = Duration::from_secs(60);
    let mut latest = Duration::ZERO;
    for line in lines.iter().filter(|line| matches!(line.content, Content::Event(_))) {
        let covered = anchors.iter().find(|(head, _)| *head >= line.seq);
        let at = covered.map_or(server.clock.wall(), |(_, at)| *at);
        let took = at.duration_since(moment(line.at())).unwrap();
        assert!(took <= minute, "record {} has no anchor within {took:?}", line.seq);
        latest = latest.max(took);
    }
    println!("{} anchors, a record waits {latest:?} at most", anchors.len());
    assert!(anchors.len() <= 15, "{} anchors in 300 s", anchors.len());
}

#[tokio::test(start_paused = true)]
async fn ten_minutes_without_the_hsm_are_told_and_covered_when_it_is_back() {
    let _held = hold_time();
    let server = Server::start().await;
    let mut when = Times::new(&server);
    when.record(&server).await;
    shows(&server, UNANCHORED, 0).await;
    shows(&server, ANCHORED_AT, wall(&server)).await;

    let away = VaultError::Unavailable { cause: "pulled out".into() };
    server.vault.set_fault(Some(memory::Fault::Fail(away)));
    for _ in 0..600 {
        when.record(&server).await;
        pass(&server, 1).await;
    }
    let during = metrics(&server).await;
    assert_eq!(sample(&during, UNANCHORED), 600);
    assert!(sample(&during, "kms_server_audit_sync_seconds_count") >= 600);
    assert_eq!(wall(&server) - sample(&during, ANCHORED_AT), 600, "what the alert looks at");
    let failed = sample(&during, "kms_server_audit_anchors_total{outcome=\"failed\"}");
    assert!((60..=600).contains(&failed), "{failed} attempts");

    server.vault.set_fault(None);
    let back = wall(&server);
    // An attempt that began before ends without an anchor, and the next comes after a pause.
    for _ in 0..10 {
        pass(&server, 1).await;
        when.wait_for_work(&server).await;
        if sample(&metrics(&server).await, UNANCHORED) == 0 {
            break;
        }
    }
    shows(&server, UNANCHORED, 0).await;
    comes_to(&server, ANCHORED_AT, |at| at >= back).await;
    eventually_now("its copy", || {
        let (summary, found) = verify(&server, &[""]);
        found.is_empty() && summary.anchored == summary.last - 1
    })
    .await;
}

/// Each would take the other for a forger, and the database knows one place only.
#[tokio::test]
async fn two_servers_of_one_name_are_told_and_no_chain_is_signed_on_top_of_the_other() {
    let server = Server::start().await;
    eventually("the first anchor", || anchor_is_kept(&server)).await;
    let token = server.admin().await;
    let mut writer = Anchors::new(&server.app);
    // What the other one, who has the same NODE_ID and a file of its own, has written meanwhile.
    let event = Content::Event(Event { node: NODE.into(), ..Event::default() });
    let (_, others) = Link { seq: 1000, ..Link::start() }.extend(&event).unwrap();
    server.store.keep_audit_head(NODE, others).await.unwrap();
    let before = anchors(&server.audit());
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    writer.anchor().await;
    assert_eq!(anchors(&server.audit()), before);
    let failed = "kms_server_audit_anchors_total{outcome=\"failed\"}";
    assert!(sample(&metrics(&server).await, failed) > 0);
    let kept = server.store.audit_head(NODE).await.unwrap();
    assert_eq!(kept, Some(others), "what the other one proved is not written over");
}

/// Bar A3. The disk of a file that is a link to /dev/full is full.
#[tokio::test]
async fn a_full_disk_refuses_at_once_and_nobody_needs_to_help_when_there_is_room() {
    let server = Server::start().await;
    let token = server.admin().await;
    eventually("the first anchor", || anchor_is_kept(&server)).await;
    fs::rename(log_file(&server, ""), log_file(&server, ".1")).unwrap();
    symlink("/dev/full", log_file(&server, "")).unwrap();
    refuses_at_once(&server, &token).await;
    fs::remove_file(log_file(&server, "")).unwrap();
    resumes_by_itself(&server, &token).await;
    let (_, found) = verify(&server, &[".1", ""]);
    assert_eq!(found, []);
}

/// Bar A3: the file is gone, and where it was nothing can be made.
#[tokio::test]
async fn a_file_that_is_gone_refuses_at_once_until_there_can_be_one_again() {
    let server = Server::start().await;
    let token = server.admin().await;
    fs::remove_file(log_file(&server, "")).unwrap();
    fs::create_dir(log_file(&server, "")).unwrap();
    refuses_at_once(&server, &token).await;
    fs::remove_dir(log_file(&server, "")).unwrap();
    resumes_by_itself(&server, &token).await;
}

async fn refuses_at_once(server: &Server, token: &str) {
    // A machine with other work is late now and then; a log that is waited for, each time.
    let (mut at_once, mut late) = (0, 0);
    while at_once < 80 {
        let asked = tokio::time::Instant::now();
        let answer = server.call(token, "GET", "/keys", "").await;
        let within = asked.elapsed() <= Duration::from_secs(1);
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(answer.body.contains("AUDIT_UNAVAILABLE_ERR"), "{answer:?}");
        at_once += u32::from(within);
        late += u32::from(!within);
        assert!(late <= 10, "{late} took more than a second, and {at_once} less");
    }
}

async fn resumes_by_itself(server: &Server, token: &str) {
    // The first to write may be the look at the log's health, or an anchor.
    eventually("a record that nobody asked for", || {
        fs::read_to_string(log_file(server, "")).is_ok_and(|text| !text.is_empty())
    })
    .await;
    assert_eq!(server.call(token, "GET", "/keys", "").await.status, 200);
}

#[tokio::test]
async fn a_record_names_the_other_end_of_the_connection_and_believes_no_header_about_it() {
    let server = Server::start().await;
    let token = server.admin().await;
    let instance = server.instance();
    let form = format!(
        "grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey={}",
        server.made.admin.api_key.expose()
    );
    for (address, uid, request) in [
        (
            server.keys,
            "uid-done",
            format!("GET /api/v2/keys HTTP/1.1\r\nauthorization: Bearer {token}\r\n"),
        ),
        (
            server.keys,
            "uid-refused",
            format!("GET /api/v2/keys/none HTTP/1.1\r\nauthorization: Bearer {token}\r\n"),
        ),
        (
            server.tokens,
            "uid-managed",
            format!("GET /v1/apikeys HTTP/1.1\r\nauthorization: Bearer {token}\r\n"),
        ),
        (
            server.tokens,
            "uid-token",
            format!("POST /oidc/token HTTP/1.1\r\ncontent-length: {}\r\n", form.len()),
        ),
    ] {
        let mut stream = http::connect(address, &server.ca()).await;
        let own = stream.get_ref().0.local_addr().unwrap();
        let body = if uid == "uid-token" { &*form } else { "" };
        let request = format!(
            "{request}host: x\r\nicp-instance: {instance}\r\ncorrelation-id: {uid}\r\nconnection: close\r\n\
             x-forwarded-for: 203.0.113.9\r\nforwarded: for=203.0.113.9\r\nx-real-ip: 203.0.113.9\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
        let audit = server.audit();
        let record = audit.lines().find(|line| line.contains(&format!("\"{uid}\""))).unwrap();
        let record: Value = serde_json::from_str(record).unwrap();
        assert_eq!(record["peer"], own.to_string(), "{record}");
        assert!(!audit.contains("203.0.113.9"));
    }
}

/// The request is about no instance, and so is its record.
#[tokio::test]
async fn a_known_caller_who_names_no_instance_is_on_record() {
    let server = Server::start().await;
    let bearer = format!("Bearer {}", server.admin().await);
    let headers = [("authorization", bearer.as_str())];
    let answer = http::ask(server.keys, &server.ca(), "GET", "/api/v2/keys", &headers, "").await;
    assert_eq!(answer.status, 400, "{answer:?}");
    let audit = server.audit();
    let record = audit.lines().find(|line| line.contains("list_keys")).unwrap();
    let record: Value = serde_json::from_str(record).unwrap();
    assert_eq!(record["outcome"], "INVALID_INSTANCE", "{record}");
    assert!(record["caller"].is_string() && record.get("instance").is_none(), "{record}");
}

/// A paused clock jumps ahead whenever nothing runs, except while something blocks: so time is only what [`pass`] says.
fn hold_time() -> mpsc::Sender<()> {
    let (held, until) = mpsc::channel();
    tokio::task::spawn_blocking(move || {
        let _: Result<(), _> = until.recv();
    });
    held
}

/// The server's clock and the runtime's go on together.
async fn pass(server: &Server, seconds: u64) {
    for _ in 0..seconds {
        server.clock.advance(Duration::from_secs(1));
        tokio::time::advance(Duration::from_secs(1)).await;
    }
}

/// Awaited in real time, which is what disks take; virtual time stands still.
async fn eventually_now(what: &str, done: impl Fn() -> bool) {
    for _ in 0..60_000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
        tokio::task::yield_now().await;
    }
    panic!("{what} never came");
}

/// As [`eventually_now`], for what a scrape sees.
async fn shows(server: &Server, name: &str, value: u64) {
    comes_to(server, name, |seen| seen == value).await;
}

async fn comes_to(server: &Server, name: &str, wanted: impl Fn(u64) -> bool) {
    let mut seen = None;
    for _ in 0..60_000 {
        let value = sample(&metrics(server).await, name);
        if wanted(value) {
            return;
        }
        seen = Some(value);
        std::thread::sleep(Duration::from_millis(1));
        tokio::task::yield_now().await;
    }
    panic!("{name} still is {seen:?}");
}

/// When each record was written.
struct Times(Vec<SystemTime>);

impl Times {
    fn new(server: &Server) -> Times {
        let written = usize::try_from(server.app.audit.head().seq).unwrap();
        Times(vec![server.clock.wall(); written])
    }

    async fn record(&mut self, server: &Server) {
        let record = Record::new("wrap", Outcome::Done);
        server.app.audit.record(record).await.unwrap();
        let written = usize::try_from(server.app.audit.head().seq).unwrap();
        self.0.resize(written, server.clock.wall());
    }

    /// Work takes real time: where an anchor is due, there is some before the next second of the virtual one.
    async fn wait_for_work(&self, server: &Server) {
        let due = || {
            let audit = &server.app.audit;
            let covered = usize::try_from(audit.head().seq - audit.lag().unanchored).unwrap();
            let age = |at: &SystemTime| server.clock.wall().duration_since(*at).unwrap();
            self.0.get(covered).is_some_and(|oldest| age(oldest) >= Duration::from_secs(30))
        };
        for _ in 0..200 {
            if !due() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
            tokio::task::yield_now().await;
        }
    }
}

fn wall(server: &Server) -> u64 {
    server.clock.wall().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

fn moment(text: &str) -> SystemTime {
    OffsetDateTime::parse(text, &Rfc3339).unwrap().into()
}

/// The value of one sample.
fn sample(metrics: &str, name: &str) -> u64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0, |value| value.parse().unwrap())
}

async fn metrics(server: &Server) -> String {
    let mut stream = TcpStream::connect(server.health).await.unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}
