//! The keys of one issuer, kept for a while. Whoever asks for a key that is not there makes the issuer be asked again,
//! but not more than once in a few seconds: a token's `kid` is anybody's to choose.

use super::document::{Key, Keys, MAX_DOCUMENT, jwks_uri};
use super::{KeySource, Trusted};
use kms_api::client::{Ca, Document, SetupError};
use kms_core::clock::Clock;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Keys are asked for again when they are this old ...
const REFRESH_AFTER: Duration = Duration::from_secs(600);
/// ... and are not used when they are this old: a withdrawn key ends by then, whatever the issuer's server does.
const MAX_AGE: Duration = Duration::from_secs(3600);
/// Between two attempts, successful or not.
const PAUSE: Duration = Duration::from_secs(5);
/// What discovery and keys together may take; somebody waits for it.
const DEADLINE: Duration = Duration::from_secs(5);

pub(super) struct Keyring {
    source: Source,
    clock: Arc<dyn Clock>,
    kept: Mutex<Option<Kept>>,
    /// Held by whoever asks the issuer: when it last was, and why in vain. The others wait for what comes of it.
    asking: tokio::sync::Mutex<Option<Attempt>>,
}

#[derive(Clone)]
struct Kept {
    keys: Arc<Keys>,
    at: Duration,
}

struct Attempt {
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
        Ok(Keyring { source, clock, kept: Mutex::default(), asking: tokio::sync::Mutex::default() })
    }

    /// The key `kid`; `None` when the issuer has none of that name.
    ///
    /// # Errors
    /// Why the issuer's keys cannot be had, when those that are kept are too old or there are none.
    pub(super) async fn key(&self, kid: &str) -> Result<Option<Key>, String> {
        if let Some(key) = self.kept(REFRESH_AFTER).and_then(|keys| keys.find(kid).cloned()) {
            return Ok(Some(key));
        }
        let mut last = self.asking.lock().await;
        let found = self.kept(REFRESH_AFTER).and_then(|keys| keys.find(kid).cloned());
        let now = self.clock.now();
        let may_ask = last.as_ref().is_none_or(|last| now >= last.at + PAUSE);
        if found.is_none() && may_ask {
            let failure = self.ask(now).await.err();
            *last = Some(Attempt { at: now, failure });
        }
        match self.kept(MAX_AGE) {
            Some(keys) => Ok(keys.find(kid).cloned()),
            None => Err(last.as_ref().and_then(|last| last.failure.clone()).unwrap_or_default()),
        }
    }

    /// The keys that are kept, if they are younger than `age`.
    fn kept(&self, age: Duration) -> Option<Arc<Keys>> {
        let now = self.clock.now();
        self.lock().as_ref().filter(|kept| now < kept.at + age).map(|kept| kept.keys.clone())
    }

    async fn ask(&self, now: Duration) -> Result<(), String> {
        let keys = self.source.read().await;
        if let Err(cause) = &keys {
            tracing::warn!("The keys of {} cannot be had: {cause}", self.source.name());
        }
        *self.lock() = Some(Kept { keys: Arc::new(keys?), at: now });
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
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
        f.debug_tuple("Keyring").field(&self.source.name()).finish()
    }
}
