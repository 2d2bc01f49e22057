//! Every setting about DEKs, by its effect.

use std::collections::BTreeSet;
use std::time::Duration;

use aws_lc_rs::cipher::{AES_256, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::iv::FixedLength;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_core::cipher::gob::{self, Secret};
use kms_core::cipher::{v1, v2};
use kms_plugin::keys::Policy;
use kms_plugin::metrics::Metrics;
use kms_plugin::probe::probe;
use kms_plugin::sealer::{Sealed, Sealer, SealerError};
use prometheus_client::registry::Registry;

use crate::double::{
    HOUR, MINUTE, Mood, World, open_v1, open_v2, policy, refused, reported, seal_v1, seal_v2,
};

fn wdek_of(sealed: &Sealed) -> Vec<u8> {
    v2::Envelope::decode(&sealed.ciphertext).unwrap().wdek().to_vec()
}

async fn wdeks(sealer: &Sealer, count: usize) -> BTreeSet<Vec<u8>> {
    let mut wdeks = BTreeSet::new();
    for _ in 0..count {
        wdeks.insert(wdek_of(&seal_v2(sealer, b"payload").await.unwrap()));
    }
    wdeks
}

#[tokio::test]
async fn case_11_what_is_sealed_is_opened_in_both_apis() {
    let world = World::new(policy());
    let sealer = world.started().await;
    for payload in [&b""[..], b"p", b"ping", &[7; 32], &[7; 33], &[0; 500]] {
        let cipher = seal_v1(&sealer, payload).await.unwrap();
        assert_eq!(open_v1(&sealer, &cipher).await.unwrap(), payload);
        let sealed = seal_v2(&sealer, payload).await.unwrap();
        assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), payload);
    }
    let cipher = seal_v1(&sealer, &[1; 4097]).await.unwrap();
    assert_eq!(open_v1(&sealer, &cipher).await.unwrap(), [1; 4097]);
    let too_large = seal_v2(&sealer, &[1; 1025]).await.unwrap_err();
    assert!(matches!(too_large, SealerError::TooLarge { limit: 1024, .. }), "{too_large:?}");
}

#[tokio::test]
async fn case_25_one_api_s_values_are_none_of_the_other_s() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let cipher = seal_v1(&sealer, b"payload").await.unwrap();
    let sealed = seal_v2(&sealer, b"payload").await.unwrap();
    let key_id = sealed.key_id.clone();
    let swapped = open_v2(&sealer, &Sealed { ciphertext: cipher, key_id }).await;
    assert!(matches!(swapped, Err(SealerError::NotAuthentic)), "{swapped:?}");
    let swapped = open_v1(&sealer, &sealed.ciphertext).await;
    assert!(matches!(swapped, Err(SealerError::NotAuthentic)), "{swapped:?}");
}

#[tokio::test]
async fn new_dek_false_reuses_one_dek() {
    let world = World::new(policy());
    let sealer = world.start();
    assert_eq!(wdeks(&sealer, 100).await.len(), 1);
    assert_eq!(world.kms.asked(), (1, 0));
}

#[tokio::test]
async fn new_dek_true_takes_a_new_dek_for_each_encrypt() {
    let world = World::new(Policy { new_dek: true, ..policy() });
    let sealer = world.start();
    assert_eq!(wdeks(&sealer, 100).await.len(), 100);
    assert_eq!(world.kms.asked(), (100, 0));
    world.kms.set(Mood::Unreachable);
    assert!(seal_v2(&sealer, b"payload").await.is_err());
}

#[tokio::test]
async fn a_cached_dek_opens_for_cache_timeout_and_no_longer() {
    let world = World::new(Policy { lifetime: 2 * HOUR, ..policy() });
    let sealed = seal_v2(&world.start(), b"payload").await.unwrap();
    let sealer = world.start();
    open_v2(&sealer, &sealed).await.unwrap();
    assert_eq!(world.kms.asked().1, 1);
    world.clock.advance(2 * HOUR - MINUTE);
    open_v2(&sealer, &sealed).await.unwrap();
    assert_eq!(world.kms.asked().1, 1, "still from the cache");
    world.clock.advance(MINUTE);
    open_v2(&sealer, &sealed).await.unwrap();
    assert_eq!(world.kms.asked().1, 2, "asked again");
}

