//! Nothing secret gets into the log, the audit log or the database file, whatever is set and whatever goes wrong.

use crate::harness::canary::{Canary, assert_clean};
use crate::harness::{Server, http};
use kms_core::clock::{Clock, SystemClock};
use kms_daemon::telemetry::{Log, LogLevel, Settings};
use kms_hsm::{VaultError, memory};
use serde_json::json;
use std::fmt::Debug;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{self, Attributes, Id};
use tracing::{Event, Metadata, Subscriber};

/// Base64 of `canary-canary-canary-canary-cana`, and of `canary-in-the-hs`.
const PLAINTEXT: &str = "Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LWNhbmE=";
const MATERIAL: &str = "Y2FuYXJ5LWluLXRoZS1ocw==";

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Written {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// The log as it is written, and beside it every event and span of every crate at TRACE, which no setting shows.
struct Everything {
    log: Log,
    traced: Written,
    spans: AtomicU64,
}

/// All fields, as whoever is careless would show them.
struct Fields<'w>(&'w Written);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0.clone(), "{}={value:?} ", field.name());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = write!(self.0.clone(), "{}={value} ", field.name());
    }
}

impl Subscriber for Everything {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::TRACE)
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        span.record(&mut Fields(&self.traced));
        Id::from_u64(self.spans.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn record(&self, _: &Id, values: &span::Record<'_>) {
        values.record(&mut Fields(&self.traced));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let meta = event.metadata();
        let _ = write!(self.traced.clone(), "\n{} {}: ", meta.level(), meta.target());
        event.record(&mut Fields(&self.traced));
        if self.log.enabled(meta) {
            self.log.event(event);
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The log of the whole process and its trace: one of this thread alone would miss lines whose place another thread
/// reached first.
fn written() -> &'static (Written, Written) {
    static WRITTEN: OnceLock<(Written, Written)> = OnceLock::new();
    WRITTEN.get_or_init(|| {
        let (written, traced) = (Written::default(), Written::default());
        let settings = Settings { level: LogLevel::Debug, log_all_values: true };
        let clock = SystemClock::new();
        let out = Box::new(written.clone());
        let (log, _) = Log::new(settings, Arc::new(move || clock.wall()), out);
        let everything = Everything { log, traced: traced.clone(), spans: AtomicU64::new(0) };
        tracing::subscriber::set_global_default(everything).unwrap();
        (written, traced)
    })
}

/// kube-apiserver's uid, as the plug-in hands it on, and the trace of the call, if it has one.
#[tokio::test]
async fn a_call_is_found_in_the_audit_file_by_its_uid_and_in_the_log_by_its_trace() {
    const UID: &str = "9b1f3c52-6c0e-4a3e-8a55-1d2f6f0b7c11";
    const TRACE: &str = "0123456789abcdef0123456789abcdef";
    let (written, _) = written();
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (bearer, instance) = (format!("Bearer {token}"), server.instance().to_string());
    let traceparent = format!("00-{TRACE}-fedcba9876543210-01");
    let headers = |traceparent| {
        [
            ("authorization", bearer.as_str()),
            ("bluemix-instance", instance.as_str()),
            ("correlation-id", UID),
            ("traceparent", traceparent),
        ]
    };
    let wrap = format!("/api/v2/keys/{id}?action=wrap");
    for (path, headers, status) in [
        (&wrap, headers(traceparent.as_str()), 200),
        (&wrap, headers("00-nobody-01"), 200),
        (&"/api/v2/keys/none?action=wrap".to_owned(), headers(traceparent.as_str()), 404),
    ] {
        let answer = http::ask(server.keys, &server.ca(), "POST", path, &headers, "{}").await;
        assert_eq!(answer.status, status, "{answer:?}");
    }
    let audit = server.audit();
    let of_uid: Vec<_> = audit.lines().filter(|line| line.contains(UID)).collect();
    assert_eq!(of_uid.len(), 3, "{audit}");
    for record in of_uid {
        let record: serde_json::Value = serde_json::from_str(record).unwrap();
        assert_eq!((&record["correlation"], &record["action"]), (&json!(UID), &json!("wrap")));
    }
    let log = written.text();
    let lines: Vec<_> = log.lines().filter(|line| line.contains(UID)).collect();
    let traced = lines.iter().filter(|line| line.contains(&format!("trace_id={TRACE}"))).count();
    let untraced = lines.iter().filter(|line| !line.contains("trace_id")).count();
    assert_eq!((traced, untraced), (2, 1), "{lines:#?}");
}

/// Bar A4, in one process: every sink, with all that can be logged being logged. The PIN's turn is in the end-to-end
/// tests.
#[tokio::test]
async fn pitfall_14_no_secret_is_written_down() {
    let (written, traced) = written();
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (wdek, _) = server.wrap(&token, &id, PLAINTEXT).await;
    assert_eq!(server.unwrap(&token, &id, &wdek).await.json()["plaintext"], PLAINTEXT);
    let path = format!("/keys/{id}/actions/wrap");
    let made = server.call(&token, "POST", &path, "").await.json();
    let import = json!({"resources": [
        {"name": "brought", "extractable": false, "payload": MATERIAL},
    ]});
    assert_eq!(server.call(&token, "POST", "/keys", &import.to_string()).await.status, 201);
    let refusals = refused(&server, &token, &path).await;
    let asked = probe(&server, "/metrics").await + &probe(&server, "/readyz").await;

    let log = written.text();
    assert!(log.contains(&wdek), "LOG_ALL_VALUES shows wrapped values");
    assert!(log.contains("canary of the operator"), "the operator is told");
    let traced = traced.text();
    assert!(traced.contains("sqlx::query"), "what libraries say is in it, too");
    let mut database = std::fs::read(server.dir.path().join("kms.db")).unwrap();
    database.extend(std::fs::read(server.dir.path().join("kms.db-wal")).unwrap());
    let canaries = [
        Canary::encoded("the DEK that was wrapped", PLAINTEXT),
        Canary::encoded("the DEK that was made", made["plaintext"].as_str().unwrap()),
        Canary::encoded("the material of a key", MATERIAL),
        Canary::new("a wrong API key", b"canary-api-key"),
        Canary::new("the token", token.as_bytes()),
        Canary::new("the token's signature", token.rsplit('.').next().unwrap().as_bytes()),
        Canary::new("the administrator's API key", server.made.admin.api_key.expose().as_bytes()),
        Canary::new("the viewer's API key", server.made.viewer.api_key.expose().as_bytes()),
    ];
    for (place, bytes) in [
        ("the log", log.as_bytes()),
        ("the trace", traced.as_bytes()),
        ("the audit log", server.audit().as_bytes()),
        ("the database", &database),
        ("a refusal", refusals.as_bytes()),
        ("/metrics or /readyz", asked.as_bytes()),
    ] {
        assert!(bytes.len() > 200, "{place} is empty");
        assert_clean(&canaries, place, bytes);
    }
}

/// What is said to whoever sends secrets in the wrong place, in the wrong form or at the wrong time.
async fn refused(server: &Server, token: &str, wrap: &str) -> String {
    let mut said = Vec::new();
    for body in [
        format!("{{\"plaintext\":\"{PLAINTEXT}\",\"{PLAINTEXT}\":1"),
        format!("{{\"plaintext\":[\"{PLAINTEXT}\"]}}"),
        format!("{{\"plaintext\":\"{PLAINTEXT}!\"}}"),
        PLAINTEXT.to_owned(),
    ] {
        let refused = server.call(token, "POST", wrap, &body).await;
        assert_eq!(refused.status, 400);
        said.push(refused);
    }
    said.push(server.unwrap(token, "none", PLAINTEXT).await);
    said.push(server.call(token, "GET", &format!("/keys/{PLAINTEXT}"), "").await);
    said.push(server.call(token, "GET", &format!("/keys?limit={PLAINTEXT}"), "").await);
    said.push(server.call(token, "POST", "/keys", &json!({"payload": MATERIAL}).to_string()).await);
    said.push(server.call(&format!("{token}x"), "GET", "/keys", "").await);
    said.push(server.call(PLAINTEXT, "GET", "/keys", "").await);
    said.push(server.ask_token("canary-api-key").await);
    let broken = VaultError::Policy("canary of the operator".into());
    server.vault.set_fault(Some(memory::Fault::Fail(broken)));
    let plaintext = json!({"plaintext": PLAINTEXT}).to_string();
    said.push(server.call(token, "POST", wrap, &plaintext).await);
    server.vault.set_fault(None);
    assert!(said.iter().all(|answer| answer.status >= 400), "{said:?}");
    format!("{said:?}")
}

async fn probe(server: &Server, path: &str) -> String {
    let mut stream = TcpStream::connect(server.health).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}
