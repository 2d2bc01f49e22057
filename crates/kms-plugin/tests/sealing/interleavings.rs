//! Contract, case 19, as a model check: the plug-in's own code, every interleaving of it. Requests, the probe, changes
//! of the configuration and rotations in the key service are tasks that stop wherever they wait, and each order in
//! which they may go on is tried. The plug-in has one thread, so that these are all the orders there are.
//!
//! Nothing here is random: the number of orders is counted, and a violation names the steps that lead to it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use async_trait::async_trait;
use kms_core::clock::ManualClock;
use kms_core::key_id::KeyId;
use kms_core::secret::Dek;
use kms_plugin::dek_cache::CrkName;
use kms_plugin::keys::{Crk, Policy, Ring};
use kms_plugin::metrics::Metrics;
use kms_plugin::probe::probe;
use kms_plugin::provider::guard::{Guard, Patience, Tools};
use kms_plugin::provider::{Error, KeyService, NewDek, Unwrapped};
use kms_plugin::random::Random;
use kms_plugin::sealer::{Call, Refusal, Sealed, Sealer};

use crate::double::{open_v2, policy, seal_v2};

#[test]
fn case_19_while_the_crk_rotates() {
    let orders = explore(|choices| {
        let world = World::new(policy(), choices);
        world.run([world.rotation(), world.probes(1), world.api_server(1), world.api_server(1)])
    });
    assert!(orders.unwrap() > 3_000);
}

#[test]
fn case_19_while_the_crk_rotates_twice_and_a_replica_lags() {
    let orders = explore(|choices| {
        let world = World::new(policy(), choices);
        world.kms.lets(Whim::Lags);
        world.run([world.rotation(), world.rotation(), world.probes(2), world.api_server(1)])
    });
    assert!(orders.unwrap() > 10_000);
}

#[test]
fn case_19_while_each_encrypt_takes_a_new_dek() {
    let policy = Policy { new_dek: true, ..policy() };
    let one = explore(|choices| {
        let world = World::new(policy, choices);
        world.run([world.rotation(), world.probes(1), world.api_server(2)])
    });
    assert!(one.unwrap() > 5_000);
    let two_and_a_lagging_replica = explore(|choices| {
        let world = World::new(policy, choices);
        world.kms.lets(Whim::Lags);
        world.run([world.rotation(), world.api_server(1), world.api_server(1)])
    });
    assert!(two_and_a_lagging_replica.unwrap() > 500);
}

#[test]
fn case_19_while_no_dek_is_kept_and_values_are_read() {
    let orders = explore(|choices| {
        let world = World::new(Policy { lifetime: Duration::ZERO, ..policy() }, choices);
        world.run([world.rotation(), world.probes(1), world.api_server(1), world.reader()])
    });
    assert!(orders.unwrap() > 10_000);
}

#[test]
fn case_19_while_access_is_withdrawn_and_given_back() {
    let orders = explore(|choices| {
        let world = World::new(policy(), choices);
        world.kms.lets(Whim::Refuses);
        world.run([world.rotation(), world.probes(2), world.api_server(1)])
    });
    assert!(orders.unwrap() > 500);
}

#[test]
fn case_19_while_the_configuration_goes_to_another_crk_and_back() {
    let there_and_back = [(2, &["b", "a"][..]), (3, &["a", "b", "a"][..])];
    for (new_dek, probes) in [(false, 2), (true, 1)] {
        let orders = explore(|choices| {
            let world = World::new(Policy { new_dek, ..policy() }, choices);
            world.run([world.reloads(&there_and_back), world.probes(probes), world.api_server(1)])
        });
        assert!(orders.unwrap() > 1_000);
    }
}

