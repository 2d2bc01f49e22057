//! The key API as its clients use it: every verb, both prefixes, both forms of an action, and what clients leave out.

use crate::harness::{Server, http, new_key};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_core::clock::Clock;
use kms_core::wdek::{Wdek, WdekVersion};
use kms_server::app::Settings;
use kms_server::store::Custody;
use serde_json::{Value, json};
use std::time::Duration;
use time::OffsetDateTime;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

#[tokio::test]
async fn a_root_key_is_created_shown_listed_counted_and_deleted() {
    let server = Server::start().await;
    let token = server.admin().await;
    let made = server.create(&token, "first").await;
    assert_eq!(made["state"], 1);
    assert_eq!(made["extractable"], false);
    assert_eq!(made["imported"], false);
    assert!(made.get("payload").is_none() && made.get("lastRotateDate").is_none());
    assert!(made["creationDate"].as_str().unwrap().ends_with('Z'));
    let id = made["id"].as_str().unwrap();

    let shown = server.call(&token, "GET", &format!("/keys/{id}"), "").await;
    assert_eq!((shown.status, &shown.json()["resources"][0]), (200, &made));
    let metadata = server.call(&token, "GET", &format!("/keys/{id}/metadata"), "").await;
    assert_eq!(metadata.json()["resources"][0], made);
    let list = server.call(&token, "GET", "/keys?totalCount=True&state=", "").await;
    assert_eq!(list.json()["metadata"]["totalCount"], 1);
    assert_eq!(list.json()["resources"], json!([made]));
    let count = server.call(&token, "HEAD", "/keys", "").await;
    assert_eq!((count.status, count.header("key-total")), (200, Some("1")));
    assert_eq!(count.body, "");

    let deleted = server.call(&token, "DELETE", &format!("/keys/{id}"), "").await;
    assert_eq!((deleted.status, deleted.body.as_str()), (204, ""));
    let list = server.call(&token, "GET", "/keys", "").await;
    assert_eq!(list.json()["resources"], json!([]));
    let destroyed = server.call(&token, "GET", "/keys?state=5", "").await;
    let destroyed = &destroyed.json()["resources"][0];
    assert_eq!((&destroyed["id"], &destroyed["state"]), (&made["id"], &json!(5)));
    assert_eq!(destroyed["deletedBy"], destroyed["createdBy"]);
}

#[tokio::test]
async fn success_has_its_own_media_type_and_echoes_the_correlation_id() {
    let server = Server::start().await;
    let token = server.admin().await;
    let (bearer, instance) = (format!("Bearer {token}"), server.instance().to_string());
    let headers = [
        ("authorization", bearer.as_str()),
        ("bluemix-instance", instance.as_str()),
        ("correlation-id", "trace-4711"),
        ("content-type", "text/plain"),
        ("accept", "image/png"),
    ];
    let body = new_key("traced");
    let path = "/kms/api/v2/keys";
    let made = http::ask(server.keys, &server.ca(), "POST", path, &headers, &body).await;
    assert_eq!(made.status, 201);
    assert_eq!(made.header("content-type"), Some("application/vnd.ibm.kms.key+json"));
    assert_eq!(made.header("correlation-id"), Some("trace-4711"));
    assert!(server.audit().contains("trace-4711"));
    let id = made.json()["resources"][0]["id"].as_str().unwrap().to_owned();
    let path = format!("/kms/api/v2/keys/{id}?action=wrap");
    let wrapped = http::ask(server.keys, &server.ca(), "POST", &path, &headers, "null").await;
    assert_eq!(wrapped.header("content-type"), Some("application/vnd.ibm.kms.key_action+json"));
}

