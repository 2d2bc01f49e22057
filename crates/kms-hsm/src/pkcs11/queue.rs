//! Where requests wait for a worker: bounded, refusing early, and knowing who still waits.
//!
//! A PKCS#11 call has no time limit of its own and cannot be called off. So a caller leaves at its
//! deadline, its job is skipped if no worker has begun it, and is counted as stuck if one has.
//!
//! A worker that sleeps is woken only where that is quicker than to wait for one that is awake. Most
//! calls into a library in this machine's memory are over before another thread has begun to run, and
//! two threads in it only wait for each other's locks; over a network, every worker is wanted.

use crate::pkcs11::error::Fault;
use crate::pkcs11::seat::Seat;
use crate::statistics;
use crate::vault::{Circuit, VaultError};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// A loss of the sessions can hit a job twice: as it happens, and seen late by a slower worker.
const RETRIES: u8 = 2;
/// About what it takes to wake a thread and to put it to sleep again. A call that takes no longer is quick.
const QUICK: Duration = Duration::from_micros(100);
/// How many jobs it takes to change one's mind about the library; a thread may lose its processor in any of them.
const SURE: u8 = 16;

/// One request on its way to the token.
pub(super) trait Job: Send {
    /// Does the work and answers. On `Err` nothing was answered yet.
    fn run(&mut self, seat: &Seat) -> Result<(), Fault>;
    /// Answers with an error.
    fn fail(&mut self, error: VaultError);
    /// Whether the caller still waits.
    fn wanted(&self) -> bool;
    /// Whether it may be tried with new sessions; counts.
    fn retry(&mut self) -> bool;
    /// Whether it is of the kind that comes by the thousand, and is quick where the library is.
    fn is_brief(&self) -> bool;
    /// The caller's mark.
    fn ticket(&self) -> &Arc<Ticket>;
}

/// Shared by a caller and its job.
#[derive(Debug, Default)]
pub(super) struct Ticket {
    overdue: AtomicBool,
    left: AtomicBool,
    /// When its caller came.
    since: Duration,
}

/// A caller that waits. It may leave at any time, and its job then counts as one that nobody waits for.
#[derive(Debug)]
pub(crate) struct Waiting(pub(super) Arc<Ticket>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.left.store(true, Ordering::Relaxed);
    }
}

/// A job made of a closure.
pub(super) struct Call<T, F> {
    /// Dropped before the answer goes out, with whatever name or turn it has reserved.
    work: Option<F>,
    undo: Option<Undo>,
    reply: Option<Reply<T>>,
    ticket: Arc<Ticket>,
    retries: u8,
}

/// Who gets the answer.
enum Reply<T> {
    /// A task, which is woken for it.
    Task(oneshot::Sender<Result<T, VaultError>>),
    /// Whoever this leads to, on the worker's own thread.
    Direct(Then<T>),
}

/// What is done with an answer. It must not wait for anything.
pub(crate) type Then<T> = Box<dyn FnOnce(Result<T, VaultError>) + Send>;

/// How much there is to do, and who does it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) crew: usize,
    pub(super) at_work: usize,
    pub(super) waiting: usize,
}

/// What takes back the effect of a job whose caller has left.
pub(super) type Undo = Box<dyn FnOnce(&Seat) + Send>;

/// How far recovery must go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Repair {
    /// New sessions and a new login.
    Sessions,
    /// The library is initialised anew.
    Device,
}

/// What the pool can do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The first connection is being made; requests wait.
    Starting,
    /// Workers serve.
    Up,
    /// Something was lost and the first repair is under way; requests wait.
    Broken(Repair, String),
    /// Repair has failed and is tried again with pauses; requests are refused at once.
    Down(String),
    /// The PIN was refused; nothing more is tried before it is replaced.
    Refused(String),
    /// The vault is being dropped.
    Closed,
}

/// The queue, and what everybody must know.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// For workers that sleep: a job, or the end of the phase.
    work: Condvar,
    /// For the supervisor and for `open`: the phase, or a worker that left.
    change: Condvar,
    capacity: usize,
}

