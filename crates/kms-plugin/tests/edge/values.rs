//! What is sealed and opened over the socket: sizes, changed values, values of somebody else, and that no two are alike.

use std::collections::HashSet;
use std::time::Duration;

use kms_api::grpc::v2::DecryptRequest;
use kms_api::grpc::{Status, v1beta1};
use kms_core::clock::{Clock, SystemClock};
use kms_core::key_id::KeyId;
use kms_plugin::random::Random;
use kms_plugin::sealer::{Sealed, Sealer};
use tonic::Code;

use crate::double::{World, open_v2, policy, seal_v2};
use crate::serving::{Plugin, v1_encrypt, v2_decrypt, v2_encrypt};

const SEED: [u8; 32] = [7; 32];
/// How many payloads are sealed to see that no two results are alike.
const MANY: usize = 100_000;

#[tokio::test]
async fn case_11_every_size_comes_back_or_is_refused_in_words() {
    let plugin = Plugin::on_a_file(World::new(policy()).started().await);
    let (mut v1, mut v2) = plugin.clients().await;
    for size in [32, 0, 1, 4, 33, 1024, 4097, 32] {
        let payload = vec![0xa5; size];
        let cipher = v1.encrypt(v1_encrypt(&payload)).await.unwrap().into_inner().cipher;
        let opened = v1.decrypt(v1_decrypt(cipher)).await.unwrap().into_inner();
        assert_eq!(opened.plain, payload);
        match v2.encrypt(v2_encrypt(&payload)).await {
            Ok(sealed) => {
                let opened = v2.decrypt(v2_decrypt(sealed.into_inner())).await.unwrap();
                assert_eq!(opened.into_inner().plaintext, payload);
            }
            // With what it is wrapped in, it would be longer than kube-apiserver takes.
            Err(error) => {
                assert!(size >= 1024, "{size}: {error:?}");
                assert_eq!(error.code(), Code::InvalidArgument);
                assert!(error.message().contains("the limit is 1024"), "{error:?}");
            }
        }
    }
}

#[tokio::test]
async fn case_13_no_annotations_are_written() {
    let plugin = Plugin::on_a_file(World::new(policy()).started().await);
    let (_, mut v2) = plugin.clients().await;
    let sealed = v2.encrypt(v2_encrypt(&SEED)).await.unwrap().into_inner();
    assert!(sealed.annotations.is_empty(), "they would stand unencrypted in every object");
}

#[tokio::test]
async fn case_14_whatever_is_changed_the_answer_is_the_same() {
    let world = World::new(policy());
    let plugin = Plugin::on_a_file(world.started().await);
    let (_, mut v2) = plugin.clients().await;
    let sealed = v2_decrypt(v2.encrypt(v2_encrypt(&SEED)).await.unwrap().into_inner());
    let mut changed = vec![("key_id", another_version(&sealed))];
    for (key, value) in [("a.example", &b"x"[..]), ("a.example", b""), ("", b"")] {
        let mut annotated = sealed.clone();
        annotated.annotations.insert(key.into(), value.to_vec());
        changed.push(("annotation", annotated));
    }
    for bit in 0..sealed.ciphertext.len() * 8 {
        let mut flipped = sealed.clone();
        flipped.ciphertext[bit / 8] ^= 1 << (bit % 8);
        changed.push(("ciphertext", flipped));
    }
    assert!(changed.len() > 500);
    for (what, request) in changed {
        let error = v2.decrypt(request.clone()).await.expect_err(what);
        let (code, text) = (error.code(), error.message());
        let expected = (Code::InvalidArgument, "the value does not authenticate");
        assert_eq!((code, text), expected, "{what}: {request:?}");
    }
    assert_eq!(v2.decrypt(sealed).await.unwrap().into_inner().plaintext, SEED);
}

/// Wherever a change sits that only the authentication finds, finding it takes as long.
#[tokio::test]
async fn case_14_no_refusal_is_quicker_than_another() {
    let sealer = World::new(policy()).started().await;
    let sealed = seal_v2(&sealer, &SEED).await.unwrap();
    let forged = |change: fn(&mut Sealed)| {
        let (ciphertext, key_id) = (sealed.ciphertext.clone(), sealed.key_id.clone());
        let mut forged = Sealed { ciphertext, key_id };
        change(&mut forged);
        forged
    };
    let forged = [
        forged(|forged| *forged.ciphertext.last_mut().unwrap() ^= 1),
        // The first byte behind WDEK and nonce.
        forged(|forged| {
            let first = forged.ciphertext.len() - SEED.len() - 16;
            forged.ciphertext[first] ^= 1;
        }),
        forged(|forged| forged.key_id = KeyId::new("instance", "crk", "v9").unwrap()),
    ];
    let mut best = [Duration::MAX; 3];
    for _ in 0..2000 {
        for (best, forged) in best.iter_mut().zip(&forged) {
            *best = (*best).min(time_to_refuse(&sealer, forged).await);
        }
    }
    let (quickest, slowest) = (best.iter().min().unwrap(), best.iter().max().unwrap());
    assert!(*slowest < *quickest * 2, "{best:?}");
}

