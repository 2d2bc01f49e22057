//! Latencies in a fixed space: how many fell into each of some thousand steps, each about one percent wide. An hour
//! of a fast plug-in has more calls than memory has room for.

use std::time::Duration;

/// Steps per doubling, as a power of two.
const PRECISION: u32 = 6;
const STEPS: usize = 64 << PRECISION;

#[derive(Debug)]
pub(super) struct Latencies {
    counts: Vec<u64>,
    total: u64,
}

impl Latencies {
    pub(super) fn new() -> Self {
        Latencies { counts: vec![0; STEPS], total: 0 }
    }

    pub(super) fn add(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get_mut(step(nanos)) {
            *count += 1;
            self.total += 1;
        }
    }

    pub(super) fn merge(&mut self, other: &Latencies) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
        self.total += other.total;
    }

    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The smallest latency that this share of all calls did not exceed, at most 1.6 % too high.
    pub(super) fn quantile(&self, share: f64) -> Duration {
        let mut seen = 0;
        for (step, count) in self.counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen as f64 >= share * self.total as f64 {
                return Duration::from_nanos(upper(step));
            }
        }
        Duration::ZERO
    }
}

/// Values below 128 have a step of their own; above, the leading one bit and the six below it name the step.
fn step(nanos: u64) -> usize {
    let shift = (u64::BITS - nanos.leading_zeros()).saturating_sub(PRECISION + 1);
    let leading = usize::try_from(nanos >> shift).unwrap_or(usize::MAX);
    (usize::try_from(shift).unwrap_or(usize::MAX) << PRECISION).saturating_add(leading)
}

/// The largest value of a step.
fn upper(step: usize) -> u64 {
    let step = u64::try_from(step).unwrap_or(u64::MAX);
    let shift = (step >> PRECISION).saturating_sub(1).min(63);
    let leading = u128::from(step - (shift << PRECISION));
    u64::try_from(((leading + 1) << shift) - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_measured_is_zero() {
        assert_eq!(Latencies::new().quantile(0.99), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn each_value_has_a_step_that_ends_just_above_it(nanos: u64) {
            let step = step(nanos);
            prop_assert!(step < STEPS);
            let upper = upper(step);
            prop_assert!(upper >= nanos);
            prop_assert!(upper - nanos <= nanos / 64);
        }

        #[test]
        fn quantiles_are_those_of_the_sorted_values(
            mut values in proptest::collection::vec(0u64..10_000_000, 1..200),
            share in 0.01f64..=1.0,
        ) {
            let mut latencies = Latencies::new();
            values.iter().for_each(|nanos| latencies.add(Duration::from_nanos(*nanos)));
            values.sort_unstable();
            let rank = (share * values.len() as f64).ceil() as usize;
            let exact = values[rank - 1];
            let found = u64::try_from(latencies.quantile(share).as_nanos()).unwrap();
            prop_assert!(found >= exact && found - exact <= exact / 64, "{found} for {exact}");
        }
    }
}
