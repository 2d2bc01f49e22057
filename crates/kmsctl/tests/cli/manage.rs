//! Keys, service IDs, API keys and instances.

use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::program::{managing, stderr, stdout};
use crate::server::{Asked, Reply, Server};

const KEY: &str = "7d2e0000-0000-4000-8000-000000000001";

/// A key service with one root key and one standard key, and its token service.
fn answer(asked: &Asked) -> Reply {
    let envelope =
        |keys: Value| Reply::ok(json!({"metadata": {"collectionTotal": 1}, "resources": keys}));
    let root = json!({"id": KEY, "name": "crk", "state": 1, "extractable": false,
        "keyVersion": {"id": "v-2"}, "creationDate": "2026-01-01T00:00:00Z"});
    let standard = json!({"id": "s", "name": "std\u{1b}[2J", "state": 5, "extractable": true,
        "imported": true, "payload": "bWF0ZXJpYWw="});
    let created = json!({"id": "ApiKey-1", "name": "node", "service_id": "ServiceId-1",
        "created_at": "2026-01-01T00:00:00Z", "apikey": "shown-once"});
    let policy = json!({"id": "Policy-1", "service_id": "ServiceId-1", "role": "Reader",
        "instance_id": "i-1", "key_id": "k-1", "created_at": "2026-01-01T00:00:00Z"});
    let profile = json!({"id": "Profile-1", "iam_id": "iam-Profile-1", "name": "node",
        "service_id": "ServiceId-1", "issuer": "https://cluster.test", "subject": "who",
        "created_at": "2026-01-01T00:00:00Z"});
    match (asked.method.as_str(), asked.path.as_str()) {
        (_, "/identity/token") => Reply::ok(json!({"access_token": "t", "expires_in": 3600})),
        ("GET", "/api/v2/keys?limit=200&offset=0") => {
            envelope(Value::Array(vec![root.clone(); 200]))
        }
        ("GET", "/api/v2/keys?limit=200&offset=200") => envelope(json!([standard])),
        ("GET", "/api/v2/keys/s") => envelope(json!([standard])),
        ("POST", "/api/v2/keys") if asked.body.contains("toolong") => {
            let reason = json!({"code": "INVALID_FIELD_ERR", "message": "name has 91 characters"});
            let refusal = json!({"errorMsg": "Bad Request: no", "reasons": [reason]});
            Reply::Json(400, json!({"metadata": {}, "resources": [refusal]}).to_string())
        }
        ("DELETE", _) => Reply::Json(204, String::new()),
        ("POST", path) if path.contains("?action=") => Reply::Json(204, String::new()),
        (_, path) if path.starts_with("/api/v2/keys") => envelope(json!([root])),
        ("POST", "/v1/apikeys") if asked.body.contains("unknown") => {
            Reply::Json(404, json!({"errorCode": "X", "errorMessage": "No such ID."}).to_string())
        }
        ("POST", "/v1/apikeys") => Reply::Json(201, created.to_string()),
        ("POST", "/v1/apikeys/ApiKey-1/rotate") => Reply::ok(created),
        ("POST", "/v1/apikeys/ApiKey-1/lock") => Reply::Json(204, String::new()),
        ("POST", "/v1/policies") => Reply::Json(201, policy.to_string()),
        ("GET", "/v1/policies") => Reply::ok(json!({"policies": [policy]})),
        ("POST", "/v1/profiles") => Reply::Json(201, profile.to_string()),
        _ => Reply::Json(500, String::new()),
    }
}

async fn service() -> Server {
    Server::start(|_, asked| answer(asked)).await
}

fn sent(server: &Server, method: &str) -> Vec<Asked> {
    let asked = server.asked().into_iter();
    asked.filter(|asked| asked.method == method && asked.path != "/identity/token").collect()
}

#[tokio::test]
async fn every_page_of_keys_is_listed() {
    let server = service().await;
    let table = managing(&server, &["keys", "list"], "").await;
    let lines: Vec<&str> = stdout(&table).lines().collect();
    assert_eq!(lines.len(), 1 + 200 + 1);
    assert!(lines[0].starts_with("ID ") && lines[1].contains("  crk "), "{}", lines[1]);
    assert!(lines[201].contains("standard, imported") && !lines[201].contains('\u{1b}'));

    let json = managing(&server, &["-o", "json", "keys", "list"], "").await;
    let keys: Vec<Value> = serde_json::from_str(stdout(&json)).unwrap();
    assert_eq!(keys.len(), 201);
    assert_eq!(keys[0]["keyVersion"]["id"], "v-2");
}

