//! Mistakes that key servers before this one have made, each with the test that it is not made here. The list of all
//! twenty-one is `xtask/tests/pitfalls.rs`; those that have a better place bear their number there.

use crate::harness::http::{self, Answer, Connection, Request};
use crate::harness::{Server, new_key};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use kms_core::clock::{Clock, SystemClock};
use kms_hsm::VaultError;
use kms_hsm::memory::Fault;
use kms_server::http::KEY_ROUTES;
use kms_server::policy::{Action, Role, Scope, permits};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

/// A WDEK whose members were changed by `change`.
fn changed(wdek: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut json: Value = serde_json::from_slice(&BASE64.decode(wdek).unwrap()).unwrap();
    change(&mut json);
    BASE64.encode(json.to_string())
}

/// One bit of one byte of a member turned over.
fn flipped(wdek: &str, member: &str, byte: usize) -> String {
    changed(wdek, |json| {
        let mut bytes = BASE64.decode(json[member].as_str().unwrap()).unwrap();
        bytes[byte] ^= 1;
        json[member] = BASE64.encode(bytes).into();
    })
}

/// How often a comparison of times is made before it counts: what leaks does so each time, what else the machine does
/// falls on one side only now and then.
const ATTEMPTS: usize = 10;
const TURNS: usize = 60;

/// Both take as long, give or take a fourth, on one connection and in turns. Other work on the machine only ever makes an
/// answer slower: the fastest tenth of each is compared. The error is what was seen each time.
async fn as_long(
    server: SocketAddr,
    ca: &Path,
    requests: [&Request; 2],
) -> Result<(), Vec<[Duration; 2]>> {
    let seen = compared(server, ca, requests, 1).await;
    if seen.iter().copied().any(alike) { Ok(()) } else { Err(seen) }
}

fn alike([one, other]: [Duration; 2]) -> bool {
    one.max(other) < one.min(other) * 5 / 4
}

/// How long each took, attempt by attempt, up to so many in which they were alike.
async fn compared(
    server: SocketAddr,
    ca: &Path,
    requests: [&Request; 2],
    enough: usize,
) -> Vec<[Duration; 2]> {
    let clock = SystemClock::new();
    let mut connection = Connection::open(server, ca).await;
    let mut seen = Vec::new();
    for _ in 0..ATTEMPTS {
        let mut times = [Vec::new(), Vec::new()];
        for turn in 0..2 * TURNS {
            // First, second, second, first, ...: neither always follows the other.
            let one = [0, 1, 1, 0][turn % 4];
            let start = clock.now();
            let answer = connection.ask(requests[one]).await;
            times[one].push(clock.now() - start);
            assert!(answer.status >= 400, "{answer:?}");
        }
        let [one, other] = times.map(|mut times| {
            times.sort();
            times[TURNS / 10]
        });
        seen.push([one, other]);
        if seen.iter().copied().filter(|times| alike(*times)).count() == enough {
            break;
        }
    }
    seen
}

#[tokio::test]
async fn pitfall_03_all_unwraps_that_fail_look_alike_and_take_as_long() {
    let server = Server::start().await;
    let token = server.admin().await;
    let key = server.create_id(&token, "crk").await;
    let (wdek, _) = server.wrap(&token, &key, PLAINTEXT).await;
    let (length, hash) = (48, 64);
    let mut bad = vec![flipped(&wdek, "hash", 0), flipped(&wdek, "hash", hash - 1)];
    // A padding oracle would tell the last block from the others.
    bad.extend([0, 15, 16, length - 17, length - 1].map(|at| flipped(&wdek, "ciphertext", at)));
    bad.extend([0, 15].map(|at| flipped(&wdek, "iv", at)));
    bad.push(changed(&wdek, |json| json["handle"] = Uuid::from_u128(1).to_string().into()));
    let expected = server.unwrap(&token, &key, &bad[0]).await;
    assert_eq!(expected.status, 422);
    for one in &bad {
        let answer = server.unwrap(&token, &key, one).await;
        assert_eq!((answer.status, &answer.body), (422, &expected.body));
    }
    let path = format!("/api/v2/keys/{key}/actions/unwrap");
    let (bearer, instance) = (format!("Bearer {token}"), server.instance().to_string());
    let headers = [("authorization", bearer.as_str()), ("icp-instance", instance.as_str())];
    let [hash, padding] = [&bad[0], &bad[6]].map(|wdek| {
        Request::new("POST", &path, &headers, &json!({ "ciphertext": wdek }).to_string())
    });
    assert_eq!(as_long(server.keys, &server.ca(), [&hash, &padding]).await, Ok(()));
}