#[tokio::test]
async fn a_dek_is_wrapped_and_unwrapped_and_the_associated_data_must_be_the_same() {
    let server = Server::start().await;
    let token = server.viewer().await;
    let id = server.create_id(&server.admin().await, "crk").await;
    let wrap = format!("/keys/{id}/actions/wrap");
    let body = json!({"plaintext": PLAINTEXT, "aad": ["a", "bc"]}).to_string();
    let wrapped = server.call(&token, "POST", &wrap, &body).await.json();
    assert!(wrapped.get("plaintext").is_none(), "what the caller knows is not repeated");
    let unwrap = format!("/keys/{id}?action=unwrap");
    for (aad, status) in [
        (json!(["a", "bc"]), 200),
        (json!(["ab", "c"]), 422),
        (json!(["bc", "a"]), 422),
        (json!(["a", "bc", ""]), 422),
        (json!([]), 422),
        (Value::Null, 422),
    ] {
        let body = json!({"ciphertext": wrapped["ciphertext"], "aad": aad}).to_string();
        let answer = server.call(&token, "POST", &unwrap, &body).await;
        assert_eq!(answer.status, status, "{aad}: {answer:?}");
        if status == 200 {
            assert_eq!(answer.json()["plaintext"], PLAINTEXT);
            assert_eq!(answer.json()["keyVersion"], wrapped["keyVersion"]);
            assert!(answer.json().get("ciphertext").is_none());
        } else {
            assert!(answer.message().ends_with("(UNPROCESSABLE_CIPHERTEXT_ERR)"));
        }
    }
}

#[tokio::test]
async fn a_wrap_that_says_nothing_gets_a_fresh_dek() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let mut seen = Vec::new();
    for body in ["", "null", "{}", "  {} ", r#"{"plaintext":""}"#, r#"{"plaintext":null}"#] {
        let wrap = server.call(&token, "POST", &format!("/keys/{id}/actions/wrap"), body).await;
        assert_eq!(wrap.status, 200, "{body:?}");
        let made = wrap.json()["plaintext"].as_str().unwrap().to_owned();
        assert_eq!(STANDARD.decode(&made).unwrap().len(), 32);
        let opened = server.unwrap(&token, &id, wrap.json()["ciphertext"].as_str().unwrap()).await;
        assert_eq!(opened.json()["plaintext"], made);
        assert!(!seen.contains(&made));
        seen.push(made);
    }
}

#[tokio::test]
async fn every_changed_or_foreign_wdek_gets_the_same_answer() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let other = server.create_id(&token, "other").await;
    let (wdek, _) = server.wrap(&token, &id, PLAINTEXT).await;
    let change = |change: &dyn Fn(&mut Wdek)| {
        let mut changed = Wdek::decode(&wdek).unwrap();
        change(&mut changed);
        changed.encode()
    };
    let mut answers = vec![server.unwrap(&token, &other, &wdek).await];
    for changed in [
        change(&|w| w.ciphertext[0] ^= 1),
        change(&|w| w.ciphertext.truncate(16)),
        change(&|w| w.iv[0] ^= 1),
        change(&|w| w.hash[63] ^= 1),
        change(&|w| w.handle = Some(uuid::Uuid::nil())),
    ] {
        answers.push(server.unwrap(&token, &id, &changed).await);
    }
    for answer in &answers {
        assert_eq!((answer.status, &answer.body), (422, &answers[0].body));
    }
    for senseless in ["", "!", "bm8gd2Rlaw==", "e30="] {
        let answer = server.unwrap(&token, &id, senseless).await;
        assert_eq!(answer.status, 400, "{senseless}");
        assert_eq!(answer.json()["resources"][0]["reasons"][0]["target"]["name"], "ciphertext");
    }
}

#[tokio::test]
async fn rotation_keeps_what_was_wrapped_and_offers_it_anew() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let mut old = vec![server.wrap(&token, &id, PLAINTEXT).await];
    for body in ["", "null", "{}"] {
        let path = format!("/keys/{id}/actions/rotate");
        let rotated = server.call(&token, "POST", &path, body).await;
        assert_eq!((rotated.status, rotated.body.as_str()), (204, ""));
        old.push(server.wrap(&token, &id, PLAINTEXT).await);
    }
    let newest = old.last().unwrap().1.clone();
    for (wdek, version) in &old {
        let opened = server.unwrap(&token, &id, wdek).await.json();
        assert_eq!(opened["plaintext"], PLAINTEXT);
        assert_eq!(&opened["keyVersion"]["id"], version);
        if *version == newest {
            assert!(opened.get("rewrappedKeyVersion").is_none());
            continue;
        }
        assert_eq!(opened["rewrappedKeyVersion"]["id"], newest);
        let again = server.unwrap(&token, &id, opened["ciphertext"].as_str().unwrap()).await.json();
        assert_eq!(
            (&again["plaintext"], &again["keyVersion"]["id"]),
            (&json!(PLAINTEXT), &json!(newest))
        );
    }
    let list =
        server.call(&token, "GET", &format!("/keys/{id}/versions?totalCount=true"), "").await;
    let listed: Vec<_> =
        list.json()["resources"].as_array().unwrap().iter().map(|v| v["id"].clone()).collect();
    let mut wanted: Vec<_> = old.iter().map(|(_, version)| json!(version)).collect();
    wanted.reverse();
    assert_eq!((listed, &list.json()["metadata"]["totalCount"]), (wanted, &json!(4)));
    let page =
        server.call(&token, "GET", &format!("/keys/{id}/versions?limit=1&offset=1"), "").await;
    assert_eq!(page.json()["resources"][0]["id"], old[2].1);
}