#[tokio::test]
async fn keys_are_made_imported_and_rotated() {
    let server = service().await;
    let created = managing(&server, &["keys", "create", "crk", "--alias", "main"], "").await;
    assert!(stdout(&created).contains(KEY) && created.status.success());
    let arguments = ["keys", "import", "old", "--material-file", "-", "--encoding", "hex"];
    assert!(managing(&server, &arguments, "00ff\n").await.status.success());
    let rotated = managing(&server, &["keys", "rotate", KEY, "-o", "json"], "").await;
    let shown: Value = serde_json::from_str(stdout(&rotated)).unwrap();
    assert_eq!(shown["keyVersion"]["id"], "v-2");

    let posts = sent(&server, "POST");
    let member = |post: &Asked| {
        let body: Value = serde_json::from_str(&post.body).unwrap();
        body["resources"][0].clone()
    };
    assert_eq!(member(&posts[0])["aliases"], json!(["main"]));
    assert_eq!(member(&posts[0])["extractable"], json!(false));
    assert_eq!(member(&posts[1])["payload"], "AP8=");
    assert_eq!(posts[2].path, format!("/api/v2/keys/{KEY}?action=rotate"));
}

#[tokio::test]
async fn a_key_is_disabled_and_enabled_and_shown_afterwards() {
    let server = service().await;
    for verb in ["disable", "enable"] {
        let output = managing(&server, &["keys", verb, KEY], "").await;
        assert!(output.status.success() && stdout(&output).contains(KEY), "{output:?}");
    }
    let paths: Vec<_> = sent(&server, "POST").into_iter().map(|asked| asked.path).collect();
    let path = |verb| format!("/api/v2/keys/{KEY}?action={verb}");
    assert_eq!(paths, [path("disable"), path("enable")]);
}

#[tokio::test]
async fn a_refusal_is_shown_with_its_reason() {
    let server = service().await;
    let output = managing(&server, &["keys", "create", "toolong"], "").await;
    assert_eq!(stderr(&output), "kmsctl: Bad Request: no\n        name has 91 characters\n");
}

#[tokio::test]
async fn key_material_is_never_shown() {
    let server = service().await;
    for format in ["table", "json"] {
        let output = managing(&server, &["keys", "show", "s", "-o", format], "").await;
        assert!(output.status.success() && !stdout(&output).contains("bWF0"), "{output:?}");
    }
}

#[tokio::test]
async fn a_key_is_purged_only_after_its_id_was_typed_and_nothing_is_read_for_it() {
    let server = service().await;
    let refused = managing(&server, &["keys", "purge", KEY], "y\n").await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("nothing was changed") && stderr(&refused).contains("--yes"));
    assert!(sent(&server, "DELETE").is_empty());
    let purged = managing(&server, &["keys", "purge", KEY], &format!("{KEY}\n")).await;
    assert!(purged.status.success(), "{purged:?}");
    assert!(managing(&server, &["keys", "purge", KEY, "--yes"], "").await.status.success());
    let paths: Vec<_> = sent(&server, "DELETE").into_iter().map(|asked| asked.path).collect();
    assert_eq!(paths, vec![format!("/api/v2/keys/{KEY}/purge"); 2]);
    assert!(sent(&server, "GET").is_empty(), "the role may not");
}

#[tokio::test]
async fn a_key_is_deleted_only_after_its_id_was_typed() {
    let server = service().await;
    let refused = managing(&server, &["keys", "delete", KEY], "y\n").await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("nothing was changed") && stderr(&refused).contains("--yes"));
    assert!(sent(&server, "DELETE").is_empty());

    assert!(
        managing(&server, &["keys", "delete", KEY], &format!("{KEY}\n")).await.status.success()
    );
    assert!(managing(&server, &["keys", "delete", KEY, "--yes"], "").await.status.success());
    assert_eq!(sent(&server, "DELETE").len(), 2);
}