#[tokio::test]
async fn pitfall_05_no_cut_ciphertext_is_more_than_refused() {
    let server = Server::start().await;
    let token = server.admin().await;
    let key = server.create_id(&token, "crk").await;
    let (wdek, _) = server.wrap(&token, &key, PLAINTEXT).await;
    let cuts = (0..=64).chain((65..wdek.len()).step_by(7));
    let mut bad: Vec<String> = cuts.map(|at| wdek[..at].to_owned()).collect();
    for member in ["ciphertext", "hash", "iv"] {
        for length in (0..=64).filter(|length| length % 16 != 0 || *length == 0) {
            bad.push(changed(&wdek, |json| json[member] = BASE64.encode(vec![7; length]).into()));
        }
    }
    for one in &bad {
        let answer = server.unwrap(&token, &key, one).await;
        assert!([400, 422].contains(&answer.status), "{one}: {answer:?}");
    }
    assert_eq!(server.unwrap(&token, &key, &wdek).await.json()["plaintext"], PLAINTEXT);
}

#[tokio::test]
async fn pitfall_06_associated_data_counts_to_the_last_letter_and_in_order() {
    let server = Server::start().await;
    let token = server.admin().await;
    let key = server.create_id(&token, "crk").await;
    let lists = [
        json!([]),
        json!([""]),
        json!(["", ""]),
        json!(["a", "b"]),
        json!(["b", "a"]),
        json!(["ab"]),
        json!(["a", "b", ""]),
        json!(["", "a", "b"]),
        json!(["a"]),
        json!(["A", "b"]),
        json!(["a,b"]),
        json!(["a\u{0}b"]),
    ];
    let ask = |action: &str, body: Value| {
        let (server, token, path) = (&server, &token, format!("/keys/{key}/actions/{action}"));
        async move { server.call(token, "POST", &path, &body.to_string()).await }
    };
    for wrapped_with in &lists {
        let wrapped =
            ask("wrap", json!({"plaintext": PLAINTEXT, "aad": wrapped_with})).await.json();
        for opened_with in &lists {
            let asked = json!({"ciphertext": wrapped["ciphertext"], "aad": opened_with});
            let expected = if wrapped_with == opened_with { 200 } else { 422 };
            let answer = ask("unwrap", asked).await;
            assert_eq!(answer.status, expected, "{wrapped_with} opened with {opened_with}");
        }
        let without = ask("unwrap", json!({"ciphertext": wrapped["ciphertext"]})).await.status;
        assert_eq!(without == 200, *wrapped_with == json!([]), "{wrapped_with} without any");
    }
}