async fn time_to_refuse(sealer: &Sealer, forged: &Sealed) -> Duration {
    let clock = SystemClock::new();
    open_v2(sealer, forged).await.unwrap_err();
    clock.now()
}

#[tokio::test]
async fn case_16_an_unknown_key_id_is_not_found_and_nobody_is_asked() {
    let world = World::new(policy());
    let plugin = Plugin::on_a_file(world.started().await);
    let (_, mut v2) = plugin.clients().await;
    let sealed = v2_decrypt(v2.encrypt(v2_encrypt(&SEED)).await.unwrap().into_inner());
    let asked = world.kms.asked();
    for key_id in ["keelson/instance/other/v1", "keelson/other/crk/v1", "1", "", "keelson/x", "ü"]
    {
        let request = DecryptRequest { key_id: key_id.into(), ..sealed.clone() };
        let error = v2.decrypt(request).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{key_id:?}: {error:?}");
    }
    assert_eq!(world.kms.asked(), asked);
}

#[tokio::test]
async fn case_17_no_two_sealed_values_are_alike() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let mut seen = HashSet::new();
    let mut add = |Sealed { ciphertext, key_id }| seen.insert((ciphertext, key_id));
    for _ in 0..2 {
        assert!(add(seal_v2(&sealer, &SEED).await.unwrap()), "the same payload twice");
    }
    let random = Random::system();
    for _ in 0..MANY {
        let payload: [u8; 32] = random.bytes().unwrap();
        assert!(add(seal_v2(&sealer, &payload).await.unwrap()));
    }
    assert_eq!(world.kms.asked().0, 1, "one DEK sealed them all, its nonces make the difference");
}

#[tokio::test]
async fn case_25_a_changed_empty_or_foreign_cipher_is_refused() {
    let plugin = Plugin::on_a_file(World::new(policy()).started().await);
    let (mut v1, mut v2) = plugin.clients().await;
    let cipher = v1.encrypt(v1_encrypt(b"ping")).await.unwrap().into_inner().cipher;
    let sealed = v2_decrypt(v2.encrypt(v2_encrypt(&SEED)).await.unwrap().into_inner());
    let mut refused =
        vec![Vec::new(), sealed.ciphertext.clone(), cipher[..cipher.len() / 2].into()];
    for bit in 0..cipher.len() * 8 {
        let mut flipped = cipher.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        refused.push(flipped);
    }
    for changed in refused {
        let text = String::from_utf8_lossy(&changed).into_owned();
        does_not_open(v1.decrypt(v1_decrypt(changed)).await.map(drop), &text);
    }
    for ciphertext in [Vec::new(), cipher.clone()] {
        let text = String::from_utf8_lossy(&ciphertext).into_owned();
        let request = DecryptRequest { ciphertext, ..sealed.clone() };
        does_not_open(v2.decrypt(request).await.map(drop), &text);
    }
    assert_eq!(v1.decrypt(v1_decrypt(cipher)).await.unwrap().into_inner().plain, b"ping");
}

fn does_not_open(answer: Result<(), Status>, what: &str) {
    // A changed KpVersion names an entry that is not configured.
    let codes = [Code::InvalidArgument, Code::NotFound];
    let refused = answer.as_ref().is_err_and(|error| codes.contains(&error.code()));
    assert!(refused, "{what}: {answer:?}");
}

fn v1_decrypt(cipher: Vec<u8>) -> v1beta1::DecryptRequest {
    v1beta1::DecryptRequest { version: "v1beta1".into(), cipher }
}

/// The same value under a key_id that is another version of the same CRK.
fn another_version(sealed: &DecryptRequest) -> DecryptRequest {
    let key_id = KeyId::parse(&sealed.key_id).unwrap();
    let key_id = KeyId::new(key_id.instance(), key_id.crk(), "v9").unwrap().to_string();
    DecryptRequest { key_id, ..sealed.clone() }
}