#[tokio::test]
async fn an_api_key_is_shown_once_or_saved_for_its_owner_alone() {
    let server = service().await;
    let create = ["api-keys", "create", "node", "--service-id", "ServiceId-1"];
    let shown = managing(&server, &create, "").await;
    assert!(
        stdout(&shown).contains("shown-once") && stdout(&shown).contains("cannot be shown again")
    );

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("api-key");
    let save = [&create[..], &["--save", file.to_str().unwrap()]].concat();
    let saved = managing(&server, &save, "").await;
    assert!(saved.status.success() && !stdout(&saved).contains("shown-once"), "{saved:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "shown-once\n");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

    let again = managing(&server, &save, "").await;
    assert!(stderr(&again).contains("never overwritten"), "{}", stderr(&again));
    assert_eq!(sent(&server, "POST").len(), 2);
}

#[tokio::test]
async fn no_empty_file_is_left_where_no_api_key_came() {
    let server = service().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("api-key");
    let path = file.to_str().unwrap();
    let arguments = ["api-keys", "create", "node", "--service-id", "unknown", "--save", path];
    let output = managing(&server, &arguments, "").await;
    assert!(stderr(&output).contains("X:No such ID"), "{}", stderr(&output));
    assert!(!file.exists());
}

#[tokio::test]
async fn an_api_key_is_locked_unlocked_and_given_a_new_secret() {
    let server = service().await;
    for verb in ["lock", "unlock"] {
        let output = managing(&server, &["api-keys", verb, "ApiKey-1"], "").await;
        assert!(output.status.success() && stdout(&output).contains("ApiKey-1"), "{output:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("api-key");
    let rotate = ["api-keys", "rotate", "ApiKey-1", "--overlap", "60"];
    let save = [&rotate[..], &["--save", file.to_str().unwrap()]].concat();
    let saved = managing(&server, &save, "").await;
    assert!(saved.status.success() && !stdout(&saved).contains("shown-once"), "{saved:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "shown-once\n");
    assert!(stdout(&managing(&server, &rotate, "").await).contains("shown-once"));
    let posts = sent(&server, "POST");
    let asked = |post: &Asked| (post.path.clone(), post.body.clone());
    assert_eq!(asked(&posts[0]), ("/v1/apikeys/ApiKey-1/lock".into(), "null".into()));
    let rotated = (posts[1].path.as_str(), posts[1].body.as_str());
    assert_eq!(rotated, ("/v1/apikeys/ApiKey-1/rotate", r#"{"overlap_seconds":60}"#));
    assert_eq!(sent(&server, "DELETE")[0].path, "/v1/apikeys/ApiKey-1/lock");
}

#[tokio::test]
async fn policies_and_profiles_are_made_listed_and_deleted() {
    let server = service().await;
    let place = ["--instance", "i-1", "--key", "k-1"];
    let create = [&["policies", "create", "ServiceId-1", "--role", "Reader"][..], &place].concat();
    let made = managing(&server, &create, "").await;
    assert!(stdout(&made).contains("instance i-1, key k-1"), "{made:?}");
    let listed = managing(&server, &["policies", "list"], "").await;
    assert!(stdout(&listed).contains("Policy-1"), "{listed:?}");
    let issuer = ["--service-id", "ServiceId-1", "--issuer", "https://cluster.test"];
    let who = ["--namespace", "ns", "--service-account", "sa"];
    let create = [&["profiles", "create", "node"][..], &issuer, &who].concat();
    assert!(stdout(&managing(&server, &create, "").await).contains("Profile-1"));
    for delete in [
        ["policies", "delete", "Policy-1"],
        ["profiles", "delete", "Profile-1"],
        ["service-ids", "delete", "ServiceId-1"],
    ] {
        assert!(managing(&server, &delete, "").await.status.success());
    }
    let bodies: Vec<String> = sent(&server, "POST").into_iter().map(|asked| asked.body).collect();
    assert!(bodies[0].contains(r#""instance_id":"i-1","key_id":"k-1""#), "{}", bodies[0]);
    assert!(bodies[1].contains(r#""namespace":"ns","service_account":"sa""#), "{}", bodies[1]);
    // Without a place, or with half of a name, nothing is sent.
    for wrong in [
        vec!["policies", "create", "ServiceId-1", "--role", "Reader"],
        vec!["policies", "create", "ServiceId-1", "--role", "Reader", "--key", "k-1"],
        vec!["profiles", "create", "n", "--service-id", "s", "--issuer", "i", "--namespace", "ns"],
    ] {
        assert_eq!(managing(&server, &wrong, "").await.status.code(), Some(2), "{wrong:?}");
    }
}
