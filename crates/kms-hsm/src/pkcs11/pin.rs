//! A PIN that can be replaced while a vault uses it.
//!
//! The last wrong PINs lock a token for good, so one that was refused is never tried again, not even
//! by another vault that shares it, nor, where there is a file for it, by the next process: whoever
//! logs in asks here first.

use super::refused::Refused;
use kms_core::secret::SecretText;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The user PIN of a token; clones are the same PIN.
#[derive(Clone, Debug)]
pub struct Pin(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    text: SecretText,
    /// Why the token refuses it, if it was tried and refused.
    refusal: Option<String>,
    file: Option<Refused>,
    /// Whether `text` was compared with what the file says.
    compared: bool,
    /// Whether the file was there when it was looked at or written last.
    kept: bool,
}

impl Pin {
    /// A PIN that was not tried yet.
    #[must_use]
    pub fn new(text: SecretText) -> Self {
        Self::with(text, None)
    }

    /// The same, unless `file` says that `token` has refused it before. A refusal is kept there, as a slow hash, until
    /// another PIN has opened the token or somebody removes the file. To try the PIN once more, remove the file.
    #[must_use]
    pub fn remembered(text: SecretText, file: PathBuf, token: String) -> Self {
        Self::with(text, Some(Refused::new(file, token)))
    }

    fn with(text: SecretText, file: Option<Refused>) -> Self {
        let state = State { text, refusal: None, file, compared: false, kept: false };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Uses `text` from the next login on; false if that is the PIN already.
    pub fn replace(&self, text: SecretText) -> bool {
        let mut state = self.state();
        let other = state.text.expose() != text.expose();
        if other {
            (state.text, state.refusal, state.compared) = (text, None, false);
        }
        other
    }

    /// Whether the token has refused it. It stays refused until it is replaced, or the file of its refusal is removed.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        let mut state = self.state();
        state.listen();
        state.refusal.is_some()
    }

    /// What to log in with. Blocks for as long as a slow hash takes where a refusal is kept.
    ///
    /// # Errors
    /// Why it was refused before.
    pub fn to_try(&self) -> Result<SecretText, String> {
        let mut state = self.state();
        state.listen();
        state.compare();
        state.refusal.clone().map_or_else(|| Ok(state.text.clone()), Err)
    }

    /// Notes that the token refuses `tried`, unless that was replaced meanwhile.
    pub fn refuse(&self, tried: &SecretText, why: &str) {
        let mut state = self.state();
        if state.text.expose() == tried.expose() && state.refusal.is_none() {
            state.refusal = Some(why.to_owned());
            state.keep();
        }
    }

    /// Notes that `tried` has opened the token: what was refused before it is of no use any more.
    pub fn accept(&self, tried: &SecretText) {
        let mut state = self.state();
        if state.kept && state.text.expose() == tried.expose() {
            state.forget();
        }
    }

    /// Forgets every refusal: the token was made anew.
    pub fn forget_refusals(&self) {
        let mut state = self.state();
        state.refusal = None;
        state.forget();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whoever removes the file wants the PIN tried again.
    fn listen(&mut self) {
        if self.kept && self.file.as_ref().is_some_and(|file| !file.is_there()) {
            (self.kept, self.refusal) = (false, None);
            tracing::info!("The file of the refused PIN was removed; the PIN is tried once more.");
        }
    }

    fn compare(&mut self) {
        let Some(file) = self.file.as_ref().filter(|_| !self.compared) else { return };
        self.compared = true;
        self.kept = file.is_there();
        let path = file.file().display();
        match file.is(&self.text) {
            Ok(false) => {}
            Ok(true) => {
                tracing::error!(
                    "The HSM has refused this PIN before. It is not tried again before it is another one, or {path} is \
                     removed."
                );
                self.refusal = Some("it was refused before, and is not tried again".to_owned());
            }
            Err(error) => tracing::warn!("{path} says of no PIN that it was refused: {error}"),
        }
    }

    fn keep(&mut self) {
        let Some(file) = &self.file else { return };
        let path = file.file().display();
        match file.keep(&self.text) {
            Ok(()) => {
                self.kept = true;
                tracing::error!(
                    "The HSM refuses the PIN. It is not tried again before it is another one, or {path} is removed."
                );
            }
            Err(error) => tracing::error!(
                "The HSM refuses the PIN, and {path} cannot be written: {error}. The next start of this service will \
                 try it again, and the last wrong PINs lock a token."
            ),
        }
    }

    fn forget(&mut self) {
        let Some(file) = &self.file else { return };
        match file.forget() {
            Ok(()) => self.kept = false,
            Err(error) => {
                tracing::warn!("{} cannot be removed: {error}", file.file().display());
            }
        }
    }
}

impl From<SecretText> for Pin {
    fn from(text: SecretText) -> Self {
        Self::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(pin: &str) -> SecretText {
        SecretText::new(pin.to_owned())
    }

    #[test]
    fn a_refused_pin_is_not_tried_again_until_it_is_replaced_by_another() {
        let pin = Pin::new(text("1"));
        let shared = pin.clone();
        let tried = pin.to_try().unwrap();
        shared.refuse(&tried, "CKR_PIN_INCORRECT");
        assert!(pin.is_refused());
        assert_eq!(pin.to_try().unwrap_err(), "CKR_PIN_INCORRECT");
        assert!(!pin.replace(text("1")), "the same one");
        assert!(pin.is_refused());
        assert!(pin.replace(text("2")));
        assert_eq!(shared.to_try().unwrap().expose(), "2");
        shared.refuse(&tried, "a late answer about the one before");
        assert!(!pin.is_refused());
    }

    #[test]
    fn the_next_process_tries_another_pin_or_the_same_when_the_file_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("refused");
        let next = |pin: &str| Pin::remembered(text(pin), file.clone(), "token".to_owned());
        next("1").refuse(&text("1"), "CKR_PIN_INCORRECT");
        let pin = next("1");
        assert!(pin.to_try().is_err());
        assert!(pin.is_refused());
        assert!(pin.replace(text("2")));
        assert_eq!(pin.to_try().unwrap().expose(), "2");
        assert!(pin.replace(text("1")), "back again");
        assert!(pin.to_try().is_err());
        std::fs::remove_file(&file).unwrap();
        assert!(!pin.is_refused());
        assert_eq!(pin.to_try().unwrap().expose(), "1");
        pin.refuse(&text("1"), "CKR_PIN_INCORRECT");
        let pin = next("2");
        assert_eq!(pin.to_try().unwrap().expose(), "2");
        pin.accept(&text("2"));
        assert!(!file.exists(), "what was refused before is forgotten");
    }

    #[test]
    fn without_a_place_for_its_file_a_refusal_lasts_as_long_as_the_process() {
        let pin = Pin::remembered(text("1"), "/nowhere/refused".into(), "token".to_owned());
        pin.refuse(&pin.to_try().unwrap(), "CKR_PIN_INCORRECT");
        for _ in 0..3 {
            assert!(pin.is_refused());
            assert_eq!(pin.to_try().unwrap_err(), "CKR_PIN_INCORRECT");
        }
    }
}
