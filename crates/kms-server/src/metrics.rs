//! What can be counted without saying anything secret: answers by action and status, and whether the HSM answers.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    answers: Family<Labels, Counter>,
    ready: Gauge,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    action: &'static str,
    status: u32,
}

impl Metrics {
    #[must_use]
    pub fn new() -> Metrics {
        let mut registry = Registry::with_prefix("kms_server");
        let (answers, ready) = (Family::default(), Gauge::default());
        registry.register("answers", "Answers by action and HTTP status", answers.clone());
        registry.register("ready", "1 while HSM and database answer", ready.clone());
        Metrics { registry, answers, ready }
    }

    pub fn answered(&self, action: &'static str, status: u16) {
        self.answers.get_or_create(&Labels { action, status: u32::from(status) }).inc();
    }

    pub fn ready(&self, ready: bool) {
        self.ready.set(i64::from(ready));
    }

    /// The text of `/metrics`.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}
