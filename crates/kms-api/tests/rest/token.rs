//! Tokens: one request for many callers, renewal ahead of the end, refusals, changed API key files.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use kms_api::client::Error;
use kms_api::token::{Credential, Profile, TokenSettings, TokenSource};
use kms_core::clock::{Clock, ManualClock};
use kms_core::secret::SecretText;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::server::{Reply, Server};

const LATE: Duration = Duration::from_secs(30);
const LIFE: u64 = 1000;

fn numbered(number: usize) -> Reply {
    Reply::ok(json!({"access_token": format!("token-{number}"), "expires_in": LIFE}))
}

fn refused() -> Reply {
    let body =
        json!({"errorCode": "BXNIM0415E", "errorMessage": "Provided API key could not be found."});
    Reply::Json(400, body.to_string())
}

fn source(server: &Server, key: Credential) -> (TokenSource, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::new());
    let url = format!("{}/identity/token", server.url());
    let settings = TokenSettings { url, ca: Some(server.ca.clone()) };
    (TokenSource::new(&settings, key, clock.clone()).unwrap(), clock)
}

fn inline() -> Credential {
    Credential::ApiKey(SecretText::new("an-api-key".to_owned()))
}

async fn text(tokens: &TokenSource) -> String {
    tokens.token(LATE).await.unwrap().expose().to_owned()
}

/// Callers that all wait for the first request, which the server holds until they do.
async fn sixteen_callers(reply: fn() -> Reply) -> (Server, Vec<Result<Arc<SecretText>, Error>>) {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let server = Server::start(move |_, _| Reply::When(Arc::clone(&held), Box::new(reply()))).await;
    let (tokens, _clock) = source(&server, inline());
    let mut callers = JoinSet::new();
    for _ in 0..16 {
        let tokens = tokens.clone();
        callers.spawn(async move { tokens.token(LATE).await });
    }
    server.has_been_asked(1).await;
    gate.add_permits(16);
    let outcomes = callers.join_all().await;
    (server, outcomes)
}

#[tokio::test]
async fn many_callers_make_one_request() {
    let (server, outcomes) = sixteen_callers(|| numbered(0)).await;
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!(server.asked().len(), 1);
    let asked = &server.asked()[0];
    assert_eq!(asked.path, "/identity/token");
    assert!(asked.body.ends_with("&apikey=an-api-key"));
}

#[tokio::test]
async fn many_callers_share_one_refusal() {
    let (server, outcomes) = sixteen_callers(refused).await;
    for outcome in outcomes {
        let text = outcome.unwrap_err().to_string();
        assert_eq!(text, "BXNIM0415E:Provided API key could not be found");
    }
    assert_eq!(server.asked().len(), 1);
}

#[tokio::test]
async fn a_refusal_is_not_remembered() {
    let server =
        Server::start(|number, _| if number == 0 { refused() } else { numbered(number) }).await;
    let (tokens, _clock) = source(&server, inline());
    assert!(tokens.token(LATE).await.unwrap_err().is_refusal());
    assert_eq!(text(&tokens).await, "token-1");
}

#[tokio::test]
async fn a_caller_that_gives_up_leaves_its_place() {
    let server =
        Server::start(|number, _| if number == 0 { Reply::Hang } else { numbered(number) }).await;
    let (tokens, _clock) = source(&server, inline());
    let impatient = tokens.clone();
    let first = tokio::spawn(async move { impatient.token(LATE).await });
    server.has_been_asked(1).await;
    first.abort();
    assert_eq!(text(&tokens).await, "token-1");
}