/// That the check has teeth: a plug-in in the wrong order is found out.
#[test]
fn to_report_first_and_to_rotate_afterwards_is_found_out() {
    let violation = explore(|choices| {
        let world = World::new(policy(), choices);
        let plugin = Rc::new(ReportsFirst::new(&world.kms));
        let api_server = api_server(plugin.clone(), world.log.clone(), 1);
        let rotation = {
            let (plugin, kms) = (plugin.clone(), world.kms.clone());
            Box::pin(async move {
                kms.rotate();
                plugin.rotate().await;
            })
        };
        step_through(&*plugin, &world.log, &world.choices, vec![rotation, api_server])
    });
    let violation = violation.unwrap_err();
    assert!(violation.contains("is reported, but has wrapped nothing"), "{violation}");
}

/// More would take minutes: a scenario is too large.
const MOST_RUNS: usize = 100_000;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// What kube-apiserver sees of a plug-in.
trait Plugin {
    fn status(&self) -> Option<KeyId>;
    async fn encrypt(&self) -> Option<KeyId>;
    /// True if something was wrapped under this key_id, so that it may be reported.
    fn has_wrapped(&self, key_id: &KeyId) -> bool;
}

/// The real sealer over a key service whose every answer can be waited for.
struct World {
    kms: Arc<Kms>,
    sealer: Arc<Sealer>,
    tools: Tools,
    policy: Policy,
    sealed: Rc<RefCell<Vec<Sealed>>>,
    log: Rc<RefCell<Log>>,
    choices: Arc<Choices>,
}

impl World {
    /// A plug-in that seals under the first version of CRK `a`.
    fn new(policy: Policy, choices: &Arc<Choices>) -> World {
        let kms = Arc::new(Kms::new(choices.clone()));
        let metrics = Metrics::unregistered();
        let tools =
            Tools { clock: Arc::new(ManualClock::new()), random: Random::system(), metrics };
        let ring = Ring { current: crk(&kms, &tools, "a", 1), previous: Vec::new() };
        let sealer = Arc::new(Sealer::new(ring, policy, tools.clone()));
        let sealed = Rc::default();
        let world = World {
            kms,
            sealer,
            tools,
            policy,
            sealed,
            log: Rc::default(),
            choices: choices.clone(),
        };
        finish(async {
            assert!(probe(&world.sealer).await);
            let first = seal_v2(&world.sealer, b"payload").await.unwrap();
            world.sealed.borrow_mut().push(first);
        });
        world
    }

    fn run<const N: usize>(&self, tasks: [Task; N]) -> Result<(), String> {
        step_through(&self.seen(), &self.log, &self.choices, tasks.into())?;
        self.kms.lets(Whim::None);
        finish(async {
            assert!(probe(&self.sealer).await, "it comes to rest");
            for sealed in &self.sealed.take() {
                assert_eq!(open_v2(&self.sealer, sealed).await.unwrap(), b"payload");
            }
            let last = seal_v2(&self.sealer, b"payload").await.unwrap();
            assert_eq!(last.key_id, self.sealer.status().unwrap().key_id);
        });
        Ok(())
    }

    fn seen(&self) -> Seen {
        let (sealer, sealed) = (self.sealer.clone(), self.sealed.clone());
        Seen { kms: self.kms.clone(), sealer, sealed }
    }

    fn rotation(&self) -> Task {
        let kms = self.kms.clone();
        Box::pin(async move { kms.rotate() })
    }

    fn probes(&self, rounds: usize) -> Task {
        let sealer = self.sealer.clone();
        Box::pin(async move {
            for _ in 0..rounds {
                probe(&sealer).await;
            }
        })
    }

    fn api_server(&self, rounds: usize) -> Task {
        api_server(Rc::new(self.seen()), self.log.clone(), rounds)
    }

    /// Another API server, which meets what the first has sealed.
    fn reader(&self) -> Task {
        let seen = self.seen();
        Box::pin(async move {
            let (ciphertext, key_id) = {
                let sealed = seen.sealed.borrow();
                let last = sealed.last().unwrap();
                (last.ciphertext.clone(), last.key_id.clone())
            };
            let opened = open_v2(&seen.sealer, &Sealed { ciphertext, key_id }).await;
            assert_eq!(opened.unwrap(), b"payload");
        })
    }

