//! The client of a key service that speaks Key Protect REST v2: ours, IBM's on-premises product of 2019 and the
//! cloud service, all by the `?action=` form that each of them serves.
//!
//! A call takes one token, one exchange, and after a 401 one more of each. It never retries an outage: how often to
//! try again is the caller's policy, and its deadline covers everything here, the token included.

mod document;
mod error;
pub(crate) mod https;
mod management;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};
use kms_core::secret::SecretText;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use uuid::Uuid;

pub use self::document::Document;
pub use self::error::{Error, SetupError, causes};
use self::https::{Answer, Exchange, Https, WipedBuffer, header, headers};
pub use self::management::Management;
use crate::rest::{
    Collection, KEY_ACTION_TYPE, KEY_TYPE, KeyResource, RotateRequest, UnwrapAnswer, UnwrapRequest,
    WrapAnswer, WrapRequest,
};
use crate::token::TokenSource;
use crate::trace::{TRACEPARENT, TraceParent};

/// What this code calls itself to servers, unless told otherwise.
pub const USER_AGENT: &str = concat!("keelson/", env!("CARGO_PKG_VERSION"));

const KEYS: &str = "/api/v2/keys";

/// Which CA must have signed the server's certificate. No other is trusted, the system's least of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ca {
    /// A PEM file, read when the client is made.
    File(PathBuf),
    Pem(Vec<u8>),
}

impl fmt::Display for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ca::File(path) => path.display().fmt(f),
            Ca::Pem(_) => f.write_str("(given as text)"),
        }
    }
}

#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// `https://host[:port][/prefix]`; `/api/v2/keys` comes behind it.
    pub url: String,
    pub instance_id: String,
    pub ca: Option<Ca>,
    /// How many connections at most; 2 serve 17,000 calls a second.
    pub max_connections: usize,
    pub user_agent: String,
}

/// What one call may take, and the name under which both sides log it.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// The time that is left, for everything.
    pub deadline: Duration,
    /// Sent as `Correlation-Id`. Without one, or if it does not fit into a header, a new UUID is sent.
    pub correlation_id: Option<&'a str>,
    /// Sent as `traceparent`, if the caller is part of a trace.
    pub trace: Option<TraceParent>,
}

impl Call<'_> {
    pub fn within(deadline: Duration) -> Self {
        Call { deadline, correlation_id: None, trace: None }
    }
}

/// What a new key is called.
#[derive(Debug, Clone, Default)]
pub struct NewKey {
    pub name: String,
    pub description: Option<String>,
    pub aliases: Vec<String>,
    /// True for a standard key, whose material the service gives out; a root key otherwise.
    pub extractable: bool,
    /// RFC 3339. From then on it wraps no more, and goes on unwrapping.
    pub expires: Option<String>,
}

/// Which keys to list.
#[derive(Debug, Clone, Default)]
pub struct KeyQuery {
    pub limit: Option<u32>,
    pub offset: Option<u32>,
    /// States to list; the service's default leaves out destroyed keys.
    pub states: Vec<u8>,
}

#[derive(Debug)]
pub struct KeyProtect {
    https: Https,
    instance: HeaderValue,
    tokens: TokenSource,
}

impl KeyProtect {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// Settings that no client can be made of.
    pub fn new(settings: &ClientSettings, tokens: TokenSource) -> Result<Self, SetupError> {
        let https = Https::new(
            "the key service",
            &settings.url,
            settings.ca.as_ref(),
            settings.max_connections,
            &settings.user_agent,
        )?;
        let instance = header("instance ID", &settings.instance_id)?;
        Ok(KeyProtect { https, instance, tokens })
    }

    /// How long the token that is held is still used; `None` without one.
    pub fn token_life_left(&self) -> Option<Duration> {
        self.tokens.life_left()
    }

    /// Wraps `plaintext` with the CRK; without it the service makes a DEK, wraps it and returns both.
    ///
    /// # Errors
    /// See [`Error`]; true of every method here.
    pub async fn wrap(
        &self,
        crk: &str,
        plaintext: Option<&[u8]>,
        aad: &[String],
        call: Call<'_>,
    ) -> Result<WrapAnswer, Error> {
        let request = WrapRequest { plaintext: plaintext.map(encoded), aad: some(aad) };
        let path = format!("{}?action=wrap", key_path(crk));
        let answer = self.ask(Ask::action(path, &request, Replay::Safe)?, call).await?;
        self.parse(&answer)
    }

    /// Unwraps a WDEK with the CRK version that made it.
    pub async fn unwrap(
        &self,
        crk: &str,
        ciphertext: &str,
        aad: &[String],
        call: Call<'_>,
    ) -> Result<UnwrapAnswer, Error> {
        let request = UnwrapRequest { ciphertext: ciphertext.to_owned(), aad: some(aad) };
        let path = format!("{}?action=unwrap", key_path(crk));
        let answer = self.ask(Ask::action(path, &request, Replay::Safe)?, call).await?;
        self.parse(&answer)
    }