struct State {
    phase: Phase,
    jobs: VecDeque<Box<dyn Job>>,
    at_work: Vec<Work>,
    crew: usize,
    asleep: usize,
    /// Of those asleep, how many were woken and have not got up yet.
    woken: usize,
    pace: Pace,
    /// How many jobs workers have come back from.
    done: u64,
}

/// A job in a worker's hands.
struct Work {
    ticket: Arc<Ticket>,
    /// Since when it is under way, if it is brief; of others nobody expects that they return soon.
    since: Option<Duration>,
}

/// Whether most jobs of late were quick: up to [`SURE`] of them are remembered.
#[derive(Default)]
struct Pace(u8);

impl<T, F> Call<T, F> {
    pub(super) fn new(
        work: F,
        undo: Option<Undo>,
    ) -> (Box<Self>, Arc<Ticket>, oneshot::Receiver<Result<T, VaultError>>) {
        let (sender, receiver) = oneshot::channel();
        let call = Self::with(work, undo, Reply::Task(sender));
        let ticket = Arc::clone(&call.ticket);
        (Box::new(call), ticket, receiver)
    }

    /// One whose answer goes to `then`, unless the caller has left.
    pub(super) fn direct(work: F, then: Then<T>) -> (Box<Self>, Arc<Ticket>) {
        let call = Self::with(work, None, Reply::Direct(then));
        let ticket = Arc::clone(&call.ticket);
        (Box::new(call), ticket)
    }

    fn with(work: F, undo: Option<Undo>, reply: Reply<T>) -> Self {
        let ticket = Arc::new(Ticket { since: statistics::now(), ..Ticket::default() });
        Self { work: Some(work), undo, reply: Some(reply), ticket, retries: 0 }
    }

    fn has_caller(&self) -> bool {
        match &self.reply {
            Some(Reply::Task(caller)) => !caller.is_closed(),
            Some(Reply::Direct(_)) => !self.ticket.left.load(Ordering::Relaxed),
            None => false,
        }
    }

    /// Answers once; false when nobody takes the answer.
    fn answer(&mut self, answer: Result<T, VaultError>) -> bool {
        self.work = None;
        if !self.has_caller() {
            return false;
        }
        match self.reply.take() {
            Some(Reply::Task(caller)) => caller.send(answer).is_ok(),
            Some(Reply::Direct(then)) => {
                then(answer);
                true
            }
            None => false,
        }
    }
}

impl<T, F> Drop for Call<T, F> {
    /// A task hears by itself of a job that was dropped; nobody else does.
    fn drop(&mut self) {
        self.answer(Err(VaultError::Unavailable { cause: "a worker ended".to_owned() }));
    }
}

impl<T, F> Job for Call<T, F>
where
    T: Send + 'static,
    F: FnMut(&Seat) -> Result<T, Fault> + Send + 'static,
{
    fn run(&mut self, seat: &Seat) -> Result<(), Fault> {
        let Some(work) = &mut self.work else { return Ok(()) };
        let value = work(seat)?;
        let delivered = self.wanted() && self.answer(Ok(value));
        if !delivered && let Some(undo) = self.undo.take() {
            undo(seat);
        }
        Ok(())
    }

    fn fail(&mut self, error: VaultError) {
        self.answer(Err(error));
    }

    fn wanted(&self) -> bool {
        self.has_caller()
    }

    fn retry(&mut self) -> bool {
        self.retries += 1;
        self.retries <= RETRIES && self.wanted()
    }

    fn is_brief(&self) -> bool {
        matches!(self.reply, Some(Reply::Direct(_)))
    }

    fn ticket(&self) -> &Arc<Ticket> {
        &self.ticket
    }
}

impl Ticket {
    /// The caller has left at its deadline.
    pub(super) fn expire(&self) {
        self.overdue.store(true, Ordering::Relaxed);
    }
}

impl Waiting {
    /// Leaves; at its deadline, if it has come that long ago.
    pub(crate) fn leave(self, deadline: Duration) {
        if statistics::now().saturating_sub(self.0.since) >= deadline {
            self.0.expire();
        }
    }
}

impl Queue {
    pub(super) fn new(capacity: usize) -> Self {
        let state = State {
            phase: Phase::Starting,
            jobs: VecDeque::new(),
            at_work: Vec::new(),
            crew: 0,
            asleep: 0,
            woken: 0,
            pace: Pace::default(),
            done: 0,
        };
        Self { state: Mutex::new(state), work: Condvar::new(), change: Condvar::new(), capacity }
    }

