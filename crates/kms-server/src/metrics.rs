//! Every number that the server publishes, in one table: [`Metrics::new`] below is the list that an operator reads.
//! Names start with `kms_server_`.
//!
//! Never a label here: a key, a token, an id, or anything else that a caller chooses.

use crate::audit::Lag;
use crate::failures::Cause;
use crate::health::Parts;
use crate::hsm_metrics::HsmMetrics;
use crate::limits::{self, TooMuch};
use crate::token::NotValid;
use crate::uses;
use kms_core::crypto_module::CryptoModule;
use kms_hsm::{Circuit, Statistics};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;

type Labels = [(&'static str, &'static str); 1];

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    hsm: HsmMetrics,
    hsm_versions: Gauge,
    hsm_capacity: Gauge,
    gcm_uses: Gauge,
    gcm_uses_max: Gauge,
    key_expires: Gauge,
    answers: Family<Answered, Counter>,
    rewraps_failed: Counter,
    answer_seconds: Family<Labels, Histogram, fn() -> Histogram>,
    ready: Gauge,
    part_ready: Family<Labels, Gauge>,
    connections: Gauge,
    requests: Gauge,
    limits: Family<Labels, Gauge>,
    refused: Family<Labels, Counter>,
    logins_refused: Family<Labels, Counter>,
    tokens_refused: Family<Labels, Counter>,
    audit_records: Family<Labels, Counter>,
    audit_seconds: Histogram,
    audit_syncs: Counter,
    audit_sync_seconds: Histogram,
    audit_waiting: Gauge,
    audit_oldest: Gauge<f64, AtomicU64>,
    audit_anchors: Family<Labels, Counter>,
    audit_anchored_at: Gauge,
    audit_unanchored: Gauge,
    audit_losses: Gauge,
    certificate_ends: Gauge,
    certificate_reloads: Family<Labels, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    action: &'static str,
    status: u32,
}

/// What is measured only when somebody looks.
#[derive(Debug, Clone, Copy)]
pub struct Snapshot {
    pub connections: usize,
    pub requests: usize,
    pub limits: limits::Settings,
    pub refused: [(TooMuch, u64); TooMuch::ALL.len()],
    pub audit_syncs: u64,
    pub audit: Lag,
    pub certificate_ends: Option<SystemTime>,
}

