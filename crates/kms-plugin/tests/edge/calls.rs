//! Calls that come in another order than expected, that are given up, and that are too many.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kms_api::grpc::v1beta1::VersionRequest;
use kms_api::grpc::v2::{DecryptRequest, StatusRequest};
use kms_plugin::config::StatusVersion;
use kms_plugin::dek_cache::CrkName;
use kms_plugin::keys::{Crk, Policy, Ring};
use kms_plugin::probe::probe;
use kms_plugin::provider::guard::{Guard, Tools};
use kms_plugin::provider::{Backend, Error, KeyService, NewDek, Unwrapped};
use kms_plugin::random::Random;
use kms_plugin::sealer::{Call, Sealer};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::{Code, Request};

use crate::double::{FakeKms, Mood, World, policy, seal_v2};
use crate::serving::{Plugin, v1_encrypt, v2_decrypt, v2_encrypt};

/// Nobody waits longer for what should come at once.
const SOON: Duration = Duration::from_secs(60);

#[tokio::test]
async fn case_23_version_is_v1beta1_and_need_not_be_asked_first() {
    let world = World::new(policy());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kms.sock");
    let address = path.to_str().unwrap();
    let start = || {
        let own = tempfile::tempdir().unwrap();
        Plugin::serving(address, own, world.start(), StatusVersion::V2)
    };
    let plugin = start();
    let (mut v1, _) = plugin.clients().await;
    v1.encrypt(v1_encrypt(b"ping")).await.unwrap();
    let version = v1.version(VersionRequest::default()).await.unwrap().into_inner().version;
    assert_eq!(version, "v1beta1");
    plugin.stop().await.unwrap();

    // kube-apiserver remembers the answer for good, so the next process is not asked.
    let _plugin = start();
    let again = async {
        while v1.encrypt(v1_encrypt(b"ping")).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, again).await.unwrap();
}

/// Like a pool of HSM sessions: counts the calls that occupy one.
#[derive(Debug)]
struct Sessions {
    kms: Arc<FakeKms>,
    busy: Arc<AtomicUsize>,
}

struct Session<'a>(&'a AtomicUsize);

impl Sessions {
    fn take(&self) -> Session<'_> {
        self.busy.fetch_add(1, Ordering::Relaxed);
        Session(&self.busy)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[async_trait]
impl KeyService for Sessions {
    async fn wrap_new(&self, call: &Call) -> Result<NewDek, Error> {
        let _session = self.take();
        self.kms.wrap_new(call).await
    }

    async fn unwrap(&self, wdek: &[u8], call: &Call) -> Result<Unwrapped, Error> {
        let _session = self.take();
        self.kms.unwrap(wdek, call).await
    }
}

fn counting(world: &World) -> (Plugin, Arc<AtomicUsize>) {
    let busy = Arc::new(AtomicUsize::new(0));
    let sessions = Arc::new(Sessions { kms: world.kms.clone(), busy: busy.clone() });
    (plugin_before(sessions, world), busy)
}

fn plugin_before(service: Arc<dyn KeyService>, world: &World) -> Plugin {
    Plugin::on_a_file(sealer_before(service, world))
}

fn sealer_before(service: Arc<dyn KeyService>, world: &World) -> Arc<Sealer> {
    let tools = Tools {
        clock: world.clock.clone(),
        random: Random::system(),
        metrics: world.metrics.clone(),
    };
    let name = CrkName { instance: "instance".into(), crk: "crk".into() };
    let service = Guard::new(service, world.patience, tools.clone());
    let ring =
        Ring { current: Arc::new(Crk { name, kp_version: 1, service }), previous: Vec::new() };
    Arc::new(Sealer::new(ring, world.policy, tools))
}

/// Its WDEKs have this length.
#[derive(Debug)]
struct Padding {
    kms: Arc<FakeKms>,
    length: usize,
}

#[async_trait]
impl KeyService for Padding {
    async fn wrap_new(&self, call: &Call) -> Result<NewDek, Error> {
        let new = self.kms.wrap_new(call).await?;
        let mut wdek = new.wdek.to_vec();
        wdek.resize(self.length, b'=');
        Ok(NewDek { wdek: wdek.into(), ..new })
    }

