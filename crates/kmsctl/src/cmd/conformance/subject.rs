//! The plug-in under judgement: every call with kube-apiserver's deadline around it, and what came of it told apart
//! as the cases need it: an answer, a refusal in words, a lost connection, or silence.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kms_api::client::causes;
use kms_api::grpc::v1beta1::key_management_service_client::KeyManagementServiceClient as V1Client;
use kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient as V2Client;
use kms_api::grpc::{Channel, Status, connect, v1beta1, v2};
use kms_core::clock::{Clock, SystemClock};
use thiserror::Error;
use tokio::time::timeout;
use uuid::Uuid;

use super::leaks;
use super::raw::{Answer, Broken, Connection, Request};

/// Codes of gRPC that the cases know by name.
const DEADLINE_EXCEEDED: i32 = 4;
pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
pub(super) const UNIMPLEMENTED: i32 = 12;
const UNAVAILABLE: i32 = 14;

/// A version of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    V1,
    V2,
}

impl fmt::Display for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Api::V1 => "v1",
            Api::V2 => "v2",
        })
    }
}

/// What KMS v2's Encrypt returned, to be given back to Decrypt.
pub(super) type Sealed = v2::EncryptResponse;

/// Why there is no answer.
#[derive(Debug, Clone, Error)]
pub(super) enum Failure {
    #[error("{name}: {text}")]
    Refused { code: i32, name: String, text: String },
    #[error("no answer: {0}")]
    Lost(String),
    #[error("no answer within {0:?}")]
    Silent(Duration),
}

/// Cheap to clone; every clone speaks over the same connection and shares what was seen.
#[derive(Debug, Clone)]
pub(super) struct Subject {
    pub(super) socket: Arc<str>,
    pub(super) limit: Duration,
    clock: SystemClock,
    channel: Channel,
    /// Versions without which it is not what was asked for.
    pub(super) required: &'static [Api],
    met: Arc<Met>,
    seen: Arc<Seen>,
}

/// The first answers of the run. None: this version is not to be judged.
#[derive(Debug, Default)]
pub(super) struct Met {
    pub(super) v2_status: Option<Result<v2::StatusResponse, Failure>>,
    /// An Encrypt, although kube-apiserver asks for the Version first.
    pub(super) v1_encrypt: Option<Result<Vec<u8>, Failure>>,
}

/// What later cases want to know of earlier ones.
#[derive(Debug, Default)]
struct Seen {
    calls: AtomicU64,
    /// Texts of refusals that hold a payload.
    leaks: Mutex<Vec<String>>,
    /// How changed KMS v2 values were refused, and what had been changed first.
    refusals: Mutex<BTreeMap<String, String>>,
}

impl Subject {
    /// Connects, and asks once in each of the versions that are `asked` for.
    ///
    /// # Errors
    /// Nobody accepts on the socket, or whoever does stays silent.
    pub(super) async fn meet(
        socket: &str,
        limit: Duration,
        asked: &[Api],
        required: &'static [Api],
    ) -> Result<Subject, Failure> {
        let mut subject = Subject {
            socket: socket.into(),
            limit,
            clock: SystemClock::new(),
            channel: reach(socket, limit).await?,
            required,
            met: Arc::default(),
            seen: Arc::default(),
        };
        let mut met = Met::default();
        for api in asked {
            match api {
                Api::V1 => met.v1_encrypt = Some(subject.v1_encrypt(subject.payload(32)).await),
                Api::V2 => met.v2_status = Some(subject.status().await),
            }
        }
        if let Some(silence) = met.silence() {
            return Err(silence);
        }
        subject.met = Arc::new(met);
        Ok(subject)
    }

    /// The same plug-in over a connection of its own.
    pub(super) async fn connected_anew(&self) -> Result<Subject, Failure> {
        Ok(Subject { channel: reach(&self.socket, self.limit).await?, ..self.clone() })
    }

    pub(super) fn met(&self) -> &Met {
        &self.met
    }

    /// It does not answer UNIMPLEMENTED. Whether it answers well is for the cases to say.
    pub(super) fn serves(&self, api: Api) -> bool {
        let failure = match api {
            Api::V1 => self.met.v1_encrypt.as_ref().map(|answer| answer.as_ref().err()),
            Api::V2 => self.met.v2_status.as_ref().map(|answer| answer.as_ref().err()),
        };
        failure.is_some_and(|failure| failure.is_none_or(|failure| !failure.has(UNIMPLEMENTED)))
    }

    /// The versions to judge.
    pub(super) fn apis(&self) -> impl Iterator<Item = Api> {
        [Api::V2, Api::V1].into_iter().filter(|api| self.serves(*api))
    }

    pub(super) async fn status(&self) -> Result<v2::StatusResponse, Failure> {
        let mut client = V2Client::new(self.channel.clone());
        self.within(async { Ok(client.status(v2::StatusRequest {}).await?.into_inner()) }).await
    }

    pub(super) async fn encrypt(&self, plaintext: Vec<u8>) -> Result<Sealed, Failure> {
        self.encrypt_as(plaintext, self.uid()).await
    }

    pub(super) async fn encrypt_as(
        &self,
        plaintext: Vec<u8>,
        uid: String,
    ) -> Result<Sealed, Failure> {
        let mut client = V2Client::new(self.channel.clone());
        let request = v2::EncryptRequest { plaintext, uid };
        self.within(async { Ok(client.encrypt(request).await?.into_inner()) }).await
    }

    pub(super) async fn decrypt(&self, sealed: Sealed) -> Result<Vec<u8>, Failure> {
        self.decrypt_as(sealed, self.uid()).await
    }

