//! Where requests wait for a worker: bounded, refusing early, and knowing who still waits.
//!
//! A PKCS#11 call has no time limit of its own and cannot be called off. So a caller leaves at its
//! deadline, its job is skipped if no worker has begun it, and is counted as stuck if one has.

use crate::pkcs11::error::Fault;
use crate::pkcs11::seat::Seat;
use crate::statistics;
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
    left: AtomicBool,
    /// When its caller came.
    since: Duration,
}

/// A caller that waits. It may leave at any time, and its job then counts as one that nobody waits for.
#[derive(Debug)]
pub(super) struct Waiting(pub(super) Arc<Ticket>);

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
    answer: Option<oneshot::Sender<Result<T, VaultError>>>,
    ticket: Arc<Ticket>,
    retries: u8,
}

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
    /// How many jobs workers have come back from.
    done: u64,
}

impl<T, F> Call<T, F> {
    pub(super) fn new(
        work: F,
        undo: Option<Undo>,
    ) -> (Box<Self>, Arc<Ticket>, oneshot::Receiver<Result<T, VaultError>>) {
        let (sender, receiver) = oneshot::channel();
        let ticket = Arc::new(Ticket { since: statistics::now(), ..Ticket::default() });
        let call = Self {
            work: Some(work),
            undo,
            answer: Some(sender),
            ticket: Arc::clone(&ticket),
            retries: 0,
        };
        (Box::new(call), ticket, receiver)
    }

