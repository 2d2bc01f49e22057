//! A plug-in that remembers instead of encrypting: what it calls a ciphertext is a name under which it keeps the
//! payload. Without a fault it does all that kube-apiserver demands; with one, it is broken in just that place.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use kms_api::grpc::v1beta1::key_management_service_server::KeyManagementService as V1;
use kms_api::grpc::v2::key_management_service_server::KeyManagementService as V2;
use kms_api::grpc::{v1beta1, v2};
use tonic::{Request, Response, Status};

const KEY_ID: &str = "double/key/1";
const ANNOTATION: &str = "version.double.example.com";
const TOO_LONG: usize = 1000;

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    // Below the messages; see `server`.
    NoV1,
    NeitherService,
    StockAuthority,
    SilentWithoutAuthority,
    UnknownMethodIsUnknown,
    RefusesUnknownFields,
    TakesInvalidUtf8,
    HangsWhenExpired,
    KeepsCancelledCalls,
    // Status.
    UnhealthyInWords,
    CannotSeal,
    EmptyKeyId,
    LongKeyId,
    OldVersion,
    VersionChanges,
    KeyIdChanges,
    StatusWaitsForDecrypts,
    StatusOneByOne,
    StatusHangs,
    // KMS v2.
    PayloadsTurnRound,
    FourBytesHang,
    OpensOnlyWhatIsShort,
    UidMustBeAscii,
    SameUidForBoth,
    LongCiphertext,
    AnnotationWithSlash,
    TooManyAnnotations,
    PayloadInAnnotation,
    KeyIdIgnored,
    AnnotationsIgnored,
    LastByteIgnored,
    TellsWhichCheck,
    EmptyKeyIdTaken,
    Repeats,
    OtherKeyIdFromEncrypt,
    OpensNothing,
    OneBufferForAll,
    FullAtOnce,
    PayloadInText,
    // KMS v1.
    VersionFirst,
    OtherV1Version,
    InsistsOn32Bytes,
    LongCipher,
    OpensEmptyCipher,
    V1LastByteIgnored,
    V1OpensV2,
    V2OpensV1,
    V1OneBufferForAll,
}

#[derive(Debug)]
pub(crate) struct Double {
    pub(crate) fault: Fault,
    kept: Mutex<HashMap<Vec<u8>, Kept>>,
    latest: Mutex<Vec<u8>>,
    calls: AtomicU64,
    statuses: AtomicU64,
    running: AtomicUsize,
    version_known: AtomicBool,
    one_by_one: tokio::sync::Mutex<()>,
}

#[derive(Debug, Clone)]
struct Kept {
    payload: Vec<u8>,
    /// None for KMS v1.
    sealed: Option<v2::EncryptResponse>,
    uid: String,
}

impl Double {
    pub(crate) fn new(fault: Fault) -> Double {
        Double {
            fault,
            kept: Mutex::default(),
            latest: Mutex::default(),
            calls: AtomicU64::new(0),
            statuses: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            version_known: AtomicBool::new(false),
            one_by_one: tokio::sync::Mutex::default(),
        }
    }