#[tokio::test]
async fn pitfall_07_a_ciphertext_opens_under_its_own_key_whoever_swaps_rows() {
    let server = Server::start().await;
    let token = server.admin().await;
    let mut wrapped = Vec::new();
    for name in ["one", "two", "three"] {
        let key = server.create_id(&token, name).await;
        let mut versions = Vec::new();
        for _ in 0..2 {
            versions.push(server.wrap(&token, &key, PLAINTEXT).await);
            assert_eq!(server.rotate(&token, &key).await.status, 204);
        }
        wrapped.push((key, versions));
    }
    for (key, _) in &wrapped {
        for (owner, versions) in &wrapped {
            for (wdek, _) in versions {
                let expected = if key == owner { 200 } else { 422 };
                assert_eq!(server.unwrap(&token, key, wdek).await.status, expected);
                // As if it came from the other key's own version.
                let without =
                    changed(wdek, |json| drop(json.as_object_mut().unwrap().remove("handle")));
                let foreign = server.unwrap(&token, key, &without).await.status;
                assert!(key == owner || foreign != 200, "{foreign}");
            }
        }
    }
    let swapped =
        changed(&wrapped[0].1[0].0, |json| json["handle"] = wrapped[0].1[1].1.clone().into());
    assert_eq!(server.unwrap(&token, &wrapped[0].0, &swapped).await.status, 422, "version swap");

    // Somebody with the database file gives the first key the versions of the second.
    let file = server.dir.path().join("kms.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&file);
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    let (first, second) = (&wrapped[0].0, &wrapped[1].0);
    let mut connection = pool.acquire().await.unwrap();
    sqlx::query("PRAGMA foreign_keys = OFF").execute(&mut *connection).await.unwrap();
    sqlx::query(
        "UPDATE key_versions SET key_id = CASE key_id WHEN ?1 THEN ?2 ELSE ?1 END,
                number = number + 100 WHERE key_id IN (?1, ?2)",
    )
    .bind(first)
    .bind(second)
    .execute(&mut *connection)
    .await
    .unwrap();
    for (wdek, _) in &wrapped[1].1 {
        let answer = server.unwrap(&token, first, wdek).await;
        assert_eq!(answer.status, 422, "the first key opens what the second has wrapped");
    }
}

#[tokio::test]
async fn pitfall_10_nobody_who_is_refused_reaches_the_hsm() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = server.create_id(&admin, "crk").await;
    let (wdek, _) = server.wrap(&admin, &key, PLAINTEXT).await;
    let mut tokens = Vec::new();
    for role in Role::ALL {
        tokens.push((role, server.identity(role, Scope::Instance(server.instance())).await.1));
    }
    let (_, stranger) =
        server.identity(Role::Manager, Scope::Instance(server.other_instance().await)).await;
    let broken = VaultError::Policy("somebody got through".into());
    server.vault.set_fault(Some(Fault::Fail(broken)));
    for route in KEY_ROUTES {
        let path = route.path.replace("{id}", &key);
        let body = match route.action {
            Action::CreateKey => new_key("made"),
            Action::Unwrap => json!({"ciphertext": wdek}).to_string(),
            _ => String::new(),
        };
        for (role, token) in &tokens {
            if !permits(*role, route.action) {
                let answer = server.call(token, route.method, &path, &body).await;
                assert_eq!(answer.status, 401, "{role:?} {route:?}: {answer:?}");
            }
        }
        assert_eq!(server.call(&stranger, route.method, &path, &body).await.status, 400);
    }
}

#[tokio::test]
async fn pitfall_11_what_is_withdrawn_at_one_replica_is_refused_by_the_other() {
    let (server, other) = Server::start_pair().await;
    let admin = server.admin().await;
    let key = server.create_id(&admin, "crk").await;
    let (wdek, _) = server.wrap(&admin, &key, PLAINTEXT).await;
    let (caller, token) = server.identity(Role::Viewer, Scope::Instance(server.instance())).await;
    for replica in [&server, &other] {
        assert_eq!(replica.unwrap(&token, &key, &wdek).await.status, 200);
    }
    let path = format!("/keys/{key}/actions");
    for (action, expected) in [("disable", 409), ("enable", 200)] {
        let done = server.call(&admin, "POST", &format!("{path}/{action}"), "").await;
        assert_eq!(done.status, 204);
        for replica in [&server, &other] {
            assert_eq!(replica.unwrap(&token, &key, &wdek).await.status, expected, "{action}");
        }
    }
    let api_key = format!("/v1/apikeys/{}/lock", caller.api_key().unwrap());
    for (method, expected) in [("POST", 401), ("DELETE", 200)] {
        assert_eq!(other.manage(&admin, method, &api_key, "").await.status, 204);
        for replica in [&server, &other] {
            assert_eq!(replica.unwrap(&token, &key, &wdek).await.status, expected, "{method}");
        }
    }
    let policy = format!("/v1/policies/{}", caller.service_id);
    assert_eq!(other.manage(&admin, "DELETE", &policy, "").await.status, 204);
    for replica in [&server, &other] {
        assert_eq!(replica.unwrap(&token, &key, &wdek).await.status, 400);
    }
    assert_eq!(server.call(&admin, "DELETE", &format!("/keys/{key}"), "").await.status, 204);
    for replica in [&server, &other] {
        assert_eq!(replica.unwrap(&admin, &key, &wdek).await.status, 410);
    }
}