    /// Configurations, by the KP_CONFIG.VERSION and the CRKs of their entries; VERSIONs go down by one.
    fn reloads(&self, configurations: &[(i64, &[&str])]) -> Task {
        let rings: Vec<_> = configurations
            .iter()
            .map(|(version, crks)| {
                let entries = crks.iter().zip((1..=*version).rev());
                let mut entries = entries.map(|(name, v)| crk(&self.kms, &self.tools, name, v));
                Ring { current: entries.next().unwrap(), previous: entries.collect() }
            })
            .collect();
        let (sealer, policy) = (self.sealer.clone(), self.policy);
        Box::pin(async move {
            for ring in rings {
                sealer.install(ring, policy).unwrap();
                stop().await;
            }
        })
    }
}

fn crk(kms: &Arc<Kms>, tools: &Tools, name: &str, kp_version: i64) -> Arc<Crk> {
    let patience = Patience { max_retries: 0, timeout: None };
    let service = Guard::new(kms.clone(), patience, tools.clone());
    let name = CrkName { instance: "i".into(), crk: name.into() };
    Arc::new(Crk { name, kp_version, service })
}

struct Seen {
    kms: Arc<Kms>,
    sealer: Arc<Sealer>,
    sealed: Rc<RefCell<Vec<Sealed>>>,
}

impl Plugin for Seen {
    fn status(&self) -> Option<KeyId> {
        self.sealer.status().ok().map(|status| status.key_id)
    }

    async fn encrypt(&self) -> Option<KeyId> {
        let sealed = seal_v2(&self.sealer, b"payload").await.ok()?;
        let key_id = sealed.key_id.clone();
        self.sealed.borrow_mut().push(sealed);
        Some(key_id)
    }

    fn has_wrapped(&self, key_id: &KeyId) -> bool {
        self.kms.has_wrapped(key_id.version())
    }
}

/// As kube-apiserver does: it asks for the status, and on a key_id that it has not seen yet for an Encrypt.
fn api_server(plugin: Rc<impl Plugin + 'static>, log: Rc<RefCell<Log>>, rounds: usize) -> Task {
    Box::pin(async move {
        for round in 0..rounds {
            if round > 0 {
                stop().await;
            }
            let before = plugin.status();
            stop().await;
            let sealed = plugin.encrypt().await;
            log.borrow_mut().observe(&*plugin);
            if let Some(sealed) = sealed {
                log.borrow_mut().answered(before.as_ref(), &sealed);
            }
        }
    })
}

/// What Status said, in order, and what must not have been.
#[derive(Default)]
struct Log {
    reported: Vec<KeyId>,
    violations: Vec<String>,
}

impl Log {
    fn observe(&mut self, plugin: &impl Plugin) {
        let Some(key_id) = plugin.status().filter(|key_id| self.reported.last() != Some(key_id))
        else {
            return;
        };
        if self.reported.contains(&key_id) {
            self.violations.push(format!("{key_id} is reported again"));
        }
        if !plugin.has_wrapped(&key_id) {
            self.violations.push(format!("{key_id} is reported, but has wrapped nothing"));
        }
        self.reported.push(key_id);
    }

    /// Between the status before and an Encrypt's answer the report may have changed, but Encrypt is neither ahead of
    /// it nor behind what was seen.
    fn answered(&mut self, before: Option<&KeyId>, sealed: &KeyId) {
        let place = |wanted: &KeyId| self.reported.iter().position(|key_id| key_id == wanted);
        let text = match (before.map(place), place(sealed)) {
            (_, None) => format!("Encrypt answers {sealed}, which was never reported"),
            (Some(before), sealed_at) if sealed_at < before => {
                format!("Encrypt answers {sealed}, which Status had left before it was called")
            }
            _ => return,
        };
        self.violations.push(text);
    }
}

