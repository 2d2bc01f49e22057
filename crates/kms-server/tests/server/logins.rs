//! Tokens of other issuers, traded for ours: whom a profile trusts, what is refused, and where the keys come from.

use crate::harness::http::Answer;
use crate::harness::issuer::{SigningKey, Site, key_file};
use crate::harness::{Server, health, http};
use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use kms_core::clock::Clock;
use kms_server::app::Settings;
use kms_server::issuers::{KeySource, Trusted};
use kms_server::ops::refused::record_rest;
use kms_server::policy::{Role, Scope};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, UNIX_EPOCH};
use tempfile::TempDir;

const CLUSTER: &str = "https://kubernetes.default.svc";
const CR_TOKEN: &str = "urn:ibm:params:oauth:grant-type:cr-token";
const ACCOUNT: &str = "system:serviceaccount:kube-system:kmsplugin";

async fn start(issuers: Vec<Trusted>) -> Server {
    Server::start_with(Settings { issuers, ..Server::settings() }).await
}

/// A server that trusts a cluster by the file with its keys, and a profile of one of its service accounts.
struct Cluster {
    server: Server,
    key: SigningKey,
    profile: Value,
    _dir: TempDir,
}

impl Cluster {
    async fn start() -> Cluster {
        let (dir, key) = (TempDir::new().unwrap(), SigningKey::new("k-1"));
        let keys = KeySource::File(key_file(&dir, &[&key]));
        let server =
            start(vec![Trusted { url: CLUSTER.into(), audience: "kms".into(), keys }]).await;
        let account = json!({"namespace": "kube-system", "service_account": "kmsplugin"});
        let profile = trust(&server, "node", CLUSTER, account).await;
        Cluster { server, key, profile, _dir: dir }
    }

    /// What kube-apiserver writes into the token of the service account that is trusted.
    fn claims(&self) -> Value {
        claims(&self.server, CLUSTER, ACCOUNT)
    }

    async fn log_in(&self, token: &str) -> Answer {
        log_in(&self.server, token, "profile_name=node").await
    }
}

fn claims(server: &Server, issuer: &str, subject: &str) -> Value {
    let now = now(server);
    json!({
        "iss": issuer, "sub": subject, "aud": ["other", "kms"], "iat": now, "nbf": now, "exp": now + 600,
        "jti": "00000000-0000-4000-8000-000000000000",
    })
}

fn now(server: &Server) -> u64 {
    server.clock.wall().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn with(mut claims: Value, changes: Value) -> Value {
    for (name, value) in changes.as_object().unwrap() {
        claims[name] = value.clone();
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(name);
        }
    }
    claims
}

/// A profile for a new service ID that may wrap in the server's instance.
async fn trust(server: &Server, name: &str, issuer: &str, who: Value) -> Value {
    let (owner, _) = server.identity(Role::Viewer, Scope::Instance(server.instance())).await;
    let service_id = format!("ServiceId-{}", owner.service_id);
    let new = with(json!({"name": name, "service_id": service_id, "issuer": issuer}), who);
    let admin = server.admin().await;
    let made = server.manage(&admin, "POST", "/v1/profiles", &new.to_string()).await;
    assert_eq!(made.status, 201, "{made:?}");
    made.json()
}

async fn log_in(server: &Server, token: &str, profile: &str) -> Answer {
    let form = format!("grant_type={CR_TOKEN}&cr_token={token}&{profile}");
    http::ask(server.tokens, &server.ca(), "POST", "/identity/token", &[], &form).await
}

async fn trade(server: &Server, token: &str) -> Answer {
    trade_as("anna", server, token).await
}

async fn trade_as(profile: &str, server: &Server, token: &str) -> Answer {
    let grant = "urn:ietf:params:oauth:grant-type:jwt-bearer";
    let form = format!("grant_type={grant}&assertion={token}&profile_name={profile}");
    http::ask(server.tokens, &server.ca(), "POST", "/oidc/token", &[], &form).await
}

