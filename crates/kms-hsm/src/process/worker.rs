//! The process that has the vendor's library in it: reads requests, has its vault do them, and answers.
//!
//! It trusts nobody but the service at the other end of its socket, and ends when that one does.

use super::socket::{self, Inbox};
use super::wire::{Answer, Call, FromWorker, Hello, MAX_IDS, Pulse, ToWorker};
use crate::pkcs11::{Direct, Pin, Pkcs11Vault, Settings, Standstill, Then, Waiting};
use crate::vault::{Vault, VaultError};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// How often the service hears that this process lives.
const BEAT: Duration = Duration::from_millis(250);
/// How often the deadline may pass without a call that returns. Then nobody expects it any more.
const HOPE: u32 = 2;
/// No introduction within this time: whoever started this process is not our service.
const INTRODUCTION: Duration = Duration::from_secs(10);

/// Whether standard input is the socket of a service. Everybody else has started the worker by mistake.
#[must_use]
pub fn has_service() -> bool {
    socket::is_one(io::stdin())
}

/// Serves the service at the other end of standard input until it ends. Call it first thing in a process of its own,
/// in a runtime that has I/O and time.
///
/// # Errors
/// There is no such service, or the operating system refuses what this process needs.
pub async fn serve() -> io::Result<()> {
    let end = take_stdin()?;
    let hello = match socket::receive(&end, Some(INTRODUCTION))? {
        Some(packet) => ToWorker::decode(&packet).map_err(io::Error::other)?,
        None => return Ok(()),
    };
    let ToWorker::Hello(hello) = hello else { return Err(io::ErrorKind::InvalidData.into()) };
    let opened = open(*hello);
    let answer = FromWorker::Opened(opened.as_ref().map(|_| ()).map_err(Clone::clone));
    socket::try_send(&end, &answer.encode())?;
    let Ok(vault) = opened else { return Ok(()) };
    let end = socket::for_tasks(end)?;
    let line = Line { end, runtime: Handle::current(), under_way: Mutex::default() };
    Arc::new(Worker { vault, line: Arc::new(line) }).serve().await
}

/// The socket, where no library finds it, and no child of a library keeps it open.
fn take_stdin() -> io::Result<OwnedFd> {
    // Where the parent has died before, the socket says so.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let _ = rustix::thread::set_name(c"kms-hsm-worker");
    if !has_service() {
        return Err(io::Error::other("this command is for the service itself: it starts it"));
    }
    let end = io::stdin().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(end)
}

fn open(hello: Hello) -> Result<Pkcs11Vault, VaultError> {
    let count = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
    let settings = Settings {
        library: hello.library,
        token: hello.token,
        pin: Pin::new(hello.pin),
        sessions: count(hello.sessions),
        queue: count(hello.queue),
        deadline: hello.deadline,
        gcm: hello.gcm,
    };
    Pkcs11Vault::open_known(settings, hello.known)
}

struct Worker {
    vault: Pkcs11Vault,
    line: Arc<Line>,
}

/// What the threads of the vault need of it to answer. They do not hold the vault itself: it ends without them.
struct Line {
    end: AsyncFd<OwnedFd>,
    runtime: Handle,
    under_way: Mutex<HashMap<u64, UnderWay>>,
}

/// What becomes an answer.
enum UnderWay {
    Task(AbortHandle),
    /// The two verbs that come by the thousand: the thread that has the result sends it, and no task is woken for it.
    Direct(Waiting),
}

impl Worker {
    async fn serve(self: Arc<Self>) -> io::Result<()> {
        let mut beat = tokio::time::interval(BEAT);
        let mut doubt = Doubt::default();
        let mut inbox = Inbox::new();
        loop {
            tokio::select! {
                // The beat first: packets that never end would silence it.
                biased;
                _ = beat.tick() => {
                    self.vault.nudge();
                    let stuck = doubt.grows(self.vault.standstill(), self.vault.deadline());
                    let (circuit, known) = (self.vault.circuit(), self.vault.known());
                    let pulse = Pulse { stuck, circuit, known };
                    // A service that does not read does not miss a pulse either.
                    let _ = self.line.try_send(&FromWorker::Pulse(pulse));
                }
                packet = inbox.next(&self.line.end) => match packet? {
                    Some(packet) => self.obey(&packet)?,
                    None => return Ok(()),
                },
            }
        }
    }

    fn obey(self: &Arc<Self>, packet: &[u8]) -> io::Result<()> {
        match ToWorker::decode(packet).map_err(io::Error::other)? {
            ToWorker::Call(number, call) => self.begin(number, call),
            ToWorker::Cancel(number) => match self.line.under_way().remove(&number) {
                Some(UnderWay::Task(task)) => task.abort(),
                Some(UnderWay::Direct(waiting)) => waiting.leave(self.vault.deadline()),
                None => {}
            },
            ToWorker::Hello(_) => return Err(io::ErrorKind::InvalidData.into()),
        }
        Ok(())
    }

    fn begin(self: &Arc<Self>, number: u64, call: Call) {
        match call {
            Call::Wrap(id, context, dek) => {
                let then = self.line.answer_with(number, Answer::Wrapped);
                self.begin_direct(number, Pkcs11Vault::wrap_then(id, context, dek, then));
            }
            Call::Unwrap(id, context, wrapped) => {
                let then = self.line.answer_with(number, Answer::Secret);
                self.begin_direct(number, Pkcs11Vault::unwrap_then(id, context, wrapped, then));
            }
            other => self.begin_task(number, other),
        }
    }

