//! Access tokens: got at the token service for a credential, kept until shortly before they end, and renewed before any
//! caller has to wait. One request at a time, however many callers need a token; no token or API key is ever
//! logged, written or shown.

mod credential;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::Method;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use kms_core::clock::Clock;
use kms_core::secret::SecretText;
use tokio::time::{Instant, timeout_at};

use crate::client::https::{Exchange, Https, headers, until};
use crate::client::{Ca, Error, SetupError, USER_AGENT};
use crate::rest::TokenAnswer;

use credential::Shown;
pub use credential::{Credential, Profile, expiry};

/// No token lives longer here, whatever the service says.
const MAX_LIFE: Duration = Duration::from_secs(24 * 3600);
/// A token that ends within this time may end on its way.
const MARGIN: Duration = Duration::from_secs(10);
/// What a renewal in the background may take; nobody waits for it.
const RENEWAL_DEADLINE: Duration = Duration::from_secs(10);
/// After a renewal that failed, the next attempt waits: an outage must not become a request per call.
const RENEWAL_PAUSE: Duration = Duration::from_secs(15);

#[derive(Debug, Clone)]
pub struct TokenSettings {
    /// The full URL of the token endpoint.
    pub url: String,
    pub ca: Option<Ca>,
}

/// Gives out tokens. Clones share one token.
#[derive(Clone)]
pub struct TokenSource {
    shared: Arc<Shared>,
}

struct Shared {
    https: Https,
    credential: Credential,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// Held by whoever asks the token service; the others wait for what comes of it.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    token: Option<Kept>,
    /// How many requests came to an end, so that a waiter knows whether one did while it waited.
    finished: u64,
    last_error: Option<Error>,
    renew_not_before: Duration,
}

#[derive(Clone)]
struct Kept {
    text: Arc<SecretText>,
    /// From here on it is renewed in the background.
    renew_at: Duration,
    /// From here on it is not given out.
    ends_at: Duration,
}

impl TokenSource {
    /// Connects to nothing and reads no file yet.
    ///
    /// # Errors
    /// Settings that no client can be made of.
    pub fn new(
        settings: &TokenSettings,
        credential: Credential,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, SetupError> {
        let ca = settings.ca.as_ref();
        let https = Https::new("the token service", &settings.url, ca, 1, USER_AGENT)?;
        let (state, asking) = (Mutex::default(), tokio::sync::Mutex::default());
        Ok(TokenSource { shared: Arc::new(Shared { https, credential, clock, state, asking }) })
    }

    /// A token that is good now. Waits only if there is none.
    ///
    /// # Errors
    /// `Iam` if the credential is refused; `ApiKeyFile` or `CrTokenFile` if there is none in its file, or one that has
    /// ended; `Unreachable`, `TimedOut`, `BadAnswer`.
    pub async fn token(&self, deadline: Duration) -> Result<Arc<SecretText>, Error> {
        self.token_until(until(deadline)).await
    }

    pub(crate) async fn token_until(&self, until: Instant) -> Result<Arc<SecretText>, Error> {
        match self.shared.kept() {
            Some(kept) => {
                if kept.renew_at <= self.shared.clock.now() {
                    self.renew();
                }
                Ok(kept.text)
            }
            None => self.shared.obtain(until).await,
        }
    }

    /// How long the token that is held is still given out; `None` without one.
    pub fn life_left(&self) -> Option<Duration> {
        let kept = self.shared.kept()?;
        Some(kept.ends_at.saturating_sub(self.shared.clock.now()))
    }

    /// Forgets this token, because a service refused it; a newer one, got by somebody else meanwhile, stays.
    pub fn invalidate(&self, refused: &Arc<SecretText>) {
        self.shared.forget(refused);
    }

    /// Starts a renewal, unless one runs or failed a moment ago.
    fn renew(&self) {
        let shared = Arc::clone(&self.shared);
        if !shared.claim_renewal() {
            return;
        }
        tokio::spawn(async move {
            let Ok(_asking) = shared.asking.try_lock() else { return };
            let old = shared.state().token.clone();
            let refused =
                shared.ask(until(RENEWAL_DEADLINE)).await.is_err_and(|error| error.is_refusal());
            // A withdrawn credential shows at once, not when the old token ends.
            if let (true, Some(old)) = (refused, old) {
                shared.forget(&old.text);
            }
        });
    }
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenSource").field("https", &self.shared.https).finish_non_exhaustive()
    }
}

