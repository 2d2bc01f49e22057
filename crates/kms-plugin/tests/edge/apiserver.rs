//! kube-apiserver's side of KMS v2 by the rules of its source, over a real connection: when it asks, what it checks,
//! what it keeps, and when it stops writing. Time is tokio's, so that a paused clock makes hours of it a test.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use hyper_util::rt::TokioIo;
use kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient as V2;
use kms_api::grpc::v2::{
    DecryptRequest, EncryptRequest, EncryptResponse, StatusRequest, StatusResponse,
};
use kms_api::grpc::{Channel, Status};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::Request;
use tonic::transport::Endpoint;

/// `timeout` of the encryption configuration.
const CALL: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_secs(60);
const POLL_WHILE_UNHEALTHY: Duration = Duration::from_secs(10);
/// How long a probe's outcome is kept, for whoever asks next.
const KEEP_HEALTHY: Duration = Duration::from_secs(20);
const KEEP_UNHEALTHY: Duration = Duration::from_secs(3);
/// How long is written after the last good Status.
const WRITE: Duration = Duration::from_secs(180);
/// A changed configuration must get healthy within this.
const RELOAD: Duration = Duration::from_secs(10);
const RELOAD_POLL: Duration = Duration::from_millis(100);
/// Between two attempts to connect: grpc-go's, with the jitter at its worst.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(120);
const GROWTH: f64 = 1.6;
const JITTER: f64 = 1.2;

/// What is stored, by name; it outlives every API server.
pub(crate) type Etcd = Arc<Mutex<BTreeMap<String, Stored>>>;

#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) source: Source,
    nonce: [u8; NONCE_LEN],
    object: Vec<u8>,
}

/// A sealed seed as it stands in each object. The three together name it in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    ciphertext: Vec<u8>,
    pub(crate) key_id: String,
    annotations: BTreeMap<String, Vec<u8>>,
}

/// How often the plug-in was asked.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    status: AtomicUsize,
    encrypt: AtomicUsize,
    decrypt: AtomicUsize,
}

pub(crate) struct ApiServer {
    address: String,
    etcd: Etcd,
    calls: Arc<Calls>,
    provider: Arc<Provider>,
    polling: JoinHandle<()>,
}

/// One loaded configuration: a connection, a seed, a probe, a cache.
struct Provider {
    connection: Connection,
    calls: Arc<Calls>,
    current: Mutex<Option<Seed>>,
    cache: Mutex<HashMap<Source, [u8; 32]>>,
    /// One probe at a time; whoever comes meanwhile waits.
    probe: tokio::sync::Mutex<Probe>,
    between: Between,
}

/// Done after the next Status and before the Encrypt that follows it.
type Between = Mutex<Option<Box<dyn FnOnce() + Send>>>;

#[derive(Default)]
struct Probe {
    /// The first one that was seen; no other is taken.
    version: Option<String>,
    kept: Option<(Instant, Result<(), String>)>,
}

#[derive(Clone)]
struct Seed {
    source: Source,
    seed: [u8; 32],
    expires: Instant,
}

impl ApiServer {
    /// Asks once while the configuration is loaded; it serves whatever comes of that.
    pub(crate) async fn start(address: &str, etcd: &Etcd) -> ApiServer {
        let calls = Arc::new(Calls::default());
        let (provider, polling) = load(address, &calls).await;
        ApiServer { address: address.to_owned(), etcd: etcd.clone(), calls, provider, polling }
    }

    /// What `/readyz` answers.
    pub(crate) async fn ready(&self) -> Result<(), String> {
        self.provider.check().await
    }

    pub(crate) fn write(&self, name: &str, object: &[u8]) -> Result<(), String> {
        let seed = self.provider.seed_to_write()?;
        let mut bytes = object.to_vec();
        let aad = Aad::from(name.as_bytes());
        let nonce = key(&seed.seed).seal_in_place_append_tag(aad, &mut bytes).unwrap();
        let stored = Stored { source: seed.source, nonce: *nonce.as_ref(), object: bytes };
        self.etcd.lock().unwrap().insert(name.to_owned(), stored);
        Ok(())
    }

    pub(crate) async fn read(&self, name: &str) -> Result<Vec<u8>, String> {
        let stored = self.stored(name);
        let seed = self.provider.seed_of(&stored.source).await?;
        let nonce = Nonce::assume_unique_for_key(stored.nonce);
        let mut bytes = stored.object;
        let object = key(&seed).open_in_place(nonce, Aad::from(name.as_bytes()), &mut bytes);
        Ok(object.map_err(|_| "another seed came back")?.to_vec())
    }

