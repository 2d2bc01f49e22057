//! A PIN that can be replaced while a vault uses it.
//!
//! The last wrong PINs lock a token for good, so one that was refused is never tried again, not even
//! by another vault that shares it: whoever logs in asks here first.

use kms_core::secret::SecretText;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The user PIN of a token; clones are the same PIN.
#[derive(Clone, Debug)]
pub struct Pin(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    text: SecretText,
    /// Why the token refuses it, if it was tried and refused.
    refusal: Option<String>,
}

impl Pin {
    /// A PIN that was not tried yet.
    #[must_use]
    pub fn new(text: SecretText) -> Self {
        Self(Arc::new(Mutex::new(State { text, refusal: None })))
    }

    /// Uses `text` from the next login on; false if that is the PIN already.
    pub fn replace(&self, text: SecretText) -> bool {
        let mut state = self.state();
        let other = state.text.expose() != text.expose();
        if other {
            *state = State { text, refusal: None };
        }
        other
    }

    /// Whether the token has refused it. It stays refused until it is replaced.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.state().refusal.is_some()
    }

    /// What to log in with.
    ///
    /// # Errors
    /// Why it was refused before.
    pub fn to_try(&self) -> Result<SecretText, String> {
        let state = self.state();
        state.refusal.clone().map_or_else(|| Ok(state.text.clone()), Err)
    }

    /// Notes that the token refuses `tried`, unless that was replaced meanwhile.
    pub fn refuse(&self, tried: &SecretText, why: &str) {
        let mut state = self.state();
        if state.text.expose() == tried.expose() {
            state.refusal = Some(why.to_owned());
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
}