fn access_token(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["access_token"].as_str().unwrap().to_owned()
}

fn refused(answer: &Answer, why: &str) {
    let code = answer.json()["errorCode"].clone();
    assert_eq!((answer.status, code), (400, json!("BXNIM0407E")), "{why}: {answer:?}");
}

/// The token is genuine, and no profile of that name trusts whose it is.
fn is_nobody(answer: &Answer, why: &str) {
    let code = answer.json()["errorCode"].clone();
    assert_eq!((answer.status, code), (403, json!("BXNIM0513E")), "{why}: {answer:?}");
}

#[tokio::test]
async fn a_service_accounts_token_is_traded_for_one_that_may_what_its_profile_may() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    assert_eq!(cluster.profile["subject"], ACCOUNT);
    let token = cluster.key.token(&cluster.claims());
    let id = cluster.profile["id"].as_str().unwrap();
    for profile in ["profile_name=node".to_owned(), format!("profile_id={id}&profile_name=node")] {
        let answer = log_in(server, &token, &profile).await;
        let body = answer.json();
        assert_eq!(answer.header("content-type"), Some("application/json"));
        assert_eq!((&body["token_type"], &body["scope"]), (&json!("Bearer"), &json!("ibm openid")));
        // Ours would live for an hour; the one that it came from ends in ten minutes.
        assert_eq!(
            (&body["expires_in"], &body["expiration"]),
            (&json!(600), &json!(now(server) + 600))
        );
        let ours = access_token(&answer);
        let part = BASE64URL.decode(ours.split('.').nth(1).unwrap()).unwrap();
        let claims: Value = serde_json::from_slice(&part).unwrap();
        assert_eq!(claims["iam_id"], cluster.profile["iam_id"]);
        assert_eq!((&claims["sub"], &claims["identifier"]), (&json!(id), &json!(id)));
        assert_eq!(
            (&claims["sub_type"], &claims["grant_type"]),
            (&json!("ComputeResource"), &json!(CR_TOKEN))
        );

        let admin = server.admin().await;
        let key = server.create_id(&admin, "crk").await;
        server.wrap(&ours, &key, "AAAA").await;
        assert_eq!(
            server.call(&ours, "GET", "/keys", "").await.status,
            401,
            "a viewer lists nothing"
        );
        assert_eq!(server.manage(&ours, "GET", "/v1/profiles", "").await.status, 403);
        let audit = server.audit();
        let record = audit.lines().rfind(|line| line.contains(r#""action":"wrap""#)).unwrap();
        assert!(record.contains(cluster.profile["iam_id"].as_str().unwrap()), "{record}");
        assert!(!audit.contains(&token) && !audit.contains(&ours));
    }
}

#[tokio::test]
async fn a_removed_profile_ends_its_tokens_with_the_next_call() {
    let cluster = Cluster::start().await;
    let (server, token) = (&cluster.server, cluster.key.token(&cluster.claims()));
    let admin = server.admin().await;
    let key = server.create_id(&admin, "crk").await;
    let ours = access_token(&cluster.log_in(&token).await);
    server.wrap(&ours, &key, "AAAA").await;
    let path = format!("/v1/profiles/{}", cluster.profile["id"].as_str().unwrap());
    assert_eq!(server.manage(&admin, "DELETE", &path, "").await.status, 204);
    let trusted = format!(r#""grant":"{ACCOUNT} of {CLUSTER}""#);
    let told = server.audit().lines().filter(|line| line.contains(&trusted)).count();
    assert_eq!(told, 4, "made and deleted, each begun and done");
    let wrap = format!("/keys/{key}/actions/wrap");
    assert_eq!(server.call(&ours, "POST", &wrap, "").await.status, 401);
    is_nobody(&cluster.log_in(&token).await, "no profile");
    assert_eq!(server.manage(&admin, "DELETE", &path, "").await.status, 404);
}

#[tokio::test]
async fn no_forged_login_is_taken_and_all_refusals_are_one() {
    let cluster = Cluster::start().await;
    let (server, key) = (&cluster.server, &cluster.key);
    let (good, now) = (cluster.claims(), now(server));
    let stranger = SigningKey::new("k-1");
    let header = |alg: &str| json!({"alg": alg, "kid": "k-1"});
    let own = server.admin().await;
    let signed = key.token(&good);
    let (text, _) = signed.rsplit_once('.').unwrap();
    let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key.modulus()), text.as_bytes());
    let mut forged = vec![
        ("no token", "x".to_owned()),
        ("two parts", text.to_owned()),
        ("no signature", format!("{text}.")),
        ("HMAC with the public key", format!("{text}.{}", BASE64URL.encode(mac))),
        ("another key of the same kid", stranger.token(&good)),
        ("one of ours", own),
        ("no kid", key.sign(&json!({"alg": "RS256"}), &good)),
        ("an unknown kid", key.sign(&json!({"alg": "RS256", "kid": "k-2"}), &good)),
        ("critical", key.sign(&json!({"alg": "RS256", "kid": "k-1", "crit": ["exp"]}), &good)),
        ("much too long", key.token(&with(good.clone(), json!({"x": "y".repeat(16_384)})))),
    ];
    for alg in ["none", "HS256", "RS384", "PS256", "ES256", ""] {
        forged.push(("another alg", key.sign(&header(alg), &good)));
    }
    let account = |namespace: &str, name: &str| json!({"kubernetes.io": {"namespace": namespace, "serviceaccount": {"name": name}}});
    for change in [
        json!({"iss": "https://kubernetes.default.svc/"}),
        json!({"iss": "https://another.test"}),
        json!({"iss": null}),
        json!({"aud": ["other"]}),
        json!({"aud": "https://kubernetes.default.svc"}),
        json!({"aud": null}),
        json!({"aud": ""}),
        json!({"iss": [CLUSTER]}),
        json!({"exp": now}),
        json!({"exp": null}),
        json!({"exp": "tomorrow"}),
        json!({"nbf": now + 60}),
        json!({"iat": now + 60}),
        json!({"sub": null}),
        account("default", "kmsplugin"),
        account("kube-system", "another"),
    ] {
        forged.push(("other claims", key.token(&with(good.clone(), change))));
    }
    assert!(forged.len() > 30);
    let expected = cluster.log_in("x.y.z").await;
    for (what, token) in &forged {
        let answer = cluster.log_in(token).await;
        refused(&answer, what);
        assert_eq!(answer.body, expected.body, "{what}");
    }
    for profile in ["profile_id=Profile-1", "profile_name=node&profile_id=x"] {
        refused(&log_in(server, &signed, profile).await, profile);
    }
    is_nobody(&log_in(server, &signed, "profile_name=other").await, "another profile");
    for sub in
        ["system:serviceaccount:kube-system:another", "system:serviceaccount:default:kmsplugin"]
    {
        let token = key.token(&with(good.clone(), json!({"sub": sub})));
        is_nobody(&cluster.log_in(&token).await, sub);
    }
    for extra in [json!({}), account("kube-system", "kmsplugin"), json!({"exp": now + 1})] {
        access_token(&cluster.log_in(&key.token(&with(good.clone(), extra))).await);
    }
}