    fn begin_direct(&self, number: u64, (job, waiting): (Direct, Waiting)) {
        // Before it begins: it takes itself out when it is done.
        self.line.under_way().insert(number, UnderWay::Direct(waiting));
        self.vault.begin(job);
    }

    fn begin_task(self: &Arc<Self>, number: u64, call: Call) {
        let worker = self.clone();
        // Held until the task is in it, which takes itself out when it is done.
        let mut under_way = self.line.under_way();
        let task = tokio::spawn(async move {
            let answer = perform(&worker.vault, call).await;
            worker.line.under_way().remove(&number);
            if let Err(error) = worker.line.answer(number, answer).await {
                tracing::debug!("an answer that nobody hears: {error}");
            }
        });
        under_way.insert(number, UnderWay::Task(task.abort_handle()));
    }
}

impl Line {
    fn answer_with<T: 'static>(
        self: &Arc<Self>,
        number: u64,
        answer: impl FnOnce(T) -> Answer + Send + 'static,
    ) -> Then<T> {
        let line = self.clone();
        Box::new(move |result: Result<T, VaultError>| {
            line.under_way().remove(&number);
            let answer = FromWorker::Answer(number, result.map(answer));
            match line.try_send(&answer) {
                Ok(()) => {}
                // The service has not read for a while; a session is not kept waiting for it.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let (runtime, packet) = (line.runtime.clone(), answer.encode());
                    runtime.spawn(async move { socket::deliver(&line.end, &packet).await });
                }
                Err(error) => tracing::debug!("an answer that nobody hears: {error}"),
            }
        })
    }

    async fn answer(&self, number: u64, answer: Result<Answer, VaultError>) -> io::Result<()> {
        let answer = match answer {
            Ok(Answer::Ids(mut ids)) => {
                while ids.len() > MAX_IDS {
                    let rest = ids.split_off(MAX_IDS);
                    let part = FromWorker::Part(number, ids).encode();
                    socket::deliver(&self.end, &part).await?;
                    ids = rest;
                }
                Ok(Answer::Ids(ids))
            }
            other => other,
        };
        socket::deliver(&self.end, &FromWorker::Answer(number, answer).encode()).await
    }

    fn try_send(&self, message: &FromWorker) -> io::Result<()> {
        socket::try_send(self.end.get_ref(), &message.encode())
    }

    fn under_way(&self) -> MutexGuard<'_, HashMap<u64, UnderWay>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn perform(vault: &Pkcs11Vault, call: Call) -> Result<Answer, VaultError> {
    let done = |()| Answer::Done;
    match call {
        Call::Create(id) => vault.create_version(id).await.map(done),
        Call::Import(id, material) => vault.import_version(id, material).await.map(done),
        Call::Destroy(id) => vault.destroy_version(id).await.map(done),
        Call::Wrap(id, context, dek) => vault.wrap(id, &context, dek).await.map(Answer::Wrapped),
        Call::Unwrap(id, context, wrapped) => {
            vault.unwrap(id, &context, wrapped).await.map(Answer::Secret)
        }
        Call::WrapGcm(id, context, dek) => {
            vault.wrap_gcm(id, &context, dek).await.map(Answer::Sealed)
        }
        Call::UnwrapGcm(id, context, sealed) => {
            vault.unwrap_gcm(id, &context, sealed).await.map(Answer::Secret)
        }
        Call::Random(len) => {
            vault.random(usize::try_from(len).unwrap_or(usize::MAX)).await.map(Answer::Secret)
        }
        Call::MakeSigningKey(id) => vault.make_signing_key(id).await.map(Answer::PublicKey),
        Call::PublicHalf(id) => vault.public_half(id).await.map(Answer::PublicKey),
        Call::Sign(id, data) => vault.sign(id, &data).await.map(Answer::Signature),
        Call::Versions => vault.versions().await.map(Answer::Ids),
        Call::Incomplete => vault.incomplete().await.map(Answer::Ids),
        Call::Probe => vault.probe().await.map(done),
        Call::Statistics => {
            let counted = vault.statistics().await.unwrap_or_default();
            Ok(Answer::Statistics(Box::new(counted)))
        }
        Call::CheckValue(id) => vault.check_value(id).await.map(Answer::CheckValue),
    }
}

/// For how long nothing has moved.
#[derive(Default)]
struct Doubt {
    seen: Option<Standstill>,
    beats: u32,
}

impl Doubt {
    /// Whether hope is over; asked once in a beat.
    fn grows(&mut self, now: Option<Standstill>, deadline: Duration) -> bool {
        self.beats = if now.is_some() && now == self.seen { self.beats + 1 } else { 0 };
        self.seen = now;
        let hope = match now {
            None => return false,
            Some(Standstill::Calls(_)) => deadline * HOPE,
            Some(Standstill::Connecting(_)) => deadline * crate::pkcs11::SLOW,
        };
        BEAT * self.beats > hope
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hope_ends_when_nothing_moves_and_begins_anew_when_something_does() {
        let deadline = Duration::from_secs(1);
        let mut doubt = Doubt::default();
        let beats = |doubt: &mut Doubt, now, most| {
            (1..=most).find(|_| doubt.grows(now, deadline)).unwrap_or_default()
        };
        assert_eq!(beats(&mut doubt, None, 100), 0);
        assert_eq!(beats(&mut doubt, Some(Standstill::Calls(7)), 9), 0);
        assert_eq!(beats(&mut doubt, Some(Standstill::Calls(8)), 100), 10);
        // To log in may take as long as to make a key.
        assert_eq!(beats(&mut doubt, Some(Standstill::Connecting(1)), 100), 42);
        assert_eq!(beats(&mut doubt, None, 100), 0);
    }
}