    /// A key whose material the HSM makes.
    pub async fn create_key(&self, key: &NewKey, call: Call<'_>) -> Result<KeyResource, Error> {
        self.add_key(key, None, call).await
    }

    /// A key from existing material.
    pub async fn import_key(
        &self,
        key: &NewKey,
        material: &[u8],
        call: Call<'_>,
    ) -> Result<KeyResource, Error> {
        self.add_key(key, Some(encoded(material)), call).await
    }

    pub async fn list_keys(
        &self,
        query: &KeyQuery,
        call: Call<'_>,
    ) -> Result<Collection<KeyResource>, Error> {
        let answer = self.ask(Ask::read(format!("{KEYS}{query}")), call).await?;
        self.parse(&answer)
    }

    pub async fn get_key(&self, id: &str, call: Call<'_>) -> Result<KeyResource, Error> {
        let answer = self.ask(Ask::read(key_path(id)), call).await?;
        self.parse_one(&answer)
    }

    /// Adds a version to the key. An imported key needs the `material` of that version, a generated one takes none.
    pub async fn rotate_key(
        &self,
        id: &str,
        material: Option<&[u8]>,
        call: Call<'_>,
    ) -> Result<(), Error> {
        let request = RotateRequest { payload: material.map(encoded) };
        let path = format!("{}?action=rotate", key_path(id));
        self.ask(Ask::action(path, &request, Replay::Never)?, call).await.map(drop)
    }

    /// Suspends the key: it neither wraps nor unwraps until it is enabled.
    pub async fn disable_key(&self, id: &str, call: Call<'_>) -> Result<(), Error> {
        self.act(id, "disable", call).await
    }

    pub async fn enable_key(&self, id: &str, call: Call<'_>) -> Result<(), Error> {
        self.act(id, "enable", call).await
    }

    pub async fn delete_key(&self, id: &str, call: Call<'_>) -> Result<(), Error> {
        // Not replayed: the second answer would say "deleted already" of what this call did.
        let ask = Ask { method: Method::DELETE, replay: Replay::Never, ..Ask::read(key_path(id)) };
        self.ask(ask, call).await.map(drop)
    }

    /// Removes a destroyed key for good.
    pub async fn purge_key(&self, id: &str, call: Call<'_>) -> Result<(), Error> {
        let path = format!("{}/purge", key_path(id));
        // Not replayed: the second answer would say "not found" of what this call did.
        let ask = Ask { method: Method::DELETE, replay: Replay::Never, ..Ask::read(path) };
        self.ask(ask, call).await.map(drop)
    }

    async fn act(&self, id: &str, action: &str, call: Call<'_>) -> Result<(), Error> {
        let path = format!("{}?action={action}", key_path(id));
        // Not replayed: the second answer would say "not in a valid state" of what this call did.
        let ask = Ask { method: Method::POST, replay: Replay::Never, ..Ask::read(path) };
        self.ask(ask, call).await.map(drop)
    }

    async fn add_key(
        &self,
        key: &NewKey,
        payload: Option<SecretText>,
        call: Call<'_>,
    ) -> Result<KeyResource, Error> {
        let resource = KeyResource {
            kind: Some(KEY_TYPE.to_owned()),
            name: Some(key.name.clone()),
            description: key.description.clone(),
            aliases: key.aliases.clone(),
            extractable: Some(key.extractable),
            expiration_date: key.expires.clone(),
            payload,
            ..KeyResource::default()
        };
        let envelope = Collection::new(KEY_TYPE, vec![resource]);
        let ask = Ask {
            content_type: KEY_TYPE,
            ..Ask::action(KEYS.to_owned(), &envelope, Replay::Never)?
        };
        let answer = self.ask(ask, call).await?;
        self.parse_one(&answer)
    }

    async fn ask(&self, ask: Ask, call: Call<'_>) -> Result<Answer, Error> {
        let headers = self.headers(&ask, call);
        with_token(
            &self.https,
            &self.tokens,
            ask,
            headers,
            https::until(call.deadline),
            |status, body| Error::from_key_service(self.https.what(), status, body),
        )
        .await
    }

    fn headers(&self, ask: &Ask, call: Call<'_>) -> HeaderMap {
        let mut headers = headers([
            // The on-premises product knows the first name, the cloud service the second.
            (HeaderName::from_static("icp-instance"), self.instance.clone()),
            (HeaderName::from_static("bluemix-instance"), self.instance.clone()),
            (HeaderName::from_static("correlation-id"), correlation(call.correlation_id)),
        ]);
        if !ask.body.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(ask.content_type));
        }
        let trace = call.trace.and_then(|trace| HeaderValue::try_from(trace.to_string()).ok());
        headers.extend(trace.map(|trace| (HeaderName::from_static(TRACEPARENT), trace)));
        headers
    }

    fn parse<T: DeserializeOwned>(&self, answer: &Answer) -> Result<T, Error> {
        parse(&self.https, answer)
    }

    fn parse_one(&self, answer: &Answer) -> Result<KeyResource, Error> {
        let envelope: Collection<KeyResource> = self.parse(answer)?;
        let first = envelope.resources.into_iter().next();
        first.ok_or_else(|| self.https.bad_answer("no key is in it"))
    }
}

