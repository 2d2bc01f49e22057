//! PKCS11: the HSM that holds the CRKs where no key service stands between. The section is there or it is not; that
//! alone chooses the provider.

use std::path::PathBuf;
use std::time::Duration;

use kms_core::secret::SecretText;
use kms_daemon::settings::{Section, Settings};
use uuid::Uuid;

pub(super) const SECTION: &str = "PKCS11";

/// One token, and the CRK version that wraps.
#[derive(Debug, Clone)]
pub struct Hsm {
    pub library: PathBuf,
    pub token: Token,
    /// Another one is used from the next login on.
    pub pin: SecretText,
    /// Where it was read, if not in the configuration itself.
    pub pin_file: Option<PathBuf>,
    /// Where it is kept that the token has refused a PIN, for the next process; a node has no other place of its own.
    pub refused_pin_file: Option<PathBuf>,
    pub sessions: usize,
    pub deadline: Duration,
    /// `None` until the first one was made.
    pub crk_version: Option<Uuid>,
}

/// By what one token is told from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    Label(String),
    Serial(String),
    Slot(u64),
}

impl Hsm {
    /// The way to the token is another one; PIN and version can change while the process runs.
    pub(super) fn is_elsewhere(&self, other: &Hsm) -> bool {
        let way = |hsm: &Hsm| {
            let Hsm { library, token, sessions, deadline, refused_pin_file, .. } = hsm;
            (library.clone(), token.clone(), *sessions, *deadline, refused_pin_file.clone())
        };
        way(self) != way(other)
    }
}

pub(super) fn read(settings: &mut Settings) -> Option<Hsm> {
    settings.has(SECTION).then(|| settings.section(SECTION, hsm))
}

fn hsm(section: &mut Section<'_>) -> Hsm {
    let sessions = section.number("SESSIONS", 1..=64, 2);
    let (pin, pin_file) = match section.secret("PIN", "PIN_FILE") {
        Some(mut pin) => (SecretText::new(std::mem::take(&mut *pin.text)), pin.file),
        // The mistake was named.
        None => (SecretText::default(), None),
    };
    let deadline = section.number("DEADLINE_IN_MILLISECONDS", 10..=60_000, 2000);
    Hsm {
        // It need not be there yet: HSM drivers are mounted and installed by others.
        library: section.required("LIBRARY").into(),
        token: token(section),
        pin,
        pin_file,
        refused_pin_file: section.text("REFUSED_PIN_FILE").map(PathBuf::from),
        sessions: usize::try_from(sessions).unwrap_or(usize::MAX),
        deadline: Duration::from_millis(deadline),
        crk_version: crk_version(section),
    }
}

/// By one name, not by several that may contradict each other.
fn token(section: &mut Section<'_>) -> Token {
    let named = ["TOKEN_LABEL", "TOKEN_SERIAL", "SLOT"].map(|name| section.has(name));
    let (label, serial) = (section.text("TOKEN_LABEL"), section.text("TOKEN_SERIAL"));
    let slot = section.number("SLOT", 0..=u64::MAX, 0);
    match (named, label, serial) {
        ([true, false, false], Some(label), _) => Token::Label(label),
        ([false, true, false], _, Some(serial)) => Token::Serial(serial),
        ([false, false, true], ..) => Token::Slot(slot),
        ([false, false, false], ..) => {
            section.mistake("TOKEN_LABEL", "is missing (or TOKEN_SERIAL, or SLOT)");
            Token::Label(String::new())
        }
        _ => {
            section.mistake("TOKEN_LABEL", "or TOKEN_SERIAL or SLOT names the token; keep one");
            Token::Label(String::new())
        }
    }
}

/// CRK and instance: what a wrapped DEK is bound to in an HSM are UUIDs, in one spelling.
pub(super) fn uuid(section: &mut Section<'_>, name: &'static str) -> Uuid {
    let text = section.required(name);
    if text.is_empty() { Uuid::nil() } else { parsed(section, name, &text) }
}

fn crk_version(section: &mut Section<'_>) -> Option<Uuid> {
    let text = section.text("CRK_VERSION")?;
    Some(parsed(section, "CRK_VERSION", &text))
}

fn parsed(section: &mut Section<'_>, name: &str, text: &str) -> Uuid {
    Uuid::try_parse(text).unwrap_or_else(|_| {
        section.mistake(name, "must be a UUID");
        Uuid::nil()
    })
}
