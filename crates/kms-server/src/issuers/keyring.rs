//! The keys of one issuer, kept for a while. Whoever asks for a key that is not there makes the issuer be asked again,
//! but once for all who wait, and not again for a few seconds: a token's `kid` is anybody's to choose. An issuer that
//! hangs never holds up whose key is there.

use super::document::{Key, Keys, MAX_DOCUMENT, jwks_uri};
use super::{KeySource, Trusted};
use kms_api::client::{Ca, Document, SetupError};
use kms_core::clock::Clock;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Keys are asked for again, while they go on serving, when they are this old ...
const REFRESH_AFTER: Duration = Duration::from_secs(600);
/// ... and are not used when they are this old: a withdrawn key ends by then, whatever the issuer's server does.
const MAX_AGE: Duration = Duration::from_secs(3600);
/// Between the end of an attempt, successful or not, and the next.
const PAUSE: Duration = Duration::from_secs(5);
/// What discovery and keys together may take; somebody waits for it.
const DEADLINE: Duration = Duration::from_secs(5);

pub(super) struct Keyring(Arc<Shared>);

struct Shared {
    source: Source,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    kept: Option<Kept>,
    last: Option<Attempt>,
    /// Nothing is ever sent: the attempt is over when its sender is gone, however it ended.
    asking: Option<watch::Receiver<()>>,
}

struct Kept {
    keys: Keys,
    /// When they were asked for.
    at: Duration,
}

struct Attempt {
    /// When it was over: a pause that began with it would be over with an issuer's silence.
    at: Duration,
    failure: Option<String>,
}

enum Source {
    Discovery { issuer: String, document: Box<Document>, ca: Ca },
    File(PathBuf),
}

impl Keyring {
    pub(super) fn new(trusted: &Trusted, clock: Arc<dyn Clock>) -> Result<Self, SetupError> {
        let source = match &trusted.keys {
            KeySource::File(path) => Source::File(path.clone()),
            KeySource::Discovery { ca } => {
                let (issuer, ca) = (trusted.url.clone(), Ca::File(ca.clone()));
                let path = "/.well-known/openid-configuration";
                let url = format!("{}{path}", issuer.trim_end_matches('/'));
                let document = Document::new("the issuer's discovery document", &url, &ca)?;
                let document = Box::new(document);
                Source::Discovery { issuer, document, ca }
            }
        };
        Ok(Keyring(Arc::new(Shared { source, clock, state: Mutex::default() })))
    }

    /// The key `kid`; `None` when the issuer has none of that name. Who asks for one that is there waits for nobody.
    ///
    /// # Errors
    /// Why the issuer's keys cannot be had, when those that are kept are too old or there are none.
    pub(super) async fn key(&self, kid: &str) -> Result<Option<Key>, String> {
        let asking = {
            let (mut state, now) = (self.0.lock(), self.0.clock.now());
            let key = state.key(kid, now);
            if key.is_some() && state.kept(now, REFRESH_AFTER).is_some() {
                return Ok(key);
            }
            let asking = self.ask(&mut state, now);
            if key.is_some() {
                return Ok(key);
            }
            asking
        };
        if let Some(mut asking) = asking {
            let _over = asking.changed().await;
        }
        self.0.lock().answer(kid, self.0.clock.now())
    }

    /// The attempt that is under way, or a new one, which goes on when nobody waits any more; `None` in the pause.
    fn ask(&self, state: &mut State, now: Duration) -> Option<watch::Receiver<()>> {
        if let Some(asking) = state.asking.as_ref().filter(|asking| asking.has_changed().is_ok()) {
            return Some(asking.clone());
        }
        if state.last.as_ref().is_some_and(|last| now < last.at + PAUSE) {
            return None;
        }
        let (over, asking) = watch::channel(());
        let shared = self.0.clone();
        tokio::spawn(async move {
            shared.ask(now).await;
            drop(over);
        });
        state.asking = Some(asking.clone());
        Some(asking)
    }
}

impl Shared {
    async fn ask(&self, now: Duration) {
        let keys = self.source.read().await;
        let mut state = self.lock();
        let failure = match keys {
            Ok(keys) => {
                state.kept = Some(Kept { keys, at: now });
                None
            }
            Err(cause) => {
                tracing::warn!("The keys of {} cannot be had: {cause}", self.source.name());
                Some(cause)
            }
        };
        state.last = Some(Attempt { at: self.clock.now(), failure });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The keys that are kept, if they are younger than `age`.
    fn kept(&self, now: Duration, age: Duration) -> Option<&Keys> {
        self.kept.as_ref().filter(|kept| now < kept.at + age).map(|kept| &kept.keys)
    }

    fn key(&self, kid: &str, now: Duration) -> Option<Key> {
        self.kept(now, MAX_AGE)?.find(kid).cloned()
    }

    fn answer(&self, kid: &str, now: Duration) -> Result<Option<Key>, String> {
        if self.kept(now, MAX_AGE).is_some() {
            return Ok(self.key(kid, now));
        }
        Err(self.last.as_ref().and_then(|last| last.failure.clone()).unwrap_or_default())
    }
}

impl Source {
    fn name(&self) -> String {
        match self {
            Source::Discovery { issuer, .. } => format!("issuer {issuer}"),
            Source::File(path) => path.display().to_string(),
        }
    }

    async fn read(&self) -> Result<Keys, String> {
        match self {
            Source::File(path) => {
                Keys::parse(&read_file(path).map_err(|e| e.to_string())?).map_err(|e| e.to_string())
            }
            Source::Discovery { issuer, document, ca } => {
                let both = discover(issuer, document, ca);
                let in_time = tokio::time::timeout(DEADLINE, both).await;
                in_time.unwrap_or_else(|_| Err("it did not answer in time".to_owned()))
            }
        }
    }
}

async fn discover(issuer: &str, document: &Document, ca: &Ca) -> Result<Keys, String> {
    let found = document.fetch(DEADLINE).await.map_err(|e| e.to_string())?;
    let uri = jwks_uri(&found, issuer).map_err(|e| format!("its discovery document: {e}"))?;
    let keys = Document::new("the issuer's key set", &uri, ca).map_err(|e| e.to_string())?;
    let keys = keys.fetch(DEADLINE).await.map_err(|e| e.to_string())?;
    Keys::parse(&keys).map_err(|e| format!("its key set: {e}"))
}

fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = u64::try_from(MAX_DOCUMENT).unwrap_or(u64::MAX).saturating_add(1);
    std::fs::File::open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Keyring").field(&self.0.source.name()).finish()
    }
}