#[tokio::test]
async fn wdeks_of_both_formats_are_read_and_either_is_written() {
    let old_format = Settings { wdek_version: WdekVersion::V2_0_0, ..Server::settings() };
    let server = Server::start_with(old_format).await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let mut all = Vec::new();
    for _ in 0..3 {
        let (wdek, version) = server.wrap(&token, &id, PLAINTEXT).await;
        let read = Wdek::decode(&wdek).unwrap();
        assert_eq!((read.version, read.handle), (WdekVersion::V2_0_0, None));
        all.push((wdek, version));
        assert_eq!(server.rotate(&token, &id).await.status, 204);
    }
    for (wdek, version) in &all {
        let opened = server.unwrap(&token, &id, wdek).await.json();
        assert_eq!(
            (&opened["plaintext"], &opened["keyVersion"]["id"]),
            (&json!(PLAINTEXT), &json!(version))
        );
    }
    let new = Server::start().await;
    let token = new.admin().await;
    let id = new.create_id(&token, "crk").await;
    let (wdek, version) = new.wrap(&token, &id, PLAINTEXT).await;
    let read = Wdek::decode(&wdek).unwrap();
    assert_eq!(read.version, WdekVersion::V2_1_0);
    assert_eq!(read.handle.unwrap().to_string(), version);
}

#[tokio::test]
async fn aes_gcm_is_written_where_asked_for_and_read_always() {
    let gcm = Settings { wdek_version: WdekVersion::V4_0_0, ..Server::settings() };
    let server = Server::start_with(gcm).await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (wdek, version) = server.wrap(&token, &id, PLAINTEXT).await;
    let read = Wdek::decode(&wdek).unwrap();
    assert_eq!((read.version, read.hash.len(), read.iv.len()), (WdekVersion::V4_0_0, 0, 12));
    assert_eq!(read.handle.unwrap().to_string(), version);
    assert_eq!(server.rotate(&token, &id).await.status, 204);
    let opened = server.unwrap(&token, &id, &wdek).await.json();
    assert_eq!(opened["plaintext"], PLAINTEXT);
    let mut changed = read;
    changed.ciphertext[0] ^= 1;
    assert_eq!(server.unwrap(&token, &id, &changed.encode()).await.status, 422);
}

#[tokio::test]
async fn imported_keys_wrap_and_rotate_with_material_only() {
    let server = Server::start().await;
    let token = server.admin().await;
    for length in [16, 24, 32] {
        let payload = STANDARD.encode(vec![7; length]);
        let body = new_key("brought").replace(
            "\"extractable\":false",
            &format!("\"extractable\":false,\"payload\":\"{payload}\""),
        );
        let made = server.call(&token, "POST", "/keys", &body).await;
        assert_eq!(made.status, 201, "{made:?}");
        assert!(!made.body.contains(&payload), "material is never shown");
        let made = &made.json()["resources"][0];
        assert_eq!(made["imported"], true);
        let id = made["id"].as_str().unwrap();
        let (wdek, _) = server.wrap(&token, id, PLAINTEXT).await;
        let refused = server.rotate(&token, id).await;
        assert_eq!(refused.status, 400);
        assert!(refused.message().ends_with("(KEY_PAYLOAD_REQ_ERR)"));
        let path = format!("/keys/{id}/actions/rotate");
        let next = json!({"payload": STANDARD.encode([9; 32])}).to_string();
        assert_eq!(server.call(&token, "POST", &path, &next).await.status, 204);
        assert_eq!(server.unwrap(&token, id, &wdek).await.json()["plaintext"], PLAINTEXT);
    }
    for length in [0, 1, 15, 17, 31, 33, 64] {
        let payload = STANDARD.encode(vec![7; length]);
        let body =
            new_key("bad").replace("\"name\"", &format!("\"payload\":\"{payload}\",\"name\""));
        let answer = server.call(&token, "POST", "/keys", &body).await;
        // No payload at all is another request: a key is generated.
        assert_eq!(answer.status, if length == 0 { 201 } else { 400 }, "{length}");
    }
    let generated = server.create_id(&token, "generated").await;
    let path = format!("/keys/{generated}/actions/rotate");
    let body = json!({"payload": STANDARD.encode([9; 32])}).to_string();
    let refused = server.call(&token, "POST", &path, &body).await;
    assert!(refused.message().ends_with("(INVALID_QUERY_PARAM_ERR)"), "{refused:?}");
}

