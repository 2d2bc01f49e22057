//! What is kept of each call, and what is told of all.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

/// The outcome of one load.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    /// How long those took that were wanted, in microseconds.
    good: Vec<u32>,
    /// How long those took that were refused (429, 503).
    refused: Vec<u32>,
    /// Those that were neither, nor a success: who wants a refusal (the no-op) still gets a success now and then.
    failed: u64,
    /// All answers by status; 0 is a connection that failed.
    statuses: BTreeMap<u16, u64>,
    elapsed: Duration,
}

impl Figures {
    /// Counts an answer that took `time`. `wanted` is the status of a good one.
    pub(crate) fn count(&mut self, status: u16, wanted: u16, time: Duration) {
        let micros = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        *self.statuses.entry(status).or_default() += 1;
        match status {
            _ if status == wanted => self.good.push(micros),
            429 | 503 => self.refused.push(micros),
            200..300 => {}
            _ => self.failed += 1,
        }
    }

    pub(crate) fn add(&mut self, other: Figures) {
        self.good.extend(other.good);
        self.refused.extend(other.refused);
        self.failed += other.failed;
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
    }

    pub(crate) fn took(&mut self, elapsed: Duration) {
        self.elapsed = elapsed;
    }

    pub(crate) fn json(mut self) -> Value {
        self.good.sort_unstable();
        self.refused.sort_unstable();
        let rate = |count: usize| per_second(count, self.elapsed);
        json!({
            "good_per_second": rate(self.good.len()),
            "refused_per_second": rate(self.refused.len()),
            "failed": self.failed,
            "p50_us": percentile(&self.good, 500),
            "p99_us": percentile(&self.good, 990),
            "p999_us": percentile(&self.good, 999),
            "max_us": self.good.last().max(self.refused.last()),
            "refused_p99_us": percentile(&self.refused, 990),
            "statuses": self.statuses,
        })
    }
}

fn per_second(count: usize, elapsed: Duration) -> f64 {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    if elapsed.is_zero() { 0.0 } else { f64::from(count) / elapsed.as_secs_f64() }
}

/// Of sorted values the one that so many per mille are not above.
fn percentile(sorted: &[u32], per_mille: usize) -> Option<u32> {
    let rank = (sorted.len() * per_mille).div_ceil(1000);
    sorted.get(rank.checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let values: Vec<u32> = (1..=1000).collect();
        assert_eq!(percentile(&values, 500), Some(500));
        assert_eq!(percentile(&values, 999), Some(999));
        assert_eq!(percentile(&[7], 990), Some(7));
        assert_eq!(percentile(&[], 500), None);
    }

    #[test]
    fn a_refusal_is_neither_good_nor_a_failure() {
        let mut figures = Figures::default();
        let time = Duration::from_millis(2);
        for status in [200, 200, 429, 503, 500, 0] {
            figures.count(status, 200, time);
        }
        figures.took(Duration::from_secs(2));
        let json = figures.json();
        assert_eq!(json["good_per_second"], 1.0);
        assert_eq!(json["refused_per_second"], 1.0);
        assert_eq!(json["failed"], 2);
        assert_eq!(json["p99_us"], 2000);
    }

    #[test]
    fn what_is_wanted_may_be_a_refusal() {
        let mut figures = Figures::default();
        figures.count(429, 429, Duration::from_millis(1));
        figures.count(200, 429, Duration::from_millis(1));
        figures.took(Duration::from_secs(1));
        let json = figures.json();
        assert_eq!((&json["good_per_second"], &json["failed"]), (&1.0.into(), &0.into()));
    }
}