#[tokio::test]
async fn pitfall_15_a_path_has_one_form() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = server.create_id(&admin, "crk").await;
    let (bearer, instance) = (format!("Bearer {admin}"), server.instance().to_string());
    let headers = [("authorization", bearer.as_str()), ("icp-instance", instance.as_str())];
    let ask = |path: String| {
        let (server, headers) = (&server, &headers);
        async move { http::ask(server.keys, &server.ca(), "GET", &path, headers, "").await.status }
    };
    assert_eq!(ask(format!("/api/v2/keys/{key}")).await, 200);
    for path in [
        format!("/api/v2/keys/{}", key.to_uppercase()),
        format!("/api/v2/keys/{}", key.replace('-', "")),
        format!("/api/v2/keys/../keys/{key}"),
        format!("/api/v2/./keys/{key}"),
        format!("/api/v2//keys/{key}"),
        format!("//api/v2/keys/{key}"),
        format!("/api/v2/keys/{key}/"),
        format!("/api/v2/keys/{key}/."),
        format!("/api/v2/keys/{key}/../{key}"),
        format!("/api/v2/keys%2f{key}"),
        format!("/api/v2/%6beys/{key}"),
        format!("/api/v2/keys/%2e%2e/keys/{key}"),
        format!("/api/v2/Keys/{key}"),
        format!("/API/v2/keys/{key}"),
        format!("/api/v2/keys/{key};x=1"),
        format!("/api/v2/keys/{key}%00"),
        format!("/api/v2/keys/{key}%20"),
        format!("/api/v2/keys/%20{key}"),
        format!("/api/v2/keys/{{{key}}}"),
        format!("/other/../api/v2/keys/{key}"),
        format!("/api/v2/keys/{key}/actions/../metadata"),
        "/api/v2/keys/root".to_owned(),
        "/api/v2/keys/*".to_owned(),
    ] {
        let status = ask(path.clone()).await;
        assert!([400, 404, 501].contains(&status), "{path}: {status}");
    }
}

#[tokio::test]
async fn pitfall_16_how_long_a_refusal_takes_says_nothing() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let (locked, _) = server.identity(Role::Viewer, Scope::Instance(server.instance())).await;
    let locked = locked.api_key().unwrap();
    let path = format!("/v1/apikeys/{locked}/lock");
    assert_eq!(server.manage(&admin, "POST", &path, "").await.status, 204);
    let locked = locked.to_string();
    // As long as the other, and none that anybody has.
    let unknown = Uuid::from_u128(1).to_string();
    let (one, two) = (server.ask_token(&locked).await, server.ask_token(&unknown).await);
    assert_eq!((one.status, &one.body), (two.status, &two.body));
    let grant = "grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey=";
    let [one, other] = [&locked, &unknown]
        .map(|key| Request::new("POST", "/oidc/token", &[], &format!("{grant}{key}")));
    assert_eq!(as_long(server.tokens, &server.ca(), [&one, &other]).await, Ok(()));

    let (_, viewer) = server.identity(Role::Viewer, Scope::Instance(server.instance())).await;
    let bearer = format!("Bearer {viewer}");
    let [there, nowhere] = [server.other_instance().await, Uuid::from_u128(1)].map(|instance| {
        let instance = instance.to_string();
        let headers = [("authorization", bearer.as_str()), ("icp-instance", instance.as_str())];
        Request::new("GET", "/api/v2/keys", &headers, "")
    });
    assert_eq!(as_long(server.keys, &server.ca(), [&there, &nowhere]).await, Ok(()));
    // That this can see a difference: whoever shows no token is refused without a look at the database.
    let nobody = Request::new("GET", "/api/v2/keys", &[], "");
    // A machine with other work makes them alike now and then.
    let seen = compared(server.keys, &server.ca(), [&there, &nobody], ATTEMPTS).await;
    let told_apart = seen.iter().filter(|times| !alike(**times)).count();
    assert!(told_apart > ATTEMPTS / 2, "{seen:?}");
}

#[tokio::test]
async fn pitfall_17_no_request_costs_more_than_it_may() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = server.create_id(&admin, "crk").await;
    let wrap = format!("/keys/{key}/actions/wrap");
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(9000), close.repeat(9000));
    let names: String = (0..7000).map(|n| format!("\"x{n}\":1,")).collect();
    let clock = SystemClock::new();
    for body in [
        deep("[", "]"),
        deep("{\"a\":", "}"),
        "[".repeat(60_000),
        format!("{{\"aad\":{}}}", deep("[", "]")),
        format!("{{{}\"plaintext\":\"\"}}", &names[..60_000]),
        format!("{{\"aad\":[{}\"\"]}}", "\"\",".repeat(15_000)),
        format!("{{\"plaintext\":1{}}}", "0".repeat(60_000)),
    ] {
        let start = clock.now();
        let answer = server.call(&admin, "POST", &wrap, &body).await;
        assert_eq!(answer.status, 400, "{} ...: {answer:?}", &body[..20]);
        assert!(clock.now() - start < Duration::from_secs(5));
    }
    let large = server.call(&admin, "POST", &wrap, &"x".repeat(70_000)).await;
    assert_eq!(large.status, 413);
    for flood in [many_headers(2000), format!("x: {}\r\n", "y".repeat(1 << 20)), long_path()] {
        let answer = flooded(&server, &flood).await;
        assert!(answer.is_none_or(|status| (400..500).contains(&status)), "{answer:?}");
    }
    assert_eq!(server.call(&admin, "POST", &wrap, "").await.status, 200, "others are served");
}