#[tokio::test]
async fn keys_come_by_discovery_and_a_new_one_is_found_without_asking_for_each_unknown_one() {
    let (site, first, second) = (Site::start().await, SigningKey::new("1"), SigningKey::new("2"));
    site.publish(&[&first]);
    let server = start(vec![site.trusted()]).await;
    trust(&server, "anna", &site.url, json!({"subject": "anna"})).await;
    assert_eq!(site.asked(), 0, "nobody is asked before somebody logs in");
    let claims = claims(&server, &site.url, "anna");
    for _ in 0..3 {
        access_token(&trade(&server, &first.token(&claims)).await);
    }
    assert_eq!(site.asked(), 1);
    site.publish(&[&first, &second]);
    refused(&trade(&server, &second.token(&claims)).await, "too soon to ask again");
    server.clock.advance(Duration::from_secs(5));
    access_token(&trade(&server, &second.token(&claims)).await);
    assert_eq!(site.asked(), 2);
    server.clock.advance(Duration::from_secs(5));
    let nobody = SigningKey::new("3");
    for _ in 0..20 {
        refused(&trade(&server, &nobody.token(&claims)).await, "no such key");
    }
    assert_eq!(site.asked(), 3, "anybody can invent a kid");
    access_token(&trade(&server, &first.token(&claims)).await);
}

