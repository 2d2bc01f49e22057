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
    pub token_label: String,
    pub pin: SecretText,
    pub sessions: usize,
    pub deadline: Duration,
    /// `None` until the first one was made.
    pub crk_version: Option<Uuid>,
}

impl Hsm {
    /// The way to the token is another one; which version wraps does not count.
    pub(super) fn is_elsewhere(&self, other: &Hsm) -> bool {
        let way = |hsm: &Hsm| {
            let Hsm { library, token_label, sessions, deadline, .. } = hsm;
            (library.clone(), token_label.clone(), *sessions, *deadline)
        };
        way(self) != way(other) || self.pin.expose() != other.pin.expose()
    }
}

pub(super) fn read(settings: &mut Settings) -> Option<Hsm> {
    settings.has(SECTION).then(|| settings.section(SECTION, hsm))
}

fn hsm(section: &mut Section<'_>) -> Hsm {
    let sessions = section.number("SESSIONS", 1..=64, 2);
    let deadline = section.number("DEADLINE_IN_MILLISECONDS", 10..=60_000, 2000);
    Hsm {
        // It need not be there yet: HSM drivers are mounted and installed by others.
        library: section.required("LIBRARY").into(),
        token_label: section.required("TOKEN_LABEL"),
        pin: pin(section),
        sessions: usize::try_from(sessions).unwrap_or(usize::MAX),
        deadline: Duration::from_millis(deadline),
        crk_version: crk_version(section),
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

fn pin(section: &mut Section<'_>) -> SecretText {
    match (section.has("PIN"), section.has("PIN_FILE")) {
        (true, false) => SecretText::new(section.required("PIN")),
        (false, true) => pin_in_file(section),
        (true, true) => {
            section.text("PIN");
            section.text("PIN_FILE");
            section.mistake("PIN", "and PIN_FILE are both set; only one of them may be");
            SecretText::default()
        }
        (false, false) => {
            section.mistake("PIN", "is missing (or PIN_FILE, the file that holds it)");
            SecretText::default()
        }
    }
}

fn pin_in_file(section: &mut Section<'_>) -> SecretText {
    let path = super::schema::file(section, "PIN_FILE");
    // What cannot be read was named as a mistake already.
    let bytes = super::read_file(&path).map(zeroize::Zeroizing::new).unwrap_or_default();
    match std::str::from_utf8(&bytes) {
        Ok(text) => SecretText::new(text.trim().to_owned()),
        Err(_) => {
            section.mistake("PIN_FILE", "names a file that is not text");
            SecretText::default()
        }
    }
}
