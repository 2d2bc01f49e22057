//! What the vault counts of its HSM, as metrics. The vault counts where the calls are made, which may be in another
//! process; here it is only shown.

use kms_hsm::{BOUNDS, Circuit, Statistics, Times};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Cheap to clone: every clone shows the same numbers.
#[derive(Debug, Clone, Default)]
pub struct HsmMetrics(Arc<Mutex<Option<Seen>>>);

/// What the last look at the vault has found.
#[derive(Debug, Clone)]
struct Seen {
    circuit: Circuit,
    counted: Option<Statistics>,
}

impl HsmMetrics {
    pub fn take(&self, circuit: Circuit, counted: Option<Statistics>) {
        let seen = Seen { circuit, counted };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen);
    }
}

impl Collector for HsmMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(Seen { circuit, counted }) = seen else { return Ok(()) };
        let help = "1 for what the breaker before the HSM is: closed (requests are let through), repairing (they wait), \
                    open (they are refused at once), pin_refused";
        let mut circuits =
            encoder.encode_descriptor("hsm_circuit", help, None, MetricType::Gauge)?;
        for state in Circuit::ALL {
            let gauge = ConstGauge::new(i64::from(state == circuit));
            gauge.encode(circuits.encode_family(&[("state", state.name())])?)?;
        }
        // Without an answer there is nothing more to show: a gap says so, a zero would lie.
        let Some(counted) = counted else { return Ok(()) };
        for (name, help, value) in [
            ("hsm_sessions_open", "Sessions that are open and logged in", counted.sessions),
            ("hsm_sessions_in_use", "Sessions that are at work", counted.busy),
            ("hsm_sessions_max", "Sessions that the configuration asks for", counted.most_sessions),
            ("hsm_queue_length", "Requests that wait for a session", counted.queued),
            ("hsm_queue_max", "Requests that may wait for a session", counted.most_queued),
        ] {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        for (name, help, value) in [
            ("hsm_logins", "Logins at the token that it granted", counted.logins),
            ("hsm_reconnects", "Logins after sessions or the token were lost", counted.reconnects),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        let help = "Return codes of PKCS#11 functions but CKR_OK, by their names";
        let mut codes = encoder.encode_descriptor("hsm_codes", help, None, MetricType::Counter)?;
        for (code, count) in &counted.codes {
            let label = [("code", code.as_str())];
            ConstCounter::new(*count).encode(codes.encode_family(&label)?)?;
        }
        let help = "How long requests waited for a session";
        let waits = encoder.encode_descriptor(
            "hsm_queue_wait",
            help,
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        histogram(waits, &counted.waits)?;
        let help = "How long PKCS#11 functions took, by their names";
        let mut calls = encoder.encode_descriptor(
            "hsm_call",
            help,
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (function, times) in &counted.functions {
            let label = [("function", function.as_str())];
            histogram(calls.encode_family(&label)?, times)?;
        }
        Ok(())
    }
}

fn histogram(mut encoder: MetricEncoder<'_>, times: &Times) -> fmt::Result {
    let ends = BOUNDS.iter().map(|micros| Duration::from_micros(*micros).as_secs_f64());
    let buckets: Vec<(f64, u64)> = ends.chain([f64::INFINITY]).zip(times.counts).collect();
    let count = times.counts.iter().sum();
    encoder.encode_histogram::<NoLabelSet>(times.sum.as_secs_f64(), count, &buckets, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    #[test]
    fn what_was_counted_is_shown_and_nothing_while_nobody_can_say() {
        let shown = HsmMetrics::default();
        let mut registry = Registry::with_prefix("kms_server");
        registry.register_collector(Box::new(shown.clone()));
        let text = || {
            let mut text = String::new();
            encode(&mut text, &registry).unwrap();
            text
        };
        assert_eq!(text(), "# EOF\n");
        shown.take(Circuit::Open, None);
        let away = text();
        assert!(away.contains("kms_server_hsm_circuit{state=\"open\"} 1\n"), "{away}");
        assert!(away.contains("kms_server_hsm_circuit{state=\"closed\"} 0\n"), "{away}");
        assert!(!away.contains("hsm_sessions"), "{away}");
        let mut times = Times { sum: Duration::from_millis(3), ..Times::default() };
        (times.counts[0], times.counts[16]) = (2, 1);
        let counted = Statistics {
            functions: [("C_Encrypt".to_owned(), times)].into(),
            codes: [("CKR_DEVICE_ERROR".to_owned(), 4)].into(),
            sessions: 2,
            logins: 3,
            reconnects: 2,
            ..Statistics::default()
        };
        shown.take(Circuit::Closed, Some(counted));
        let text = text();
        for sample in [
            "kms_server_hsm_circuit{state=\"closed\"} 1\n",
            "kms_server_hsm_sessions_open 2\n",
            "kms_server_hsm_logins_total 3\n",
            "kms_server_hsm_reconnects_total 2\n",
            "kms_server_hsm_codes_total{code=\"CKR_DEVICE_ERROR\"} 4\n",
            "kms_server_hsm_call_seconds_bucket{le=\"0.00005\",function=\"C_Encrypt\"} 2\n",
            "kms_server_hsm_call_seconds_bucket{le=\"+Inf\",function=\"C_Encrypt\"} 3\n",
            "kms_server_hsm_call_seconds_count{function=\"C_Encrypt\"} 3\n",
            "kms_server_hsm_queue_wait_seconds_count 0\n",
        ] {
            assert!(text.contains(sample), "{sample} is not in {text}");
        }
    }
}