/// Rotates when told to, and has the whims that it is let have.
#[derive(Debug)]
struct Kms {
    state: Mutex<State>,
    choices: Arc<Choices>,
}

#[derive(Debug)]
struct State {
    newest: usize,
    whim: Whim,
    wraps: usize,
    deks: HashMap<Vec<u8>, (Dek, usize)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whim {
    None,
    /// A wrap may be answered by a replica that has not heard of the last rotation.
    Lags,
    /// Any call may be refused.
    Refuses,
}

impl Kms {
    fn new(choices: Arc<Choices>) -> Kms {
        let state = State { newest: 1, whim: Whim::None, wraps: 0, deks: HashMap::new() };
        Kms { state: Mutex::new(state), choices }
    }

    fn lets(&self, whim: Whim) {
        self.state.lock().unwrap().whim = whim;
    }

    fn rotate(&self) {
        self.state.lock().unwrap().newest += 1;
    }

    fn newest(&self) -> usize {
        self.state.lock().unwrap().newest
    }

    fn has_wrapped(&self, version: &str) -> bool {
        let state = self.state.lock().unwrap();
        state.deks.values().any(|(_, wrapped_by)| format!("v{wrapped_by}") == version)
    }

    fn is_refused(&self, state: &State) -> bool {
        state.whim == Whim::Refuses && self.choices.choose(2) == 1
    }
}

fn refused() -> Error {
    Error::Refused { refusal: Refusal::KeyState, text: "disabled".into() }
}

#[async_trait]
impl KeyService for Kms {
    async fn wrap_new(&self, _: &Call) -> Result<NewDek, Error> {
        stop().await;
        let answer = {
            let mut state = self.state.lock().unwrap();
            let lags = state.whim == Whim::Lags && state.newest > 1 && self.choices.choose(2) == 1;
            if self.is_refused(&state) {
                Err(refused())
            } else {
                state.wraps += 1;
                let (number, version) = (state.wraps, state.newest - usize::from(lags));
                let wdek = format!("wdek-{number}").into_bytes();
                let dek = Dek::from_bytes([u8::try_from(number).unwrap(); 32]);
                state.deks.insert(wdek.clone(), (dek.clone(), version));
                Ok(NewDek { dek, wdek: wdek.into(), version: format!("v{version}") })
            }
        };
        stop().await;
        answer
    }

    async fn unwrap(&self, wdek: &[u8], _: &Call) -> Result<Unwrapped, Error> {
        stop().await;
        let state = self.state.lock().unwrap();
        if self.is_refused(&state) {
            return Err(refused());
        }
        let (dek, version) = state.deks.get(wdek).cloned().ok_or(Error::NotAuthentic)?;
        let newest = state.newest;
        Ok(Unwrapped { dek, active_version: (newest != version).then(|| format!("v{newest}")) })
    }
}

/// The wrong order: the new version is reported as soon as it is known, and wraps a DEK afterwards.
struct ReportsFirst {
    kms: Arc<Kms>,
    reported: RefCell<usize>,
    seals: RefCell<usize>,
}

impl ReportsFirst {
    fn new(kms: &Arc<Kms>) -> ReportsFirst {
        ReportsFirst { kms: kms.clone(), reported: RefCell::new(1), seals: RefCell::new(1) }
    }

    async fn rotate(&self) {
        *self.reported.borrow_mut() = self.kms.newest();
        let call = Call { uid: String::new(), trace: None, deadline: Duration::from_secs(3) };
        let new = self.kms.wrap_new(&call).await.unwrap();
        *self.seals.borrow_mut() = new.version[1..].parse().unwrap();
    }
}

impl Plugin for ReportsFirst {
    fn status(&self) -> Option<KeyId> {
        KeyId::new("i", "a", &format!("v{}", self.reported.borrow())).ok()
    }