    pub(super) async fn decrypt_as(&self, sealed: Sealed, uid: String) -> Result<Vec<u8>, Failure> {
        let mut client = V2Client::new(self.channel.clone());
        let Sealed { ciphertext, key_id, annotations } = sealed;
        let request = v2::DecryptRequest { ciphertext, uid, key_id, annotations };
        self.within(async { Ok(client.decrypt(request).await?.into_inner().plaintext) }).await
    }

    pub(super) async fn v1_version(&self) -> Result<String, Failure> {
        let mut client = V1Client::new(self.channel.clone());
        let request = v1beta1::VersionRequest { version: "v1beta1".to_owned() };
        self.within(async { Ok(client.version(request).await?.into_inner().version) }).await
    }

    pub(super) async fn v1_encrypt(&self, plain: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let mut client = V1Client::new(self.channel.clone());
        let request = v1beta1::EncryptRequest { version: "v1beta1".to_owned(), plain };
        self.within(async { Ok(client.encrypt(request).await?.into_inner().cipher) }).await
    }

    pub(super) async fn v1_decrypt(&self, cipher: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let mut client = V1Client::new(self.channel.clone());
        let request = v1beta1::DecryptRequest { version: "v1beta1".to_owned(), cipher };
        self.within(async { Ok(client.decrypt(request).await?.into_inner().plain) }).await
    }

    /// A raw connection, for what no generated client can send.
    pub(super) async fn raw(&self) -> Result<Connection, Failure> {
        let address = match self.socket.strip_prefix('@') {
            Some(name) => format!("\0{name}"),
            None => self.socket.to_string(),
        };
        self.unbroken(Connection::open(&address)).await
    }

    /// One request over a raw connection. A refusal by gRPC is an answer here.
    pub(super) async fn ask(
        &self,
        connection: &mut Connection,
        request: &Request<'_>,
    ) -> Result<Answer, Failure> {
        let answer = self.unbroken(connection.ask(request)).await?;
        self.listen(&answer.said.grpc_message);
        Ok(answer)
    }

    /// Anything else that a raw connection does, within the limit.
    pub(super) async fn unbroken<T>(
        &self,
        work: impl Future<Output = Result<T, Broken>>,
    ) -> Result<T, Failure> {
        let done = timeout(self.limit, work).await.map_err(|_| Failure::Silent(self.limit))?;
        done.map_err(|broken| Failure::Lost(broken.to_string()))
    }

    /// A payload that no other call of this run has.
    pub(super) fn payload(&self, length: usize) -> Vec<u8> {
        leaks::payload(self.count(), length)
    }

    /// As long as kube-apiserver's, which draws it anew for each call.
    pub(super) fn uid(&self) -> String {
        Uuid::from_u128(self.count().into()).to_string()
    }

    /// How long `work` takes.
    pub(super) async fn timed<T>(&self, work: impl Future<Output = T>) -> (T, Duration) {
        let before = self.clock.now();
        let result = work.await;
        (result, self.clock.now() - before)
    }

    /// Texts that held a payload.
    pub(super) fn leaks(&self) -> Vec<String> {
        self.seen.leaks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Remembers how a changed KMS v2 value was refused.
    pub(super) fn note_refusal(&self, text: String, changed: String) {
        let mut refusals = self.seen.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        refusals.entry(text).or_insert(changed);
    }

    /// Each text of those refusals, and what had been changed when it came first.
    pub(super) fn refusals(&self) -> BTreeMap<String, String> {
        self.seen.refusals.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn within<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Failure> {
        let answer = timeout(self.limit, call).await.map_err(|_| Failure::Silent(self.limit))?;
        answer.map_err(|status| {
            self.listen(status.message());
            Failure::from(status)
        })
    }

    fn listen(&self, text: &str) {
        if leaks::holds_a_payload(text) {
            let mut leaks = self.seen.leaks.lock().unwrap_or_else(PoisonError::into_inner);
            leaks.push(text.to_owned());
        }
    }

    fn count(&self) -> u64 {
        self.seen.calls.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl Met {
    /// If there was nothing else.
    fn silence(&self) -> Option<Failure> {
        let v1 = self.v1_encrypt.as_ref().map(|answer| answer.as_ref().err());
        let v2 = self.v2_status.as_ref().map(|answer| answer.as_ref().err());
        let mut failures = v1.into_iter().chain(v2);
        let first = failures.next()??;
        let silent = |failure: &Failure| matches!(failure, Failure::Silent(_));
        (silent(first) && failures.all(|failure| failure.is_some_and(silent)))
            .then(|| first.clone())
    }
}

impl Failure {
    /// It says nothing about what was asked, only that something behind the plug-in did not answer.
    pub(super) fn is_outage(&self) -> bool {
        [DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE].iter().any(|code| self.has(*code))
    }

    pub(super) fn has(&self, wanted: i32) -> bool {
        matches!(self, Failure::Refused { code, .. } if *code == wanted)
    }
}

async fn reach(socket: &str, limit: Duration) -> Result<Channel, Failure> {
    let channel = timeout(limit, connect(socket)).await.map_err(|_| Failure::Silent(limit))?;
    channel.map_err(|error| Failure::Lost(causes(&error)))
}

/// None for a refusal in words, where that is as good as an answer.
pub(super) fn unless_refused<T>(answer: Result<T, Failure>) -> Result<Option<T>, Failure> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(Failure::Refused { .. }) => Ok(None),
        Err(failure) => Err(failure),
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        // A status that the plug-in sent has no source; one that stands for a broken connection or stream has.
        if std::error::Error::source(&status).is_some() {
            return Failure::Lost(status.message().to_owned());
        }
        let (code, text) = (status.code(), status.message().to_owned());
        Failure::Refused { code: code.into(), name: format!("{code:?}"), text }
    }
}
