//! Calls a KMS plug-in as kube-apiserver does, and builds the bytes that kube-apiserver would store.
//!
//! For what must be seen without kube-apiserver in between: Status while the key service hangs, many callers at
//! once, and the demo on a machine without Go.

use std::path::Path;
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, RandomizedNonceKey};
use kms_api::grpc::v1beta1::key_management_service_client::KeyManagementServiceClient as V1Client;
use kms_api::grpc::v1beta1::{
    DecryptRequest as V1Decrypt, EncryptRequest as V1Encrypt, VersionRequest,
};
use kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient as V2Client;
use kms_api::grpc::v2::{
    DecryptRequest as V2Decrypt, EncryptRequest as V2Encrypt, EncryptResponse, StatusRequest,
    StatusResponse,
};
use kms_core::clock::{Clock, SystemClock};
use tokio::runtime::Runtime;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use crate::error::{Error, Result};

/// A connection to a plug-in's socket. Each call has kube-apiserver's usual deadline of 3 seconds.
#[derive(Debug)]
pub struct Driver {
    runtime: Runtime,
    channel: Channel,
}

impl Driver {
    /// Connects to `socket`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = Runtime::new().map_err(Error::machine("start a runtime"))?;
        let unreachable = |error: tonic::transport::Error| {
            Error::answer(socket.display().to_string(), describe(&error))
        };
        let endpoint =
            Endpoint::from_shared(format!("unix://{}", socket.display())).map_err(unreachable)?;
        let channel = runtime.block_on(endpoint.connect()).map_err(unreachable)?;
        Ok(Self { runtime, channel })
    }

    /// KMS v1 Version: the API version, the name and the version of the plug-in.
    ///
    /// # Errors
    /// What the plug-in answers.
    pub fn v1_version(&self) -> Result<[String; 3]> {
        let request = with_deadline(VersionRequest { version: V1.to_owned() });
        let answer = self.runtime.block_on(self.v1().version(request))?.into_inner();
        Ok([answer.version, answer.runtime_name, answer.runtime_version])
    }

    /// KMS v1 Encrypt.
    ///
    /// # Errors
    /// What the plug-in answers.
    pub fn v1_encrypt(&self, plain: &[u8]) -> Result<Vec<u8>> {
        let request = with_deadline(V1Encrypt { version: V1.to_owned(), plain: plain.to_vec() });
        Ok(self.runtime.block_on(self.v1().encrypt(request))?.into_inner().cipher)
    }

    /// KMS v1 Decrypt.
    ///
    /// # Errors
    /// What the plug-in answers.
    pub fn v1_decrypt(&self, cipher: &[u8]) -> Result<Vec<u8>> {
        let request = with_deadline(V1Decrypt { version: V1.to_owned(), cipher: cipher.to_vec() });
        Ok(self.runtime.block_on(self.v1().decrypt(request))?.into_inner().plain)
    }

    /// KMS v2 Status.
    ///
    /// # Errors
    /// What the plug-in answers.
    pub fn v2_status(&self) -> Result<StatusResponse> {
        let request = with_deadline(StatusRequest {});
        Ok(self.runtime.block_on(self.v2().status(request))?.into_inner())
    }

    /// KMS v2 Encrypt.
    ///
    /// # Errors
    /// What the plug-in answers.
    pub fn v2_encrypt(&self, plaintext: &[u8]) -> Result<EncryptResponse> {
        let request =
            with_deadline(V2Encrypt { plaintext: plaintext.to_vec(), uid: UID.to_owned() });
        Ok(self.runtime.block_on(self.v2().encrypt(request))?.into_inner())
    }

    /// KMS v2 Decrypt of what Encrypt answered.
    ///
    /// # Errors
    /// What the plug-in answers.
    pub fn v2_decrypt(&self, sealed: &EncryptResponse) -> Result<Vec<u8>> {
        let request = with_deadline(v2_decrypt_request(sealed));
        Ok(self.runtime.block_on(self.v2().decrypt(request))?.into_inner().plaintext)
    }

    /// How long each of `calls` calls of Status took, one after the other; the shortest first.
    ///
    /// # Errors
    /// The first call that fails.
    pub fn status_times(&self, calls: usize) -> Result<Vec<Duration>> {
        let clock = SystemClock::new();
        let mut v2 = self.v2();
        let mut times = self.runtime.block_on(async {
            let mut times = Vec::with_capacity(calls);
            for _ in 0..calls {
                let request = with_deadline(StatusRequest {});
                let before = clock.now();
                v2.status(request).await?;
                times.push(clock.now() - before);
            }
            Ok::<_, Error>(times)
        })?;
        times.sort_unstable();
        Ok(times)
    }

    /// `callers` at once, each of which encrypts and decrypts `rounds` times through both APIs. Returns the number
    /// of calls that were answered.
    ///
    /// # Errors
    /// The first call that fails, or a payload that comes back changed.
    pub fn hammer(&self, callers: usize, rounds: usize) -> Result<usize> {
        self.runtime.block_on(async {
            let mut tasks = tokio::task::JoinSet::new();
            for caller in 0..callers {
                tasks.spawn(round_trips(self.v1(), self.v2(), caller, rounds));
            }
            let mut calls = 0;
            while let Some(task) = tasks.join_next().await {
                calls += task.map_err(|error| Error::answer("a caller", error.to_string()))??;
            }
            Ok(calls)
        })
    }

    fn v1(&self) -> V1Client<Channel> {
        V1Client::new(self.channel.clone())
    }

    fn v2(&self) -> V2Client<Channel> {
        V2Client::new(self.channel.clone())
    }
}

