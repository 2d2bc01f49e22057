//! The crew of worker threads, and the supervisor who musters it, again and again.
//!
//! A crew lives as long as its sessions. When one worker loses its session the whole crew leaves
//! and a new one comes: were a session number given out twice, two threads would share a session
//! and one would encrypt with the other's key. The library is finalised only after the last worker
//! has left, because C_Finalize under a running call is undefined.

use crate::pkcs11::error::{Class, Fault};
use crate::pkcs11::module::Module;
use crate::pkcs11::queue::{Call, Job, Phase, Queue, Repair, Then, Undo, Waiting};
use crate::pkcs11::seat::Seat;
use crate::pkcs11::{FIRST_ATTEMPT, Settings, Token, ops};
use crate::statistics::{self, Statistics};
use crate::vault::{Circuit, VaultError};
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// A token that comes back is found within this time, and sees one login in it.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a vault that is dropped waits for the last call to return. Libraries crash in a process
/// that ends under them.
const FAREWELL: Duration = Duration::from_secs(10);
/// Some drivers come back only when they are really unloaded.
const RELOAD_AFTER: u32 = 10;

/// Worker threads behind a queue.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    /// Closed when the supervisor has ended; nothing is ever sent.
    ended: Mutex<mpsc::Receiver<Infallible>>,
}

#[derive(Debug)]
struct Shared {
    queue: Queue,
    settings: Settings,
    /// The token that answered first. Another one in its place is not ours.
    known: Mutex<Option<Known>>,
    /// Odd while the supervisor is in the library.
    visits: AtomicU64,
}

/// What a token is known by.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) token: Token,
    /// Of the canary key: a copy of a token from before our time may have its serial number.
    pub(crate) check_value: Vec<u8>,
}

/// Calls into the library that have not returned yet, and how many have before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standstill {
    /// Only those whose callers have left, at their deadlines or before.
    Calls(u64),
    /// One of the supervisor, who connects.
    Connecting(u64),
}

/// How serving a job ended.
enum Outcome {
    Answered,
    Failed(VaultError),
    Lost(Repair, String),
}

impl Pool {
    /// Loads the library and waits for the outcome of the first attempt to log in.
    ///
    /// # Errors
    /// A library that cannot be loaded. A token that is away is no error: it is waited for, as is
    /// another PIN in the place of one that is refused.
    pub(super) fn start(settings: Settings, known: Option<Known>) -> Result<Self, VaultError> {
        let module = Module::load(&settings.library).map_err(Fault::into_answer)?;
        let patience = settings.patience().min(FIRST_ATTEMPT);
        let queue = Queue::new(settings.queue);
        let known = Mutex::new(known);
        let shared = Arc::new(Shared { queue, settings, known, visits: AtomicU64::new(0) });
        let (alive, ended) = mpsc::channel();
        let supervisor = std::thread::Builder::new().name("hsm-supervisor".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || {
                supervise(&shared, Arc::new(module));
                drop(alive);
            }
        });
        supervisor.map_err(|error| VaultError::Unavailable {
            cause: format!("cannot start a thread: {error}"),
        })?;
        let pool = Self { shared, ended: Mutex::new(ended) };
        pool.shared.queue.wait(patience, |phase, _| *phase != Phase::Starting);
        Ok(pool)
    }

    /// Why the PIN is refused, while it is.
    pub(super) fn refusal(&self) -> Option<String> {
        match self.shared.queue.phase() {
            Phase::Refused(cause) => Some(cause),
            _ => None,
        }
    }

    /// Has a worker do `work`, which may run more than once, and waits until the deadline.
    ///
    /// `undo` runs when the work was done but its caller no longer waits.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        deadline: Duration,
        undo: Option<Undo>,
        work: impl FnMut(&Seat) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, VaultError> {
        let (call, ticket, answer) = Call::new(work, undo);
        let waiting = Waiting(ticket);
        self.shared.queue.submit(call)?;
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(answer)) => answer,
            // The worker panicked and dropped the job.
            Ok(Err(_)) => Err(VaultError::Unavailable { cause: "a worker ended".to_owned() }),
            Err(_) => {
                waiting.0.expire();
                Err(VaultError::TimedOut)
            }
        }
    }

    /// Has a worker do `work`, and `then` what is to be done with the result, all on the worker's own thread: nobody
    /// is woken for the result. The caller is there until it leaves the [`Waiting`] that comes with the job.
    pub(super) fn direct<T: Send + 'static>(
        work: impl FnMut(&Seat) -> Result<T, Fault> + Send + 'static,
        then: Then<T>,
    ) -> (Box<dyn Job>, Waiting) {
        let (call, ticket) = Call::direct(work, then);
        (call, Waiting(ticket))
    }

    /// Begins such a job; one that is refused is answered at once.
    pub(super) fn submit(&self, job: Box<dyn Job>) {
        // The caller has heard of it.
        let _ = self.shared.queue.submit(job);
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.shared.queue
    }

    /// The token that was found, once it was.
    pub(super) fn known(&self) -> Option<Known> {
        self.shared.known()
    }

    /// `None` while something may still return in time.
    pub(super) fn standstill(&self) -> Option<Standstill> {
        let visits = self.shared.visits.load(Ordering::Relaxed);
        match visits % 2 {
            0 => self.shared.queue.standstill().map(Standstill::Calls),
            _ => Some(Standstill::Connecting(visits)),
        }
    }

    pub(super) fn circuit(&self) -> Circuit {
        self.shared.queue.circuit()
    }

    /// What was counted, and how full it is now.
    pub(super) fn statistics(&self) -> Statistics {
        let size = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        let load = self.shared.queue.load();
        Statistics {
            sessions: size(load.crew),
            busy: size(load.at_work),
            queued: size(load.waiting),
            most_sessions: size(self.shared.settings.sessions),
            most_queued: size(self.shared.settings.queue),
            ..statistics::counted()
        }
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.shared.settings
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.queue.down(Phase::Closed);
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        if ended.recv_timeout(FAREWELL) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("a call into the PKCS#11 library does not return; it is left behind");
        }
    }
}