impl Shared {
    fn kept(&self) -> Option<Kept> {
        let now = self.clock.now();
        self.state().token.clone().filter(|kept| now < kept.ends_at)
    }

    fn forget(&self, token: &Arc<SecretText>) {
        let mut state = self.state();
        if state.token.as_ref().is_some_and(|kept| Arc::ptr_eq(&kept.text, token)) {
            state.token = None;
        }
    }

    fn claim_renewal(&self) -> bool {
        let now = self.clock.now();
        let mut state = self.state();
        let claimed = state.renew_not_before <= now;
        if claimed {
            state.renew_not_before = now + RENEWAL_PAUSE;
        }
        claimed
    }

    /// Waits for its turn and asks, unless the one before got a token or a refusal meanwhile: 32 callers with a wrong
    /// API key make one request, not 32 in a row.
    async fn obtain(&self, until: Instant) -> Result<Arc<SecretText>, Error> {
        let joined = self.state().finished;
        let turn = timeout_at(until, self.asking.lock()).await;
        let _asking = turn.map_err(|_| self.https.timed_out())?;
        if let Some(kept) = self.kept() {
            return Ok(kept.text);
        }
        if let Some(error) = self.error_since(joined) {
            return Err(error);
        }
        self.ask(until).await
    }

    fn error_since(&self, joined: u64) -> Option<Error> {
        let state = self.state();
        let error = state.last_error.clone().filter(|_| state.finished > joined);
        // Another caller's shorter deadline says nothing about this one.
        error.filter(|error| !matches!(error, Error::TimedOut { .. }))
    }

    /// One request to the token service; the caller holds `asking`.
    async fn ask(&self, until: Instant) -> Result<Arc<SecretText>, Error> {
        let outcome = self.request(until).await;
        let mut state = self.state();
        state.finished = state.finished.wrapping_add(1);
        match outcome {
            Ok(kept) => {
                let text = Arc::clone(&kept.text);
                state.token = Some(kept);
                state.last_error = None;
                state.renew_not_before = Duration::ZERO;
                Ok(text)
            }
            Err(error) => {
                state.last_error = Some(error.clone());
                Err(error)
            }
        }
    }

