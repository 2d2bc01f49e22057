//! How patiently the key service is asked: inside the caller's deadline, again only when it could not be
//! reached, and not at all for a moment after it was found to be down.
//!
//! The answer's meaning is not decided here; DEKs are not kept here.

use std::fmt::Debug;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kms_api::trace::TraceParent;
use kms_core::clock::Clock;

use super::{Backend, Error, KeyService, NewDek, Unwrapped};
use crate::metrics::Metrics;
use crate::random::Random;
use crate::sealer::Call;

/// A caller that sees its own deadline pass learns nothing; so a sixth of it (at most this much) is kept
/// to carry the cause back.
const KEPT_FOR_THE_ANSWER: Duration = Duration::from_millis(500);
/// The first pause between two attempts; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// So many calls in a row have to fail before callers are turned away unasked.
const FAILURES_TO_OPEN: u32 = 3;
/// How long they are turned away at most; then one is let through to see. Doubles up to the second figure.
const FIRST_REST: Duration = Duration::from_millis(500);
/// Half of what the probe waits at most, so that the breaker does not turn away the probe that would see the service
/// come back.
const LONGEST_REST: Duration = Duration::from_millis(2500);
/// Whoever has less time than this learns nothing of the service by not being answered. kube-apiserver hands on its
/// caller's deadline: three `kubectl --request-timeout=200ms` would else turn everybody away from a service that is well.
const HURRIED: Duration = Duration::from_millis(500);

/// A key service with retries, deadline and breaker around it.
#[derive(Debug)]
pub struct Guard {
    service: Arc<dyn KeyService>,
    patience: Patience,
    breaker: Breaker,
    tools: Tools,
}

/// What the configuration says about asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    pub max_retries: u32,
    /// No call waits longer, whatever the caller's deadline.
    pub timeout: Option<Duration>,
}

/// What everybody who works with time and chance is given.
#[derive(Debug, Clone)]
pub struct Tools {
    pub clock: Arc<dyn Clock>,
    pub random: Random,
    pub metrics: Metrics,
}

impl Guard {
    pub fn new(service: Arc<dyn KeyService>, patience: Patience, tools: Tools) -> Guard {
        Guard { service, patience, breaker: Breaker::default(), tools }
    }

    /// See [`KeyService::wrap_new`].
    pub async fn wrap_new(&self, call: &Call) -> Result<NewDek, Error> {
        let call = self.within_budget(call);
        self.ask("wrap", &call, || self.service.wrap_new(&call)).await
    }

    /// See [`KeyService::unwrap`].
    pub async fn unwrap(&self, wdek: &[u8], call: &Call) -> Result<Unwrapped, Error> {
        let call = self.within_budget(call);
        self.ask("unwrap", &call, || self.service.unwrap(wdek, &call)).await
    }

    /// See [`KeyService::backend`].
    pub fn backend(&self) -> Backend {
        self.service.backend()
    }

    /// See [`KeyService::named_version`].
    pub fn named_version(&self) -> Option<&str> {
        self.service.named_version()
    }

    /// See [`KeyService::token_life_left`].
    pub fn token_life_left(&self) -> Option<Duration> {
        self.service.token_life_left()
    }

    /// Callers are turned away unasked, but for one now and then.
    pub fn is_down(&self) -> bool {
        self.breaker.is_open()
    }

    fn within_budget(&self, call: &Call) -> Call {
        let budget = budget(call.deadline);
        let deadline = self.patience.timeout.map_or(budget, |timeout| timeout.min(budget));
        Call { uid: call.uid.clone(), trace: self.child(call.trace), deadline }
    }

    /// Unless everybody is given as little.
    fn is_hurried(&self, call: &Call) -> bool {
        call.deadline < self.patience.timeout.map_or(HURRIED, |timeout| timeout.min(HURRIED))
    }

    /// What the key service is asked is a span of its own in the caller's trace, by chance unlike any other.
    fn child(&self, trace: Option<TraceParent>) -> Option<TraceParent> {
        trace.map(|trace| trace.child(self.tools.random.bytes().unwrap_or_default()))
    }

