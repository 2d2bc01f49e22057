//! What the configuration says about DEKs, as far as sealing and opening go.
//!
//! Nothing here is checked; that is the configuration's.

use std::time::Duration;

/// What the configuration says about DEKs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// A new DEK for each Encrypt.
    pub new_dek: bool,
    /// How long a plain DEK may be used without asking the key service again; zero: none is kept.
    pub lifetime: Duration,
    /// When the DEK that seals is replaced by a new one.
    pub max_age: Duration,
    pub max_uses: u64,
    /// How many DEKs are held for opening.
    pub capacity: usize,
    pub len_bytes: u8,
    pub accept_unauthenticated: bool,
}

impl Policy {
    /// A DEK for sealing is held in memory.
    pub(super) fn keeps_dek(&self) -> bool {
        !self.new_dek && !self.lifetime.is_zero()
    }
}