    /// Answers once; false when nobody takes the answer.
    fn answer(&mut self, answer: Result<T, VaultError>) -> bool {
        self.work = None;
        self.answer.take().is_some_and(|caller| caller.send(answer).is_ok())
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
        let state = State {
            phase: Phase::Starting,
            jobs: VecDeque::new(),
            at_work: Vec::new(),
            crew: 0,
            done: 0,
        };
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
                    statistics::waited(job.ticket().since);
                    return Some(job);
                }
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A worker has finished what it took.
    pub(super) fn done(&self, ticket: &Arc<Ticket>) {
        let mut state = self.state();
        state.at_work.retain(|other| !Arc::ptr_eq(other, ticket));
        state.done += 1;
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

    /// How many jobs are done, while only such are under way as nobody waits for.
    pub(super) fn standstill(&self) -> Option<u64> {
        let state = self.state();
        let alone = |ticket: &Arc<Ticket>| ticket.left.load(Ordering::Relaxed);
        let still = !state.at_work.is_empty() && state.at_work.iter().all(alone);
        still.then_some(state.done)
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

#[cfg(test)]
mod tests {
    use super::*;

    type Answer = oneshot::Receiver<Result<(), VaultError>>;

    fn job() -> (Box<dyn Job>, Arc<Ticket>, Answer) {
        let (call, ticket, answer) = Call::new(|_: &Seat| Ok(()), None);
        (call, ticket, answer)
    }

    fn up(capacity: usize, crew: usize) -> Queue {
        let queue = Queue::new(capacity);
        queue.up(crew);
        queue
    }

    fn lost() -> VaultError {
        VaultError::Unavailable { cause: "lost".to_owned() }
    }

    #[test]
    fn a_full_queue_is_busy_until_a_caller_leaves() {
        let queue = up(2, 1);
        let (one, _, first) = job();
        let (two, _, _second) = job();
        assert_eq!(queue.submit(one), Ok(()));
        assert_eq!(queue.submit(two), Ok(()));
        assert_eq!(queue.submit(job().0), Err(VaultError::Busy));
        drop(first);
        let (three, _, _third) = job();
        assert_eq!(queue.submit(three), Ok(()));
    }

    #[test]
    fn a_job_that_nobody_waits_for_is_not_begun() {
        let queue = up(2, 1);
        let (left, _, answer) = job();
        queue.submit(left).unwrap();
        drop(answer);
        let (wanted, ticket, _answer) = job();
        queue.submit(wanted).unwrap();
        assert!(Arc::ptr_eq(queue.take().unwrap().ticket(), &ticket));
    }

    #[test]
    fn a_job_is_tried_again_first_after_a_repair_but_not_for_ever() {
        let queue = up(2, 1);
        let (unlucky, ticket, mut answer) = job();
        let (next, _, _next) = job();
        queue.submit(unlucky).unwrap();
        queue.submit(next).unwrap();
        for _ in 0..RETRIES {
            let job = queue.take().unwrap();
            assert!(Arc::ptr_eq(job.ticket(), &ticket));
            queue.broken(Repair::Sessions, "lost", job);
            assert!(queue.take().is_none(), "this crew must leave");
            queue.up(1);
        }
        let job = queue.take().unwrap();
        queue.broken(Repair::Sessions, "lost", job);
        assert_eq!(answer.try_recv(), Ok(Err(lost())));
    }

    #[test]
    fn requests_wait_for_the_first_repair_and_are_refused_during_the_next() {
        let queue = up(2, 2);
        let (first, _, _first) = job();
        queue.submit(first).unwrap();
        let job_at_work = queue.take().unwrap();
        queue.broken(Repair::Sessions, "closed", job_at_work);
        assert_eq!(queue.phase(), Phase::Broken(Repair::Sessions, "closed".to_owned()));
        let (waiting, _, mut answer) = job();
        assert_eq!(queue.submit(waiting), Ok(()));
        queue.down(Phase::Down("lost".to_owned()));
        assert_eq!(answer.try_recv(), Ok(Err(lost())));
        assert_eq!(queue.submit(job().0), Err(lost()));
        queue.down(Phase::Refused("the PIN".to_owned()));
        assert_eq!(queue.submit(job().0), Err(VaultError::Credential("the PIN".to_owned())));
    }

    #[test]
    fn the_deeper_repair_wins() {
        let queue = up(4, 2);
        let (one, _, _one) = job();
        let (two, _, _two) = job();
        queue.submit(one).unwrap();
        queue.submit(two).unwrap();
        let (one, two) = (queue.take().unwrap(), queue.take().unwrap());
        queue.broken(Repair::Device, "gone", one);
        queue.broken(Repair::Sessions, "closed", two);
        assert_eq!(queue.phase(), Phase::Broken(Repair::Device, "gone".to_owned()));
    }

    #[test]
    fn a_crew_of_which_every_call_is_overdue_takes_no_more() {
        let queue = up(4, 2);
        let (one, first, _one) = job();
        let (two, second, _two) = job();
        queue.submit(one).unwrap();
        queue.submit(two).unwrap();
        let _running = (queue.take().unwrap(), queue.take().unwrap());
        first.expire();
        let (waiting, _, _answer) = job();
        assert_eq!(queue.submit(waiting), Ok(()), "one worker may still return");
        second.expire();
        assert!(matches!(queue.submit(job().0), Err(VaultError::Unavailable { .. })));
        queue.done(&first);
        let (served, _, _answer) = job();
        assert_eq!(queue.submit(served), Ok(()));
    }

    #[test]
    fn it_stands_still_while_only_calls_are_under_way_that_nobody_waits_for() {
        let queue = up(4, 2);
        assert_eq!(queue.standstill(), None);
        let (one, first, _one) = job();
        let (two, second, _two) = job();
        queue.submit(one).unwrap();
        queue.submit(two).unwrap();
        let _running = (queue.take().unwrap(), queue.take().unwrap());
        drop(Waiting(first.clone()));
        assert_eq!(queue.standstill(), None, "the second may still return");
        queue.done(&second);
        assert_eq!(queue.standstill(), Some(1));
        queue.done(&first);
        assert_eq!(queue.standstill(), None);
    }

    #[test]
    fn a_closed_queue_stays_closed() {
        let queue = up(1, 1);
        queue.down(Phase::Closed);
        queue.up(1);
        assert!(queue.take().is_none());
        assert!(matches!(queue.submit(job().0), Err(VaultError::Unavailable { .. })));
    }
}