    async fn ask<T, F: Future<Output = Result<T, Error>>>(
        &self,
        operation: &'static str,
        call: &Call,
        attempt: impl Fn() -> F,
    ) -> Result<T, Error> {
        let started = self.tools.clock.now();
        let is_hurried = self.is_hurried(call);
        if let Some(error) = self.breaker.turns_away(is_hurried, started, &self.tools.random) {
            self.tools.metrics.provider_call(operation, "failed_fast", Duration::ZERO);
            return Err(error);
        }
        // If the deadline passes during a pause, the cause of the last attempt is the better answer.
        let mut last = Error::TimedOut(self.backend());
        let result = tokio::time::timeout(call.deadline, self.attempts(attempt, &mut last)).await;
        let result = result.unwrap_or(Err(last));
        let now = self.tools.clock.now();
        let outcome = result.as_ref().map_or_else(Error::outcome, |_| "ok");
        self.tools.metrics.provider_call(operation, outcome, now.saturating_sub(started));
        if let Err(error) = &result {
            tracing::debug!(
                uid = call.uid,
                trace_id = call.trace_id(),
                "The {} gave no answer to {operation}: {error}",
                self.backend()
            );
        }
        let error = result.as_ref().err();
        if !(is_hurried && matches!(error, Some(Error::TimedOut(_)))) {
            self.breaker.learn(error, now, &self.tools.random);
        }
        result
    }

    async fn attempts<T, F: Future<Output = Result<T, Error>>>(
        &self,
        attempt: impl Fn() -> F,
        last: &mut Error,
    ) -> Result<T, Error> {
        for retry in 0..self.patience.max_retries {
            match attempt().await {
                Err(error @ Error::Unreachable { .. }) => *last = error,
                result => return result,
            }
            tokio::time::sleep(self.pause(retry)).await;
        }
        attempt().await
    }

    /// Doubles with each retry; between half of it and the whole, so that callers do not come back as one.
    fn pause(&self, retry: u32) -> Duration {
        let longest = FIRST_PAUSE.saturating_mul(2u32.saturating_pow(retry)).min(LONGEST_PAUSE);
        self.tools.random.between(longest / 2, longest)
    }
}

/// What is left of a caller's deadline for the key service.
pub fn budget(deadline: Duration) -> Duration {
    deadline - (deadline / 6).min(KEPT_FOR_THE_ANSWER)
}

/// Counts outages in a row. After a few it turns callers away with the cause that it knows, and lets one
/// through now and then, so that hanging calls do not pile up behind a dead service.
#[derive(Debug, Default)]
struct Breaker(Mutex<Outage>);

#[derive(Debug, Default)]
struct Outage {
    failures: u32,
    rest: Duration,
    until: Duration,
    cause: Option<Error>,
}

impl Breaker {
    fn is_open(&self) -> bool {
        let outage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        outage.failures >= FAILURES_TO_OPEN
    }

    /// `is_hurried` callers see nothing, so none of them is let through.
    fn turns_away(&self, is_hurried: bool, now: Duration, random: &Random) -> Option<Error> {
        let mut outage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if outage.failures < FAILURES_TO_OPEN {
            return None;
        }
        if is_hurried || now < outage.until {
            return outage.cause.clone();
        }
        // This caller goes and sees; the others wait for what it finds, or for the next one.
        outage.rest_from(now, random);
        None
    }

    fn learn(&self, error: Option<&Error>, now: Duration, random: &Random) {
        let mut outage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(error) = error.filter(|error| error.is_outage()) else {
            *outage = Outage::default();
            return;
        };
        outage.failures = outage.failures.saturating_add(1);
        outage.cause = Some(error.clone());
        if outage.failures >= FAILURES_TO_OPEN {
            outage.rest = (outage.rest * 2).clamp(FIRST_REST, LONGEST_REST);
            outage.rest_from(now, random);
        }
    }
}

impl Outage {
    /// At least half of the rest, so that the plug-ins of many nodes do not come back as one.
    fn rest_from(&mut self, now: Duration, random: &Random) {
        self.until = now + random.between(self.rest / 2, self.rest);
    }
}
