//! What is promised of the server, held against one run. Ratios are taken within a round.

use super::loads::{CALM, Load, Measured, Measurements, OVERLOAD};
use super::service::USUAL_WORKERS;
use crate::bench::Finding;
use crate::bench::table::median;

/// Of the rate with one key in the token.
const FULL_TOKEN: f64 = 0.95;
/// Of the authenticated no-op's rate.
const OF_NOOP: f64 = 0.6;
const WRAPS: f64 = 5000.0;
const P99_MS: f64 = 10.0;
const P999_MS: f64 = 50.0;
/// A key service that answers later has not answered.
const LONGEST_MS: f64 = 250.0;
/// Of the peak.
const GOODPUT: f64 = 0.8;
/// Two rates that differ by less are the same on a machine that does other things, too.
const NOISE: f64 = 0.05;

pub(super) fn findings(measured: &Measurements) -> Vec<Finding> {
    vec![
        full_token(measured),
        of_noop(measured),
        wraps(measured),
        calm(measured),
        overload(measured),
        workers(measured, 1, USUAL_WORKERS),
        workers(measured, USUAL_WORKERS, 4),
    ]
}

fn full_token(measured: &Measurements) -> Finding {
    let ratio = ratio(measured, Load::FULL, Load::PEAK);
    let text = format!(
        "wrap with a full token: {ratio:.2} of the rate with one key in it (>= {FULL_TOKEN})"
    );
    Finding { text, held: ratio >= FULL_TOKEN }
}

fn of_noop(measured: &Measurements) -> Finding {
    let ratio = ratio(measured, Load::PEAK, Load::NOOP);
    let of_read = self::ratio(measured, Load::PEAK, Load::READ);
    let text = format!(
        "wrap, audited: {ratio:.2} of the authenticated no-op's rate (>= {OF_NOOP}), {of_read:.2} of an audited read's"
    );
    Finding { text, held: ratio >= OF_NOOP }
}

fn wraps(measured: &Measurements) -> Finding {
    let rate = middle(measured, Load::PEAK, |m| Some(m.good_per_second)).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let text = format!("wrap, audited: {rate:.0}/s on {cores} processors (>= {WRAPS} on 2)");
    Finding { text, held: rate >= WRAPS }
}

fn calm(measured: &Measurements) -> Finding {
    // Nothing measured is no good time.
    let ms = |figure: fn(&Measured) -> Option<f64>| {
        middle(measured, Load::Calm, figure).map_or(f64::INFINITY, |us| us / 1000.0)
    };
    let (p99, p999) = (ms(|m| m.p99_us), ms(|m| m.p999_us));
    let rounds = measured.0.get(&Load::Calm).map(Vec::as_slice).unwrap_or_default();
    let longest = rounds.iter().filter_map(|m| m.max_us).fold(0.0, f64::max) / 1000.0;
    let failed: u64 = rounds.iter().map(|m| m.failed).sum();
    let text = format!(
        "wrap at {CALM}/s: p99 {p99:.1} ms (<= {P99_MS}), p99.9 {p999:.1} ms (<= {P999_MS}), longest of all rounds \
         {longest:.0} ms (<= {LONGEST_MS}), {failed} failed (0)"
    );
    let held = p99 <= P99_MS && p999 <= P999_MS && longest <= LONGEST_MS && failed == 0;
    Finding { text, held: held && !rounds.is_empty() }
}

fn overload(measured: &Measurements) -> Finding {
    let ratio = ratio(measured, Load::Overload, Load::PEAK);
    let rounds = measured.0.get(&Load::Overload).map(Vec::as_slice).unwrap_or_default();
    let failed: u64 = rounds.iter().map(|m| m.failed).sum();
    let text = format!(
        "at {OVERLOAD} times the peak: goodput {ratio:.2} of it (>= {GOODPUT}), {failed} neither good nor 429 or 503 (0)"
    );
    Finding { text, held: ratio >= GOODPUT && failed == 0 }
}

fn workers(measured: &Measurements, few: u32, more: u32) -> Finding {
    let ratio = ratio(measured, Load::wrap_with_workers(more), Load::wrap_with_workers(few));
    let least = 1.0 - NOISE;
    let text = format!(
        "wrap with {more} HSM workers: {ratio:.2} of the rate with {few} (never less: >= {least})"
    );
    Finding { text, held: ratio >= least }
}

/// One load's good answers in parts of another's: of each round, then the median. 0 where one was not measured.
fn ratio(measured: &Measurements, one: Load, other: Load) -> f64 {
    let (Some(one), Some(other)) = (measured.0.get(&one), measured.0.get(&other)) else {
        return 0.0;
    };
    let rates =
        one.iter().zip(other).map(|(one, other)| one.good_per_second / other.good_per_second);
    median(rates.filter(|ratio| ratio.is_finite()).collect()).unwrap_or_default()
}

fn middle(
    measured: &Measurements,
    load: Load,
    figure: fn(&Measured) -> Option<f64>,
) -> Option<f64> {
    median(measured.0.get(&load)?.iter().filter_map(figure).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn rates(rates: [f64; 3]) -> Vec<Measured> {
        rates.map(|rate| Measured { good_per_second: rate, ..Measured::default() }).to_vec()
    }

    fn of<'f>(findings: &'f [Finding], text: &str) -> &'f Finding {
        findings.iter().find(|finding| finding.text.contains(text)).unwrap()
    }

    #[test]
    fn a_promise_is_judged_round_by_round() {
        // The machine is slow in the second round: the rates fall, their ratios stay.
        let measured = Measurements(BTreeMap::from([
            (Load::PEAK, rates([6000.0, 600.0, 6000.0])),
            (Load::NOOP, rates([9000.0, 900.0, 9000.0])),
            (Load::FULL, rates([5400.0, 540.0, 5400.0])),
            (Load::wrap_with_workers(1), rates([5000.0, 600.0, 5000.0])),
            (Load::wrap_with_workers(4), rates([5400.0, 540.0, 5400.0])),
        ]));
        let findings = findings(&measured);
        assert!(of(&findings, "0.67 of the authenticated no-op's rate").held);
        assert!(!of(&findings, "a full token: 0.90 of the rate").held);
        assert!(of(&findings, "with 2 HSM workers: 1.20").held);
        assert!(!of(&findings, "with 4 HSM workers: 0.90").held);
    }

    #[test]
    fn what_was_not_measured_did_not_hold() {
        let findings = findings(&Measurements(BTreeMap::new()));
        assert_eq!(findings.iter().find(|finding| finding.held).map(|finding| &finding.text), None);
    }

    #[test]
    fn one_late_answer_breaks_the_promise() {
        let calm = |max_us| Measured {
            p99_us: Some(4000.0),
            p999_us: Some(9000.0),
            max_us: Some(max_us),
            ..Measured::default()
        };
        let held = |rounds| {
            let measured = Measurements(BTreeMap::from([(Load::Calm, rounds)]));
            super::calm(&measured).held
        };
        assert!(held(vec![calm(30_000.0), calm(20_000.0)]));
        assert!(!held(vec![calm(30_000.0), calm(260_000.0)]));
    }
}
