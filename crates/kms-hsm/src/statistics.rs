//! What an HSM is asked, how long it takes and what it answers: numbers for an operator, without a key, an id or a byte
//! of anybody's data among them.
//!
//! A PKCS#11 library is one for the whole process, and so is this count.

use cryptoki::context::Function;
use kms_core::clock::{Clock, SystemClock};
use std::collections::{BTreeMap, HashMap};
use std::mem::{Discriminant, discriminant};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Upper ends of the buckets of [`Times`], in microseconds: from a library in memory to an HSM that makes an RSA key.
pub const BOUNDS: [u64; 16] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 10_000_000,
];

/// All of it, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// How long each call of a PKCS#11 function took, by the function's name in the standard: as many as there were.
    pub functions: BTreeMap<String, Times>,
    /// How often each return code but CKR_OK came, by its name.
    pub codes: BTreeMap<String, u64>,
    /// How long requests waited for a session.
    pub waits: Times,
    pub logins: u64,
    /// Logins after the first: something was lost before each.
    pub reconnects: u64,
    /// Sessions that are open and logged in.
    pub sessions: u64,
    /// Of them, at work.
    pub busy: u64,
    /// As many as the settings ask for.
    pub most_sessions: u64,
    /// Requests that wait for a session.
    pub queued: u64,
    /// As many as may wait.
    pub most_queued: u64,
}

/// A histogram of durations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// For each of [`BOUNDS`], how many took no longer than that and longer than the one before; the last has no end.
    pub counts: [u64; BOUNDS.len() + 1],
    pub sum: Duration,
}

impl Times {
    fn add(&mut self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|bound| *bound < micros);
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum += took;
    }
}

/// What is counted as it happens.
#[derive(Default)]
struct Record {
    /// Named when somebody asks: a name costs more than some calls.
    functions: HashMap<Discriminant<Function>, (Function, Times)>,
    /// Everything else. The gauges are read when somebody asks.
    rest: Statistics,
}

/// What was counted until now.
pub(crate) fn counted() -> Statistics {
    let record = record();
    let functions = record.functions.values().map(|(function, times)| (name(*function), *times));
    Statistics { functions: functions.collect(), ..record.rest.clone() }
}

/// Runs `call`, which is one call of one PKCS#11 function, and counts how long it took.
pub(crate) fn timed<T>(function: Function, call: impl FnOnce() -> T) -> T {
    let began = now();
    let result = call();
    let took = now().saturating_sub(began);
    let mut record = record();
    let known = record.functions.entry(discriminant(&function));
    known.or_insert((function, Times::default())).1.add(took);
    result
}

pub(crate) fn code(name: &str) {
    *record().rest.codes.entry(name.to_owned()).or_default() += 1;
}

pub(crate) fn waited(since: Duration) {
    let took = now().saturating_sub(since);
    record().rest.waits.add(took);
}

pub(crate) fn login(again: bool) {
    let rest = &mut record().rest;
    rest.logins += 1;
    rest.reconnects += u64::from(again);
}

/// `C_Encrypt`.
pub(crate) fn name(function: Function) -> String {
    format!("C_{function:?}")
}

/// Time since this process began to count.
pub(crate) fn now() -> Duration {
    static CLOCK: OnceLock<SystemClock> = OnceLock::new();
    CLOCK.get_or_init(SystemClock::new).now()
}

fn record() -> MutexGuard<'static, Record> {
    static RECORD: OnceLock<Mutex<Record>> = OnceLock::new();
    RECORD.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duration_is_in_the_bucket_that_it_fits() {
        let mut times = Times::default();
        for micros in [0, 50, 51, 10_000_000, 10_000_001, u64::MAX / 2000] {
            times.add(Duration::from_micros(micros));
        }
        assert_eq!(times.counts[..2], [2, 1]);
        assert_eq!(times.counts[15..], [1, 2]);
    }

    #[test]
    fn a_function_is_counted_by_its_name_and_returns_what_it_returns() {
        let before = counted().functions.get("C_SeedRandom").map_or(0, |t| t.counts.iter().sum());
        assert_eq!(timed(Function::SeedRandom, || 7), 7);
        let after: u64 = counted().functions["C_SeedRandom"].counts.iter().sum();
        assert_eq!(after, before + 1);
    }
}