#[tokio::test]
async fn a_withdrawn_key_ends_within_the_hour_whatever_the_issuers_server_does() {
    let (site, first, second) = (Site::start().await, SigningKey::new("1"), SigningKey::new("2"));
    site.publish(&[&first]);
    let server = start(vec![site.trusted()]).await;
    trust(&server, "anna", &site.url, json!({"subject": "anna"})).await;
    let lasting = with(claims(&server, &site.url, "anna"), json!({"exp": now(&server) + 86_400}));
    let token = first.token(&lasting);
    access_token(&trade(&server, &token).await);
    site.say("https://broken.test", "https://broken.test");
    server.clock.advance(Duration::from_secs(3599));
    access_token(&trade(&server, &token).await);
    server.clock.advance(Duration::from_secs(1));
    let away = trade(&server, &token).await;
    assert_eq!((away.status, &away.json()["errorCode"]), (503, &json!("ISSUER_UNAVAILABLE_ERR")));
    assert!(!away.body.contains("broken.test"), "the cause is for the operator: {away:?}");
    site.say(&site.url, &format!("{}/keys", site.url));
    site.publish(&[&second]);
    server.clock.advance(Duration::from_secs(5));
    refused(&trade(&server, &token).await, "the key was withdrawn");
    access_token(&trade(&server, &second.token(&lasting)).await);
}

/// Tokens that nobody has signed, of an issuer that says nothing any more.
#[tokio::test]
async fn an_issuer_that_hangs_is_asked_once_for_all_and_holds_up_nobody_whose_key_is_there() {
    let (site, key) = (Site::start().await, SigningKey::new("1"));
    site.publish(&[&key]);
    let server = start(vec![site.trusted()]).await;
    trust(&server, "anna", &site.url, json!({"subject": "anna"})).await;
    let good =
        key.token(&with(claims(&server, &site.url, "anna"), json!({"exp": now(&server) + 86_400})));
    access_token(&trade(&server, &good).await);
    site.hang();
    // The key is old enough to be asked for again.
    server.clock.advance(Duration::from_secs(601));
    let part = |value: Value| BASE64URL.encode(value.to_string());
    let header = part(json!({"alg": "RS256", "kid": "no such key"}));
    let garbage = format!("{header}.{}.AAAA", part(json!({"iss": site.url})));
    let done = AtomicUsize::new(0);
    let one = || async {
        refused(&trade(&server, &garbage).await, "garbage");
        done.fetch_add(1, Ordering::SeqCst);
    };
    let ten = || async {
        tokio::join!(one(), one(), one(), one(), one(), one(), one(), one(), one(), one());
    };
    let flood = async { tokio::join!(ten(), ten(), ten()) };
    let known = async {
        while site.held() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for _ in 0..3 {
            access_token(&trade(&server, &good).await);
        }
        assert_eq!(done.load(Ordering::SeqCst), 0, "it waited for the issuer");
        // More than the pause passes while the attempt is under way.
        server.clock.advance(Duration::from_secs(6));
    };
    // Its deadline is 5 s; one behind the other, 30 of them are 150 s.
    let both = async { tokio::join!(flood, known) };
    tokio::time::timeout(Duration::from_secs(60), both).await.expect("one waited for another");
    assert_eq!(site.held(), 1);
    refused(&trade(&server, &garbage).await, "garbage");
    assert_eq!(site.held(), 1, "the pause begins with the end of the attempt");
}

