//! What every operation works with.

use crate::audit::Audit;
use crate::failures::Failures;
use crate::gate::Gates;
use crate::health::Health;
use crate::issuers::Issuers;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::store::Store;
use crate::token::Issuer;
use crate::uses::Uses;
use kms_core::clock::Clock;
use kms_core::wdek::WdekVersion;
use kms_hsm::Vault;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;

#[derive(Debug)]
pub struct App {
    pub vault: Arc<dyn Vault>,
    pub store: Arc<dyn Store>,
    pub audit: Audit,
    pub issuer: Issuer,
    /// Others, whose tokens are traded for ours.
    pub issuers: Issuers,
    pub clock: Arc<dyn Clock>,
    pub settings: Settings,
    pub uses: Uses,
    pub gates: Gates,
    pub limits: Limits,
    /// Logins that were refused.
    pub failures: Failures,
    pub metrics: Metrics,
    pub health: Health,
}

/// What an operator may choose about the operations.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The format in which WDEKs are written; both are read.
    pub wdek_version: WdekVersion,
    /// Zero: a key may be rotated as often as wanted.
    pub min_rotation_interval: Duration,
}

impl App {
    #[must_use]
    pub fn now(&self) -> OffsetDateTime {
        self.clock.wall().into()
    }
}
