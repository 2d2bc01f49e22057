//! Nothing secret gets into the log, the audit log or the database file, whatever is set and whatever goes wrong.

use crate::harness::Server;
use kms_core::clock::{Clock, SystemClock};
use kms_daemon::telemetry::{Log, LogLevel, Settings};
use kms_hsm::{VaultError, memory};
use serde_json::json;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

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

#[tokio::test]
async fn no_secret_is_written_down() {
    let written = Written::default();
    let settings = Settings { level: LogLevel::Debug, log_all_values: true };
    let clock = SystemClock::new();
    let (log, _) = Log::new(settings, Arc::new(move || clock.wall()), Box::new(written.clone()));
    // For the whole process: a log of this thread alone would miss lines whose place another thread reached first.
    tracing::subscriber::set_global_default(log).unwrap();

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

    let log = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
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
