//! The thread that keeps a worker process alive: starts it, buries it, and starts the next one.
//!
//! One thread for all of them, because the kernel ends a worker when the *thread* that started it ends: so no worker
//! outlives its service, however that one dies.

use super::connection::Connection;
use super::socket;
use super::wire::{FromWorker, Hello, Pulse, ToWorker};
use super::{Program, Shared, State};
use crate::pkcs11::{Known, Pin};
use crate::vault::{Circuit, VaultError};
use kms_core::secret::SecretText;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// As in the vault's own pool: what comes back is found within this time, and sees one login in it.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A worker that lived for so long was no failure.
const STEADY: Duration = Duration::from_secs(5);
/// How long a worker may take to log out when its service ends.
const FAREWELL: Duration = Duration::from_secs(5);
/// What the start of a process adds to the time in which its vault opens.
const START: Duration = Duration::from_secs(10);

/// What the keeper is told.
#[derive(Debug)]
pub(super) enum Event {
    /// This worker is of no use any more.
    Lost { worker: u64, cause: String },
    /// The service ends.
    Close,
}

/// Everything that starting a worker takes.
pub(super) struct Keeper {
    pub(super) program: Program,
    pub(super) shared: Arc<Shared>,
    pub(super) runtime: Handle,
    pub(super) orders: Sender<Event>,
    pub(super) events: Receiver<Event>,
    /// The token that the first worker found. Another one in its place is not ours.
    pub(super) known: Arc<Mutex<Option<Known>>>,
}

/// How far a start came.
enum Start {
    Up(Child, Arc<Connection>),
    /// The vault did not open.
    Refused(VaultError),
    Failed(String),
}

impl Keeper {
    /// Runs until the service ends. `first` hears how the first start went.
    pub(super) fn run(self, first: &Sender<Result<(), VaultError>>) {
        let mut failures: u32 = 0;
        for worker in 0.. {
            let (cause, served) = match self.start(worker) {
                Start::Up(child, connection) => {
                    let started = Ok(());
                    let _ = first.send(started);
                    self.shared.set(State::Up(worker, connection.clone()));
                    let (closing, cause) = self.watch(worker, &mut failures);
                    self.bury(child, &connection, closing, &cause);
                    if closing {
                        return;
                    }
                    (cause, true)
                }
                Start::Refused(error) => {
                    // Only the first caller is told as it is: it has not begun to serve.
                    let _ = first.send(Err(error.clone()));
                    (error.to_string(), false)
                }
                Start::Failed(cause) => (cause, false),
            };
            failures = failures.saturating_add(1);
            if self.shared.settings.pin.is_refused() {
                if self.wait_for_another_pin() {
                    return;
                }
                continue;
            }
            tracing::warn!("The HSM's library is started again in a new process: {cause}");
            self.shared.set(if served { State::Restarting } else { State::Down(cause) });
            let _ = first.send(Ok(()));
            if self.pause(pause_after(failures)) {
                return;
            }
        }
    }

    /// Starts a process, introduces itself, and waits until the vault in it is open.
    fn start(&self, worker: u64) -> Start {
        let failed =
            |what: &str, error: &dyn std::fmt::Display| Start::Failed(format!("{what}: {error}"));
        let (ours, theirs) = match socket::pair() {
            Ok(pair) => pair,
            Err(error) => return failed("no socket for the worker", &error),
        };
        let pin = match self.shared.settings.pin.to_try() {
            Ok(pin) => pin,
            Err(cause) => return Start::Refused(VaultError::Credential(cause)),
        };
        let hello = ToWorker::Hello(Box::new(self.hello(pin.clone()))).encode();
        let mut child = match self.program.command(theirs).spawn() {
            Ok(child) => child,
            Err(error) => return failed("the worker cannot be started", &error),
        };
        let patience = self.shared.patience() + START;
        let opened = socket::try_send(&ours, &hello)
            .and_then(|()| socket::receive(&ours, Some(patience)))
            .map(|packet| packet.map(|packet| FromWorker::decode(&packet)));
        match opened {
            Ok(Some(Ok(FromWorker::Opened(Ok(()))))) => self.connect(worker, child, ours, pin),
            Ok(Some(Ok(FromWorker::Opened(Err(error))))) => {
                end(&mut child);
                if let VaultError::Credential(why) = &error {
                    self.shared.settings.pin.refuse(&pin, why);
                }
                Start::Refused(error)
            }
            Ok(None) => Start::Failed(format!("it ended at the start{}", end(&mut child))),
            Err(error) => {
                end(&mut child);
                failed("no word of the worker", &error)
            }
            Ok(Some(_)) => {
                end(&mut child);
                failed("the worker", &"it has sent what means nothing")
            }
        }
    }