    /// An update that changes nothing: skipped, unless what is stored is stale. True if it was written.
    pub(crate) async fn touch(&self, name: &str) -> Result<bool, String> {
        let object = self.read(name).await?;
        let current = self.provider.current.lock().unwrap().clone();
        let stale = current.is_some_and(|seed| seed.source.key_id != self.key_id(name));
        if stale {
            self.write(name, &object)?;
        }
        Ok(stale)
    }

    /// A changed configuration: everything anew, and taken over only if it gets healthy in time.
    pub(crate) async fn reload(&mut self) -> Result<(), String> {
        let (provider, polling) = load(&self.address, &self.calls).await;
        let healthy = timeout(RELOAD, async {
            while provider.check().await.is_err() {
                sleep(RELOAD_POLL).await;
            }
        });
        if healthy.await.is_err() {
            polling.abort();
            return Err("the changed configuration does not get healthy".into());
        }
        self.provider = provider;
        std::mem::replace(&mut self.polling, polling).abort();
        Ok(())
    }

    pub(crate) fn between_status_and_encrypt(&self, event: impl FnOnce() + Send + 'static) {
        *self.provider.between.lock().unwrap() = Some(Box::new(event));
    }

    /// The key_id under which an object is stored.
    pub(crate) fn key_id(&self, name: &str) -> String {
        self.stored(name).source.key_id
    }

    /// (Status, Encrypt, Decrypt) so far.
    pub(crate) fn asked(&self) -> [usize; 3] {
        let Calls { status, encrypt, decrypt } = &*self.calls;
        [status, encrypt, decrypt].map(|count| count.load(Ordering::Relaxed))
    }

    fn stored(&self, name: &str) -> Stored {
        self.etcd.lock().unwrap()[name].clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.polling.abort();
    }
}

async fn load(address: &str, calls: &Arc<Calls>) -> (Arc<Provider>, JoinHandle<()>) {
    let provider = Arc::new(Provider {
        connection: Connection::new(address),
        calls: calls.clone(),
        current: Mutex::new(None),
        cache: Mutex::new(HashMap::new()),
        probe: tokio::sync::Mutex::new(Probe::default()),
        between: Mutex::new(None),
    });
    let _ = provider.check().await;
    let polling = tokio::spawn({
        let provider = provider.clone();
        async move {
            loop {
                sleep(POLL).await;
                while provider.check().await.is_err() {
                    sleep(POLL_WHILE_UNHEALTHY).await;
                }
            }
        }
    });
    (provider, polling)
}

impl Provider {
    async fn check(&self) -> Result<(), String> {
        let mut probe = self.probe.lock().await;
        if let Some((until, outcome)) = &probe.kept
            && Instant::now() < *until
        {
            return outcome.clone();
        }
        let outcome = self.ask_and_judge(&mut probe).await;
        let keep = if outcome.is_ok() { KEEP_HEALTHY } else { KEEP_UNHEALTHY };
        probe.kept = Some((Instant::now() + keep, outcome.clone()));
        outcome
    }

    async fn ask_and_judge(&self, probe: &mut Probe) -> Result<(), String> {
        let StatusResponse { version, healthz, key_id } = self.status().await?;
        let mut problems = Vec::new();
        if healthz != "ok" {
            problems.push(format!("healthz is {healthz}"));
        }
        let first = probe.version.get_or_insert_with(|| version.clone());
        if !["v2", "v2beta1"].contains(&&*version) || *first != version {
            problems.push(format!("version was {first} and is {version}"));
        }
        // Neither of them stops this, and with it the writes.
        match key_id.len() {
            1..=1024 => problems.extend(self.follow(key_id).await.err()),
            bytes => problems.push(format!("key_id of {bytes} bytes")),
        }
        if problems.is_empty() { Ok(()) } else { Err(problems.join(", ")) }
    }

    /// A known key_id prolongs the writing, a new one needs a new seed first.
    async fn follow(&self, key_id: String) -> Result<(), String> {
        let expires = Instant::now() + WRITE;
        if let Some(seed) = self.current.lock().unwrap().as_mut()
            && seed.source.key_id == key_id
        {
            seed.expires = expires;
            return Ok(());
        }
        if let Some(event) = self.between.lock().unwrap().take() {
            event();
        }
        let mut seed = [0; 32];
        aws_lc_rs::rand::fill(&mut seed).unwrap();
        let source = self.encrypt(&seed).await?;
        if source.key_id != key_id {
            return Err(format!("Status says key_id {key_id}, Encrypt {}", source.key_id));
        }
        if !(1..=1024).contains(&source.ciphertext.len()) {
            return Err(format!("ciphertext of {} bytes", source.ciphertext.len()));
        }
        self.cache.lock().unwrap().insert(source.clone(), seed);
        *self.current.lock().unwrap() = Some(Seed { source, seed, expires });
        Ok(())
    }

