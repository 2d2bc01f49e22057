//! Tokens that somebody else made, or that were changed: each is refused, by both listeners, with one answer.

use crate::harness::{ISSUER, Server};
use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::RSA_PKCS1_SHA256;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use kms_core::clock::Clock;
use kms_hsm::Vault;
use kms_server::policy::{Role, Scope};
use kms_server::store::Store;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, UNIX_EPOCH};

/// The parts of a good token, to be put together anew.
pub(crate) struct Parts {
    header: Value,
    pub(crate) claims: Value,
    signature: String,
}

impl Parts {
    pub(crate) fn of(token: &str) -> Parts {
        let mut parts = token.split('.');
        let mut json = || {
            let part = BASE64URL.decode(parts.next().unwrap()).unwrap();
            serde_json::from_slice(&part).unwrap()
        };
        let (header, claims) = (json(), json());
        Parts { header, claims, signature: parts.next().unwrap().to_owned() }
    }

    fn header(&self, changes: Value) -> Value {
        merge(&self.header, changes)
    }

    pub(crate) fn claims(&self, changes: Value) -> Value {
        merge(&self.claims, changes)
    }
}

/// `null` removes a member.
fn merge(into: &Value, changes: Value) -> Value {
    let mut merged = into.as_object().unwrap().clone();
    for (name, value) in changes.as_object().unwrap() {
        if value.is_null() {
            merged.remove(name);
        } else {
            merged.insert(name.clone(), value.clone());
        }
    }
    Value::Object(merged)
}

fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| BASE64URL.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}

/// Signed with the server's own key, as if its HSM had been misused.
async fn signed(server: &Server, header: &Value, claims: &Value) -> String {
    let text = unsigned(header, claims);
    let key = server.store.signing_key().await.unwrap().unwrap();
    let signature = server.vault.sign(key.id, text.as_bytes()).await.unwrap();
    format!("{text}.{}", BASE64URL.encode(signature))
}

pub(crate) fn signed_by_a_stranger(text: &str) -> String {
    let key = KeyPair::generate(KeySize::Rsa2048).unwrap();
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), text.as_bytes(), &mut signature).unwrap();
    format!("{text}.{}", BASE64URL.encode(signature))
}

fn hmac_with(key: &[u8], text: &str) -> String {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes());
    format!("{text}.{}", BASE64URL.encode(tag))
}

#[tokio::test]
async fn pitfall_13_no_forged_token_is_taken() {
    let server = Server::start().await;
    let (good, viewer) = (server.admin().await, server.viewer().await);
    let mut forged = patched(&good, &viewer);
    forged.extend(other_algorithms(&server, &good).await);
    forged.extend(other_headers(&server, &good).await);
    forged.extend(other_claims(&server, &good).await);
    forged.extend(stale(&server, &good).await);
    let kinds: BTreeSet<_> = forged.iter().map(|(_, token)| token).collect();
    assert!(kinds.len() == forged.len() && kinds.len() > 60, "{} kinds", kinds.len());

    let expected = server.call("x.y.z", "GET", "/keys", "").await;
    assert_eq!(expected.status, 401);
    for (what, token) in &forged {
        let answer = server.call(token, "GET", "/keys", "").await;
        assert_eq!((answer.status, &answer.body), (401, &expected.body), "{what}: {token}");
        let managed = server.manage(token, "GET", "/v1/apikeys", "").await;
        assert_eq!(managed.status, 401, "{what}: {token}");
    }
    let intact = signed_with_our_header(&server, &good, &Parts::of(&good).claims).await;
    for token in [&good, &intact] {
        assert_eq!(server.call(token, "GET", "/keys", "").await.status, 200);
    }
}

