//! What is known of the parts that this server cannot work without.

use std::sync::{PoisonError, RwLock};

/// What the last probe found: `Err` says what is missing.
#[derive(Debug)]
pub struct Health(RwLock<Result<(), String>>);

impl Health {
    /// Not ready until the first probe has answered.
    #[must_use]
    pub fn unknown() -> Health {
        Health(RwLock::new(Err("the first check has not been made yet".into())))
    }

    pub(crate) fn set(&self, found: Result<(), String>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = found;
    }

    /// # Errors
    /// What is missing, in words.
    pub fn last(&self) -> Result<(), String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