/// What kube-apiserver stores under `etcd_key` for a KMS v1 provider: its prefix, the sealed data key with its
/// length, and the object under AES-256-GCM with that data key, bound to the etcd key.
///
/// # Errors
/// When the sealed key does not fit.
pub fn stored_by_v1(
    provider: &str,
    etcd_key: &str,
    data_key: &[u8; 32],
    sealed_key: &[u8],
    object: &[u8],
) -> Result<Vec<u8>> {
    let refused = |text: &str| Error::answer("the driver", text);
    let length = u16::try_from(sealed_key.len())
        .map_err(|_| refused("the sealed key is over 65535 bytes"))?;
    let key = RandomizedNonceKey::new(&AES_256_GCM, data_key).map_err(|_| refused("no AES key"))?;
    let mut body = object.to_vec();
    let nonce = key
        .seal_in_place_append_tag(Aad::from(etcd_key.as_bytes()), &mut body)
        .map_err(|_| refused("AES-GCM failed"))?;
    let prefix = format!("k8s:enc:kms:v1:{provider}:");
    let parts = [prefix.as_bytes(), &length.to_be_bytes(), sealed_key, nonce.as_ref(), &body];
    Ok(parts.concat())
}

const V1: &str = "v1beta1";
/// kube-apiserver sends a fresh UUID per call; the plug-in only logs it.
const UID: &str = "6f1c2c2e-4d1b-4a52-9e39-6d3f0f1f7c10";
const DEADLINE: Duration = Duration::from_secs(3);

fn with_deadline<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

fn v2_decrypt_request(sealed: &EncryptResponse) -> V2Decrypt {
    V2Decrypt {
        ciphertext: sealed.ciphertext.clone(),
        uid: UID.to_owned(),
        key_id: sealed.key_id.clone(),
        annotations: sealed.annotations.clone(),
    }
}

async fn round_trips(
    mut v1: V1Client<Channel>,
    mut v2: V2Client<Channel>,
    caller: usize,
    rounds: usize,
) -> Result<usize> {
    for round in 0..rounds {
        let payload = format!("caller {caller:>4} round {round:>12}").into_bytes();
        let request = with_deadline(V1Encrypt { version: V1.to_owned(), plain: payload.clone() });
        let cipher = v1.encrypt(request).await?.into_inner().cipher;
        let request = with_deadline(V1Decrypt { version: V1.to_owned(), cipher });
        let opened_v1 = v1.decrypt(request).await?.into_inner().plain;
        let request = with_deadline(V2Encrypt { plaintext: payload.clone(), uid: UID.to_owned() });
        let sealed = v2.encrypt(request).await?.into_inner();
        let request = with_deadline(v2_decrypt_request(&sealed));
        let opened_v2 = v2.decrypt(request).await?.into_inner().plaintext;
        if opened_v1 != payload || opened_v2 != payload {
            return Err(Error::answer("kmsplugin", "a payload came back changed"));
        }
    }
    Ok(rounds * 4)
}

/// An error with its causes: tonic's own text is only "transport error".
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