type Forged = Vec<(&'static str, String)>;

/// Put together from two good tokens, by somebody who cannot sign.
fn patched(good: &str, viewer: &str) -> Forged {
    let parts = Parts::of(good);
    let same = unsigned(&parts.header, &parts.claims);
    let (text, signature) = good.rsplit_once('.').unwrap();
    let (_, other_signature) = viewer.rsplit_once('.').unwrap();
    let theirs = &Parts::of(viewer).claims["iam_id"];
    let promoted = unsigned(&parts.header, &parts.claims(json!({"iam_id": theirs})));
    vec![
        ("two parts", same.clone()),
        ("no signature", format!("{same}.")),
        ("four parts", format!("{good}.x")),
        ("half a signature", good[..good.len() - 20].to_owned()),
        ("another token's signature", format!("{text}.{other_signature}")),
        ("changed claims", format!("{promoted}.{signature}")),
        ("another key", signed_by_a_stranger(text)),
        ("much too long", format!("{same}{}.{signature}", "A".repeat(8192))),
    ]
}

/// The header says how the token is to be checked; nobody must listen.
async fn other_algorithms(server: &Server, good: &str) -> Forged {
    let parts = Parts::of(good);
    let (claims, signature) = (&parts.claims, &parts.signature);
    let mut forged = Forged::new();
    for alg in ["none", "None", "NONE", "HS256", "RS384", "RS512", "PS256", "ES256", ""] {
        let header = parts.header(json!({"alg": alg}));
        forged.push(("another alg", format!("{}.{signature}", unsigned(&header, claims))));
        forged.push(("another alg, signed", signed(server, &header, claims).await));
    }
    let none = unsigned(&parts.header(json!({"alg": "none"})), claims);
    forged.push(("alg none without a signature", format!("{none}.")));
    let hs256 = unsigned(&parts.header(json!({"alg": "HS256"})), claims);
    let public = server.store.signing_key().await.unwrap().unwrap().public;
    let kid = parts.header["kid"].as_str().unwrap();
    for key in [public.n.as_slice(), kid.as_bytes(), b""] {
        forged.push(("HS256 with what everybody knows", hmac_with(key, &hs256)));
    }
    forged
}

/// Signed with the right key, but for a header of somebody else's making.
async fn other_headers(server: &Server, good: &str) -> Forged {
    let parts = Parts::of(good);
    let mut forged = Forged::new();
    for change in [
        json!({"kid": null}),
        json!({"kid": "../../../dev/null"}),
        json!({"kid": "' OR 1=1 --"}),
        json!({"kid": "20171030-00:00:00"}),
        json!({"jku": "https://evil.test/keys"}),
        json!({"x5u": "https://evil.test/cert"}),
        json!({"jwk": {"kty": "RSA", "n": "AQAB", "e": "AQAB"}}),
        json!({"x5c": ["MIIB"]}),
        json!({"crit": ["exp"], "exp": 0}),
        json!({"b64": false}),
        json!({"zip": "DEF"}),
        json!({"typ": "at+jwt"}),
    ] {
        let header = parts.header(change);
        forged.push(("another header", signed(server, &header, &parts.claims).await));
    }
    forged
}

/// Signed with the right key and header, but not by this issuer for this service, now, for somebody who exists.
async fn other_claims(server: &Server, good: &str) -> Forged {
    let parts = Parts::of(good);
    let now = server.clock.wall().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let absent = "00000000-0000-4000-8000-000000000000";
    let mut forged = Forged::new();
    for change in [
        json!({"iss": null}),
        json!({"iss": "https://iam.cloud.ibm.com/identity"}),
        json!({"iss": format!("{ISSUER}/")}),
        json!({"aud": null}),
        json!({"aud": "another-service"}),
        json!({"exp": null}),
        json!({"exp": "tomorrow"}),
        json!({"exp": -1}),
        json!({"exp": now - 6}),
        json!({"exp": now + 100 * 365 * 86_400}),
        json!({"exp": u64::MAX}),
        json!({"nbf": null}),
        json!({"nbf": now + 61}),
        json!({"iat": null}),
        json!({"iat": now + 61}),
        json!({"sub": null}),
        json!({"iam_id": null}),
        json!({"iam_id": "IBMid-270007EVTA"}),
        json!({"iam_id": format!("iam-ServiceId-{absent}")}),
        json!({"api_key_id": null}),
        json!({"api_key_id": absent}),
    ] {
        let claims = parts.claims(change);
        forged.push(("other claims", signed_with_our_header(server, good, &claims).await));
    }
    forged
}

/// Issued by this server to somebody who has lost what they proved themselves with.
async fn stale(server: &Server, admin: &str) -> Forged {
    let mut stale = Forged::new();
    for (what, method, path) in [
        ("a locked API key", "POST", "/v1/apikeys/{id}/lock"),
        ("a replaced API key", "POST", "/v1/apikeys/{id}/rotate"),
        ("a revoked API key", "DELETE", "/v1/apikeys/{id}"),
    ] {
        let (owner, token) = server.identity(Role::Administrator, Scope::Everywhere).await;
        assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
        let path = path.replace("{id}", &owner.api_key().unwrap().to_string());
        assert!((200..300).contains(&server.manage(admin, method, &path, "").await.status));
        stale.push((what, token));
    }
    stale
}

/// With the header byte for byte, so that only the claims can be what is refused.
pub(crate) async fn signed_with_our_header(server: &Server, good: &str, claims: &Value) -> String {
    let (header, _) = good.split_once('.').unwrap();
    let text = format!("{header}.{}", BASE64URL.encode(claims.to_string()));
    let key = server.store.signing_key().await.unwrap().unwrap();
    let signature = server.vault.sign(key.id, text.as_bytes()).await.unwrap();
    format!("{text}.{}", BASE64URL.encode(signature))
}

/// A client that logged in there is not refused here, where its second 401 would count as a withdrawal.
#[tokio::test]
async fn the_clock_of_another_server_may_be_a_minute_ahead() {
    let server = Server::start().await;
    let good = server.admin().await;
    let now = server.clock.wall().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let ahead = json!({"iat": now + 60, "nbf": now + 60, "exp": now + 3660});
    let claims = Parts::of(&good).claims(ahead);
    let token = signed_with_our_header(&server, &good, &claims).await;
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
}

#[tokio::test]
async fn a_token_ends_five_seconds_after_it_says() {
    let server = Server::start().await;
    let token = server.admin().await;
    server.clock.advance(Duration::from_secs(3604));
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 200);
    server.clock.advance(Duration::from_secs(1));
    assert_eq!(server.call(&token, "GET", "/keys", "").await.status, 401);
}

