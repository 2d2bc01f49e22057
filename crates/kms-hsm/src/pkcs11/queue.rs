//! Where requests wait for a worker: bounded, refusing early, and knowing who still waits.
//!
//! A PKCS#11 call has no time limit of its own and cannot be called off. So a caller leaves at its
//! deadline, its job is skipped if no worker has begun it, and is counted as stuck if one has.

use crate::pkcs11::error::Fault;
use crate::pkcs11::seat::Seat;
use crate::vault::VaultError;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// A loss of the sessions can hit a job twice: as it happens, and seen late by a slower worker.
const RETRIES: u8 = 2;

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
    /// The caller's mark.
    fn ticket(&self) -> &Arc<Ticket>;
}

/// Shared by a caller and its job.
#[derive(Debug, Default)]
pub(super) struct Ticket {
    overdue: AtomicBool,
}

/// A job made of a closure.
pub(super) struct Call<T, F> {
    work: F,
    undo: Option<Undo>,
    answer: Option<oneshot::Sender<Result<T, VaultError>>>,
    ticket: Arc<Ticket>,
    retries: u8,
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
    /// The PIN was refused; nothing more is tried.
    Refused(String),
    /// The vault is being dropped.
    Closed,
}

/// The queue, and what everybody must know.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// For workers: a job, or the end of the phase.
    work: Condvar,
    /// For the supervisor and for `open`: the phase, or a worker that left.
    change: Condvar,
    capacity: usize,
}

struct State {
    phase: Phase,
    jobs: VecDeque<Box<dyn Job>>,
    at_work: Vec<Arc<Ticket>>,
    crew: usize,
}

impl<T, F> Call<T, F>
where
    T: Send + 'static,
    F: FnMut(&Seat) -> Result<T, Fault> + Send + 'static,
{
    pub(super) fn new(
        work: F,
        undo: Option<Undo>,
    ) -> (Box<Self>, Arc<Ticket>, oneshot::Receiver<Result<T, VaultError>>) {
        let (sender, receiver) = oneshot::channel();
        let ticket = Arc::new(Ticket::default());
        let call =
            Self { work, undo, answer: Some(sender), ticket: Arc::clone(&ticket), retries: 0 };
        (Box::new(call), ticket, receiver)
    }
}

impl<T, F> Job for Call<T, F>
where
    T: Send + 'static,
    F: FnMut(&Seat) -> Result<T, Fault> + Send + 'static,
{
    fn run(&mut self, seat: &Seat) -> Result<(), Fault> {
        let value = (self.work)(seat)?;
        let Some(answer) = self.answer.take() else { return Ok(()) };
        if answer.send(Ok(value)).is_err()
            && let Some(undo) = self.undo.take()
        {
            undo(seat);
        }
        Ok(())
    }

    fn fail(&mut self, error: VaultError) {
        if let Some(answer) = self.answer.take() {
            // A caller that has left needs no answer.
            let _ = answer.send(Err(error));
        }
    }

    fn wanted(&self) -> bool {
        self.answer.as_ref().is_some_and(|answer| !answer.is_closed())
    }

    fn retry(&mut self) -> bool {
        self.retries += 1;
        self.retries <= RETRIES && self.wanted()
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

impl Queue {
    pub(super) fn new(capacity: usize) -> Self {
        let state =
            State { phase: Phase::Starting, jobs: VecDeque::new(), at_work: Vec::new(), crew: 0 };
        Self { state: Mutex::new(state), work: Condvar::new(), change: Condvar::new(), capacity }
    }

    /// Puts a job in, or says at once why not.
    ///
    /// # Errors
    /// `Busy` when the queue is full; `Unavailable` or `Credential` while nobody could serve it.
    pub(super) fn submit(&self, job: Box<dyn Job>) -> Result<(), VaultError> {
        let mut state = self.state();
        state.admits()?;
        if state.jobs.len() >= self.capacity {
            state.jobs.retain(|job| job.wanted());
        }
        if state.jobs.len() >= self.capacity {
            return Err(VaultError::Busy);
        }
        state.jobs.push_back(job);
        drop(state);
        self.work.notify_one();
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
                    state.at_work.push(Arc::clone(job.ticket()));
                    return Some(job);
                }
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A worker has finished what it took.
    pub(super) fn done(&self, ticket: &Arc<Ticket>) {
        self.state().at_work.retain(|other| !Arc::ptr_eq(other, ticket));
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

    fn all_stuck(&self) -> bool {
        let overdue = |ticket: &Arc<Ticket>| ticket.overdue.load(Ordering::Relaxed);
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