    fn has(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn key_id(&self) -> String {
        match self.fault {
            Fault::EmptyKeyId => String::new(),
            Fault::LongKeyId => "k".repeat(1025),
            _ => KEY_ID.to_owned(),
        }
    }

    /// A name that no other payload has, and that no change of a few bits makes into another one.
    fn name(&self, payload: &[u8]) -> Vec<u8> {
        let number = match self.fault {
            Fault::Repeats => 0,
            _ => self.calls.fetch_add(1, Ordering::Relaxed),
        };
        let part = |part: u8| {
            let mut hasher = DefaultHasher::new();
            (number, part, payload).hash(&mut hasher);
            hasher.finish().to_be_bytes()
        };
        (0..4).flat_map(part).collect()
    }

    fn keep(&self, name: &[u8], kept: Kept) {
        self.latest.lock().unwrap().clone_from(&kept.payload);
        self.kept.lock().unwrap().insert(name.to_vec(), kept);
    }

    /// What is kept under a name; with the fault, whatever its last byte is.
    fn find(&self, name: &[u8], last_byte_ignored: Fault) -> Option<Kept> {
        let kept = self.kept.lock().unwrap();
        let found = kept.get(name).cloned();
        let mut alike = kept.iter().filter(|_| self.has(last_byte_ignored) && !name.is_empty());
        let beginning = &name[..name.len().saturating_sub(1)];
        found.or_else(|| {
            alike.find(|(other, _)| other.starts_with(beginning)).map(|(_, kept)| kept.clone())
        })
    }

    /// The payload; with the fault, whichever came last.
    fn open(&self, kept: Kept, one_buffer: Fault) -> Vec<u8> {
        match self.has(one_buffer) {
            true => self.latest.lock().unwrap().clone(),
            false => kept.payload,
        }
    }
}

fn refused() -> Status {
    Status::invalid_argument("the value does not authenticate")
}

#[tonic::async_trait]
impl V2 for Double {
    async fn status(
        &self,
        _: Request<v2::StatusRequest>,
    ) -> Result<Response<v2::StatusResponse>, Status> {
        let count = self.statuses.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            Fault::StatusHangs => std::future::pending().await,
            Fault::StatusWaitsForDecrypts => drop(self.one_by_one.lock().await),
            Fault::StatusOneByOne => self.in_turn().await,
            _ => {}
        }
        let version = match self.fault {
            Fault::OldVersion => "v2alpha1",
            Fault::VersionChanges if count > 10 => "v2beta1",
            _ => "v2",
        };
        let healthz = if self.has(Fault::UnhealthyInWords) { "HSM away" } else { "ok" };
        let key_id = match self.fault {
            Fault::KeyIdChanges => format!("{KEY_ID}/{count}"),
            _ => self.key_id(),
        };
        let (version, healthz) = (version.to_owned(), healthz.to_owned());
        Ok(Response::new(v2::StatusResponse { version, healthz, key_id }))
    }

    async fn encrypt(
        &self,
        request: Request<v2::EncryptRequest>,
    ) -> Result<Response<v2::EncryptResponse>, Status> {
        let v2::EncryptRequest { plaintext: payload, uid } = request.into_inner();
        match self.fault {
            Fault::CannotSeal => return Err(Status::unavailable("HSM away")),
            Fault::FourBytesHang if payload.len() == 4 => std::future::pending().await,
            Fault::UidMustBeAscii if !uid.is_ascii() => std::future::pending().await,
            Fault::PayloadInText if payload.len() > TOO_LONG => {
                return Err(Status::invalid_argument(format!("too long: {:?}...", &payload[..32])));
            }
            _ if payload.len() > TOO_LONG => return Err(Status::invalid_argument("too long")),
            _ => {}
        }
        let mut ciphertext = self.name(&payload);
        if self.has(Fault::LongCiphertext) {
            ciphertext.resize(1025, 0);
        }
        let key_id = match self.fault {
            Fault::OtherKeyIdFromEncrypt => format!("{KEY_ID}/other"),
            _ => self.key_id(),
        };
        let annotations = self.annotations(&payload);
        let sealed = v2::EncryptResponse { ciphertext, key_id, annotations };
        self.keep(&sealed.ciphertext, Kept { payload, sealed: Some(sealed.clone()), uid });
        Ok(Response::new(sealed))
    }

    async fn decrypt(
        &self,
        request: Request<v2::DecryptRequest>,
    ) -> Result<Response<v2::DecryptResponse>, Status> {
        let running = self.running.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            Fault::StatusWaitsForDecrypts => self.in_turn().await,
            // Long enough for a hundred callers to meet, on a busy machine too.
            Fault::FullAtOnce => tokio::time::sleep(Duration::from_millis(100)).await,
            // So that those that come together are there together.
            _ => tokio::task::yield_now().await,
        }
        let opened = self.open_v2(request.into_inner(), running);
        self.running.fetch_sub(1, Ordering::Relaxed);
        opened.map(|plaintext| Response::new(v2::DecryptResponse { plaintext }))
    }
}

impl Double {
    /// What an HSM with one session makes of many callers.
    async fn in_turn(&self) {
        let _turn = self.one_by_one.lock().await;
        tokio::time::sleep(Duration::from_millis(3)).await;
    }