#[tokio::test]
async fn a_token_says_what_ibms_clients_read_and_its_key_is_published() {
    let server = Server::start().await;
    let answer = server.ask_token(server.made.viewer.api_key.expose()).await;
    let body = answer.json();
    let now = server.clock.wall().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!((&body["token_type"], &body["expires_in"]), (&json!("Bearer"), &json!(3600)));
    assert_eq!(body["expiration"], now + 3600);
    assert_eq!(
        (&body["refresh_token"], &body["scope"]),
        (&json!("not_supported"), &json!("ibm openid"))
    );
    let parts = Parts::of(body["access_token"].as_str().unwrap());
    let service_id = server.made.viewer.service_id;
    assert_eq!(parts.claims["iam_id"], format!("iam-ServiceId-{service_id}"));
    assert_eq!(parts.claims["sub"], format!("ServiceId-{service_id}"));
    assert_eq!((&parts.claims["iat"], &parts.claims["exp"]), (&json!(now), &json!(now + 3600)));
    let path = "/identity/keys";
    let keys =
        crate::harness::http::ask(server.tokens, &server.ca(), "GET", path, &[], "").await.json();
    assert_eq!(keys["keys"][0]["kid"], parts.header["kid"]);
    assert_eq!(keys["keys"][0]["alg"], "RS256");
    assert!(keys["keys"][0].get("use").is_none());
}