fn many_headers(count: usize) -> String {
    (0..count).map(|n| format!("x-{n}: y\r\n")).collect()
}

/// Stands in a header's place: it ends the first request, and its own request line is a megabyte long.
fn long_path() -> String {
    format!("\r\nGET /{} HTTP/1.1\r\nhost: x\r\n", "a".repeat(1 << 20))
}

/// The last status that comes back when `flood` stands among the headers; `None` for a connection that is cut.
async fn flooded(server: &Server, flood: &str) -> Option<u16> {
    let mut stream = http::connect(server.keys, &server.ca()).await;
    let request = format!("GET /api/v2/keys HTTP/1.1\r\nhost: x\r\n{flood}\r\n");
    // The server may cut it while this is being written.
    let _ = stream.write_all(request.as_bytes()).await;
    let mut text = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut text)).await;
    let text = String::from_utf8_lossy(&text).into_owned();
    let last = text.rsplit("HTTP/1.1 ").next()?;
    last.get(..3)?.parse().ok()
}

/// What the service whose API this is has, and this server has not.
#[tokio::test]
async fn pitfall_18_what_is_not_built_says_so() {
    let server = Server::start().await;
    let admin = server.admin().await;
    let key = server.create_id(&admin, "crk").await;
    for (method, path) in [
        ("POST", "/keys_with_policy_overrides"),
        ("PATCH", "/keys/{id}"),
        ("POST", "/keys/{id}/restore"),
        ("POST", "/keys/{id}/actions/rewrap"),
        ("POST", "/keys/{id}/actions/setKeyForDeletion"),
        ("POST", "/keys/{id}/actions/unsetKeyForDeletion"),
        ("POST", "/keys/{id}/actions/sync"),
        ("POST", "/keys/{id}?action=rewrap"),
        ("POST", "/keys/{id}?action=restore"),
        ("GET", "/keys/{id}/policies"),
        ("PUT", "/keys/{id}/policies"),
        ("GET", "/instance/policies"),
        ("PUT", "/instance/policies"),
        ("GET", "/instance/allowed_ip_port"),
        ("POST", "/import_token"),
        ("GET", "/import_token"),
        ("POST", "/keys/{id}/aliases/name"),
        ("DELETE", "/keys/{id}/aliases/name"),
        ("GET", "/key_rings"),
        ("POST", "/key_rings/ring"),
        ("DELETE", "/key_rings/ring"),
        ("GET", "/keys/{id}/registrations"),
        ("GET", "/kmip_adapters"),
        ("POST", "/kmip_adapters"),
        ("POST", "/event_ack"),
    ] {
        let answer = server.call(&admin, method, &path.replace("{id}", &key), "").await;
        unbuilt(&answer, &format!("{method} {path}"));
    }
    for query in ["?search=x", "?sort=id", "?filter=state=1"] {
        unbuilt(&server.call(&admin, "GET", &format!("/keys{query}"), "").await, query);
    }
    let standard = new_key("x").replace("\"extractable\":false", "\"extractable\":true");
    unbuilt(&server.call(&admin, "POST", "/keys", &standard).await, "standard keys");
    let alias = new_key("x").replace("\"name\"", "\"aliases\":[\"a\"],\"name\"");
    unbuilt(&server.call(&admin, "POST", "/keys", &alias).await, "aliases");
}

fn unbuilt(answer: &Answer, what: &str) {
    assert_eq!(answer.status, 501, "{what}: {answer:?}");
    assert!(answer.message().contains("(NOT_IMPLEMENTED)"), "{what}: {answer:?}");
}