#[tokio::test]
async fn a_token_is_kept_renewed_ahead_and_then_replaced() {
    let server = Server::start(|number, _| numbered(number)).await;
    let (tokens, clock) = source(&server, inline());
    assert_eq!(text(&tokens).await, "token-0");
    clock.advance(Duration::from_secs(LIFE * 79 / 100));
    assert_eq!(text(&tokens).await, "token-0");
    assert_eq!(server.asked().len(), 1);

    // At 80 % of its life the old token still serves, and the next one is on its way.
    clock.advance(Duration::from_secs(LIFE / 50));
    assert_eq!(text(&tokens).await, "token-0");
    server.has_been_asked(2).await;
    while text(&tokens).await == "token-0" {
        tokio::task::yield_now().await;
    }
    assert_eq!(text(&tokens).await, "token-1");
    assert_eq!(server.asked().len(), 2);

    clock.advance(Duration::from_secs(LIFE));
    assert_eq!(text(&tokens).await, "token-2");
}

#[tokio::test]
async fn an_outage_leaves_the_old_token_until_it_ends() {
    let server = Server::start(|number, _| match number {
        0 => numbered(0),
        _ => Reply::Json(503, "<html>".to_owned()),
    })
    .await;
    let (tokens, clock) = source(&server, inline());
    assert_eq!(text(&tokens).await, "token-0");
    clock.advance(Duration::from_secs(LIFE * 9 / 10));
    assert_eq!(text(&tokens).await, "token-0");
    server.has_been_asked(2).await;
    assert_eq!(text(&tokens).await, "token-0");

    clock.advance(Duration::from_secs(LIFE / 10));
    assert!(tokens.token(LATE).await.unwrap_err().is_outage());
}

#[tokio::test]
async fn an_api_key_withdrawn_shows_at_the_renewal() {
    let server = Server::start(|number, _| if number == 0 { numbered(0) } else { refused() }).await;
    let (tokens, clock) = source(&server, inline());
    assert_eq!(text(&tokens).await, "token-0");
    clock.advance(Duration::from_secs(LIFE * 9 / 10));
    let error = loop {
        match tokens.token(LATE).await {
            Ok(_) => tokio::task::yield_now().await,
            Err(error) => break error,
        }
    };
    assert!(error.is_refusal(), "{error:?}");
}

#[tokio::test]
async fn an_invalidated_token_is_replaced_but_only_that_one() {
    let server = Server::start(|number, _| numbered(number)).await;
    let (tokens, _clock) = source(&server, inline());
    let first = tokens.token(LATE).await.unwrap();
    tokens.invalidate(&first);
    assert_eq!(text(&tokens).await, "token-1");
    tokens.invalidate(&first);
    assert_eq!(text(&tokens).await, "token-1");
}

#[tokio::test]
async fn a_changed_api_key_file_is_read_again() {
    let server = Server::start(|number, _| numbered(number)).await;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "first-key").unwrap();
    let (tokens, _clock) = source(&server, Credential::ApiKeyFile(file.path().to_owned()));
    let first = tokens.token(LATE).await.unwrap();
    std::fs::write(file.path(), "  second-key\n").unwrap();
    tokens.invalidate(&first);
    tokens.token(LATE).await.unwrap();
    let asked = server.asked();
    assert!(asked[0].body.ends_with("&apikey=first-key"));
    assert!(asked[1].body.ends_with("&apikey=second-key"));
}

