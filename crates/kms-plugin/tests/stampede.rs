//! A thousand plug-ins and one key service of finite capacity, in virtual time: what arrives there when it comes back
//! from an outage, and when the DEKs that were got together are refreshed. Probe, breaker, retries and refresh are the
//! real ones; the service, the clock and the chance are not. `--nocapture` shows the figures that `docs/outages.md` has.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail loudly; the figures"
)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use kms_core::clock::Clock;
use kms_core::secret::Dek;
use kms_daemon::lifecycle::Shutdown;
use kms_plugin::dek_cache::CrkName;
use kms_plugin::keys::{Crk, Ring};
use kms_plugin::metrics::Metrics;
use kms_plugin::probe;
use kms_plugin::provider::guard::{Guard, Patience, Tools};
use kms_plugin::provider::{Error, KeyService, NewDek, Unwrapped};
use kms_plugin::random::Random;
use kms_plugin::sealer::{Call, Sealer};
use tokio::time::{Instant, sleep};

#[path = "sealing/policy.rs"]
mod policy;

use policy::{HOUR, policy};

const PLUG_INS: u64 = 1000;
/// Calls a second, and how many may wait: kms-server's QUEUE.
const CAPACITY: u32 = 500;
const QUEUE: u32 = 256;
/// PROBE_INTERVAL_IN_SECONDS and CACHE_TIMEOUT_IN_HOURS as they are by default.
const INTERVAL: Duration = Duration::from_secs(30);
const OUTAGE: Duration = Duration::from_secs(300);
const TICK: Duration = Duration::from_millis(100);

#[tokio::test(start_paused = true)]
async fn a_thousand_plug_ins_do_not_stampede_after_an_outage() {
    let apart = simulate(Chance::Seeded).await;
    let together = simulate(Chance::None).await;
    println!("{:>44} {:>12} {:>15}", "", "with jitter", "without jitter");
    for (what, figure) in FIGURES {
        println!("{what:>44} {:>12} {:>15}", figure(&apart), figure(&together));
    }
    // Everybody is served as fast as the service can, and nobody is turned away on the way.
    assert_eq!(apart.turned_away, 0);
    assert!(apart.healthy_after <= Duration::from_secs(7), "{apart:?}");
    assert!(apart.peak_after_return <= 2 * usize::try_from(CAPACITY / 10).unwrap(), "{apart:?}");
    // In the hour after it nobody meets again.
    assert!(apart.peak_later <= 6 * apart.mean_later, "{apart:?}");
    // The same without chance is what the jitter is for.
    assert!(together.peak_after_return >= 1000, "{together:?}");
    assert!(together.turned_away >= 1000, "{together:?}");
    assert!(2 * together.healthy_after > 3 * apart.healthy_after, "{together:?}");
    assert!(2 * together.peak_later > 3 * apart.peak_later, "{together:?}");
}

type Figure = fn(&Seen) -> String;

const FIGURES: [(&str, Figure); 5] = [
    ("calls in the worst 0.1 s after the return", |seen| seen.peak_after_return.to_string()),
    ("calls turned away, queue full", |seen| seen.turned_away.to_string()),
    ("until all are ready", |seen| format!("{:.1} s", seen.healthy_after.as_secs_f64())),
    ("calls in the worst 0.1 s of the hour after", |seen| seen.peak_later.to_string()),
    ("calls in 0.1 s of that hour, on average", |seen| seen.mean_later.to_string()),
];

#[derive(Debug)]
struct Seen {
    peak_after_return: usize,
    turned_away: usize,
    healthy_after: Duration,
    peak_later: usize,
    mean_later: usize,
}

#[derive(Clone, Copy)]
enum Chance {
    Seeded,
    /// Every pause is as long as it may be: what a plug-in without jitter does.
    None,
}