    fn annotations(&self, payload: &[u8]) -> HashMap<String, Vec<u8>> {
        let (name, value) = match self.fault {
            Fault::AnnotationWithSlash => ("double.example.com/version", b"1".to_vec()),
            Fault::TooManyAnnotations => (ANNOTATION, vec![b'1'; 32 * 1024]),
            Fault::PayloadInAnnotation => (ANNOTATION, payload.to_vec()),
            _ => (ANNOTATION, b"1".to_vec()),
        };
        HashMap::from([(name.to_owned(), value)])
    }

    fn open_v2(&self, request: v2::DecryptRequest, running: usize) -> Result<Vec<u8>, Status> {
        let v2::DecryptRequest { ciphertext, uid, key_id, annotations } = request;
        if self.has(Fault::FullAtOnce) && running > 50 {
            return Err(Status::unavailable("busy"));
        }
        if self.has(Fault::OpensNothing) && ciphertext.is_empty() {
            return Ok(Vec::new());
        }
        let found = self.find(&ciphertext, Fault::LastByteIgnored);
        let Some(Kept { sealed, payload, uid: encrypted_as }) = found.clone() else {
            return Err(refused());
        };
        let Some(sealed) = sealed else {
            return if self.has(Fault::V2OpensV1) { Ok(payload) } else { Err(refused()) };
        };
        let key_id_taken = self.has(Fault::KeyIdIgnored)
            || self.has(Fault::EmptyKeyIdTaken) && key_id.is_empty()
            || key_id == sealed.key_id;
        if !key_id_taken {
            return Err(Status::not_found("no such key_id"));
        }
        if annotations != sealed.annotations && !self.has(Fault::AnnotationsIgnored) {
            return Err(match self.fault {
                Fault::TellsWhichCheck => Status::invalid_argument("wrong annotations"),
                _ => refused(),
            });
        }
        match self.fault {
            Fault::SameUidForBoth if uid != encrypted_as => Err(refused()),
            Fault::OpensOnlyWhatIsShort if payload.len() == 33 => Err(refused()),
            Fault::PayloadsTurnRound => Ok(payload.into_iter().rev().collect()),
            _ => found.map(|kept| self.open(kept, Fault::OneBufferForAll)).ok_or_else(refused),
        }
    }
}

#[tonic::async_trait]
impl V1 for Double {
    async fn version(
        &self,
        _: Request<v1beta1::VersionRequest>,
    ) -> Result<Response<v1beta1::VersionResponse>, Status> {
        self.version_known.store(true, Ordering::Relaxed);
        let version = if self.has(Fault::OtherV1Version) { "v1" } else { "v1beta1" }.to_owned();
        Ok(Response::new(v1beta1::VersionResponse { version, ..Default::default() }))
    }

    async fn encrypt(
        &self,
        request: Request<v1beta1::EncryptRequest>,
    ) -> Result<Response<v1beta1::EncryptResponse>, Status> {
        let payload = request.into_inner().plain;
        if self.has(Fault::VersionFirst) && !self.version_known.load(Ordering::Relaxed) {
            return Err(Status::failed_precondition("Version first"));
        }
        if self.has(Fault::InsistsOn32Bytes) && payload.len() != 32 {
            return Err(Status::invalid_argument("not 32 bytes"));
        }
        let mut cipher = self.name(&payload);
        if self.has(Fault::LongCipher) && payload.len() == 32 {
            cipher.resize(65_536, 0);
        }
        self.keep(&cipher, Kept { payload, sealed: None, uid: String::new() });
        Ok(Response::new(v1beta1::EncryptResponse { cipher }))
    }

    async fn decrypt(
        &self,
        request: Request<v1beta1::DecryptRequest>,
    ) -> Result<Response<v1beta1::DecryptResponse>, Status> {
        let cipher = request.into_inner().cipher;
        if self.has(Fault::OpensEmptyCipher) && cipher.is_empty() {
            return Ok(Response::new(v1beta1::DecryptResponse::default()));
        }
        let found = self.find(&cipher, Fault::V1LastByteIgnored).ok_or_else(refused)?;
        if found.sealed.is_some() && !self.has(Fault::V1OpensV2) {
            return Err(refused());
        }
        let plain = self.open(found, Fault::V1OneBufferForAll);
        Ok(Response::new(v1beta1::DecryptResponse { plain }))
    }
}
