//! The entries of the configuration, as far as sealing and opening go.
//!
//! Nothing here asks a key service.

use std::sync::Arc;

use crate::dek_cache::CrkName;
use crate::provider::guard::Guard;
use crate::sealer::SealerError;

/// One entry of the configuration: a CRK and the way to it.
#[derive(Debug)]
pub struct Crk {
    pub name: CrkName,
    /// KP_CONFIG.VERSION: how KMS v1 values and key_ids name this entry.
    pub kp_version: i64,
    pub service: Guard,
}

/// The CRK that wraps, and those that only unwrap.
#[derive(Debug, Clone)]
pub struct Ring {
    pub current: Arc<Crk>,
    pub previous: Vec<Arc<Crk>>,
}

impl Ring {
    pub(super) fn entries(&self) -> impl Iterator<Item = &Arc<Crk>> {
        std::iter::once(&self.current).chain(&self.previous)
    }
}

impl Crk {
    pub(crate) fn opens_no_more(&self) -> SealerError {
        let backend = self.service.backend();
        let text = format!("the {backend} does not open any more what would be sealed now");
        SealerError::Unavailable { text }
    }

    /// The same entry, whatever URL or API key leads to it.
    pub(super) fn is_entry(&self, other: &Crk) -> bool {
        self.name == other.name && self.kp_version == other.kp_version
    }

    /// The same entry, and the same version of its CRK where the configuration names one.
    pub(super) fn wraps_like(&self, other: &Crk) -> bool {
        self.is_entry(other) && self.service.named_version() == other.service.named_version()
    }
}
