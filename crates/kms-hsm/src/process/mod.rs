//! The vault in a process of its own, because a vendor's library crashes and hangs, and takes its process with it.
//!
//! `wire` and `packet` are the messages, `socket` carries them, `connection` are the calls that wait for one worker,
//! `keeper` starts the next one, `worker` is the other process. A worker that crashes is replaced, and what it was
//! asked is asked again where that does no harm; one in which nothing moves any more is killed.
//!
//! What never happens here: the library is loaded into the service, a PIN that was refused is tried by the next
//! worker, a token in the place of the one that was found first is taken for it.

mod connection;
mod keeper;
mod packet;
mod socket;
pub mod wire;
mod worker;

use crate::pkcs11::{FIRST_ATTEMPT, Known, Settings, Token};
use crate::statistics::Statistics;
use crate::vault::{CheckValue, Circuit, RsaPublic, Sealed, Vault, VaultError, Wrapped};
use async_trait::async_trait;
use connection::{Connection, Lost};
use keeper::{Event, Keeper};
use kms_core::secret::SecretBytes;
use std::convert::Infallible;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use uuid::Uuid;
use wire::{Answer, Call};
pub use worker::{has_service, serve};

/// How to start a worker: a program that calls [`serve`]. It inherits environment and standard error.
#[derive(Clone, Debug)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// What it is called in a list of processes.
    pub name: OsString,
    /// What makes it a worker. Everybody may read this; secrets go through the socket.
    pub args: Vec<OsString>,
}

/// A vault whose library runs in another process.
#[derive(Debug)]
pub struct Isolated {
    shared: Arc<Shared>,
    known: Arc<Mutex<Option<Known>>>,
    orders: mpsc::Sender<Event>,
    /// Closed when the keeper has ended; nothing is ever sent.
    ended: Mutex<mpsc::Receiver<Infallible>>,
}

/// What callers and keeper share.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    state: watch::Sender<State>,
    /// As many calls as the worker's sessions and queue hold: so nothing piles up while there is no worker.
    places: Semaphore,
}

/// Whether there is a worker.
#[derive(Clone, Debug)]
enum State {
    /// The next one is being started; callers wait.
    Restarting,
    Up(u64, Arc<Connection>),
    /// The next one does not start, or never lives long; callers are refused at once.
    Down(String),
    /// The PIN was refused; nothing is started before it is replaced.
    Refused(String),
    Closed,
}

impl Isolated {
    /// Starts a worker and waits some seconds for its vault to open. Blocks; call it before the service starts, from a
    /// thread of a runtime that has I/O and time.
    ///
    /// # Errors
    /// As [`Pkcs11Vault::open`](crate::pkcs11::Pkcs11Vault::open). A library that crashes is no error: it is tried
    /// again, and meanwhile all calls answer `Unavailable`. A refused PIN is none either: they answer `Credential`
    /// until it is replaced.
    pub fn open(settings: Settings, program: Program) -> Result<Self, VaultError> {
        let unavailable = |error: std::io::Error| VaultError::Unavailable {
            cause: format!("cannot start a thread: {error}"),
        };
        let places = Semaphore::new(settings.queue.saturating_add(settings.sessions).min(MOST));
        let state = watch::Sender::new(State::Restarting);
        let shared = Arc::new(Shared { settings, state, places });
        let (orders, events) = mpsc::channel();
        let known = Arc::<Mutex<Option<Known>>>::default();
        let keeper = Keeper {
            program,
            shared: shared.clone(),
            runtime: Handle::current(),
            orders: orders.clone(),
            events,
            known: known.clone(),
        };
        let (first, outcome) = mpsc::channel();
        let (alive, ended) = mpsc::channel();
        let thread = std::thread::Builder::new().name("hsm-keeper".to_owned());
        thread
            .spawn(move || {
                keeper.run(&first);
                drop(alive);
            })
            .map_err(unavailable)?;
        let vault = Self { shared, known, orders, ended: Mutex::new(ended) };
        match outcome.recv_timeout(FIRST_ATTEMPT + START) {
            Ok(Err(VaultError::Credential(_))) => Ok(vault),
            Ok(Err(error)) => Err(error),
            _ => Ok(vault),
        }
    }