#[tokio::test]
async fn without_its_keys_an_issuer_lets_nobody_in() {
    let (site, key) = (Site::start().await, SigningKey::new("1"));
    let server = start(vec![site.trusted()]).await;
    trust(&server, "anna", &site.url, json!({"subject": "anna"})).await;
    let token = key.token(&claims(&server, &site.url, "anna"));
    let keys = format!("{}/keys", site.url);
    for (what, issuer, uri) in [
        ("no key set", site.url.clone(), keys.clone()),
        ("a slash too many", format!("{}/", site.url), keys.clone()),
        ("another issuer's document", "https://another.test".into(), keys.clone()),
        ("keys over plain HTTP", site.url.clone(), keys.replace("https", "http")),
        ("keys from a file", site.url.clone(), "file:///etc/passwd".into()),
    ] {
        site.say(&issuer, &uri);
        server.clock.advance(Duration::from_secs(5));
        let answer = trade(&server, &token).await;
        assert_eq!(answer.status, 503, "{what}: {answer:?}");
        site.publish(&[&key]);
    }
    site.say(&site.url, &keys);
    server.clock.advance(Duration::from_secs(5));
    access_token(&trade(&server, &token).await);
}

#[tokio::test]
async fn each_of_several_issuers_speaks_for_itself_only() {
    let (one, other) = (Site::start().await, Site::start().await);
    let (first, second) = (SigningKey::new("k"), SigningKey::new("k"));
    one.publish(&[&first]);
    other.publish(&[&second]);
    let server = start(vec![one.trusted(), other.trusted()]).await;
    for (site, name) in [(&one, "one"), (&other, "other")] {
        trust(&server, name, &site.url, json!({"subject": "anna"})).await;
    }
    let token =
        |key: &SigningKey, issuer: &str, who: &str| key.token(&claims(&server, issuer, who));
    let (mine, theirs) = (token(&first, &one.url, "anna"), token(&second, &other.url, "anna"));
    access_token(&trade_as("one", &server, &mine).await);
    access_token(&trade_as("other", &server, &theirs).await);
    let crossed = token(&first, &other.url, "anna");
    refused(&trade_as("other", &server, &crossed).await, "crossed");
    is_nobody(&trade_as("other", &server, &mine).await, "another issuer's");
    let unknown = token(&second, &one.url, "bert");
    refused(&trade_as("one", &server, &unknown).await, "another issuer's key");
    // What another administrator makes for the same person changes nothing.
    trust(&server, "again", &one.url, json!({"subject": "anna"})).await;
    access_token(&trade_as("one", &server, &mine).await);
    access_token(&log_in(&server, &mine, "profile_name=again").await);
}

#[tokio::test]
async fn a_profile_says_exactly_whom_it_trusts() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    let (owner, _) = server.identity(Role::Viewer, Scope::Instance(server.instance())).await;
    let admin = server.admin().await;
    let new = json!({
        "name": "other", "service_id": format!("ServiceId-{}", owner.service_id), "issuer": CLUSTER,
    });
    for (wrong, status) in [
        (json!({}), 400),
        (json!({"subject": ""}), 400),
        (json!({"subject": "a\nb"}), 400),
        (json!({"subject": "a", "namespace": "b", "service_account": "c"}), 400),
        (json!({"namespace": "b"}), 400),
        (json!({"namespace": "b:c", "service_account": "d"}), 400),
        (json!({"namespace": "b", "service_account": "*"}), 400),
        (json!({"subject": "a", "issuer": "https://another.test"}), 400),
        (json!({"subject": "a", "name": "node"}), 409),
        (json!({"subject": "a", "service_id": "00000000-0000-4000-8000-000000000000"}), 404),
        (json!({"subject": "a"}), 201),
    ] {
        let body = with(new.clone(), wrong).to_string();
        let answer = server.manage(&admin, "POST", "/v1/profiles", &body).await;
        assert_eq!(answer.status, status, "{body}: {answer:?}");
    }
}