    /// Puts a job in, or says at once why not, to its caller as well.
    ///
    /// # Errors
    /// `Busy` when the queue is full; `Unavailable` or `Credential` while nobody could serve it.
    pub(super) fn submit(&self, mut job: Box<dyn Job>) -> Result<(), VaultError> {
        let mut state = self.state();
        if let Err(error) = state.make_room(self.capacity) {
            drop(state);
            job.fail(error.clone());
            return Err(error);
        }
        let now = job.ticket().since;
        state.jobs.push_back(job);
        self.wake_one(state, now);
        Ok(())
    }

    /// The next job that somebody waits for; `None` when this crew must leave.
    pub(super) fn take(&self) -> Option<Box<dyn Job>> {
        let mut state = self.state();
        loop {
            if state.phase != Phase::Up {
                return None;
            }
            while let Some(job) = state.jobs.pop_front() {
                if job.wanted() {
                    let (ticket, now) = (Arc::clone(job.ticket()), statistics::now());
                    let since = job.is_brief().then_some(now);
                    state.at_work.push(Work { ticket, since });
                    self.wake_one(state, now);
                    statistics::waited(job.ticket().since);
                    return Some(job);
                }
            }
            state.asleep += 1;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.asleep -= 1;
            state.woken = state.woken.saturating_sub(1);
        }
    }

    /// A worker has finished what it took.
    pub(super) fn done(&self, ticket: &Arc<Ticket>) {
        let now = statistics::now();
        let mut state = self.state();
        if let Some(place) = state.at_work.iter().position(|work| Arc::ptr_eq(&work.ticket, ticket))
        {
            let work = state.at_work.swap_remove(place);
            if let Some(since) = work.since {
                state.pace.note(now.saturating_sub(since));
            }
        }
        state.done += 1;
    }

    /// Has a worker look that sleeps while something waits: those who are awake may not come back. To be called now
    /// and then.
    pub(super) fn nudge(&self) {
        let state = self.state();
        if !state.jobs.is_empty() {
            // So long a time that no call is quick.
            self.wake_one(state, Duration::MAX);
        }
    }

    /// A worker has lost its session or the device. Its job is served again after the repair.
    pub(super) fn broken(&self, repair: Repair, cause: &str, mut job: Box<dyn Job>) {
        let again = job.retry();
        let mut state = self.state();
        state.break_off(repair, cause);
        if again {
            state.jobs.push_front(job);
        } else {
            drop(state);
            job.fail(VaultError::Unavailable { cause: cause.to_owned() });
        }
        self.wake_all();
    }

    /// A crew of `size` starts to serve.
    pub(super) fn up(&self, size: usize) {
        let mut state = self.state();
        if state.phase != Phase::Closed {
            state.phase = Phase::Up;
        }
        state.crew = size;
        state.woken = 0;
        state.at_work.clear();
        drop(state);
        self.wake_all();
    }

    /// A worker has left, with its session closed.
    pub(super) fn leave(&self) {
        let mut state = self.state();
        state.crew = state.crew.saturating_sub(1);
        // Only a worker that panicked leaves while all is well.
        state.break_off(Repair::Sessions, "a worker thread ended");
        drop(state);
        self.wake_all();
    }

    /// Refuses what waits and what comes, until the next `up`.
    pub(super) fn down(&self, phase: Phase) {
        let mut state = self.state();
        if state.phase != Phase::Closed {
            state.phase = phase;
        }
        let refused = state.admits().err();
        let jobs = std::mem::take(&mut state.jobs);
        drop(state);
        for mut job in jobs {
            job.fail(refused.clone().unwrap_or(VaultError::Busy));
        }
        self.wake_all();
    }

    /// How many jobs are done, while only such are under way as nobody waits for.
    pub(super) fn standstill(&self) -> Option<u64> {
        let state = self.state();
        let alone = |work: &Work| work.ticket.left.load(Ordering::Relaxed);
        let still = !state.at_work.is_empty() && state.at_work.iter().all(alone);
        still.then_some(state.done)
    }

