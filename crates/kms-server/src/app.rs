//! What every operation works with, and the one place where it is put together: the service, its tests and the fuzz
//! targets name what differs between them, and get everything else as it is in production.

use crate::audit::{self, Audit};
use crate::failures::Failures;
use crate::gate::Gates;
use crate::guard::Guarded;
use crate::health::Health;
use crate::issuers::{Issuers, Trusted};
use crate::limits::{self, Limits};
use crate::metrics::Metrics;
use crate::store::{SigningKey, Store};
use crate::token::Issuer;
use crate::uses::Uses;
use kms_api::client::SetupError;
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
    /// Tokens that were refused.
    pub refused_tokens: Failures,
    /// What was refused to those whose token was good.
    pub refusals: Failures,
    pub metrics: Metrics,
    pub health: Health,
}

/// What a service is built on: what it keeps, and what it finds in the world.
#[derive(Debug)]
pub struct Foundation {
    pub clock: Arc<dyn Clock>,
    pub store: Arc<dyn Store>,
    /// Never the vault itself: its keys must have been seen to be those that the store knows.
    pub vault: Arc<Guarded>,
    pub audit: Audit,
    /// What tokens are signed with.
    pub signing_key: SigningKey,
}

/// What an operator may choose about the operations.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What stands in `iss` of every token.
    pub issuer_url: String,
    pub token_lifetime: Duration,
    /// Whose tokens are traded for ours.
    pub issuers: Vec<Trusted>,
    pub limits: limits::Settings,
    /// How long the audit log's disk has for each record.
    pub audit_deadline: Duration,
    /// The format in which WDEKs are written; all are read.
    pub wdek_version: WdekVersion,
    /// Zero: a key may be rotated as often as wanted.
    pub min_rotation_interval: Duration,
    /// How long a destroyed key stays before it may be purged.
    pub min_purge_wait: Duration,
}

impl Settings {
    /// What holds where the configuration says nothing.
    #[must_use]
    pub fn new(issuer_url: String) -> Settings {
        Settings {
            issuer_url,
            token_lifetime: Duration::from_secs(3600),
            issuers: Vec::new(),
            limits: limits::Settings::default(),
            audit_deadline: audit::DEADLINE,
            wdek_version: WdekVersion::V2_1_0,
            min_rotation_interval: Duration::ZERO,
            min_purge_wait: Duration::from_secs(4 * 3600),
        }
    }
}

impl App {
    /// Ready for its first request; nothing runs yet.
    ///
    /// # Errors
    /// A URL or a CA file of an issuer that no client can be made of.
    pub fn new(on: Foundation, settings: Settings) -> Result<App, SetupError> {
        let Foundation { clock, store, vault, audit, signing_key } = on;
        let (url, lifetime) = (settings.issuer_url.clone(), settings.token_lifetime);
        Ok(App {
            vault,
            store,
            audit: audit.within(settings.audit_deadline),
            issuer: Issuer::new(url, lifetime, signing_key, clock.clone()),
            issuers: Issuers::new(settings.issuers.clone(), clock.clone())?,
            limits: Limits::new(settings.limits, clock.clone()),
            clock,
            settings,
            uses: Uses::default(),
            gates: Gates::new(),
            failures: Failures::of_strangers(),
            refused_tokens: Failures::of_strangers(),
            refusals: Failures::of_callers(),
            metrics: Metrics::new(),
            health: Health::unknown(),
        })
    }

    #[must_use]
    pub fn now(&self) -> OffsetDateTime {
        self.clock.wall().into()
    }
}
