//! Every number that the plug-in publishes, in one table: `Metrics::register` below is the list that an
//! operator reads. Names start with `kmsplugin_`.
//!
//! Never a label here: a payload, a DEK, a WDEK, a uid, or anything else that a caller chooses.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use kms_core::crypto_module::CryptoModule;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

type Labels<const N: usize> = [(&'static str, &'static str); N];
type Seconds = Gauge<f64, AtomicU64>;

/// The gRPC code of an answer that is no error.
const OK: &str = "OK";

/// Cheap to clone: every clone writes into the same registry.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<Labels<3>, Counter>,
    request_seconds: Family<Labels<2>, Histogram, fn() -> Histogram>,
    provider_calls: Family<Labels<2>, Counter>,
    provider_call_seconds: Family<Labels<1>, Histogram, fn() -> Histogram>,
    opens: Family<Labels<1>, Counter>,
    hits: Counter,
    v1_unauthenticated: Counter,
    dek_cache_entries: Gauge,
    dek_age_seconds: Seconds,
    dek_uses: Gauge,
    token_life_left_seconds: Seconds,
    breakers_open: Gauge,
    build: Family<Labels<1>, Gauge>,
    probes: Family<Labels<1>, Counter>,
    ready: Gauge,
    key_ids: Family<[(&'static str, String); 1], Gauge>,
    key_id_changes: Counter,
    config_reloads: Family<Labels<1>, Counter>,
}

/// The numbers of one gRPC method. What counts an answer is found once and kept: to find it by its labels takes as long
/// as to encrypt a seed.
#[derive(Debug, Clone)]
pub struct Requests {
    ok: Counter,
    seconds: Histogram,
    all: Family<Labels<3>, Counter>,
    api: &'static str,
    method: &'static str,
}

/// What is measured only when somebody looks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Snapshot {
    pub dek_cache_entries: usize,
    pub dek_age: Duration,
    pub dek_uses: u64,
    pub token_life_left: Option<Duration>,
    pub crks_down: usize,
}

impl Metrics {
    /// All metrics, registered; `region` becomes a label of every one of them.
    pub fn register(registry: &mut Registry, region: &str) -> Metrics {
        let metrics = Metrics::unregistered();
        let registry = registry.sub_registry_with_prefix("kmsplugin");
        let registry = match region {
            "" => registry,
            _ => registry.sub_registry_with_label(("region".into(), region.to_owned().into())),
        };
        metrics.add_requests(registry);
        metrics.add_provider(registry);
        metrics.add_keys(registry);
        metrics.build.get_or_create(&[("version", env!("CARGO_PKG_VERSION"))]).set(1);
        metrics
    }

    /// For whoever does not publish: the same numbers, seen by nobody.
    pub fn unregistered() -> Metrics {
        let opens = Family::<Labels<1>, Counter>::default();
        Metrics {
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(request_buckets),
            provider_calls: Family::default(),
            provider_call_seconds: Family::new_with_constructor(call_buckets),
            hits: opens.get_or_create_owned(&[("dek", "hit")]),
            opens,
            v1_unauthenticated: Counter::default(),
            dek_cache_entries: Gauge::default(),
            dek_age_seconds: Seconds::default(),
            dek_uses: Gauge::default(),
            token_life_left_seconds: Seconds::default(),
            breakers_open: Gauge::default(),
            build: Family::default(),
            probes: Family::default(),
            ready: Gauge::default(),
            key_ids: Family::default(),
            key_id_changes: Counter::default(),
            config_reloads: Family::default(),
        }
    }

    /// Where the requests of one gRPC method are counted.
    pub fn requests(&self, api: &'static str, method: &'static str) -> Requests {
        let ok = [("api", api), ("method", method), ("code", OK)];
        Requests {
            ok: self.requests.get_or_create_owned(&ok),
            seconds: self.request_seconds.get_or_create_owned(&[("api", api), ("method", method)]),
            all: self.requests.clone(),
            api,
            method,
        }
    }

    /// One call to the key service; `outcome` as in the help text below.
    pub fn provider_call(&self, operation: &'static str, outcome: &'static str, took: Duration) {
        self.provider_calls.get_or_create(&[("operation", operation), ("outcome", outcome)]).inc();
        self.provider_call_seconds
            .get_or_create(&[("operation", operation)])
            .observe(took.as_secs_f64());
    }