    async fn encrypt(&self) -> Option<KeyId> {
        KeyId::new("i", "a", &format!("v{}", self.seals.borrow())).ok()
    }

    fn has_wrapped(&self, key_id: &KeyId) -> bool {
        self.kms.has_wrapped(key_id.version())
    }
}

/// Tries everything that `run` can be led to do by its choices, one run for each; the number of runs.
///
/// # Errors
/// The first violation.
fn explore(run: impl Fn(&Arc<Choices>) -> Result<(), String>) -> Result<usize, String> {
    // Deadlines need a timer to be there; none ever passes.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let _entered = runtime.enter();
    let choices = Arc::new(Choices::default());
    let mut runs = 0;
    loop {
        runs += 1;
        if runs > MOST_RUNS {
            return Err(format!("there are more than {MOST_RUNS} orders"));
        }
        run(&choices)?;
        if !choices.next() {
            return Ok(runs);
        }
    }
}

/// The way to one leaf of the tree of all choices.
#[derive(Debug, Default)]
struct Choices(Mutex<Way>);

#[derive(Debug, Default)]
struct Way {
    /// What was chosen, and out of how many.
    taken: Vec<(usize, usize)>,
    at: usize,
}

impl Choices {
    fn choose(&self, of: usize) -> usize {
        let mut way = self.0.lock().unwrap();
        if way.at == way.taken.len() {
            way.taken.push((0, of));
        }
        let (chosen, known) = way.taken[way.at];
        assert_eq!(known, of, "a run is determined by its choices");
        way.at += 1;
        chosen
    }

    /// On to the next leaf; false after the last one.
    fn next(&self) -> bool {
        let mut way = self.0.lock().unwrap();
        way.at = 0;
        while let Some((chosen, of)) = way.taken.pop() {
            if chosen + 1 < of {
                way.taken.push((chosen + 1, of));
                return true;
            }
        }
        false
    }
}

/// Lets one task after the other take a step, as the choices say, until all have ended.
fn step_through(
    plugin: &impl Plugin,
    log: &RefCell<Log>,
    choices: &Choices,
    tasks: Vec<Task>,
) -> Result<(), String> {
    log.borrow_mut().observe(plugin);
    let mut tasks: Vec<_> =
        tasks.into_iter().enumerate().map(|(n, task)| (n, task, Flag::up())).collect();
    let mut steps = Vec::new();
    while !tasks.is_empty() {
        let runnable: Vec<_> = (0..tasks.len()).filter(|&task| tasks[task].2.is_up()).collect();
        if runnable.is_empty() {
            return Err(format!("nobody can go on after {steps:?}"));
        }
        let chosen = runnable[if runnable.len() > 1 { choices.choose(runnable.len()) } else { 0 }];
        let (name, task, flag) = &mut tasks[chosen];
        steps.push(*name);
        let waker = Waker::from(flag.lowered());
        let ended = task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        if ended {
            drop(tasks.remove(chosen));
        }
        log.borrow_mut().observe(plugin);
        if let Some(violation) = log.borrow().violations.first() {
            return Err(format!("{violation}, after the tasks' steps {steps:?}"));
        }
    }
    Ok(())
}

/// Up while its task can go on.
struct Flag(AtomicBool);

impl Flag {
    fn up() -> Arc<Flag> {
        Arc::new(Flag(AtomicBool::new(true)))
    }

    fn is_up(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn lowered(self: &Arc<Flag>) -> Arc<Flag> {
        self.0.store(false, Ordering::Relaxed);
        self.clone()
    }
}

impl Wake for Flag {
    fn wake(self: Arc<Flag>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs a future that nothing interrupts.
fn finish<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
    }
}

/// Lets the others go on once.
async fn stop() {
    let mut stopped = false;
    std::future::poll_fn(|context| {
        if stopped {
            return Poll::Ready(());
        }
        stopped = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
