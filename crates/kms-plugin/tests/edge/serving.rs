//! Both services through their generated clients.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kms_api::grpc::connect;
use kms_api::grpc::v1beta1::key_management_service_client::KeyManagementServiceClient as V1;
use kms_api::grpc::v2;
use kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient as V2;
use kms_api::grpc::{Channel, Status, v1beta1};
use kms_daemon::lifecycle::Shutdown;
use kms_plugin::config::StatusVersion;
use kms_plugin::grpc::{ServeError, serve};
use kms_plugin::metrics::Metrics;
use kms_plugin::provider::Error;
use kms_plugin::sealer::{Refusal, Sealer};
use kms_plugin::socket::{Options, bind};
use prometheus_client::registry::Registry;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tonic::{Code, Request};

use crate::double::{HOUR, Mood, World, policy, refused};
use crate::wire::{PREFACE, SETTINGS, write_frame};

/// A plug-in that serves in this process.
pub(crate) struct Plugin {
    pub(crate) address: String,
    shutdown: Shutdown,
    task: JoinHandle<Result<(), ServeError>>,
    _dir: TempDir,
}

impl Plugin {
    pub(crate) fn on_a_file(sealer: Arc<Sealer>) -> Plugin {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kms.sock");
        Plugin::serving(path.to_str().unwrap(), dir, sealer, StatusVersion::V2)
    }

    pub(crate) fn serving(
        address: &str,
        dir: TempDir,
        sealer: Arc<Sealer>,
        version: StatusVersion,
    ) -> Plugin {
        let bound = bind(&address.parse().unwrap(), &Options::default()).unwrap();
        let shutdown = Shutdown::new();
        let asked = shutdown.clone();
        let task = tokio::spawn(async move {
            serve(bound, sealer, version, async { asked.requested().await }).await
        });
        Plugin { address: address.to_owned(), shutdown, task, _dir: dir }
    }

    pub(crate) async fn clients(&self) -> (V1<Channel>, V2<Channel>) {
        let channel = connect(&self.address).await.unwrap();
        (V1::new(channel.clone()), V2::new(channel))
    }

    pub(crate) async fn stop(self) -> Result<(), ServeError> {
        self.shutdown.request();
        self.task.await.unwrap()
    }
}

pub(crate) fn v1_encrypt(plain: &[u8]) -> v1beta1::EncryptRequest {
    v1beta1::EncryptRequest { version: "v1beta1".into(), plain: plain.to_vec() }
}

pub(crate) fn v2_encrypt(plaintext: &[u8]) -> v2::EncryptRequest {
    v2::EncryptRequest { plaintext: plaintext.to_vec(), uid: "uid".into() }
}

pub(crate) fn v2_decrypt(sealed: v2::EncryptResponse) -> v2::DecryptRequest {
    let v2::EncryptResponse { ciphertext, key_id, annotations } = sealed;
    v2::DecryptRequest { ciphertext, uid: "uid".into(), key_id, annotations }
}

async fn both_apis_answer(plugin: Plugin) {
    let (mut v1, mut v2) = plugin.clients().await;

    let version = v1.version(v1beta1::VersionRequest::default()).await.unwrap().into_inner();
    assert_eq!(version.version, "v1beta1");
    let cipher = v1.encrypt(v1_encrypt(b"ping")).await.unwrap().into_inner().cipher;
    let request = v1beta1::DecryptRequest { version: "v1beta1".into(), cipher };
    assert_eq!(v1.decrypt(request).await.unwrap().into_inner().plain, b"ping");

    let status = v2.status(v2::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((&*status.version, &*status.healthz), ("v2", "ok"));
    let sealed = v2.encrypt(v2_encrypt(&[7; 32])).await.unwrap().into_inner();
    assert_eq!(sealed.key_id, status.key_id);
    assert_eq!(v2.decrypt(v2_decrypt(sealed)).await.unwrap().into_inner().plaintext, [7; 32]);

    plugin.stop().await.unwrap();
}

#[tokio::test]
async fn case_02_both_apis_on_one_file_socket() {
    both_apis_answer(Plugin::on_a_file(World::new(policy()).started().await)).await;
}

#[tokio::test]
async fn case_02_both_apis_on_one_abstract_socket() {
    let sealer = World::new(policy()).started().await;
    let address = format!("@keelson-test-{}", std::process::id());
    let dir = tempfile::tempdir().unwrap();
    both_apis_answer(Plugin::serving(&address, dir, sealer, StatusVersion::V2)).await;
}

#[tokio::test]
async fn old_api_servers_are_told_v2beta1() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kms.sock");
    let sealer = World::new(policy()).started().await;
    let plugin = Plugin::serving(path.to_str().unwrap(), dir, sealer, StatusVersion::V2Beta1);
    let (_, mut v2) = plugin.clients().await;
    assert_eq!(v2.status(v2::StatusRequest {}).await.unwrap().into_inner().version, "v2beta1");
}