    /// The DEK to open a value with was in the cache.
    pub fn open_hit(&self) {
        self.hits.inc();
    }

    /// A DEK was looked for in order to open a value, and not in the cache.
    pub fn open(&self, found: &'static str) {
        self.opens.get_or_create(&[("dek", found)]).inc();
    }

    pub fn v1_unauthenticated(&self) {
        self.v1_unauthenticated.inc();
    }

    /// The background probe ended; it alone decides readiness.
    pub fn probe(&self, ok: bool) {
        self.probes.get_or_create(&[("outcome", if ok { "ok" } else { "failed" })]).inc();
        self.ready.set(i64::from(ok));
    }

    /// From now on Status reports the key_id with this hash.
    pub fn key_id(&self, hash: String) {
        self.key_ids.clear();
        self.key_ids.get_or_create(&[("key_id_hash", hash)]).set(1);
        self.key_id_changes.inc();
    }

    pub fn config_reload(&self, ok: bool) {
        let outcome = if ok { "accepted" } else { "refused" };
        self.config_reloads.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// The OpenMetrics text, with what is only known at the moment of a scrape.
    pub fn render(&self, registry: &Registry, now: Snapshot) -> String {
        self.dek_cache_entries.set(i64::try_from(now.dek_cache_entries).unwrap_or(i64::MAX));
        self.dek_age_seconds.set(now.dek_age.as_secs_f64());
        self.dek_uses.set(i64::try_from(now.dek_uses).unwrap_or(i64::MAX));
        self.token_life_left_seconds.set(now.token_life_left.unwrap_or_default().as_secs_f64());
        self.breakers_open.set(i64::try_from(now.crks_down).unwrap_or(i64::MAX));
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = encode(&mut text, registry);
        text
    }

    fn add_requests(&self, registry: &mut Registry) {
        registry.register(
            "requests",
            "gRPC requests answered, by api (v1beta1, v2), method and gRPC code",
            self.requests.clone(),
        );
        registry.register(
            "request_seconds",
            "Time from a request's arrival to its answer",
            self.request_seconds.clone(),
        );
        registry.register(
            "config_reloads",
            "Changes of the configuration file by outcome: accepted, refused (the old one keeps running)",
            self.config_reloads.clone(),
        );
        registry.register("build_info", "1 for the version that runs", self.build.clone());
        registry.register(
            "crypto_module",
            "The module that does this build's cryptography; fips=\"true\" for the FIPS module",
            Info::new(CryptoModule::linked().labels()),
        );
    }

    fn add_provider(&self, registry: &mut Registry) {
        registry.register(
            "provider_calls",
            "Calls to the key service by operation (wrap, unwrap) and outcome: ok, refused (it said no), \
             not_authentic (it does not know the WDEK), unreachable, timed_out, overloaded, \
             failed_fast (not asked, because it was down a moment ago)",
            self.provider_calls.clone(),
        );
        registry.register(
            "provider_call_seconds",
            "Duration of a call to the key service, its retries included",
            self.provider_call_seconds.clone(),
        );
        registry.register(
            "probes",
            "Background probes (one wrap and one unwrap) by outcome: ok, failed",
            self.probes.clone(),
        );
        registry.register(
            "ready",
            "1 if the last background probe succeeded, so that a DEK can be wrapped and unwrapped now",
            self.ready.clone(),
        );
        registry.register(
            "breakers_open",
            "How many configured CRKs have a key service that is down, so that callers are turned away unasked",
            self.breakers_open.clone(),
        );
        registry.register(
            "token_life_left_seconds",
            "How long the token of the token service is still used (0: none is held)",
            self.token_life_left_seconds.clone(),
        );
    }

    fn add_keys(&self, registry: &mut Registry) {
        registry.register(
            "dek_lookups",
            "DEKs looked for to open a value: hit (in the cache), miss (unwrapped), shared (waited for \
             another caller's unwrap), uncached (CACHE_TIMEOUT_IN_HOURS is 0)",
            self.opens.clone(),
        );
        registry.register(
            "v1_unauthenticated_opens",
            "KMS v1 values opened that carry no authentication code (V1_ACCEPT_UNAUTHENTICATED); \
             re-encrypt until this stands still",
            self.v1_unauthenticated.clone(),
        );
        registry.register(
            "dek_cache_entries",
            "DEKs held in memory for opening",
            self.dek_cache_entries.clone(),
        );
        registry.register(
            "dek_age_seconds",
            "Time since the key service last confirmed the DEK that seals (0: none is held)",
            self.dek_age_seconds.clone(),
        );
        registry.register(
            "dek_uses",
            "How often the DEK that seals was used",
            self.dek_uses.clone(),
        );
        registry.register(
            "key_id_info",
            "1 for the key_id that Status reports; key_id_hash is computed as in kube-apiserver's own metrics",
            self.key_ids.clone(),
        );
        registry.register(
            "key_id_changes",
            "How often the reported key_id was set, the first time included",
            self.key_id_changes.clone(),
        );
    }
}

impl Requests {
    /// One request answered; `code` is the gRPC code's name, such as `OK`.
    pub fn answered(&self, code: &'static str, took: Duration) {
        if code == OK {
            self.ok.inc();
        } else {
            let labels = [("api", self.api), ("method", self.method), ("code", code)];
            self.all.get_or_create(&labels).inc();
        }
        self.seconds.observe(took.as_secs_f64());
    }
}

/// 50 µs to 1.6 s: from a sealed value out of memory to a call that waited for the service.
fn request_buckets() -> Histogram {
    Histogram::new(doubling(0.000_05, 16))
}

/// 1 ms to 4 s: one TLS round trip to the longest wait that a caller allows.
fn call_buckets() -> Histogram {
    Histogram::new(doubling(0.001, 13))
}

/// Not prometheus-client's own buckets: its powers would be all that needs libm, half a MiB of resident memory.
fn doubling(first: f64, count: usize) -> impl Iterator<Item = f64> {
    std::iter::successors(Some(first), |bound| Some(bound * 2.0)).take(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_published_with_its_help_and_region() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry, "eu");
        let requests = metrics.requests("v2", "Encrypt");
        requests.answered("OK", Duration::from_millis(1));
        requests.answered("UNAVAILABLE", Duration::from_millis(1));
        metrics.provider_call("wrap", "ok", Duration::from_millis(1));
        metrics.open_hit();
        metrics.open("miss");
        metrics.v1_unauthenticated();
        metrics.probe(true);
        metrics.config_reload(false);
        let now =
            Snapshot { dek_cache_entries: 3, dek_uses: 4, crks_down: 1, ..Snapshot::default() };
        let text = metrics.render(&registry, now);
        for line in [
            r#"kmsplugin_requests_total{region="eu",api="v2",method="Encrypt",code="OK"} 1"#,
            r#"kmsplugin_provider_calls_total{region="eu",operation="wrap",outcome="ok"} 1"#,
            r#"kmsplugin_requests_total{region="eu",api="v2",method="Encrypt",code="UNAVAILABLE"} 1"#,
            r#"kmsplugin_request_seconds_count{region="eu",api="v2",method="Encrypt"} 2"#,
            r#"kmsplugin_dek_lookups_total{region="eu",dek="hit"} 1"#,
            r#"kmsplugin_dek_lookups_total{region="eu",dek="miss"} 1"#,
            r#"kmsplugin_v1_unauthenticated_opens_total{region="eu"} 1"#,
            r#"kmsplugin_ready{region="eu"} 1"#,
            r#"kmsplugin_config_reloads_total{region="eu",outcome="refused"} 1"#,
            r#"kmsplugin_dek_cache_entries{region="eu"} 3"#,
            r#"kmsplugin_dek_uses{region="eu"} 4"#,
            r#"kmsplugin_breakers_open{region="eu"} 1"#,
            r#"kmsplugin_token_life_left_seconds{region="eu"} 0"#,
            concat!(
                r#"kmsplugin_build_info{region="eu",version=""#,
                env!("CARGO_PKG_VERSION"),
                r#""} 1"#
            ),
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn only_the_current_key_id_is_shown() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry, "");
        metrics.key_id("sha256:old".into());
        metrics.key_id("sha256:new".into());
        let text = metrics.render(&registry, Snapshot::default());
        assert!(text.contains(r#"kmsplugin_key_id_info{key_id_hash="sha256:new"} 1"#), "{text}");
        assert!(!text.contains("sha256:old"), "{text}");
    }
}