impl Shared {
    fn known(&self) -> Option<Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn visit(&self) -> Visit<'_> {
        self.visits.fetch_add(1, Ordering::Relaxed);
        Visit(self)
    }
}

/// The supervisor is in the library.
struct Visit<'a>(&'a Shared);

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.0.visits.fetch_add(1, Ordering::Relaxed);
    }
}

fn supervise(shared: &Arc<Shared>, module: Arc<Module>) {
    let mut module = Some(module);
    let mut failures = 0;
    loop {
        let visit = shared.visit();
        let mustered = muster(shared, module.as_ref());
        drop(visit);
        match mustered {
            Ok(()) => {
                failures = 0;
                see_off(shared);
            }
            Err(fault) => {
                failures += 1;
                report(shared, fault, failures);
            }
        }
        match shared.queue.phase() {
            Phase::Broken(Repair::Sessions, _) => continue,
            Phase::Closed => break,
            Phase::Starting
            | Phase::Refused(_)
            | Phase::Up
            | Phase::Broken(..)
            | Phase::Down(_) => {}
        }
        if let Some(module) = &module {
            let _visit = shared.visit();
            module.finalise();
        }
        if failures > 0 && !pause(shared, failures) {
            break;
        }
        if module.is_none() || (failures > 0 && failures % RELOAD_AFTER == 0) {
            drop(module.take());
            module = Module::load(&shared.settings.library).ok().map(Arc::new);
        }
    }
    if let Some(module) = &module {
        module.finalise();
    }
}

/// Finds the token, logs in, lets a canary sing, and sends a crew to work.
fn muster(shared: &Arc<Shared>, module: Option<&Arc<Module>>) -> Result<(), Fault> {
    let settings = &shared.settings;
    let module = module.ok_or_else(|| Fault::device("the PKCS#11 library cannot be loaded"))?;
    module.initialise()?;
    let token = module.token(&settings.token)?;
    let known = shared.known();
    if let Some(Known { token: known, .. }) = &known
        && known.serial != token.serial
    {
        let (now, before) = (&token.serial, &known.serial);
        return Err(Fault::device(format!("token {now} is in the place of token {before}")));
    }
    // The crew before us has left. What it could not close would count against the token's limit.
    module.raw().close_all_sessions(token.slot)?;
    let seats = log_in(settings, module, &token)?;
    statistics::login(known.is_some());
    if let Some(first) = seats.first() {
        if known.is_none() {
            ops::plant_canary(first)?;
        }
        let check_value = first.check_value()?;
        if known.is_some_and(|known| known.check_value != check_value) {
            let what = format!(
                "{token} holds another canary key than before: it is a copy, or was made anew"
            );
            return Err(Fault::device(what));
        }
        settings.gcm.map_or(Ok(()), |choice| first.test_iv(choice))?;
        let known = Known { token: token.clone(), check_value };
        *shared.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
    }
    tracing::info!("HSM {token} is ready, {} sessions", seats.len());
    send_to_work(shared, seats)
}

fn log_in(settings: &Settings, module: &Arc<Module>, token: &Token) -> Result<Vec<Seat>, Fault> {
    let pin = settings.pin.to_try().map_err(VaultError::Credential)?;
    let seats = Seat::take(module, token, settings.sessions, &pin);
    let seats = seats.inspect(|_| settings.pin.accept(&pin));
    seats.map_err(|fault| {
        let error = fault.into_answer();
        if let VaultError::Credential(why) = &error {
            settings.pin.refuse(&pin, why);
        }
        error.into()
    })
}

