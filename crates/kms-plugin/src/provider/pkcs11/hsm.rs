//! The way into the HSM, opened on a thread of its own at the first request: libraries of HSMs may take long to load,
//! may not be there yet, and nobody's request may wait for them longer than its own deadline.
//!
//! A PIN that was refused is never tried again; another one in the configuration is, without a restart.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use kms_core::secret::SecretText;
use kms_hsm::pkcs11::{Pin, Pkcs11Vault, Settings, TokenChoice};
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
    pin: Pin,
    door: OnceLock<watch::Receiver<Door>>,
}

type Open = dyn Fn() -> Opened + Send + Sync;
type Opened = Result<Arc<dyn Vault>, VaultError>;
/// `None` while it is being opened for the first time.
type Door = Option<Opened>;

impl Hsm {
    /// `open` may block. It is called again, with pauses, while it answers `Unavailable`, and never after any other
    /// answer. What it opens logs in with `pin`, and hears itself of another one.
    pub fn new(pin: Pin, open: impl Fn() -> Opened + Send + Sync + 'static) -> Hsm {
        Hsm { open: Arc::new(open), pin, door: OnceLock::new() }
    }

    /// The HSM of the configuration.
    pub fn with(hsm: &config::Hsm) -> Hsm {
        let settings = settings(hsm);
        let pin = settings.pin.clone();
        Hsm::new(pin, move || Ok(Arc::new(Pkcs11Vault::open(settings.clone())?)))
    }

    /// Logs in with this PIN from now on. A login that lasts is left alone.
    pub fn use_pin(&self, pin: &SecretText) {
        if self.pin.replace(pin.clone()) {
            tracing::info!("The HSM's PIN is another one; the next login is made with it.");
        }
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
    let token = match hsm.token.clone() {
        config::Token::Label(label) => TokenChoice::Label(label),
        config::Token::Serial(serial) => TokenChoice::Serial(serial),
        config::Token::Slot(slot) => TokenChoice::Slot(slot),
    };
    let pin = match &hsm.refused_pin_file {
        Some(file) => {
            let token = format!("{} {token}", hsm.library.display());
            Pin::remembered(hsm.pin.clone(), file.clone(), token)
        }
        None => Pin::new(hsm.pin.clone()),
    };
    Settings {
        library: hsm.library.clone(),
        token,
        pin,
        sessions: hsm.sessions,
        queue: QUEUE,
        deadline: hsm.deadline,
        // The plug-in writes the format that both ends know.
        gcm: None,
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
        let answer = match open() {
            Err(VaultError::Unavailable { cause }) => {
                // Paths are for the log only: what is answered, kube-apiserver shows to its users.
                if told.as_ref() != Some(&cause) {
                    tracing::error!("The PKCS#11 library cannot be used, will try again: {cause}");
                    told = Some(cause);
                }
                Err(away("its PKCS#11 library cannot be used"))
            }
            answer => answer,
        };
        let done = !matches!(answer, Err(VaultError::Unavailable { .. }));
        news.send_replace(Some(answer));
        if done {
            return;
        }
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