/// The members of the records of refused logins that say what happened.
fn refusals(server: &Server) -> Vec<(String, Option<u64>)> {
    let audit = server.audit();
    let records = audit.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let refused = records.filter(|it| it["action"] == "issue_token" && it["outcome"] != "done");
    refused
        .map(|record| {
            assert!(record["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{record}");
            assert_eq!((&record["caller"], &record["api_key"]), (&Value::Null, &Value::Null));
            (record["outcome"].as_str().unwrap().to_owned(), record["count"].as_u64())
        })
        .collect()
}

#[tokio::test]
async fn who_is_refused_is_in_the_audit_log_and_a_flood_of_them_is_not() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    let admin = server.admin().await;
    let (caller, _) = server.identity(Role::Viewer, Scope::Instance(server.instance())).await;
    let (locked, unknown) = (caller.api_key().unwrap().to_string(), "nobody-has-this-one");
    let path = format!("/v1/apikeys/{locked}/lock");
    assert_eq!(server.manage(&admin, "POST", &path, "").await.status, 204);
    assert_eq!(refusals(server), []);
    for _ in 0..20 {
        for api_key in [&*locked, unknown] {
            assert_eq!(server.ask_token(api_key).await.json()["errorCode"], "BXNIM0415E");
        }
    }
    let forged = SigningKey::new("k-1").token(&cluster.claims());
    refused(&cluster.log_in(&forged).await, "forged");
    let api_key = |count| ("UNKNOWN_API_KEY".to_owned(), count);
    let mut expected = vec![api_key(None), api_key(None), api_key(None)];
    expected.push(("UNTRUSTED_TOKEN".to_owned(), None));
    assert_eq!(refusals(server), expected);
    let metrics = health(server, "/metrics", "").await;
    for sample in ["{cause=\"api_key\"} 40\n", "{cause=\"token\"} 1\n"] {
        let sample = format!("kms_server_logins_refused_total{sample}");
        assert!(metrics.contains(&sample), "{sample} is not in {metrics}");
    }
    // All the others, once a minute.
    record_rest(&server.app).await;
    record_rest(&server.app).await;
    expected.push(api_key(Some(37)));
    assert_eq!(refusals(server), expected);
    let audit = server.audit();
    for secret in [unknown, &forged] {
        assert!(!audit.contains(secret), "{audit}");
    }

    // Those of the last minute are written at the end.
    for _ in 0..5 {
        server.ask_token(unknown).await;
    }
    let server = cluster.server.restart().await;
    expected.extend([api_key(None), api_key(None), api_key(None), api_key(Some(2))]);
    assert_eq!(refusals(&server), expected);
}

#[tokio::test]
async fn a_refusal_that_cannot_be_recorded_is_no_answer_and_is_recorded_later() {
    let server = Server::start().await;
    let log = server.app.audit.path().to_owned();
    let aside = log.with_extension("aside");
    std::fs::rename(&log, &aside).unwrap();
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    let answer = server.ask_token("nobody-has-this-one").await;
    assert_eq!(
        (answer.status, &answer.json()["errorCode"]),
        (503, &json!("AUDIT_UNAVAILABLE_ERR"))
    );
    record_rest(&server.app).await;
    std::fs::remove_file(&log).unwrap();
    std::fs::rename(&aside, &log).unwrap();
    assert_eq!(refusals(&server), []);
    record_rest(&server.app).await;
    assert_eq!(refusals(&server), [("UNKNOWN_API_KEY".to_owned(), Some(1))]);
}