/// Power comes back: all start in the same moment, before the key service does.
async fn simulate(chance: Chance) -> Seen {
    let clock = Arc::new(VirtualClock(Instant::now()));
    let service = Arc::new(Service { clock: clock.clone(), state: Mutex::default() });
    let shutdown = Shutdown::new();
    let sealers: Vec<_> = (0..PLUG_INS)
        .map(|number| {
            let random = chance.source(number);
            let tools = Tools { clock: clock.clone(), random, metrics: Metrics::unregistered() };
            let sealer = plug_in(&service, tools);
            tokio::spawn(probe::run(sealer.clone(), INTERVAL, shutdown.clone()));
            sealer
        })
        .collect();
    sleep(OUTAGE).await;
    let returned = clock.now();
    service.state.lock().unwrap().up = true;
    while !sealers.iter().all(|sealer| sealer.ready().is_ok()) {
        sleep(TICK).await;
    }
    let healthy_after = clock.now() - returned;
    let after_return = service.take_arrivals();
    let turned_away = service.state.lock().unwrap().turned_away;
    sleep(HOUR).await;
    let later = service.take_arrivals();
    shutdown.request();
    let seen_until = returned.as_millis() / TICK.as_millis();
    let skip = usize::try_from(seen_until).unwrap();
    Seen {
        peak_after_return: after_return.iter().skip(skip).copied().max().unwrap_or_default(),
        turned_away,
        healthy_after,
        peak_later: later.iter().copied().max().unwrap_or_default(),
        mean_later: later.iter().sum::<usize>()
            / usize::try_from(HOUR.as_millis() / TICK.as_millis()).unwrap(),
    }
}

fn plug_in(service: &Arc<Service>, tools: Tools) -> Arc<Sealer> {
    let name = CrkName { instance: "instance".into(), crk: "crk".into() };
    let patience = Patience { max_retries: 0, timeout: None };
    let service = Guard::new(service.clone(), patience, tools.clone());
    let current = Arc::new(Crk { name, kp_version: 1, service });
    Arc::new(Sealer::new(Ring { current, previous: Vec::new() }, policy(), tools))
}

impl Chance {
    fn source(self, seed: u64) -> Random {
        let state = AtomicU64::new(seed);
        Random::new(move |bytes| {
            match self {
                Chance::None => bytes.fill(0xff),
                Chance::Seeded => {
                    for byte in bytes {
                        [*byte, ..] = split_mix(&state).to_be_bytes();
                    }
                }
            }
            Ok(())
        })
    }
}

/// SplitMix64: the same chance in every run.
fn split_mix(state: &AtomicU64) -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut z = state.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// tokio's own time, which stands still until everybody waits.
#[derive(Debug)]
struct VirtualClock(Instant);

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + self.now()
    }
}

/// One queue, one call after the other; a full queue turns callers away, as kms-server does.
#[derive(Debug)]
struct Service {
    clock: Arc<VirtualClock>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    up: bool,
    /// When everything that waits will be done.
    busy_until: Duration,
    turned_away: usize,
    /// Calls in each tenth of a second, answered or not.
    arrivals: Vec<usize>,
}

impl Service {
    async fn serve(&self) -> Result<(), Error> {
        let now = self.clock.now();
        let wait = {
            let mut state = self.state.lock().unwrap();
            state.count(now);
            if !state.up {
                return Err(Error::Unreachable { text: "connection refused".into() });
            }
            let each = Duration::from_secs(1) / CAPACITY;
            if state.busy_until.saturating_sub(now) >= each * QUEUE {
                state.turned_away += 1;
                return Err(Error::Unusable { text: "busy".into() });
            }
            state.busy_until = state.busy_until.max(now) + each;
            state.busy_until - now
        };
        sleep(wait).await;
        Ok(())
    }

    fn take_arrivals(&self) -> Vec<usize> {
        std::mem::take(&mut self.state.lock().unwrap().arrivals)
    }
}

impl State {
    fn count(&mut self, now: Duration) {
        let slot = usize::try_from(now.as_millis() / TICK.as_millis()).unwrap();
        if self.arrivals.len() <= slot {
            self.arrivals.resize(slot + 1, 0);
        }
        self.arrivals[slot] += 1;
    }
}

#[async_trait]
impl KeyService for Service {
    async fn wrap_new(&self, _: &Call) -> Result<NewDek, Error> {
        self.serve().await?;
        Ok(NewDek {
            dek: Dek::from_bytes([7; 32]),
            wdek: b"wdek".as_slice().into(),
            version: "v1".into(),
        })
    }

    async fn unwrap(&self, _: &[u8], _: &Call) -> Result<Unwrapped, Error> {
        self.serve().await?;
        Ok(Unwrapped { dek: Dek::from_bytes([7; 32]), active_version: None })
    }
}
