//! The way into the HSM, opened on a thread of its own at the first request: libraries of HSMs may take long to load,
//! may not be there yet, and nobody's request may wait for them longer than its own deadline.
//!
//! A PIN that was refused is never tried again by this process.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use kms_hsm::pkcs11::{Pkcs11Vault, Settings, TokenChoice};
use kms_hsm::{Vault, VaultError};
use tokio::sync::watch;

use crate::config;

/// So many requests may wait for a session of the HSM.
const QUEUE: usize = 256;
/// Between two attempts to load a library that cannot be loaded.
const PAUSE: Duration = Duration::from_secs(1);

/// One HSM, opened when it is first asked for.
pub struct Hsm {
    open: Arc<Open>,
    door: OnceLock<watch::Receiver<Door>>,
}

type Open = dyn Fn() -> Opened + Send + Sync;
type Opened = Result<Arc<dyn Vault>, VaultError>;
/// `None` while it is being opened for the first time.
type Door = Option<Opened>;

impl Hsm {
    /// `open` may block. It is called again, with pauses, while it answers `Unavailable`, and never after any other
    /// answer.
    pub fn new(open: impl Fn() -> Opened + Send + Sync + 'static) -> Hsm {
        Hsm { open: Arc::new(open), door: OnceLock::new() }
    }

    /// The HSM of the configuration.
    pub fn with(hsm: &config::Hsm) -> Hsm {
        let settings = settings(hsm);
        Hsm::new(move || Ok(Arc::new(Pkcs11Vault::open(settings.clone())?)))
    }

    /// The opened HSM.
    ///
    /// # Errors
    /// Why it is not open.
    pub async fn vault(&self) -> Opened {
        let mut door = self.door.get_or_init(|| unlock(self.open.clone())).clone();
        // An error means that the thread ended without a word, as it does when it panics.
        let opened = door.wait_for(Option::is_some).await.ok().and_then(|door| door.clone());
        opened.unwrap_or_else(|| Err(away("it cannot be opened")))
    }
}

/// How the HSM is asked for what the configuration says of it.
pub fn settings(hsm: &config::Hsm) -> Settings {
    Settings {
        library: hsm.library.clone(),
        token: TokenChoice::Label(hsm.token_label.clone()),
        pin: hsm.pin.clone(),
        sessions: hsm.sessions,
        queue: QUEUE,
        deadline: hsm.deadline,
    }
}

fn unlock(open: Arc<Open>) -> watch::Receiver<Door> {
    let (news, door) = watch::channel(None);
    let name = "hsm-opening".to_owned();
    let thread = thread::Builder::new().name(name).spawn(move || keep_opening(&*open, &news));
    if let Err(error) = thread {
        tracing::error!("The HSM cannot be opened, no thread can be started: {error}");
    }
    door
}

fn keep_opening(open: &Open, news: &watch::Sender<Door>) {
    let mut told = None;
    while !news.is_closed() {
        let cause = match open() {
            Err(VaultError::Unavailable { cause }) => cause,
            opened => {
                news.send_replace(Some(opened));
                return;
            }
        };
        // Paths are for the log only: what is answered, kube-apiserver shows to its users.
        if told.as_ref() != Some(&cause) {
            tracing::error!("The PKCS#11 library cannot be used, will try again: {cause}");
            told = Some(cause);
        }
        news.send_replace(Some(Err(away("its PKCS#11 library cannot be used"))));
        thread::sleep(PAUSE);
    }
}

fn away(cause: &str) -> VaultError {
    VaultError::Unavailable { cause: cause.to_owned() }
}

impl fmt::Debug for Hsm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let opened = self.door.get().map(|door| door.borrow().is_some());
        f.debug_struct("Hsm").field("opened", &opened).finish_non_exhaustive()
    }
}