#[tokio::test]
async fn case_02_an_unknown_method_is_unimplemented() {
    let plugin = Plugin::on_a_file(World::new(policy()).started().await);
    let stream = UnixStream::connect(&plugin.address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("http://localhost/v2.KeyManagementService/Rotate")
        .header("content-type", "application/grpc")
        .body(())
        .unwrap();
    let (response, _) = client.ready().await.unwrap().send_request(request, true).unwrap();
    assert_eq!(response.await.unwrap().headers()["grpc-status"], "12");
}

#[tokio::test]
async fn failures_reach_the_caller_with_their_code_and_text() {
    let world = World::new(policy());
    let plugin = Plugin::on_a_file(world.start());
    let (mut v1, mut v2) = plugin.clients().await;
    let no_api_key = "BXNIM0415E:Provided API key could not be found";
    for (mood, code, text) in [
        (refused(Refusal::Access, no_api_key), Code::Unknown, no_api_key),
        (refused(Refusal::NoSuchKey, "no such key"), Code::Unavailable, "no such key"),
        (refused(Refusal::KeyState, "it is disabled"), Code::FailedPrecondition, "it is disabled"),
        (Mood::Fails(Error::Unusable { text: "502".into() }), Code::Unavailable, "502"),
    ] {
        world.kms.set(mood);
        let errors = [
            v1.encrypt(v1_encrypt(b"ping")).await.unwrap_err(),
            v2.encrypt(v2_encrypt(&[7; 32])).await.unwrap_err(),
        ];
        for error in errors {
            assert_eq!((error.code(), error.message()), (code, text));
        }
    }
    let status = v2.status(v2::StatusRequest {}).await.unwrap_err();
    assert_ne!(status.code(), Code::Ok, "what cannot seal must not report a key_id");
}

#[tokio::test]
async fn requests_beyond_the_limits_are_refused_in_words() {
    let plugin = Plugin::on_a_file(World::new(policy()).started().await);
    let (mut v1, mut v2) = plugin.clients().await;
    let decrypt = |ciphertext, key_id| v2::DecryptRequest {
        ciphertext: vec![1; ciphertext],
        key_id: "k".repeat(key_id),
        ..v2::DecryptRequest::default()
    };
    let v1_decrypt =
        |length| v1beta1::DecryptRequest { version: String::new(), cipher: vec![1; length] };
    let refusals: [(Result<(), Status>, Code, &str); 7] = [
        (v2.decrypt(decrypt(1025, 1)).await.map(drop), Code::InvalidArgument, "1025 bytes"),
        (v2.decrypt(decrypt(1, 1025)).await.map(drop), Code::InvalidArgument, "1025 bytes"),
        (v2.decrypt(decrypt(1, 1024)).await.map(drop), Code::NotFound, "names no CRK"),
        (v2.decrypt(decrypt(0, 1)).await.map(drop), Code::NotFound, "names no CRK"),
        (v2.encrypt(v2_encrypt(&[0; 4097])).await.map(drop), Code::InvalidArgument, "limit"),
        (v1.decrypt(v1_decrypt(65_536)).await.map(drop), Code::InvalidArgument, "65536 bytes"),
        (v1.decrypt(v1_decrypt(200_000)).await.map(drop), Code::OutOfRange, "too large"),
    ];
    for (refusal, code, text) in refusals {
        let error = refusal.unwrap_err();
        assert!(error.code() == code && error.message().contains(text), "{error:?}, not {text}");
    }
}

#[tokio::test]
async fn case_27_the_callers_deadline_brings_an_answer_and_not_silence() {
    let world = World::new(policy());
    world.kms.set(Mood::Hangs);
    let plugin = Plugin::on_a_file(world.start());
    let (mut v1, _) = plugin.clients().await;
    // This client's own clock runs too; where it is the first to strike, the plug-in has not been heard.
    let mut heard = Status::cancelled("");
    for _ in 0..50 {
        let mut request = Request::new(v1_encrypt(b"ping"));
        request.metadata_mut().insert("grpc-timeout", "300m".parse().unwrap());
        heard = v1.encrypt(request).await.unwrap_err();
        if heard.code() != Code::Cancelled {
            break;
        }
        // The failure before is forgotten.
        world.clock.advance(HOUR);
    }
    assert_eq!(heard.code(), Code::DeadlineExceeded);
    assert_eq!(heard.message(), "the key service did not answer in time");
}

#[tokio::test]
async fn case_26_what_runs_is_finished_after_the_end_was_requested() {
    let world = World::new(policy());
    let before = Plugin::on_a_file(world.started().await);
    let (_, mut v2) = before.clients().await;
    let sealed = v2.encrypt(v2_encrypt(&[7; 32])).await.unwrap().into_inner();

    let plugin = Plugin::on_a_file(world.start());
    let gate = Arc::new(Semaphore::new(0));
    *world.kms.gate.lock().unwrap() = Some(Arc::clone(&gate));
    let asked_before = world.kms.asked();
    let (_, mut v2) = plugin.clients().await;
    let running = tokio::spawn(async move { v2.decrypt(v2_decrypt(sealed)).await });
    while world.kms.asked() == asked_before {
        tokio::task::yield_now().await;
    }
    plugin.shutdown.request();
    while PathBuf::from(&plugin.address).exists() {
        tokio::task::yield_now().await;
    }
    assert!(connect(&plugin.address).await.is_err(), "nobody new is taken");
    assert!(!plugin.task.is_finished());
    gate.add_permits(1);
    assert_eq!(running.await.unwrap().unwrap().into_inner().plaintext, [7; 32]);
    plugin.task.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_hangs_does_not_keep_the_plugin_from_ending() {
    let plugin = Plugin::on_a_file(World::new(policy()).start());
    let mut client = UnixStream::connect(&plugin.address).await.unwrap();
    let mut bytes = PREFACE.to_vec();
    write_frame(SETTINGS, 0, 0, &[], &mut bytes);
    client.write_all(&bytes).await.unwrap();
    client.read_exact(&mut [0; 9]).await.unwrap();
    // It answers no PING, so the connection never counts as drained.
    plugin.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_removed_socket_file_ends_the_server_so_that_it_can_bind_again() {
    let plugin = Plugin::on_a_file(World::new(policy()).start());
    std::fs::remove_file(&plugin.address).unwrap();
    assert!(matches!(plugin.task.await.unwrap(), Err(ServeError::SocketGone)));
}

#[tokio::test]
async fn every_request_is_counted_by_method_and_code() {
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry, "");
    let world = World { metrics, ..World::new(policy()) };
    let plugin = Plugin::on_a_file(world.started().await);
    let (mut v1, mut v2) = plugin.clients().await;
    v1.encrypt(v1_encrypt(b"ping")).await.unwrap();
    v2.status(v2::StatusRequest {}).await.unwrap();
    v2.decrypt(v2::DecryptRequest::default()).await.unwrap_err();
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        r#"kmsplugin_requests_total{api="v1beta1",method="Encrypt",code="OK"} 1"#,
        r#"kmsplugin_requests_total{api="v2",method="Status",code="OK"} 1"#,
        r#"kmsplugin_requests_total{api="v2",method="Decrypt",code="NOT_FOUND"} 1"#,
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn many_callers_share_one_connection() {
    let plugin = Plugin::on_a_file(World::new(policy()).started().await);
    let (v1, _) = plugin.clients().await;
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..500_u32 {
        let mut v1 = v1.clone();
        callers.spawn(async move {
            let payload = number.to_be_bytes();
            let cipher = v1.encrypt(v1_encrypt(&payload)).await?.into_inner().cipher;
            let request = v1beta1::DecryptRequest { version: "v1beta1".into(), cipher };
            assert_eq!(v1.decrypt(request).await?.into_inner().plain, payload);
            Ok::<(), Status>(())
        });
    }
    let within = tokio::time::timeout(Duration::from_secs(30), callers.join_all()).await.unwrap();
    assert!(within.iter().all(Result::is_ok), "{within:?}");
}