/// The query string, empty or from `?` on.
impl fmt::Display for KeyQuery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let states: Vec<String> = self.states.iter().map(u8::to_string).collect();
        let members = [
            ("limit", self.limit.map(|limit| limit.to_string())),
            ("offset", self.offset.map(|offset| offset.to_string())),
            ("state", Some(states.join(",")).filter(|states| !states.is_empty())),
        ];
        let mut mark = '?';
        for (name, value) in members {
            let Some(value) = value else { continue };
            write!(f, "{mark}{name}={value}")?;
            mark = '&';
        }
        Ok(())
    }
}

/// One request before it has a token.
pub(crate) struct Ask {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) content_type: &'static str,
    pub(crate) body: Bytes,
    pub(crate) replay: Replay,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Replay {
    /// Twice is as good as once: a lost connection is tried again.
    Safe,
    Never,
}

impl Ask {
    pub(crate) fn read(path: String) -> Self {
        let body = Bytes::new();
        Ask { method: Method::GET, path, content_type: KEY_TYPE, body, replay: Replay::Safe }
    }

    pub(crate) fn action(
        path: String,
        body: &impl Serialize,
        replay: Replay,
    ) -> Result<Self, Error> {
        let mut buffer = WipedBuffer::with_capacity(1024);
        serde_json::to_writer(&mut buffer, body).map_err(|error| Error::BadAnswer {
            what: "the request".to_owned(),
            cause: error.to_string(),
        })?;
        let body = buffer.into_bytes();
        Ok(Ask { method: Method::POST, path, content_type: KEY_ACTION_TYPE, body, replay })
    }
}

/// One exchange with a token, and one more with a new token if the first was refused for its token. A status other
/// than 2xx becomes what `refused` makes of it.
pub(crate) async fn with_token(
    https: &Https,
    tokens: &TokenSource,
    ask: Ask,
    headers: HeaderMap,
    until: Instant,
    refused: impl Fn(StatusCode, &[u8]) -> Error,
) -> Result<Answer, Error> {
    let Ask { method, path, body, replay, .. } = ask;
    let mut exchange = Exchange { method, path, headers, body, replay: replay == Replay::Safe };
    let mut token = tokens.token_until(until).await?;
    let mut fresh = false;
    loop {
        exchange.headers.insert(AUTHORIZATION, bearer(https, &token)?);
        let answer = https.exchange(&exchange, until).await?;
        if answer.status.is_success() {
            return Ok(answer);
        }
        let error = refused(answer.status, &answer.body);
        let wants_token =
            answer.status == StatusCode::UNAUTHORIZED || error.tells_of_an_old_token();
        if fresh || !wants_token {
            return Err(error);
        }
        tokens.invalidate(&token);
        token = tokens.token_until(until).await?;
        fresh = true;
    }
}

pub(crate) fn parse<T: DeserializeOwned>(https: &Https, answer: &Answer) -> Result<T, Error> {
    // serde's own text could quote a member's value, which may be a DEK: only the place is told.
    serde_json::from_slice(&answer.body).map_err(|error| {
        https.bad_answer(format_args!(
            "its JSON does not fit (line {}, column {})",
            error.line(),
            error.column()
        ))
    })
}

fn bearer(https: &Https, token: &Arc<SecretText>) -> Result<HeaderValue, Error> {
    let text = zeroize::Zeroizing::new(format!("Bearer {}", token.expose()));
    let mut value = HeaderValue::from_str(&text)
        .map_err(|_| https.bad_answer("its token is no header text"))?;
    value.set_sensitive(true);
    Ok(value)
}

pub(crate) fn correlation(id: Option<&str>) -> HeaderValue {
    let given = id.filter(|id| !id.is_empty() && id.len() <= 128);
    let value = given.and_then(|id| HeaderValue::from_str(id).ok());
    value.unwrap_or_else(|| {
        // A name for two logs, no secret and no input of any decision: the one place that draws its own randomness.
        let mut text = Uuid::encode_buffer();
        let id: &str = Uuid::new_v4().as_hyphenated().encode_lower(&mut text);
        HeaderValue::from_str(id).unwrap_or_else(|_| HeaderValue::from_static("-"))
    })
}

fn encoded(bytes: &[u8]) -> SecretText {
    SecretText::new(STANDARD.encode(bytes))
}

fn some(aad: &[String]) -> Option<Vec<String>> {
    (!aad.is_empty()).then(|| aad.to_vec())
}

fn key_path(id: &str) -> String {
    format!("{KEYS}/{}", path_segment(id))
}

/// Anything as one segment of a path: an id from a configuration file must not reach another route.
pub(crate) fn path_segment(text: &str) -> String {
    let mut segment = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'~' => {
                segment.push(char::from(byte))
            }
            _ => segment.push_str(&format!("%{byte:02X}")),
        }
    }
    segment
}