#[tokio::test]
async fn an_api_key_file_that_cannot_be_used_is_named() {
    let server = Server::start(|number, _| numbered(number)).await;
    let empty = tempfile::NamedTempFile::new().unwrap();
    for path in [empty.path(), "/nonexistent/api-key".as_ref()] {
        let (tokens, _clock) = source(&server, Credential::ApiKeyFile(path.to_owned()));
        let error = tokens.token(LATE).await.unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    assert!(server.asked().is_empty());
}

/// A token of a service account that ends `life` seconds from now on.
fn cr_token(clock: &ManualClock, name: &str, life: u64) -> String {
    let end = clock.wall().duration_since(UNIX_EPOCH).unwrap().as_secs() + life;
    let claims = json!({"sub": name, "exp": end}).to_string();
    format!("eyJhbGciOiJSUzI1NiJ9.{}.c2ln", BASE64URL.encode(claims))
}

fn account(server: &Server, path: &Path) -> (TokenSource, Arc<ManualClock>) {
    let profile = Profile { id: Some("Profile-1".to_owned()), name: Some("node".to_owned()) };
    source(server, Credential::CrTokenFile { path: path.to_owned(), profile })
}

fn not_good_now() -> Reply {
    let body = json!({"errorCode": "BXNIM0407E", "errorMessage": "Provided token is invalid."});
    Reply::Json(400, body.to_string())
}

fn not_trusted() -> Reply {
    let body = json!({"errorCode": "BXNIM0513E", "errorMessage": "You are not authorized."});
    Reply::Json(403, body.to_string())
}

#[tokio::test]
async fn a_service_accounts_token_is_read_anew_for_each_token() {
    let server = Server::start(|number, _| numbered(number)).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let (tokens, clock) = account(&server, file.path());
    let (first, second) = (cr_token(&clock, "first", 600), cr_token(&clock, "second", 600));
    std::fs::write(file.path(), format!("{first}\n")).unwrap();
    let got = tokens.token(LATE).await.unwrap();
    // As kubelet does it.
    std::fs::write(file.path(), &second).unwrap();
    tokens.invalidate(&got);
    tokens.token(LATE).await.unwrap();
    let asked = server.asked();
    for (asked, token) in asked.iter().zip([first, second]) {
        let members = format!("&profile_id=Profile-1&profile_name=node&cr_token={token}");
        assert!(asked.body.ends_with(&members), "{}", asked.body);
        assert!(!asked.body.contains("apikey="), "{}", asked.body);
    }
    assert_eq!(asked.len(), 2);
}

/// Whoever renews the file is away: nothing was withdrawn, and the token that is held serves until it ends.
#[tokio::test]
async fn without_a_fresh_token_in_its_file_there_is_an_outage_and_no_refusal() {
    let server =
        Server::start(|number, _| if number == 0 { numbered(0) } else { not_good_now() }).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let (tokens, clock) = account(&server, file.path());
    std::fs::write(file.path(), cr_token(&clock, "stale", LIFE / 2)).unwrap();
    assert_eq!(text(&tokens).await, "token-0");
    clock.advance(Duration::from_secs(LIFE * 9 / 10));
    assert_eq!(text(&tokens).await, "token-0");
    server.has_been_asked(2).await;
    assert_eq!(text(&tokens).await, "token-0");
    clock.advance(Duration::from_secs(LIFE / 10));
    let error = tokens.token(LATE).await.unwrap_err();
    assert!(error.is_outage() && !error.is_refusal(), "{error:?}");
    assert!(error.to_string().contains("ended 500 s ago and was not replaced"), "{error}");

    let path = file.path().to_owned();
    drop(file);
    let error = tokens.token(LATE).await.unwrap_err();
    assert!(error.is_outage() && error.to_string().contains(path.to_str().unwrap()), "{error}");
}

#[tokio::test]
async fn a_service_account_that_is_refused_loses_its_token_at_the_renewal() {
    let server =
        Server::start(|number, _| if number == 0 { numbered(0) } else { not_trusted() }).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let (tokens, clock) = account(&server, file.path());
    std::fs::write(file.path(), cr_token(&clock, "good", LIFE * 2)).unwrap();
    assert_eq!(text(&tokens).await, "token-0");
    clock.advance(Duration::from_secs(LIFE * 9 / 10));
    let error = loop {
        match tokens.token(LATE).await {
            Ok(_) => tokio::task::yield_now().await,
            Err(error) => break error,
        }
    };
    assert_eq!(error.to_string(), "BXNIM0513E:You are not authorized");
    assert!(error.is_refusal());
}

#[tokio::test]
async fn no_secret_is_in_a_debug_text() {
    let server = Server::start(|number, _| numbered(number)).await;
    let (tokens, _clock) = source(&server, inline());
    let token = tokens.token(LATE).await.unwrap();
    let shown = format!("{tokens:?} {token:?} {:?}", inline());
    assert!(!shown.contains("token-0") && !shown.contains("an-api-key"), "{shown}");
}