    fn seed_to_write(&self) -> Result<Seed, String> {
        let seed = self.current.lock().unwrap().clone().ok_or("there was no seed yet")?;
        if Instant::now() > seed.expires { Err("the seed has expired".into()) } else { Ok(seed) }
    }

    async fn seed_of(&self, source: &Source) -> Result<[u8; 32], String> {
        if self.current.lock().unwrap().is_none() {
            return Err("there was no seed yet".into());
        }
        if let Some(seed) = self.cache.lock().unwrap().get(source) {
            return Ok(*seed);
        }
        let seed = self.decrypt(source).await?;
        self.cache.lock().unwrap().insert(source.clone(), seed);
        Ok(seed)
    }

    async fn status(&self) -> Result<StatusResponse, String> {
        self.calls.status.fetch_add(1, Ordering::Relaxed);
        let call = |mut v2: V2<Channel>| async move { v2.status(in_time(StatusRequest {})).await };
        self.connection.call(call).await
    }

    async fn encrypt(&self, seed: &[u8; 32]) -> Result<Source, String> {
        self.calls.encrypt.fetch_add(1, Ordering::Relaxed);
        let request = EncryptRequest { plaintext: seed.to_vec(), uid: "encrypt".into() };
        let answer = self.connection.call(|mut v2| {
            let request = in_time(request.clone());
            async move { v2.encrypt(request).await }
        });
        let EncryptResponse { ciphertext, key_id, annotations } = answer.await?;
        Ok(Source { ciphertext, key_id, annotations: annotations.into_iter().collect() })
    }

    async fn decrypt(&self, source: &Source) -> Result<[u8; 32], String> {
        self.calls.decrypt.fetch_add(1, Ordering::Relaxed);
        let Source { ciphertext, key_id, annotations } = source.clone();
        let annotations = annotations.into_iter().collect();
        let request = DecryptRequest { ciphertext, uid: "decrypt".into(), key_id, annotations };
        let answer = self.connection.call(|mut v2| {
            let request = in_time(request.clone());
            async move { v2.decrypt(request).await }
        });
        answer.await?.plaintext.try_into().map_err(|_| "a seed has 32 bytes".into())
    }
}

/// One connection, made in the background; calls wait for it until their time is over.
struct Connection {
    channel: watch::Receiver<Option<Channel>>,
    lost: Arc<Notify>,
    dialling: JoinHandle<()>,
}

impl Connection {
    fn new(address: &str) -> Connection {
        let (made, channel) = watch::channel(None);
        let lost = Arc::new(Notify::new());
        let dialling = tokio::spawn(dial(address.to_owned(), made, lost.clone()));
        Connection { channel, lost, dialling }
    }

    async fn call<T, F: Future<Output = Result<tonic::Response<T>, Status>>>(
        &self,
        call: impl Fn(V2<Channel>) -> F,
    ) -> Result<T, String> {
        let mut channel = self.channel.clone();
        let answered = async {
            loop {
                let Ok(Some(made)) = channel.wait_for(Option::is_some).await.map(|c| c.clone())
                else {
                    return Err("nobody dials any more".into());
                };
                match call(V2::new(made)).await {
                    Ok(answer) => return Ok(answer.into_inner()),
                    // What has a source was not the plug-in's answer: the connection ended.
                    Err(status) if status.source().is_some() => {
                        self.lost.notify_one();
                        let _ = channel.changed().await;
                    }
                    Err(status) => return Err(status.message().to_owned()),
                }
            }
        };
        timeout(CALL, answered).await.unwrap_or_else(|_| Err("deadline exceeded".into()))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.dialling.abort();
    }
}

async fn dial(address: String, made: watch::Sender<Option<Channel>>, lost: Arc<Notify>) {
    loop {
        let mut backoff = FIRST_BACKOFF;
        let channel = loop {
            match connect(&address).await {
                Some(channel) => break channel,
                None => sleep(backoff.mul_f64(JITTER)).await,
            }
            backoff = backoff.mul_f64(GROWTH).min(LONGEST_BACKOFF);
        };
        made.send_replace(Some(channel));
        lost.notified().await;
        made.send_replace(None);
    }
}

/// A channel for one connection only: how the next one is made is decided in [`dial`].
async fn connect(address: &str) -> Option<Channel> {
    let mut stream = Some(TokioIo::new(UnixStream::connect(address).await.ok()?));
    let once = tower::service_fn(move |_| {
        let stream = stream.take().ok_or("it was lost");
        async move { stream }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(once).await.ok()
}

fn in_time<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL);
    request
}

fn key(seed: &[u8; 32]) -> RandomizedNonceKey {
    RandomizedNonceKey::new(&AES_256_GCM, seed).unwrap()
}
