//! The WDEK that seals and what is known of it: its age, its uses, whether the key service still opens it.
//!
//! Nothing here decides who seals next; that is [`Keys`](super::Keys).

use std::sync::Arc;
use std::time::Duration;

use kms_core::cipher::v2;
use kms_core::key_id::KeyId;
use kms_core::secret::Dek;

use super::{Crk, Policy, Wrapped};
use crate::sealer::SealerError;

#[derive(Debug)]
pub(super) struct Active {
    pub(super) crk: Arc<Crk>,
    pub(super) key_id: KeyId,
    pub(super) wdek: Arc<[u8]>,
    pub(super) dek: Option<Dek>,
    pub(super) born: Duration,
    pub(super) confirmed: Duration,
    pub(super) uses: u64,
    /// False once the key service was seen not to know it any more: nobody could read what it seals.
    pub(super) opens: bool,
    /// The last answer about it was that the key service does not know it.
    pub(super) doubted: bool,
}

impl Active {
    /// Neither lost, too old nor used up; where DEKs are kept, its DEK is there and the service confirmed it in time.
    pub(super) fn may_seal(&self, policy: &Policy, now: Duration) -> bool {
        let fresh = self.dek.is_some() && now.saturating_sub(self.confirmed) < policy.lifetime;
        (fresh || !policy.keeps_dek())
            && self.opens
            && now.saturating_sub(self.born) < policy.max_age
            && self.uses < policy.max_uses
    }

    /// To be replaced when there is an occasion, before an Encrypt has to wait for it.
    pub(super) fn is_worn(&self, policy: &Policy, now: Duration) -> bool {
        !self.may_seal(policy, now)
            || self.uses >= policy.max_uses - policy.max_uses / 10
            || now.saturating_sub(self.born) >= policy.max_age - policy.max_age / 10
    }

    /// The next Encrypt has another DEK wrapped.
    pub(super) fn wear_out(&mut self) {
        (self.dek, self.uses) = (None, u64::MAX);
    }

    /// # Errors
    /// If the key service does not open it any more.
    pub(super) fn check_opens(&self) -> Result<(), SealerError> {
        if self.opens {
            return Ok(());
        }
        Err(self.crk.opens_no_more())
    }

    /// # Errors
    /// If its WDEK is so long that kube-apiserver would discard what is sealed with it.
    pub(super) fn check_room(&self) -> Result<(), SealerError> {
        v2::check_wdek(self.crk.kp_version, &self.wdek).map_err(|error| SealerError::Unavailable {
            text: format!(
                "the {}'s wrapped DEKs have {} bytes, which is too long for KMS v2: {error}",
                self.crk.service.backend(),
                self.wdek.len()
            ),
        })
    }

    pub(super) fn wrapped(&self) -> Wrapped {
        Wrapped { crk: self.crk.clone(), wdek: self.wdek.clone(), key_id: self.key_id.clone() }
    }
}