    async fn request(&self, until: Instant) -> Result<Kept, Error> {
        let asked_at = self.clock.now();
        let Shown { form, foreign } = self.credential.show()?;
        let headers = headers([
            (CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded")),
            (ACCEPT, HeaderValue::from_static("application/json")),
        ]);
        let (method, path, body) = (Method::POST, String::new(), form.into_bytes());
        let exchange = Exchange { method, path, headers, body, replay: true };
        let answer = self.https.exchange(&exchange, until).await?;
        if !answer.status.is_success() {
            let refusal = Error::from_token_service(self.https.what(), answer.status, &answer.body);
            return Err(match foreign {
                Some(foreign) => foreign.explain(refusal, self.clock.wall()),
                None => refusal,
            });
        }
        let token =
            token_in(&answer.body).ok_or_else(|| self.https.bad_answer("no token is in it"))?;
        Ok(Kept::new(token, asked_at))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Its life counts from the request, not from the answer: a slow answer must not lengthen it.
    fn new(token: TokenAnswer, asked_at: Duration) -> Self {
        let life = Duration::from_secs(u64::from(token.expires_in)).min(MAX_LIFE);
        let margin = MARGIN.min(life / 10);
        let early = life / 5 * chance(&token.access_token) / 255;
        Kept {
            text: Arc::new(token.access_token),
            renew_at: asked_at + life * 4 / 5 - early,
            ends_at: asked_at + life - margin,
        }
    }
}

/// 0 to 255, different for each token: those who got theirs together, when an outage ended, do not all renew together.
/// The token's own bytes are chance enough, and say nothing to the token service that it does not know.
fn chance(token: &SecretText) -> u32 {
    let mix = |sum: u8, byte| sum.wrapping_mul(31).wrapping_add(byte);
    u32::from(token.expose().bytes().fold(0, mix))
}

/// A token that can be sent and lives. None for anything else.
fn token_in(body: &[u8]) -> Option<TokenAnswer> {
    let answer: TokenAnswer = serde_json::from_slice(body).ok()?;
    let sendable = answer.access_token.expose().bytes().all(|byte| byte.is_ascii_graphic());
    (sendable && !answer.access_token.is_empty() && answer.expires_in > 0).then_some(answer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_without_life_or_with_line_breaks_is_none() {
        let answer = |token: &str, life: u32| {
            let json = serde_json::json!({"access_token": token, "expires_in": life});
            token_in(json.to_string().as_bytes()).is_some()
        };
        assert!(answer("eyJ.a-b_c.x", 3600));
        assert!(!answer("eyJ", 0));
        assert!(!answer("", 3600));
        assert!(!answer("a\r\nicp-instance: other", 3600));
    }

    #[test]
    fn tokens_that_were_got_together_are_renewed_apart() {
        let renewed = |number: u32| {
            let access_token = SecretText::new(format!("eyJhbGciOiJSUzI1NiJ9.{number}.c2ln"));
            let answer = TokenAnswer {
                access_token,
                expires_in: 3600,
                refresh_token: None,
                token_type: String::new(),
                expiration: 0,
                scope: String::new(),
            };
            Kept::new(answer, Duration::ZERO).renew_at
        };
        let mut times: Vec<_> = (0..1000).map(renewed).collect();
        times.sort();
        // Within 12 minutes, and no minute has more than three times its share.
        let (first, last) = (Duration::from_secs(2160), Duration::from_secs(2880));
        assert!(first <= times[0] && times[999] <= last, "{:?} {:?}", times[0], times[999]);
        for minute in 36..48 {
            let count = times.iter().filter(|time| time.as_secs() / 60 == minute).count();
            assert!(count < 250, "{count} in minute {minute}");
        }
    }

    proptest! {
        #[test]
        fn any_body_is_a_good_token_or_none(body: Vec<u8>) {
            if let Some(answer) = token_in(&body) {
                prop_assert!(answer.expires_in > 0);
            }
        }

        #[test]
        fn any_json_members_are_a_sendable_token_or_none(token: String, life: u32, more: String) {
            let json = serde_json::json!({"access_token": token, "expires_in": life, "scope": more});
            if let Some(answer) = token_in(json.to_string().as_bytes()) {
                prop_assert!(HeaderValue::from_str(answer.access_token.expose()).is_ok());
            }
        }

        #[test]
        fn a_token_is_renewed_before_it_ends_and_never_outlives_itself(life in 1u32.., at in 0u64..1 << 40) {
            let at = Duration::from_millis(at);
            let text = SecretText::new("t".to_owned());
            let answer = TokenAnswer { access_token: text, expires_in: life, refresh_token: None,
                token_type: String::new(), expiration: 0, scope: String::new() };
            let kept = Kept::new(answer, at);
            prop_assert!(kept.renew_at < kept.ends_at);
            prop_assert!(kept.renew_at >= at + Duration::from_secs(u64::from(life)).min(MAX_LIFE) / 2);
            prop_assert!(kept.ends_at <= at + Duration::from_secs(u64::from(life)));
        }
    }
}