    /// The token in use; `None` until it was found for the first time.
    #[must_use]
    pub fn token(&self) -> Option<Token> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().map(|known| known.token.clone())
    }

    async fn call(&self, call: Call) -> Result<Answer, VaultError> {
        let _place = self.shared.places.try_acquire().map_err(|_| VaultError::Busy)?;
        let time = match call.is_slow() {
            true => self.shared.patience(),
            false => self.shared.settings.deadline,
        };
        // The worker's own answer comes first, so that it knows which calls are overdue.
        let answer = tokio::time::timeout(time + GRACE, self.shared.ask(call)).await;
        answer.unwrap_or(Err(VaultError::TimedOut))
    }
}

impl Drop for Isolated {
    fn drop(&mut self) {
        // It fails where the keeper has ended.
        let _ = self.orders.send(Event::Close);
        // The keeper's own patience has an end.
        let _ = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner).recv();
    }
}

/// What the start of a process adds to the first attempt of the vault in it.
const START: Duration = Duration::from_secs(1);
/// How much later than the worker the service itself gives up.
const GRACE: Duration = Duration::from_millis(100);
/// As many places as anybody could want; tokio has a limit.
const MOST: usize = 1 << 20;

impl Shared {
    /// Asks the worker, and once more the next one if that does no harm.
    async fn ask(&self, call: Call) -> Result<Answer, VaultError> {
        let mut again = call.may_repeat();
        loop {
            let (number, worker) = self.worker().await?;
            match worker.ask(&call).await {
                Ok(Err(VaultError::Credential(why))) => {
                    // The next worker must not try it again.
                    worker.refuse(&self.settings.pin, &why);
                    return Err(VaultError::Credential(why));
                }
                Ok(answer) => return answer,
                Err(Lost) if again => {
                    again = false;
                    // Its end may not have been heard yet: the next one must be another.
                    self.lost(number);
                }
                Err(Lost) => return Err(lost()),
            }
        }
    }

    async fn worker(&self) -> Result<(u64, Arc<Connection>), VaultError> {
        // Almost always there is one.
        if let State::Up(number, connection) = &*self.state.borrow() {
            return Ok((*number, connection.clone()));
        }
        let mut state = self.state.subscribe();
        // The sender lives in self, so the wait cannot fail.
        let state = state.wait_for(|state| !matches!(state, State::Restarting)).await;
        match state.as_deref() {
            Ok(State::Up(number, connection)) => Ok((*number, connection.clone())),
            Ok(State::Down(cause)) => Err(VaultError::Unavailable { cause: cause.clone() }),
            Ok(State::Refused(cause)) => Err(VaultError::Credential(cause.clone())),
            Ok(State::Restarting | State::Closed) | Err(_) => {
                Err(VaultError::Unavailable { cause: "the vault is closed".to_owned() })
            }
        }
    }

    fn set(&self, state: State) {
        self.state.send_replace(state);
    }

    /// This worker is gone, if it is still the one.
    fn lost(&self, worker: u64) {
        self.state.send_if_modified(|state| {
            let it = matches!(state, State::Up(number, _) if *number == worker);
            if it {
                *state = State::Restarting;
            }
            it
        });
    }

    fn patience(&self) -> Duration {
        self.settings.deadline.saturating_mul(crate::pkcs11::SLOW)
    }
}

impl Program {
    fn command(&self, socket: OwnedFd) -> Command {
        let mut command = Command::new(&self.path);
        command.arg0(&self.name).args(&self.args);
        // Whatever a library prints there would end up in the answer of a command.
        command.stdin(Stdio::from(socket)).stdout(Stdio::null());
        command
    }
}

#[async_trait]
impl Vault for Isolated {
    async fn create_version(&self, id: Uuid) -> Result<(), VaultError> {
        done(self.call(Call::Create(id)).await?)
    }

    async fn import_version(&self, id: Uuid, material: SecretBytes) -> Result<(), VaultError> {
        done(self.call(Call::Import(id, material)).await?)
    }

    async fn destroy_version(&self, id: Uuid) -> Result<(), VaultError> {
        done(self.call(Call::Destroy(id)).await?)
    }