impl Metrics {
    /// All metrics, registered.
    #[must_use]
    pub fn new() -> Metrics {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("kms_server"),
            hsm: HsmMetrics::default(),
            hsm_versions: Gauge::default(),
            hsm_capacity: Gauge::default(),
            gcm_uses: Gauge::default(),
            gcm_uses_max: Gauge::default(),
            key_expires: Gauge::default(),
            answers: Family::default(),
            rewraps_failed: Counter::default(),
            answer_seconds: Family::new_with_constructor(milliseconds_to_seconds),
            ready: Gauge::default(),
            part_ready: Family::default(),
            connections: Gauge::default(),
            requests: Gauge::default(),
            limits: Family::default(),
            refused: Family::default(),
            logins_refused: Family::default(),
            tokens_refused: Family::default(),
            audit_records: Family::default(),
            audit_seconds: milliseconds_to_seconds(),
            audit_syncs: Counter::default(),
            audit_sync_seconds: milliseconds_to_seconds(),
            audit_waiting: Gauge::default(),
            audit_oldest: Gauge::default(),
            audit_anchors: Family::default(),
            audit_anchored_at: Gauge::default(),
            audit_unanchored: Gauge::default(),
            audit_losses: Gauge::default(),
            certificate_ends: Gauge::default(),
            certificate_reloads: Family::default(),
        };
        metrics.add_process();
        metrics.add_requests();
        metrics.add_audit();
        metrics.add_hsm();
        metrics
    }

    fn add_process(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "ready",
            "1 while database, HSM, audit log and clock are good",
            self.ready.clone(),
        );
        registry.register(
            "part_ready",
            "1 while this part is good: database, HSM, audit, clock",
            self.part_ready.clone(),
        );
        registry.register(
            "crypto_module",
            "The module that does this build's cryptography; fips=\"true\" for the FIPS module",
            Info::new(CryptoModule::linked().labels()),
        );
        registry.register(
            "certificate_not_after_timestamp_seconds",
            "When the TLS certificate in use ends, in seconds since 1970; 0 where that cannot be read",
            self.certificate_ends.clone(),
        );
        registry.register(
            "certificate_reloads",
            "Changes of the TLS certificate's files, by what came of them: loaded, refused",
            self.certificate_reloads.clone(),
        );
    }

    fn add_requests(&mut self) {
        let registry = &mut self.registry;
        registry.register("answers", "Answers by action and HTTP status", self.answers.clone());
        registry.register(
            "rewraps_failed",
            "DEKs that were unwrapped and could not be wrapped by the active version, which is newer",
            self.rewraps_failed.clone(),
        );
        registry.register_with_unit(
            "answer",
            "From the last header of a request to its answer, by action",
            Unit::Seconds,
            self.answer_seconds.clone(),
        );
        registry.register("connections_open", "Open TLS connections", self.connections.clone());
        registry.register(
            "requests_in_progress",
            "Requests that are worked on",
            self.requests.clone(),
        );
        registry.register("limit", "What the configuration allows, by limit", self.limits.clone());
        registry.register(
            "limit_refusals",
            "Connections and requests that were refused, by the limit they met",
            self.refused.clone(),
        );
        registry.register(
            "logins_refused",
            "Requests for a token that got none, by cause: api_key, token, issuer_away",
            self.logins_refused.clone(),
        );
        registry.register(
            "tokens_refused",
            "Requests with a token that was not taken, by cause, as the audit log calls it",
            self.tokens_refused.clone(),
        );
    }

    /// All the others of the HSM are in `hsm_metrics`.
    fn add_hsm(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "hsm_versions",
            "Versions of keys that the database knows of in the HSM",
            self.hsm_versions.clone(),
        );
        registry.register(
            "hsm_versions_max",
            "KEY_CAPACITY: the versions that the HSM has room for; 0 where it is not set",
            self.hsm_capacity.clone(),
        );
        registry.register(
            "gcm_uses",
            "Wraps with AES-GCM that are reserved of the version of a key that has most of them",
            self.gcm_uses.clone(),
        );
        self.gcm_uses_max.set(i64::try_from(uses::LIMIT).unwrap_or(i64::MAX));
        registry.register(
            "gcm_uses_max",
            "Wraps with AES-GCM that one version of a key may make",
            self.gcm_uses_max.clone(),
        );
        registry.register(
            "key_expires_timestamp_seconds",
            "When the first of the active keys expires and wraps no more; 0 where none does",
            self.key_expires.clone(),
        );
        registry.register_collector(Box::new(self.hsm.clone()));
    }

    fn add_audit(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "audit_records",
            "Audit records by what came of them: durable, failed",
            self.audit_records.clone(),
        );
        registry.register_with_unit(
            "audit_record",
            "From a record to its being durable, which every answer waits for",
            Unit::Seconds,
            self.audit_seconds.clone(),
        );
        registry.register(
            "audit_syncs",
            "Syncs of the audit log to disk; one takes all the records that wait",
            self.audit_syncs.clone(),
        );
        registry.register_with_unit(
            "audit_sync",
            "How long the disk took for one sync",
            Unit::Seconds,
            self.audit_sync_seconds.clone(),
        );
        registry.register(
            "audit_waiting_records",
            "Records that are not durable yet; their answers wait",
            self.audit_waiting.clone(),
        );
        registry.register_with_unit(
            "audit_oldest_waiting",
            "How long the first of the waiting records has waited",
            Unit::Seconds,
            self.audit_oldest.clone(),
        );
        registry.register(
            "audit_anchors",
            "Anchors of the audit log by what came of them: written, failed",
            self.audit_anchors.clone(),
        );
        registry.register(
            "audit_anchor_timestamp_seconds",
            "When the last anchor was written, in seconds since 1970; 0 before the first",
            self.audit_anchored_at.clone(),
        );
        registry.register(
            "audit_unanchored_records",
            "Durable records that no anchor covers yet",
            self.audit_unanchored.clone(),
        );
        registry.register(
            "audit_losses",
            "How often this process found a file of the audit log, or the beginning of one, gone",
            self.audit_losses.clone(),
        );
    }

    pub fn answered(&self, action: &'static str, status: u16, took: Duration) {
        self.answers.get_or_create(&Answered { action, status: u32::from(status) }).inc();
        self.answer_seconds.get_or_create(&[("action", action)]).observe(took.as_secs_f64());
    }

    pub fn rewrap_failed(&self) {
        self.rewraps_failed.inc();
    }

    pub fn login_refused(&self, cause: Cause) {
        self.logins_refused.get_or_create(&[("cause", cause.name())]).inc();
    }

    pub fn token_refused(&self, why: NotValid) {
        self.tokens_refused.get_or_create(&[("cause", why.code())]).inc();
    }

    pub fn ready(&self, parts: &Parts) {
        self.ready.set(i64::from(parts.all_good()));
        for (name, found) in parts.named() {
            let gauge = self.part_ready.get_or_create(&[("part", name)]);
            gauge.set(i64::from(found.is_ok()));
        }
    }

    /// What the HSM was asked, and how it is; `None` while nobody can say.
    pub fn hsm(&self, circuit: Circuit, counted: Option<Statistics>) {
        self.hsm.take(circuit, counted);
    }

    /// The most uses with AES-GCM that one version has, of [`uses::LIMIT`].
    pub fn gcm_uses(&self, most: u64) {
        self.gcm_uses.set(i64::try_from(most).unwrap_or(i64::MAX));
    }

    pub fn next_expiry(&self, at: Option<OffsetDateTime>) {
        self.key_expires.set(at.map_or(0, OffsetDateTime::unix_timestamp));
    }

    /// How many versions of keys there are in the HSM.
    pub fn versions(&self, versions: usize) {
        self.hsm_versions.set(i64::try_from(versions).unwrap_or(i64::MAX));
    }

    /// How many versions the HSM has room for; 0 where nobody has said.
    pub fn capacity(&self, versions: u64) {
        self.hsm_capacity.set(i64::try_from(versions).unwrap_or(i64::MAX));
    }

    /// An audit record is durable, or could not be made so.
    pub fn recorded(&self, durable: bool, took: Duration) {
        let outcome = if durable { "durable" } else { "failed" };
        self.audit_records.get_or_create(&[("outcome", outcome)]).inc();
        self.audit_seconds.observe(took.as_secs_f64());
    }

    /// Where the audit log shows how long syncs take.
    #[must_use]
    pub fn audit_sync_seconds(&self) -> Histogram {
        self.audit_sync_seconds.clone()
    }

    /// An anchor is in the audit log, or is late.
    pub fn anchored(&self, written: bool, at: SystemTime) {
        let outcome = if written { "written" } else { "failed" };
        self.audit_anchors.get_or_create(&[("outcome", outcome)]).inc();
        if written {
            let at = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            self.audit_anchored_at.set(i64::try_from(at).unwrap_or(i64::MAX));
        }
    }

    /// The files of the certificate have changed.
    pub fn certificate_reloaded(&self, loaded: bool) {
        let outcome = if loaded { "loaded" } else { "refused" };
        self.certificate_reloads.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// The text of `/metrics`.
    #[must_use]
    pub fn render(&self, now: &Snapshot) -> String {
        self.take(now);
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    fn take(&self, now: &Snapshot) {
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.connections.set(count(now.connections));
        self.requests.set(count(now.requests));
        let allowed = [
            (TooMuch::Connections, count(now.limits.connections)),
            (TooMuch::ConnectionsOfAddress, count(now.limits.connections_per_address)),
            (TooMuch::Requests, count(now.limits.requests)),
            (TooMuch::Logins, count(now.limits.logins)),
            (TooMuch::Rate, i64::from(now.limits.rate_per_instance)),
            (TooMuch::RateOfCaller, i64::from(now.limits.rate_per_caller)),
            (TooMuch::ManagementRate, i64::from(now.limits.management_rate_per_caller)),
            (TooMuch::LoginRate, i64::from(now.limits.login_rate_per_caller)),
        ];
        for (limit, most) in allowed {
            self.limits.get_or_create(&[("limit", limit.name())]).set(most);
        }
        for (limit, refusals) in now.refused {
            let refused = self.refused.get_or_create(&[("limit", limit.name())]);
            refused.inner().store(refusals, Ordering::Relaxed);
        }
        self.audit_syncs.inner().store(now.audit_syncs, Ordering::Relaxed);
        self.audit_waiting.set(count(now.audit.waiting));
        self.audit_oldest.set(now.audit.oldest.as_secs_f64());
        self.audit_unanchored.set(i64::try_from(now.audit.unanchored).unwrap_or(i64::MAX));
        self.audit_losses.set(i64::try_from(now.audit.losses).unwrap_or(i64::MAX));
        let ends = now.certificate_ends.and_then(|end| end.duration_since(UNIX_EPOCH).ok());
        let ends = ends.map_or(0, |end| i64::try_from(end.as_secs()).unwrap_or(i64::MAX));
        self.certificate_ends.set(ends);
    }
}

/// From half a millisecond to 16 s.
fn milliseconds_to_seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 16))
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}