#[tokio::test]
async fn a_deleted_key_does_nothing_any_more_but_its_material_stays() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (wdek, version) = server.wrap(&token, &id, PLAINTEXT).await;
    let (bearer, instance) = (format!("Bearer {token}"), server.instance().to_string());
    let headers = [
        ("authorization", bearer.as_str()),
        ("icp-instance", instance.as_str()),
        ("prefer", "return=representation"),
    ];
    let path = format!("/api/v2/keys/{id}?force=true");
    let gone = http::ask(server.keys, &server.ca(), "DELETE", &path, &headers, "").await;
    assert_eq!((gone.status, &gone.json()["resources"][0]["state"]), (200, &json!(5)));
    for (method, path, body) in [
        ("POST", format!("/keys/{id}/actions/unwrap"), json!({"ciphertext": wdek}).to_string()),
        ("POST", format!("/keys/{id}/actions/wrap"), String::new()),
        ("POST", format!("/keys/{id}/actions/rotate"), String::new()),
        ("DELETE", format!("/keys/{id}"), String::new()),
    ] {
        let answer = server.call(&token, method, &path, &body).await;
        assert_eq!(answer.status, 410, "{method} {path}");
        assert!(answer.message().ends_with("(KEY_DELETED_ERR)"));
    }
    assert_eq!(server.call(&token, "GET", &format!("/keys/{id}/versions"), "").await.status, 409);
    let all =
        server.call(&token, "GET", &format!("/keys/{id}/versions?allKeyStates=true"), "").await;
    assert_eq!(all.json()["resources"][0]["id"], version);
    let held = kms_hsm::Vault::versions(&*server.vault).await.unwrap();
    assert_eq!(held, [version.parse::<uuid::Uuid>().unwrap()], "nothing is destroyed in the HSM");
}