#[tokio::test]
async fn cache_timeout_zero_keeps_no_dek_and_reuses_the_wdek() {
    let world = World::new(Policy { lifetime: Duration::ZERO, ..policy() });
    let sealer = world.started().await;
    let before = world.kms.asked();
    assert_eq!(wdeks(&sealer, 10).await.len(), 1);
    assert_eq!(world.kms.asked(), (before.0, before.1 + 10), "each Encrypt asks");
    let sealed = seal_v2(&sealer, b"payload").await.unwrap();
    let before = world.kms.asked();
    for _ in 0..5 {
        open_v2(&sealer, &sealed).await.unwrap();
    }
    assert_eq!(world.kms.asked(), (before.0, before.1 + 5), "each Decrypt asks");
    assert_eq!(sealer.snapshot().dek_cache_entries, 0);
    assert_eq!(sealer.snapshot().dek_age, Duration::ZERO);
    world.kms.set(Mood::Unreachable);
    assert!(open_v2(&sealer, &sealed).await.is_err());
    assert!(seal_v2(&sealer, b"payload").await.is_err());
}

#[tokio::test]
async fn a_dek_is_replaced_after_dek_max_uses() {
    let world = World::new(Policy { max_uses: 3, ..policy() });
    assert_eq!(wdeks(&world.start(), 7).await.len(), 3);
    let world = World::new(Policy { max_uses: 3, lifetime: Duration::ZERO, ..policy() });
    assert_eq!(wdeks(&world.start(), 9).await.len(), 3);
}

#[tokio::test]
async fn a_dek_is_replaced_after_dek_max_age_however_often_it_is_confirmed() {
    let world = World::new(Policy { max_age: 10 * HOUR, ..policy() });
    let sealer = world.started().await;
    let mut seen = BTreeSet::new();
    for _ in 0..20 {
        seen.extend(wdeks(&sealer, 1).await);
        world.clock.advance(HOUR - MINUTE);
        assert!(probe(&sealer).await);
    }
    assert_eq!(seen.len(), 2, "20 hours, at most 10 for each");
}

#[tokio::test]
async fn dek_max_age_holds_without_any_probe_too() {
    let world = World::new(Policy { max_age: HOUR, lifetime: 10 * HOUR, ..policy() });
    let sealer = world.start();
    let mut seen = wdeks(&sealer, 1).await;
    world.clock.advance(HOUR - MINUTE);
    seen.extend(wdeks(&sealer, 1).await);
    assert_eq!(seen.len(), 1);
    world.clock.advance(MINUTE);
    seen.extend(wdeks(&sealer, 1).await);
    assert_eq!(seen.len(), 2);
}

#[tokio::test]
async fn the_cache_holds_no_more_than_its_capacity() {
    let world = World::new(Policy { capacity: 3, new_dek: true, ..policy() });
    let sealer = world.start();
    wdeks(&sealer, 10).await;
    assert_eq!(sealer.snapshot().dek_cache_entries, 3);
}

#[tokio::test]
async fn num_len_bytes_is_the_width_of_the_length() {
    for len_bytes in [1, 2, 8] {
        let world = World::new(Policy { len_bytes, ..policy() });
        let cipher = seal_v1(&world.start(), &[9; 32]).await.unwrap();
        let envelope = v1::Envelope::decode(&cipher).unwrap();
        let dek = world.kms.dek_of(envelope.wdek());
        assert!(envelope.open(&dek, len_bytes, false).unwrap().authenticated);
        // Changing the setting makes nothing unreadable.
        let other = World { kms: world.kms.clone(), ..World::new(policy()) };
        assert_eq!(open_v1(&other.start(), &cipher).await.unwrap(), [9; 32]);
    }
    let world = World::new(Policy { len_bytes: 1, ..policy() });
    let too_large = seal_v1(&world.start(), &[9; 300]).await.unwrap_err();
    assert!(matches!(too_large, SealerError::TooLarge { limit: 255, .. }), "{too_large:?}");
}