fn send_to_work(shared: &Arc<Shared>, seats: Vec<Seat>) -> Result<(), Fault> {
    shared.queue.up(seats.len());
    let mut failure = None;
    for (number, seat) in seats.into_iter().enumerate() {
        let name = format!("hsm-{number}");
        let worker = std::thread::Builder::new().name(name).spawn({
            let shared = Arc::clone(shared);
            move || work(&shared, seat)
        });
        if let Err(error) = worker {
            shared.queue.leave();
            failure = Some(error);
        }
    }
    match failure {
        Some(error) => {
            see_off(shared);
            Err(Fault::device(format!("cannot start a thread: {error}")))
        }
        None => Ok(()),
    }
}

/// Waits for the end of this crew's time, and then for the last of it to leave.
fn see_off(shared: &Shared) {
    if let Phase::Broken(_, cause) = shared.queue.wait_for(|phase, _| *phase != Phase::Up) {
        tracing::warn!("HSM lost, connecting again: {cause}");
    }
    let gone = |_: &Phase, crew: usize| crew == 0;
    if !shared.queue.wait(shared.settings.deadline, gone) {
        // Nothing can be repaired while a call is under way: refuse, and wait for it.
        let cause = "a call into the PKCS#11 library does not return".to_owned();
        shared.queue.down(Phase::Down(cause));
    }
    shared.queue.wait_for(gone);
}

fn report(shared: &Shared, fault: Fault, failures: u32) {
    let cause = match fault.into_answer() {
        VaultError::Credential(cause) => {
            tracing::error!("HSM refuses the PIN, nothing more is tried: {cause}");
            return shared.queue.down(Phase::Refused(cause));
        }
        VaultError::Unavailable { cause } => cause,
        other => other.to_string(),
    };
    if shared.queue.phase() != Phase::Down(cause.clone()) {
        tracing::warn!("HSM not available, trying again (attempt {failures}): {cause}");
    }
    shared.queue.down(Phase::Down(cause));
}

/// Waits before the next attempt: a while, and for as long as the PIN is the refused one. False when
/// the vault is dropped meanwhile.
fn pause(shared: &Shared, failures: u32) -> bool {
    let time = pause_after(failures);
    loop {
        if shared.queue.wait(time, |phase, _| *phase == Phase::Closed) {
            return false;
        }
        if !shared.settings.pin.is_refused() {
            return true;
        }
    }
}

fn pause_after(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST_PAUSE)
}

fn work(shared: &Shared, seat: Seat) {
    let leaving = Leaving(&shared.queue);
    serve_all(&shared.queue, &seat);
    // The session is closed before this worker counts as gone.
    drop(seat);
    drop(leaving);
}

fn serve_all(queue: &Queue, seat: &Seat) {
    while let Some(mut job) = queue.take() {
        let outcome = serve(seat, job.as_mut());
        queue.done(job.ticket());
        match outcome {
            Outcome::Answered => {}
            Outcome::Failed(error) => job.fail(error),
            Outcome::Lost(repair, cause) => return queue.broken(repair, &cause, job),
        }
    }
}

fn serve(seat: &Seat, job: &mut dyn Job) -> Outcome {
    let mut result = job.run(seat);
    if let Err(fault) = &result
        && fault.class() == Some(Class::Handle)
    {
        seat.forget_all();
        result = job.run(seat);
    }
    let Err(fault) = result else { return Outcome::Answered };
    match fault.class() {
        Some(Class::Session) => Outcome::Lost(Repair::Sessions, cause(fault)),
        Some(Class::Device) => Outcome::Lost(Repair::Device, cause(fault)),
        Some(Class::Ambiguous | Class::Capacity) => match seat.canary() {
            Ok(()) => Outcome::Failed(fault.into_answer()),
            Err(canary) if canary.class() == Some(Class::Session) => {
                Outcome::Lost(Repair::Sessions, cause(canary))
            }
            Err(_) => Outcome::Lost(Repair::Device, cause(fault)),
        },
        // Only a login says that the PIN is refused; taken for that, one odd answer would stop the service for good. Where
        // nothing else goes either, a login is tried, and it tells.
        Some(Class::Credential) => match seat.canary() {
            Ok(()) => Outcome::Failed(VaultError::Unavailable { cause: cause(fault) }),
            Err(_) => Outcome::Lost(Repair::Device, cause(fault)),
        },
        _ => Outcome::Failed(fault.into_answer()),
    }
}

fn cause(fault: Fault) -> String {
    match fault {
        Fault::Token { what, .. } => what,
        Fault::Answer(error) => error.to_string(),
    }
}

/// Counts a worker out, however it ends.
struct Leaving<'a>(&'a Queue);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}