#[tokio::test]
async fn an_expired_key_unwraps_but_no_longer_wraps() {
    let server = Server::start().await;
    let token = server.admin().await;
    let end = "2027-01-15T08:30:00Z";
    let body =
        new_key("short").replace("\"name\"", &format!("\"expirationDate\":\"{end}\",\"name\""));
    let made = server.call(&token, "POST", "/keys", &body).await.json();
    let id = made["resources"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(made["resources"][0]["expirationDate"], end);
    let (wdek, _) = server.wrap(&token, &id, PLAINTEXT).await;
    // What an operator is warned of, and no longer than it is to come.
    let next = async || server.store.next_expiry(server.clock.wall().into()).await.unwrap();
    assert_eq!(next().await.map(OffsetDateTime::unix_timestamp), Some(1_800_001_800));
    server.clock.advance(Duration::from_secs(1800));
    assert_eq!(next().await, None);
    let token = server.admin().await;
    assert_eq!(server.unwrap(&token, &id, &wdek).await.json()["plaintext"], PLAINTEXT);
    let refused = server.call(&token, "POST", &format!("/keys/{id}/actions/wrap"), "").await;
    assert_eq!(refused.status, 409);
    assert!(refused.message().ends_with("(KEY_ACTION_INVALID_STATE_ERR)"));
    let listed = server.call(&token, "GET", "/keys?state=3", "").await;
    assert_eq!(listed.json()["resources"][0]["state"], 3);
    assert_eq!(
        server.call(&token, "GET", "/keys?state=1", "").await.json()["resources"],
        json!([])
    );
}

#[tokio::test]
async fn pages_follow_each_other_without_gaps() {
    let server = Server::start().await;
    let token = server.admin().await;
    let mut made = Vec::new();
    for n in 0..5 {
        made.push(server.create_id(&token, &format!("key {n}")).await);
    }
    made.sort();
    let mut listed = Vec::new();
    for offset in [0, 2, 4, 6] {
        let page = server.call(&token, "GET", &format!("/keys?limit=2&offset={offset}"), "").await;
        for key in page.json()["resources"].as_array().unwrap() {
            listed.push(key["id"].as_str().unwrap().to_owned());
        }
    }
    assert_eq!(listed, made);
    for bad in ["limit=5001", "limit=x", "offset=-1", "state=7", "extractable=maybe"] {
        let answer = server.call(&token, "GET", &format!("/keys?{bad}"), "").await;
        assert_eq!(answer.status, 400, "{bad}");
        assert!(answer.message().ends_with("(INVALID_QUERY_PARAM_ERR)"));
    }
}

#[tokio::test]
async fn bad_bodies_are_refused_with_their_reason() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (wrap, unwrap) = (format!("/keys/{id}/actions/wrap"), format!("/keys/{id}/actions/unwrap"));
    let long = "x".repeat(256);
    let too_long = json!({"plaintext": STANDARD.encode(vec![0; 4097])}).to_string();
    let resource = |text: &str| format!("{{\"metadata\":{{}},\"resources\":[{text}]}}");
    for (path, body, code) in [
        (&*wrap, "{".to_owned(), "BAD_BODY_ERR"),
        (&wrap, r#"{"colour":"red"}"#.to_owned(), "BAD_BODY_ERR"),
        (&wrap, r#"{"aad":[null]}"#.to_owned(), "BAD_BODY_ERR"),
        (&wrap, r#"{"plaintext":"not base64!"}"#.to_owned(), "INVALID_FIELD_ERR"),
        (&wrap, too_long, "INVALID_FIELD_ERR"),
        (&wrap, json!({"aad": [long]}).to_string(), "INVALID_FIELD_ERR"),
        (&wrap, json!({"aad": vec!["a"; 127]}).to_string(), "INVALID_FIELD_ERR"),
        (&unwrap, String::new(), "NO_BODY_ERR"),
        (&unwrap, "{}".to_owned(), "BAD_BODY_ERR"),
        ("/keys", String::new(), "NO_BODY_ERR"),
        ("/keys", "{\"resources\":[]}".to_owned(), "BAD_BODY_ERR"),
        ("/keys", resource(r#"{"extractable":false}"#), "INVALID_FIELD_ERR"),
        ("/keys", resource(r#"{"extractable":false,"name":"x"}"#), "INVALID_FIELD_ERR"),
        (
            "/keys",
            resource(
                r#"{"extractable":false,"name":"ab","expirationDate":"2001-01-01T00:00:00Z"}"#,
            ),
            "INVALID_FIELD_ERR",
        ),
        (
            "/keys",
            resource(r#"{"extractable":false,"name":"ab"},{"extractable":false,"name":"cd"}"#),
            "BAD_BODY_ERR",
        ),
    ] {
        let answer = server.call(&token, "POST", path, &body).await;
        assert_eq!(answer.status, 400, "{path} {body}");
        assert!(answer.message().ends_with(&format!("({code})")), "{path} {body}: {answer:?}");
    }
    let huge = format!("{{\"plaintext\":\"{}\"}}", "A".repeat(70_000));
    assert_eq!(server.call(&token, "POST", &wrap, &huge).await.status, 413);
}

#[tokio::test]
async fn the_longest_wrap_that_is_allowed_works() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let aad = vec!["\u{e4}".repeat(255); 126];
    let plaintext = STANDARD.encode(vec![5; 4096]);
    let body = json!({"plaintext": plaintext, "aad": aad}).to_string();
    // 126 strings of 255 two-byte characters exceed the limit on bodies; of one-byte characters they fit.
    let wrap = format!("/keys/{id}/actions/wrap");
    assert_eq!(server.call(&token, "POST", &wrap, &body).await.status, 413);
    let aad = vec!["a".repeat(255); 126];
    let body = json!({"plaintext": plaintext, "AAD": aad}).to_string();
    let wrapped = server.call(&token, "POST", &wrap, &body).await;
    assert_eq!(wrapped.status, 200);
    let body = json!({"CipherText": wrapped.json()["ciphertext"], "Aad": aad}).to_string();
    let opened = server.call(&token, "POST", &format!("/keys/{id}/actions/unwrap"), &body).await;
    assert_eq!(opened.json()["plaintext"], plaintext);
}

#[tokio::test]
async fn what_is_not_built_says_so() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let standard = new_key("std").replace("\"extractable\":false", "\"extractable\":true");
    let silent =
        new_key("std").replace(",\"extractable\":false", "").replace("\"extractable\":false,", "");
    let aliased = new_key("ali").replace("\"name\"", "\"aliases\":[\"a1\"],\"name\"");
    let secure = new_key("sec").replace("\"name\"", "\"encryptedNonce\":\"a\",\"name\"");
    for (method, path, body) in [
        ("POST", "/keys".to_owned(), standard),
        ("POST", "/keys".to_owned(), silent),
        ("POST", "/keys".to_owned(), aliased),
        ("POST", "/keys".to_owned(), secure),
        ("GET", "/keys?search=foo,".to_owned(), String::new()),
        ("GET", "/keys?sort=-id".to_owned(), String::new()),
        ("GET", "/keys?filter=state%3D1".to_owned(), String::new()),
        ("POST", "/keys_with_policy_overrides".to_owned(), String::new()),
        ("PATCH", format!("/keys/{id}"), "{}".to_owned()),
        ("POST", format!("/keys/{id}"), "{}".to_owned()),
        ("POST", format!("/keys/{id}?action=setKeyForDeletion"), "null".to_owned()),
        ("POST", format!("/keys/{id}/actions/rewrap"), "{}".to_owned()),
        ("POST", format!("/keys/{id}/restore"), String::new()),
        ("GET", format!("/keys/{id}/policies"), String::new()),
        ("GET", "/instance/policies".to_owned(), String::new()),
        ("GET", "/key_rings".to_owned(), String::new()),
        ("POST", "/import_token".to_owned(), "{}".to_owned()),
        ("GET", "/kmip_adapters".to_owned(), String::new()),
    ] {
        let answer = server.call(&token, method, &path, &body).await;
        assert_eq!(answer.status, 501, "{method} {path} {body}: {answer:?}");
        assert!(answer.message().contains("not built"), "{answer:?}");
    }
    let headers = [("authorization", "Bearer x")];
    let nowhere = http::ask(server.keys, &server.ca(), "GET", "/v1/keys", &headers, "").await;
    assert_eq!(nowhere.status, 404);
}

#[tokio::test]
async fn a_key_that_does_not_exist_is_not_found_whatever_its_name() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let absent = "00000000-0000-4000-8000-000000000000";
    for name in [absent, "an-alias", "..", "%2e%2e", &format!("{{{id}}}"), &id.to_uppercase()] {
        for (method, path) in [
            ("GET", format!("/keys/{name}")),
            ("DELETE", format!("/keys/{name}")),
            ("POST", format!("/keys/{name}/actions/wrap")),
            ("POST", format!("/keys/{name}/actions/rotate")),
        ] {
            let answer = server.call(&token, method, &path, "").await;
            assert_eq!(answer.status, 404, "{method} {path}");
            assert!(answer.message().ends_with("(KEY_NOT_FOUND_ERR)"), "{answer:?}");
        }
    }
}

#[tokio::test]
async fn rotation_may_be_limited_to_once_in_a_while() {
    let interval = Duration::from_secs(3600);
    let hourly = Settings { min_rotation_interval: interval, ..Server::settings() };
    let server = Server::start_with(hourly).await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    assert_eq!(server.rotate(&token, &id).await.status, 204, "directly after creation is allowed");
    let early = server.rotate(&token, &id).await;
    assert_eq!(early.status, 409);
    assert!(early.message().ends_with("(KEY_ROTATION_NOT_PERMITTED)"));
    server.clock.advance(Duration::from_secs(3600));
    let token = server.admin().await;
    assert_eq!(server.rotate(&token, &id).await.status, 204);
}