    async fn wrap(
        &self,
        id: Uuid,
        context: &[u8],
        dek: SecretBytes,
    ) -> Result<Wrapped, VaultError> {
        match self.call(Call::Wrap(id, context.to_vec(), dek)).await? {
            Answer::Wrapped(wrapped) => Ok(wrapped),
            _ => Err(another()),
        }
    }

    async fn unwrap(
        &self,
        id: Uuid,
        context: &[u8],
        wrapped: Wrapped,
    ) -> Result<SecretBytes, VaultError> {
        secret(self.call(Call::Unwrap(id, context.to_vec(), wrapped)).await?)
    }

    async fn wrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        dek: SecretBytes,
    ) -> Result<Sealed, VaultError> {
        match self.call(Call::WrapGcm(id, context.to_vec(), dek)).await? {
            Answer::Sealed(sealed) => Ok(sealed),
            _ => Err(another()),
        }
    }

    async fn unwrap_gcm(
        &self,
        id: Uuid,
        context: &[u8],
        sealed: Sealed,
    ) -> Result<SecretBytes, VaultError> {
        secret(self.call(Call::UnwrapGcm(id, context.to_vec(), sealed)).await?)
    }

    async fn check_value(&self, id: Uuid) -> Result<CheckValue, VaultError> {
        match self.call(Call::CheckValue(id)).await? {
            Answer::CheckValue(value) => Ok(value),
            _ => Err(another()),
        }
    }

    fn serial(&self) -> Option<String> {
        self.token().map(|token| token.serial)
    }

    async fn random(&self, len: usize) -> Result<SecretBytes, VaultError> {
        // The worker's vault refuses what is too much.
        secret(self.call(Call::Random(u32::try_from(len).unwrap_or(u32::MAX))).await?)
    }

    async fn make_signing_key(&self, id: Uuid) -> Result<RsaPublic, VaultError> {
        public_key(self.call(Call::MakeSigningKey(id)).await?)
    }

    async fn public_half(&self, id: Uuid) -> Result<RsaPublic, VaultError> {
        public_key(self.call(Call::PublicHalf(id)).await?)
    }

    async fn sign(&self, id: Uuid, data: &[u8]) -> Result<Vec<u8>, VaultError> {
        match self.call(Call::Sign(id, data.to_vec())).await? {
            Answer::Signature(signature) => Ok(signature),
            _ => Err(another()),
        }
    }

    async fn versions(&self) -> Result<Vec<Uuid>, VaultError> {
        ids(self.call(Call::Versions).await?)
    }

    async fn incomplete(&self) -> Result<Vec<Uuid>, VaultError> {
        ids(self.call(Call::Incomplete).await?)
    }

    async fn probe(&self) -> Result<(), VaultError> {
        done(self.call(Call::Probe).await?)
    }

    fn circuit(&self) -> Circuit {
        match &*self.shared.state.borrow() {
            State::Up(_, worker) => worker.circuit(),
            State::Restarting => Circuit::Repairing,
            State::Down(_) | State::Closed => Circuit::Open,
            State::Refused(_) => Circuit::Refused,
        }
    }

    async fn statistics(&self) -> Option<Statistics> {
        match self.call(Call::Statistics).await {
            Ok(Answer::Statistics(counted)) => Some(*counted),
            // A worker that is away has counted nothing.
            _ => None,
        }
    }
}

fn done(answer: Answer) -> Result<(), VaultError> {
    if matches!(answer, Answer::Done) { Ok(()) } else { Err(another()) }
}

fn secret(answer: Answer) -> Result<SecretBytes, VaultError> {
    if let Answer::Secret(secret) = answer { Ok(secret) } else { Err(another()) }
}

fn public_key(answer: Answer) -> Result<RsaPublic, VaultError> {
    if let Answer::PublicKey(key) = answer { Ok(key) } else { Err(another()) }
}

fn ids(answer: Answer) -> Result<Vec<Uuid>, VaultError> {
    if let Answer::Ids(ids) = answer { Ok(ids) } else { Err(another()) }
}

fn lost() -> VaultError {
    let cause = "the process of the HSM's library was lost before it answered".to_owned();
    VaultError::Unavailable { cause }
}

fn another() -> VaultError {
    let cause = "the process of the HSM's library has answered another question".to_owned();
    VaultError::Unavailable { cause }
}