    pub(super) fn circuit(&self) -> Circuit {
        let state = self.state();
        match state.phase {
            Phase::Up if state.all_stuck() => Circuit::Open,
            Phase::Up => Circuit::Closed,
            Phase::Starting | Phase::Broken(..) => Circuit::Repairing,
            Phase::Down(_) | Phase::Closed => Circuit::Open,
            Phase::Refused(_) => Circuit::Refused,
        }
    }

    pub(super) fn load(&self) -> Load {
        let state = self.state();
        // A crew whose time is over has sessions that nobody can use.
        let crew = if state.phase == Phase::Up { state.crew } else { 0 };
        Load { crew, at_work: state.at_work.len().min(crew), waiting: state.jobs.len() }
    }

    pub(super) fn phase(&self) -> Phase {
        self.state().phase.clone()
    }

    /// Waits until phase and crew are `enough`; false when the time is over before.
    pub(super) fn wait(&self, time: Duration, enough: impl Fn(&Phase, usize) -> bool) -> bool {
        let state = self.state();
        let (_state, result) = self
            .change
            .wait_timeout_while(state, time, |state| !enough(&state.phase, state.crew))
            .unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }

    /// Like [`Queue::wait`], for as long as it takes; returns the phase.
    pub(super) fn wait_for(&self, enough: impl Fn(&Phase, usize) -> bool) -> Phase {
        let state = self.state();
        let state = self
            .change
            .wait_while(state, |state| !enough(&state.phase, state.crew))
            .unwrap_or_else(PoisonError::into_inner);
        state.phase.clone()
    }

    /// Wakes a worker if there is work for one more.
    fn wake_one(&self, mut state: MutexGuard<'_, State>, now: Duration) {
        let wake = state.wants_a_hand(now);
        state.woken += usize::from(wake);
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    fn wake_all(&self) {
        self.work.notify_all();
        self.change.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn admits(&self) -> Result<(), VaultError> {
        let unavailable = |cause: &str| Err(VaultError::Unavailable { cause: cause.to_owned() });
        match &self.phase {
            Phase::Down(cause) => unavailable(cause),
            Phase::Refused(cause) => Err(VaultError::Credential(cause.clone())),
            Phase::Closed => unavailable("the vault is closed"),
            Phase::Up if self.all_stuck() => {
                unavailable("no call into the PKCS#11 library returns")
            }
            Phase::Starting | Phase::Up | Phase::Broken(..) => Ok(()),
        }
    }

    fn make_room(&mut self, capacity: usize) -> Result<(), VaultError> {
        self.admits()?;
        if self.jobs.len() >= capacity {
            self.jobs.retain(|job| job.wanted());
        }
        if self.jobs.len() >= capacity { Err(VaultError::Busy) } else { Ok(()) }
    }

    /// Whether a worker should be woken for what waits.
    fn wants_a_hand(&self, now: Duration) -> bool {
        if self.jobs.is_empty() || self.asleep <= self.woken {
            return false;
        }
        let awake = self.crew.saturating_sub(self.asleep - self.woken);
        let long = |work: &&Work| work.since.is_none_or(|since| now.saturating_sub(since) > QUICK);
        !self.pace.is_quick() || awake <= self.at_work.iter().filter(long).count()
    }

    fn all_stuck(&self) -> bool {
        let overdue = |work: &Work| work.ticket.overdue.load(Ordering::Relaxed);
        self.crew > 0 && self.at_work.len() >= self.crew && self.at_work.iter().all(overdue)
    }

    fn break_off(&mut self, repair: Repair, cause: &str) {
        match &mut self.phase {
            Phase::Up => self.phase = Phase::Broken(repair, cause.to_owned()),
            Phase::Broken(known, why) if *known < repair => {
                (*known, *why) = (repair, cause.to_owned());
            }
            _ => {}
        }
    }
}

impl Pace {
    fn note(&mut self, took: Duration) {
        self.0 = if took <= QUICK { (self.0 + 1).min(SURE) } else { self.0.saturating_sub(1) };
    }

    fn is_quick(&self) -> bool {
        self.0 > SURE / 2
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("phase", &self.phase)
            .field("jobs", &self.jobs.len())
            .field("at_work", &self.at_work.len())
            .field("crew", &self.crew)
            .finish()
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
