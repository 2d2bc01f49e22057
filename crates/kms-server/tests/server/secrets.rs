//! Nothing secret gets into the log, the audit log or the database file, whatever is set and whatever goes wrong.

use crate::harness::{Server, http};
use kms_core::clock::{Clock, SystemClock};
use kms_daemon::telemetry::{Log, LogLevel, Settings};
use kms_hsm::{VaultError, memory};
use serde_json::json;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock};

const PLAINTEXT: &str = "Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LWNhbmE=";
const MATERIAL: &str = "Y2FuYXJ5LWluLXRoZS1ocw==";

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
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

/// The log of the whole process: one of this thread alone would miss lines whose place another thread reached first.
fn written() -> &'static Written {
    static WRITTEN: OnceLock<Written> = OnceLock::new();
    WRITTEN.get_or_init(|| {
        let written = Written::default();
        let settings = Settings { level: LogLevel::Debug, log_all_values: true };
        let clock = SystemClock::new();
        let out = Box::new(written.clone());
        let (log, _) = Log::new(settings, Arc::new(move || clock.wall()), out);
        tracing::subscriber::set_global_default(log).unwrap();
        written
    })
}

/// kube-apiserver's uid, as the plug-in hands it on, and the trace of the call, if it has one.
#[tokio::test]
async fn a_call_is_found_in_the_audit_file_by_its_uid_and_in_the_log_by_its_trace() {
    const UID: &str = "9b1f3c52-6c0e-4a3e-8a55-1d2f6f0b7c11";
    const TRACE: &str = "0123456789abcdef0123456789abcdef";
    let written = written();
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

#[tokio::test]
async fn pitfall_14_no_secret_is_written_down() {
    let written = written();
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
    for body in [
        format!("{{\"plaintext\":\"{PLAINTEXT}\",\"{PLAINTEXT}\":1"),
        format!("{{\"plaintext\":[\"{PLAINTEXT}\"]}}"),
        format!("{{\"plaintext\":\"{PLAINTEXT}!\"}}"),
    ] {
        let refused = server.call(&token, "POST", &path, &body).await;
        assert_eq!(refused.status, 400);
        assert!(!refused.body.contains(PLAINTEXT), "{refused:?}");
    }
    server.call(&format!("{token}x"), "GET", "/keys", "").await;
    server.ask_token("canary-api-key").await;
    let broken = VaultError::Policy("canary of the operator".into());
    server.vault.set_fault(Some(memory::Fault::Fail(broken)));
    server.call(&token, "POST", &path, &json!({"plaintext": PLAINTEXT}).to_string()).await;

    let log = written.text();
    assert!(log.contains(&wdek), "LOG_ALL_VALUES shows wrapped values");
    assert!(log.contains("canary of the operator"), "the operator is told");
    let mut database = std::fs::read(server.dir.path().join("kms.db")).unwrap();
    database.extend(std::fs::read(server.dir.path().join("kms.db-wal")).unwrap());
    let database = String::from_utf8_lossy(&database).into_owned();
    let signature = token.rsplit('.').next().unwrap();
    for secret in [
        PLAINTEXT,
        "canary-canary",
        MATERIAL,
        "canary-in-the-hs",
        "canary-api-key",
        made["plaintext"].as_str().unwrap(),
        signature,
        server.made.admin.api_key.expose(),
        server.made.viewer.api_key.expose(),
    ] {
        for (place, text) in
            [("the log", &log), ("the audit log", &server.audit()), ("the database", &database)]
        {
            assert!(!text.contains(secret), "{secret} is in {place}");
        }
    }
}