    fn connect(&self, worker: u64, mut child: Child, ours: OwnedFd, pin: SecretText) -> Start {
        let _runtime = self.runtime.enter();
        let connection = match Connection::new(ours, pin) {
            Ok(connection) => Arc::new(connection),
            Err(error) => {
                end(&mut child);
                return Start::Failed(format!("no socket for the worker: {error}"));
            }
        };
        let (listening, shared) = (connection.clone(), self.shared.clone());
        let (known, orders) = (self.known.clone(), self.orders.clone());
        self.runtime.spawn(async move {
            let pin = &shared.settings.pin;
            let cause = listening.listen(|pulse| feel(&listening, pin, &known, pulse)).await;
            // In this order: whoever learns that the worker is gone must not find it again.
            shared.lost(worker);
            listening.end();
            // It fails where the service has ended.
            let _ = orders.send(Event::Lost { worker, cause });
        });
        Start::Up(child, connection)
    }

    /// Waits for the end of this worker's time: whether the service ends, and why.
    fn watch(&self, worker: u64, failures: &mut u32) -> (bool, String) {
        let mut patience = Some(STEADY);
        loop {
            let event = match patience {
                Some(time) => self.events.recv_timeout(time),
                None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(Event::Lost { worker: lost, cause }) if lost == worker => return (false, cause),
                Ok(Event::Lost { .. }) => {}
                Ok(Event::Close) | Err(RecvTimeoutError::Disconnected) => {
                    return (true, "the service ends".to_owned());
                }
                Err(RecvTimeoutError::Timeout) => {
                    *failures = 0;
                    patience = None;
                }
            }
        }
    }

    fn bury(&self, mut child: Child, connection: &Connection, closing: bool, cause: &str) {
        self.shared.set(if closing { State::Closed } else { State::Restarting });
        if closing {
            connection.hang_up();
            if !ends_within(&child, FAREWELL) {
                tracing::warn!(
                    "a call into the PKCS#11 library does not return; it is left behind"
                );
            }
        }
        let status = end(&mut child);
        connection.end();
        if !closing {
            tracing::error!("The process of the HSM's library is lost, {cause}{status}");
        }
    }

    fn hello(&self, pin: SecretText) -> Hello {
        let settings = &self.shared.settings;
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Hello {
            library: settings.library.clone(),
            token: settings.token.clone(),
            pin,
            sessions: count(settings.sessions),
            queue: count(settings.queue),
            deadline: settings.deadline,
            gcm: settings.gcm,
            known: self.known.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Nothing is started with a PIN that was refused: a worker knows nothing of what others have tried. True when the
    /// service ends.
    fn wait_for_another_pin(&self) -> bool {
        while let Err(cause) = self.shared.settings.pin.to_try() {
            self.shared.set(State::Refused(cause));
            if self.pause(LONGEST_PAUSE) {
                return true;
            }
        }
        false
    }

    /// True when the service ends meanwhile.
    fn pause(&self, time: Duration) -> bool {
        loop {
            match self.events.recv_timeout(time) {
                Ok(Event::Lost { .. }) => {}
                Err(RecvTimeoutError::Timeout) => return false,
                Ok(Event::Close) | Err(RecvTimeoutError::Disconnected) => {
                    self.shared.set(State::Closed);
                    return true;
                }
            }
        }
    }
}

/// What a pulse tells; an error ends the worker.
fn feel(
    worker: &Connection,
    pin: &Pin,
    known: &Mutex<Option<Known>>,
    pulse: Pulse,
) -> Result<(), String> {
    if pulse.known.is_some() {
        *known.lock().unwrap_or_else(PoisonError::into_inner) = pulse.known;
    }
    worker.note(pulse.circuit);
    match pulse.circuit {
        Circuit::Closed => worker.accept(pin),
        // Where nobody asks for anything, nobody else tells.
        Circuit::Refused => worker.refuse(pin, "it was tried once"),
        Circuit::Repairing | Circuit::Open => {}
    }
    if pulse.stuck {
        return Err("no call into the PKCS#11 library returns".to_owned());
    }
    if worker.is_refused() {
        return Err("its PIN is refused".to_owned());
    }
    Ok(())
}

/// Kills what is not dead yet, and says how it ended, for a sentence.
fn end(child: &mut Child) -> String {
    let exited = child.try_wait().ok().flatten();
    let _ = child.kill();
    match exited.map_or_else(|| child.wait(), Ok) {
        Ok(status) => format!(" ({})", describe(status)),
        Err(error) => format!(" ({error})"),
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(9), _) => "killed".to_owned(),
        (Some(signal), _) => format!("signal {signal}"),
        (None, code) => format!("exit code {}", code.unwrap_or_default()),
    }
}

fn ends_within(child: &Child, time: Duration) -> bool {
    let Ok(pid) = pidfd_open(Pid::from_child(child), PidfdFlags::empty()) else { return false };
    let time = Timespec::try_from(time).ok();
    matches!(poll(&mut [PollFd::new(&pid, PollFlags::IN)], time.as_ref()), Ok(1))
}

/// None after the first: a library that has crashed once serves again at once.
fn pause_after(failures: u32) -> Duration {
    match failures {
        0 | 1 => Duration::ZERO,
        more => FIRST_PAUSE.saturating_mul(1 << (more - 2).min(10)).min(LONGEST_PAUSE),
    }
}
