//! The load: callers that each make one call after the other over one shared connection, and check every answer.
//! A wrong answer counts as an error, like a refused call.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::ValueEnum;
use kms_api::grpc::Channel;
use kms_core::clock::{Clock, SystemClock};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::plugin::{Plugin, V1, V2};
use super::quantile::Latencies;

/// What a call may take beyond the end of the measurement before it is given up.
const GRACE: Duration = Duration::from_secs(5);
const REFRESH: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Api {
    V1,
    V2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Op {
    Encrypt,
    Decrypt,
    Both,
}

pub(super) struct Load {
    pub(super) channel: Channel,
    pub(super) api: Api,
    pub(super) op: Op,
    pub(super) callers: u32,
}

#[derive(Debug)]
pub(super) struct Tally {
    /// Of the calls that succeeded.
    pub(super) latencies: Latencies,
    pub(super) errors: u64,
    pub(super) first_error: Option<String>,
}

impl Load {
    /// Calls for `duration`, and tells `progress` now and then how many calls were made.
    pub(super) async fn run(
        &self,
        duration: Duration,
        clock: SystemClock,
        progress: impl Fn(u64),
    ) -> Tally {
        let done = Arc::new(AtomicU64::new(0));
        let end = clock.now() + duration;
        let give_up = Instant::now() + duration + GRACE;
        let mut callers = JoinSet::new();
        for number in 0..self.callers {
            let caller = Caller { done: Arc::clone(&done), clock, end, op: self.op, number };
            match self.api {
                Api::V1 => callers.spawn(caller.call(V1::new(self.channel.clone()))),
                Api::V2 => callers.spawn(caller.call(V2::new(self.channel.clone()))),
            };
        }
        let mut sum = Tally::new();
        let mut ticks = tokio::time::interval(REFRESH);
        loop {
            tokio::select! {
                biased;
                _ = ticks.tick() => progress(done.load(Ordering::Relaxed)),
                joined = timeout_at(give_up, callers.join_next()) => match joined {
                    Ok(Some(tally)) => sum.add(tally),
                    Ok(None) => return sum,
                    Err(_) => {
                        sum.fail(callers.len(), || "no answer in time".to_owned());
                        return sum;
                    }
                },
            }
        }
    }
}

impl Tally {
    fn new() -> Self {
        Tally { latencies: Latencies::new(), errors: 0, first_error: None }
    }

    pub(super) fn requests(&self) -> u64 {
        self.latencies.total()
    }

    fn fail(&mut self, calls: usize, text: impl FnOnce() -> String) {
        self.errors += u64::try_from(calls).unwrap_or(u64::MAX);
        self.first_error.get_or_insert_with(text);
    }

    fn add(&mut self, other: Result<Tally, tokio::task::JoinError>) {
        match other {
            Ok(other) => {
                self.latencies.merge(&other.latencies);
                self.errors += other.errors;
                self.first_error = self.first_error.take().or(other.first_error);
            }
            Err(error) => self.fail(1, || error.to_string()),
        }
    }
}

/// One of the callers, which makes its calls one after the other.
struct Caller {
    done: Arc<AtomicU64>,
    clock: SystemClock,
    end: Duration,
    op: Op,
    number: u32,
}

impl Caller {
    async fn call<P: Plugin>(self, mut plugin: P) -> Tally {
        let mut tally = Tally::new();
        let mut kept = None;
        for count in 0.. {
            if self.clock.now() >= self.end {
                break;
            }
            match self.step(&mut plugin, &mut kept, count).await {
                Ok(Some(took)) => tally.latencies.add(took),
                Ok(None) => continue,
                Err(text) => {
                    tally.fail(1, || text);
                    // A plug-in that refuses at once would keep this thread from its timers.
                    tokio::task::yield_now().await;
                }
            }
            self.done.fetch_add(1, Ordering::Relaxed);
        }
        tally
    }

    /// One call and what it took. None for an encryption that only gives a decrypting caller something to decrypt.
    async fn step<P: Plugin>(
        &self,
        plugin: &mut P,
        kept: &mut Option<([u8; 32], P::Sealed)>,
        count: u64,
    ) -> Result<Option<Duration>, String> {
        if self.op == Op::Encrypt {
            *kept = None;
        }
        let Some((payload, sealed)) = kept.take() else {
            let payload = payload(self.number, count);
            let (sealed, took) = self.timed(plugin.encrypt(payload.to_vec())).await?;
            *kept = Some((payload, sealed));
            return Ok((self.op != Op::Decrypt).then_some(took));
        };
        let outcome = self.timed(plugin.decrypt(&sealed)).await;
        let intact = matches!(&outcome, Ok((opened, _)) if *opened == payload);
        if self.op == Op::Decrypt {
            *kept = Some((payload, sealed));
        }
        let (_, took) = outcome?;
        if intact {
            Ok(Some(took))
        } else {
            Err("the plug-in decrypted to something else".to_owned())
        }
    }

    async fn timed<T>(
        &self,
        call: impl Future<Output = Result<T, String>>,
    ) -> Result<(T, Duration), String> {
        let before = self.clock.now();
        let answer = call.await?;
        Ok((answer, self.clock.now() - before))
    }
}

/// 32 bytes, as kube-apiserver's keys and seeds are, and never the same twice.
fn payload(caller: u32, count: u64) -> [u8; 32] {
    let mut payload = [0x6b; 32];
    payload[..4].copy_from_slice(&caller.to_be_bytes());
    payload[4..12].copy_from_slice(&count.to_be_bytes());
    payload
}