    async fn unwrap(&self, wdek: &[u8], call: &Call) -> Result<Unwrapped, Error> {
        let end = wdek.iter().position(|byte| *byte == b'=').unwrap_or(wdek.len());
        self.kms.unwrap(&wdek[..end], call).await
    }
}

/// 308 characters are the original's WDEK, 372 one that names its version.
#[tokio::test]
async fn case_12_what_kube_apiserver_would_discard_is_not_sent() {
    for (length, fits) in [(308, true), (372, true), (954, true), (955, false), (4000, false)] {
        let world = World::new(policy());
        let service = Arc::new(Padding { kms: world.kms.clone(), length });
        let sealer = sealer_before(service, &world);
        assert!(probe(&sealer).await, "the key service wraps and unwraps");
        let plugin = Plugin::on_a_file(sealer);
        let (mut v1, mut v2) = plugin.clients().await;
        v1.encrypt(v1_encrypt(b"ping")).await.expect("KMS v1 has room for it");
        // Were it ok, kube-apiserver would take the plug-in for healthy while each of its writes fails.
        let status =
            v2.status(StatusRequest {}).await.map_err(|status| status.message().to_owned());
        assert_eq!(status.is_ok(), fits, "{length}: {status:?}");
        let cause = format!("wrapped DEKs have {length} bytes, which is too long for KMS v2");
        assert!(fits || status.is_err_and(|text| text.contains(&cause)), "{cause}");
        match v2.encrypt(v2_encrypt(&[7; 32])).await {
            Ok(sealed) => {
                let sealed = sealed.into_inner();
                assert!(fits && sealed.ciphertext.len() <= 1024 && sealed.key_id.len() <= 1024);
                let opened = v2.decrypt(v2_decrypt(sealed)).await.unwrap().into_inner();
                assert_eq!(opened.plaintext, [7; 32]);
            }
            Err(error) => {
                assert!(!fits && error.code() == Code::InvalidArgument, "{length}: {error:?}");
                assert!(error.message().contains("the limit is 1024"), "{error:?}");
            }
        }
    }
}

async fn becomes(busy: &AtomicUsize, wanted: usize) {
    let seen = async {
        while busy.load(Ordering::Relaxed) != wanted {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, seen).await.unwrap();
}

#[tokio::test]
async fn case_27_a_call_that_is_cancelled_or_out_of_time_frees_its_session() {
    let world = World::new(Policy { new_dek: true, ..policy() });
    let sealed = seal_v2(&world.start(), b"x").await.unwrap();
    let (plugin, busy) = counting(&world);
    let (mut v1, mut v2) = plugin.clients().await;
    world.kms.set(Mood::Hangs);

    // This client's own clock runs too; where it is the first to strike, the plug-in has not been heard.
    let mut heard = Code::Cancelled;
    for _ in 0..50 {
        let mut late = Request::new(v1_encrypt(b"ping"));
        late.metadata_mut().insert("grpc-timeout", "200m".parse().unwrap());
        heard = v1.encrypt(late).await.unwrap_err().code();
        if heard != Code::Cancelled {
            break;
        }
        becomes(&busy, 0).await;
    }
    assert_eq!((heard, busy.load(Ordering::Relaxed)), (Code::DeadlineExceeded, 0));

    let cancelled = tokio::spawn({
        let mut v2 = v2.clone();
        let request = DecryptRequest {
            ciphertext: sealed.ciphertext,
            uid: "uid".into(),
            key_id: sealed.key_id.to_string(),
            ..DecryptRequest::default()
        };
        async move { v2.decrypt(request).await }
    });
    becomes(&busy, 1).await;
    cancelled.abort();
    becomes(&busy, 0).await;

    world.kms.set(Mood::Up);
    v2.encrypt(v2_encrypt(&[7; 32])).await.unwrap();
}

#[tokio::test]
async fn case_27_a_full_queue_is_said_at_once_and_to_everybody() {
    let world = World::new(Policy { new_dek: true, ..policy() });
    let plugin = Plugin::on_a_file(world.started().await);
    let (_, mut v2) = plugin.clients().await;
    world.kms.set(Mood::Fails(Error::Overloaded {
        backend: Backend::KeyService,
        text: "the queue is full".into(),
    }));
    let mut callers = JoinSet::new();
    for _ in 0..300 {
        let mut v2 = v2.clone();
        callers.spawn(async move { v2.encrypt(v2_encrypt(&[7; 32])).await.map(drop) });
    }
    let answers = timeout(SOON, callers.join_all()).await.unwrap();
    for answer in answers {
        assert_eq!(answer.unwrap_err().code(), Code::ResourceExhausted);
    }
    assert!(v2.status(StatusRequest {}).await.is_ok(), "the last probe's word still stands");
}