#[tokio::test]
async fn values_without_a_code_open_only_when_v1_accept_unauthenticated_says_so() {
    let world = World::new(policy());
    let ours = seal_v1(&world.start(), b"old").await.unwrap();
    let wdek = v1::Envelope::decode(&ours).unwrap().wdek().to_vec();
    let foreign = without_a_code(world.kms.dek_of(&wdek).as_bytes(), wdek, b"from another plug-in");
    assert_eq!(open_v1(&world.start(), &foreign).await, Err(SealerError::NotAuthentic));
    let mut registry = Registry::default();
    let accepting = World {
        kms: world.kms.clone(),
        metrics: Metrics::register(&mut registry, ""),
        ..World::new(Policy { accept_unauthenticated: true, ..policy() })
    };
    let sealer = accepting.start();
    assert_eq!(open_v1(&sealer, &ours).await.unwrap(), b"old");
    assert_eq!(open_v1(&sealer, &foreign).await.unwrap(), b"from another plug-in");
    let metrics = accepting.metrics.render(&registry, sealer.snapshot());
    assert!(metrics.contains("kmsplugin_v1_unauthenticated_opens_total 1"), "{metrics}");
}

/// As the original plug-in wrote: AES-CBC over length, payload and a fill that means nothing.
fn without_a_code(dek: &[u8], wdek: Vec<u8>, payload: &[u8]) -> Vec<u8> {
    let mut blocks = u32::try_from(payload.len()).unwrap().to_be_bytes().to_vec();
    blocks.extend_from_slice(payload);
    blocks.resize(blocks.len().next_multiple_of(16), 0);
    let key = EncryptingKey::cbc(UnboundCipherKey::new(&AES_256, dek).unwrap()).unwrap();
    let iv = [3; 16];
    key.less_safe_encrypt(&mut blocks, EncryptionContext::Iv128(FixedLength::from(iv))).unwrap();
    let cipher = STANDARD.encode([&iv[..], &blocks].concat());
    STANDARD.encode(gob::encode(&Secret { kp_version: 1, wrapped_dek: wdek, cipher })).into_bytes()
}

#[tokio::test]
async fn status_depends_on_the_service_only_where_sealing_does() {
    for (policy, from_memory) in [
        (policy(), true),
        (Policy { new_dek: true, ..policy() }, false),
        (Policy { lifetime: Duration::ZERO, ..policy() }, false),
    ] {
        let world = World::new(policy);
        let sealer = world.started().await;
        assert_eq!(reported(&sealer), "v1");
        world.kms.set(Mood::Unreachable);
        assert!(!probe(&sealer).await);
        assert_eq!(sealer.status().is_ok(), from_memory);
        assert_eq!(seal_v2(&sealer, b"payload").await.is_ok(), from_memory);
    }
}

#[tokio::test]
async fn the_service_s_own_words_are_what_status_and_encrypt_say() {
    let text = "BXNIM0415E:Provided API key could not be found";
    let world = World::new(policy());
    world.kms.set(refused(kms_plugin::sealer::Refusal::Access, text));
    let sealer = world.start();
    assert!(sealer.status().unwrap_err().to_string().contains("just started"));
    assert!(!probe(&sealer).await);
    assert_eq!(sealer.status().unwrap_err().to_string(), text);
    assert_eq!(sealer.ready().unwrap_err().to_string(), text);
    assert_eq!(seal_v1(&sealer, b"ping").await.unwrap_err().to_string(), text);
}
