//! The calls that wait for one worker. When it is gone they all hear of it, and none waits longer.

use super::socket::{self, Inbox};
use super::wire::{Answer, Call, FromWorker, MAX_PACKET, Pulse, ToWorker};
use crate::pkcs11::Pin;
use crate::vault::{Circuit, VaultError};
use kms_core::secret::SecretText;
use std::collections::HashMap;
use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use uuid::Uuid;

/// A worker that has said nothing for so long will not say anything any more.
pub(super) const SILENCE: Duration = Duration::from_secs(5);

/// The service's side of one worker.
#[derive(Debug)]
pub(super) struct Connection {
    end: AsyncFd<OwnedFd>,
    waiting: Mutex<Waiting>,
    next: AtomicU64,
    /// With which the worker logs in.
    pin: SecretText,
    refused: AtomicBool,
    /// As the last pulse told.
    circuit: Mutex<Circuit>,
}

#[derive(Debug, Default)]
struct Waiting {
    callers: HashMap<u64, Caller>,
    over: bool,
}

/// Who waits for an answer.
#[derive(Debug)]
enum Caller {
    Here(Here),
    /// Has left while a key of this name was made.
    Left(Uuid),
}

#[derive(Debug)]
struct Here {
    answer: oneshot::Sender<Result<Answer, VaultError>>,
    parts: Vec<Uuid>,
    makes: Option<Uuid>,
}

/// The worker is gone; whether it has done what was asked, nobody knows.
#[derive(Debug)]
pub(super) struct Lost;

impl Connection {
    pub(super) fn new(end: OwnedFd, pin: SecretText) -> std::io::Result<Self> {
        let end = socket::for_tasks(end)?;
        Ok(Self {
            end,
            waiting: Mutex::default(),
            next: AtomicU64::new(0),
            pin,
            refused: AtomicBool::new(false),
            circuit: Mutex::default(),
        })
    }

    /// Has the worker do `call`.
    ///
    /// # Errors
    /// [`Lost`], and inside it the vault's own errors.
    pub(super) async fn ask(
        self: &Arc<Self>,
        call: &Call,
    ) -> Result<Result<Answer, VaultError>, Lost> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let packet = call.packet(number);
        if packet.len() > MAX_PACKET {
            let what = format!("{} bytes for the HSM at once", packet.len());
            return Ok(Err(VaultError::BadInput(what)));
        }
        let (answer, answered) = oneshot::channel();
        {
            let mut waiting = self.waiting();
            if waiting.over {
                return Err(Lost);
            }
            let here = Here { answer, parts: Vec::new(), makes: call.makes() };
            waiting.callers.insert(number, Caller::Here(here));
        }
        let _leaving = Leaving { connection: self, number };
        match socket::deliver(&self.end, &packet).await {
            Ok(()) => answered.await.map_err(|_| Lost),
            Err(error) if matches!(error.kind(), BrokenPipe | ConnectionReset) => Err(Lost),
            Err(error) => Ok(Err(VaultError::Unavailable { cause: error.to_string() })),
        }
    }

    /// Hands answers to those who wait, until the worker is gone; returns how that looked.
    pub(super) async fn listen(&self, pulse: impl Fn(Pulse) -> Result<(), String>) -> String {
        let mut inbox = Inbox::new();
        loop {
            let packet = match tokio::time::timeout(SILENCE, inbox.next(&self.end)).await {
                Ok(Ok(Some(packet))) => packet,
                Ok(Ok(None)) => return "it has ended".to_owned(),
                Ok(Err(error)) => return format!("its socket failed: {error}"),
                Err(_) => return format!("it has said nothing for {} s", SILENCE.as_secs()),
            };
            match FromWorker::decode(&packet) {
                Ok(FromWorker::Answer(number, answer)) => self.answer(number, answer),
                Ok(FromWorker::Part(number, ids)) => self.keep(number, ids),
                Ok(FromWorker::Pulse(it)) => {
                    if let Err(cause) = pulse(it) {
                        return cause;
                    }
                }
                Ok(FromWorker::Opened(_)) | Err(_) => {
                    return "it has sent what means nothing".to_owned();
                }
            }
        }
    }

    /// Notes that the token refuses the PIN of this worker, which is of no use from now on.
    pub(super) fn refuse(&self, pin: &Pin, why: &str) {
        pin.refuse(&self.pin, why);
        self.refused.store(true, Ordering::Relaxed);
    }

    /// Notes that the PIN of this worker has opened the token.
    pub(super) fn accept(&self, pin: &Pin) {
        pin.accept(&self.pin);
    }

    /// Whether the worker lets requests through.
    pub(super) fn circuit(&self) -> Circuit {
        *self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn note(&self, circuit: Circuit) {
        *self.circuit.lock().unwrap_or_else(PoisonError::into_inner) = circuit;
    }

    /// Whether the PIN of this worker was refused.
    pub(super) fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// From now on nobody waits here, nor ever will.
    pub(super) fn end(&self) {
        let mut waiting = self.waiting();
        waiting.over = true;
        waiting.callers.clear();
    }

    /// Tells the worker that there will be no more, so that it logs out and ends.
    pub(super) fn hang_up(&self) {
        // It fails where the worker is gone.
        let _ = rustix::net::shutdown(self.end.get_ref(), rustix::net::Shutdown::Write);
    }

    fn answer(&self, number: u64, answer: Result<Answer, VaultError>) {
        let Some(caller) = self.waiting().callers.remove(&number) else { return };
        // Nobody knows a key whose creator did not wait for the answer.
        let unknown = match caller {
            Caller::Here(Here { answer: caller, parts, makes }) => {
                let answer = answer.map(|answer| match answer {
                    Answer::Ids(last) => Answer::Ids([parts, last].concat()),
                    other => other,
                });
                caller.send(answer).err().filter(Result::is_ok).and(makes)
            }
            Caller::Left(id) => answer.is_ok().then_some(id),
        };
        if let Some(id) = unknown {
            self.destroy(id);
        }
    }

    fn destroy(&self, id: Uuid) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let packet = Call::Destroy(id).packet(number);
        if let Err(error) = socket::try_send(self.end.get_ref(), &packet) {
            tracing::warn!("CRK version {id}, which nobody waits for, stays: {error}");
        }
    }

    fn keep(&self, number: u64, ids: Vec<Uuid>) {
        if let Some(Caller::Here(here)) = self.waiting().callers.get_mut(&number) {
            here.parts.extend(ids);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller that no longer waits: answered, at its deadline, or given up.
struct Leaving<'a> {
    connection: &'a Connection,
    number: u64,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let mut waiting = self.connection.waiting();
        let Some(Caller::Here(here)) = waiting.callers.remove(&self.number) else { return };
        if let Some(id) = here.makes {
            // It is seen to its end, so that what it leaves is known.
            waiting.callers.insert(self.number, Caller::Left(id));
            return;
        }
        drop(waiting);
        // Without room for it the worker does what nobody wants, and that is all.
        let packet = ToWorker::Cancel(self.number).encode();
        let _ = socket::try_send(self.connection.end.get_ref(), &packet);
    }
}
