//! Status over the socket: when it is ok, how it fails, and that it never waits and asks nobody.

use std::sync::Arc;
use std::time::Duration;

use kms_api::grpc::Channel;
use kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient as V2;
use kms_api::grpc::v2::{DecryptRequest, StatusRequest, StatusResponse};
use kms_core::clock::{Clock, SystemClock};
use kms_plugin::keys::Policy;
use kms_plugin::probe::probe;
use kms_plugin::provider::{Backend, Error};
use kms_plugin::sealer::Refusal;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::double::{HOUR, Mood, World, policy, refused, seal_v2};
use crate::serving::{Plugin, v1_encrypt, v2_decrypt, v2_encrypt};

/// kube-apiserver holds a lock while it waits, and its /readyz waits for that.
const PROMPT: Duration = Duration::from_millis(100);
/// How often Status is timed at most. The best round counts: what is slow in each is the plug-in's doing.
const ROUNDS: usize = 50;

async fn status(v2: &mut V2<Channel>) -> Result<StatusResponse, Status> {
    v2.status(StatusRequest {}).await.map(tonic::Response::into_inner)
}

#[tokio::test(start_paused = true)]
async fn case_06_status_is_ok_only_once_the_crk_wraps_and_unwraps() {
    let world = World::new(policy());
    let sealer = world.start();
    let plugin = Plugin::on_a_file(sealer.clone());
    let (mut v1, mut v2) = plugin.clients().await;
    assert_eq!(status(&mut v2).await.unwrap_err().code(), Code::Unavailable, "nobody asked yet");
    for mood in [Mood::Unreachable, Mood::Hangs, Mood::Lies, refused(Refusal::Access, "no")] {
        world.kms.set(mood.clone());
        assert!(!probe(&sealer).await);
        // Even if a KMS v1 write got its DEK: that it can be unwrapped again is not known.
        let _ = v1.encrypt(v1_encrypt(b"ping")).await;
        let answer = status(&mut v2).await;
        assert!(answer.is_err(), "{mood:?}: {answer:?}");
        world.clock.advance(HOUR);
    }
    // It wraps, and its unwraps never end.
    world.kms.set(Mood::Up);
    *world.kms.gate.lock().unwrap() = Some(Arc::new(Semaphore::new(0)));
    world.clock.advance(HOUR);
    assert!(!probe(&sealer).await);
    let answer = status(&mut v2).await;
    assert!(answer.is_err(), "{answer:?}");

    *world.kms.gate.lock().unwrap() = None;
    world.clock.advance(HOUR);
    assert!(probe(&sealer).await);
    assert_eq!(status(&mut v2).await.unwrap().healthz, "ok");
}

#[tokio::test(start_paused = true)]
async fn case_07_what_cannot_seal_is_an_error_and_never_a_text_beside_a_key_id() {
    for (mood, code) in [
        (Mood::Unreachable, Code::Unavailable),
        (Mood::Hangs, Code::DeadlineExceeded),
        (Mood::Fails(Error::Unusable { text: "502".into() }), Code::Unavailable),
        (
            Mood::Fails(Error::Overloaded { backend: Backend::KeyService, text: "429".into() }),
            Code::ResourceExhausted,
        ),
        (refused(Refusal::KeyState, "disabled"), Code::FailedPrecondition),
        (refused(Refusal::NoSuchKey, "deleted"), Code::Unavailable),
        (refused(Refusal::Access, "wrong API key or PIN"), Code::Unknown),
    ] {
        let world = World::new(policy());
        let sealer = world.started().await;
        let plugin = Plugin::on_a_file(sealer.clone());
        let (mut v1, mut v2) = plugin.clients().await;
        assert_eq!(status(&mut v2).await.unwrap().healthz, "ok");
        world.kms.set(mood.clone());
        world.clock.advance(HOUR);
        assert!(!probe(&sealer).await);
        let error = status(&mut v2).await.expect_err("a key_id is reported, but cannot be used");
        assert_eq!(error.code(), code, "{mood:?}");
        assert!(v1.encrypt(v1_encrypt(b"ping")).await.is_err());
    }
}

#[tokio::test]
async fn case_09_status_is_prompt_while_a_call_hangs_and_200_decrypts_wait_for_it() {
    let world = World::new(policy());
    let unknown = seal_v2(&*world.started().await, b"unknown").await.unwrap();
    let plugin = Plugin::on_a_file(world.started().await);
    let (_, mut v2) = plugin.clients().await;
    let known = v2_decrypt(v2.encrypt(v2_encrypt(&[7; 32])).await.unwrap().into_inner());
    *world.kms.gate.lock().unwrap() = Some(Arc::new(Semaphore::new(0)));
    let asked = world.kms.asked().1;
    let mut callers = JoinSet::new();
    let hanging = DecryptRequest {
        ciphertext: unknown.ciphertext,
        uid: "uid".into(),
        key_id: unknown.key_id.to_string(),
        ..DecryptRequest::default()
    };
    for _ in 0..200 {
        callers.spawn(decrypt_for_ever(v2.clone(), hanging.clone()));
    }
    for _ in 0..20 {
        callers.spawn(decrypt_for_ever(v2.clone(), known.clone()));
    }
    while world.kms.asked().1 == asked {
        tokio::task::yield_now().await;
    }
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let clock = SystemClock::new();
        assert_eq!(status(&mut v2).await.unwrap().healthz, "ok");
        best = best.min(clock.now());
        if best < PROMPT {
            break;
        }
    }
    assert_eq!(callers.len(), 220, "all of them are at it");
    assert!(best < PROMPT, "{best:?}");
}

async fn decrypt_for_ever(mut v2: V2<Channel>, request: DecryptRequest) {
    loop {
        let _ = v2.decrypt(request.clone()).await;
    }
}

#[tokio::test]
async fn case_10_a_hundred_status_calls_ask_the_key_service_nothing() {
    for policy in [
        policy(),
        Policy { new_dek: true, ..policy() },
        Policy { lifetime: Duration::ZERO, ..policy() },
    ] {
        let world = World::new(policy);
        let plugin = Plugin::on_a_file(world.started().await);
        let (_, v2) = plugin.clients().await;
        let asked = world.kms.asked();
        let mut callers = JoinSet::new();
        for _ in 0..100 {
            let mut v2 = v2.clone();
            callers.spawn(async move { status(&mut v2).await.map(|status| status.healthz) });
        }
        let answers = callers.join_all().await;
        assert!(answers.iter().all(|answer| answer.as_ref().is_ok_and(|text| text == "ok")));
        assert_eq!(world.kms.asked(), asked);
    }
}
