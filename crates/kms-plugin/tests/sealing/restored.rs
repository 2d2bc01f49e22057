//! The key service was restored from a backup of before a rotation: it wraps with the version of then, and does not
//! know the one under which the plug-in seals.

use std::sync::Arc;
use std::time::Duration;

use kms_core::clock::Clock;
use kms_daemon::lifecycle::Shutdown;
use kms_plugin::keys::{Policy, Ring};
use kms_plugin::probe::{self, probe};
use kms_plugin::sealer::{Sealed, Sealer};

use crate::double::{
    FakeKms, HOUR, MINUTE, Mood, World, open_v1, open_v2, policy, reported, seal_v1, seal_v2,
};

/// Each way to get a DEK: from memory, unwrapped for each Encrypt, wrapped for each Encrypt.
fn policies() -> [Policy; 3] {
    [
        policy(),
        Policy { lifetime: Duration::ZERO, ..policy() },
        Policy { new_dek: true, ..policy() },
    ]
}

/// A plug-in that seals under v2, a value of it, and the key service back at v1.
async fn restored(world: &World) -> (Arc<Sealer>, Sealed) {
    let sealer = world.started().await;
    world.kms.rotate();
    assert!(probe(&sealer).await);
    let sealed = seal_v2(&sealer, b"x").await.unwrap();
    assert_eq!(sealed.key_id.version(), "v2");
    world.clock.advance(2 * MINUTE);
    world.kms.restore(1);
    (sealer, sealed)
}

/// Status and Encrypt say the same.
async fn seals_nothing(sealer: &Sealer) {
    let says = sealer.status().unwrap_err();
    let text = says.to_string();
    assert!(text.contains("wraps with version v1, which v2 had replaced"), "{text}");
    assert!(text.contains("kmsctl keys rotate"), "{text}");
    assert_eq!(sealer.ready(), Err(says));
    assert!(seal_v2(sealer, b"y").await.is_err());
    assert!(seal_v1(sealer, b"y").await.is_err());
}

/// What it seals can be opened by a plug-in that has just been started.
async fn seals_for_others(world: &World, sealer: &Sealer, version: &str) {
    assert_eq!(reported(sealer), version);
    let sealed = seal_v2(sealer, b"new").await.unwrap();
    assert_eq!(sealed.key_id.version(), version);
    assert_eq!(open_v2(&world.start(), &sealed).await.unwrap(), b"new");
}

#[tokio::test]
async fn nothing_is_sealed_under_a_version_that_nobody_can_open() {
    for policy in policies() {
        let world = World::new(policy);
        let (sealer, sealed) = restored(&world).await;
        assert!(!probe(&sealer).await, "{policy:?}");
        seals_nothing(&sealer).await;
        assert_eq!(
            open_v2(&sealer, &sealed).await.is_ok(),
            !policy.lifetime.is_zero(),
            "what is in memory can still be read, and so be saved"
        );
        assert!(!probe(&sealer).await);
        seals_nothing(&sealer).await;

        world.kms.rotate();
        assert!(probe(&sealer).await, "{policy:?}");
        seals_for_others(&world, &sealer, "v3").await;
    }
}

#[tokio::test]
async fn a_version_that_is_adopted_seals_until_its_dek_ends_and_not_without_a_word() {
    let world = World::new(policy());
    let (sealer, sealed) = restored(&world).await;
    assert!(!probe(&sealer).await);
    world.kms.adopt("v2");
    assert!(probe(&sealer).await, "it opens");
    seals_for_others(&world, &sealer, "v2").await;
    assert_eq!(open_v2(&world.start(), &sealed).await.unwrap(), b"x");

    // A new DEK is not to be had: the operator learns it before the one in use ends.
    world.clock.advance(2 * MINUTE);
    assert!(!probe(&sealer).await);
    seals_for_others(&world, &sealer, "v2").await;
    assert!(sealer.ready().unwrap_err().to_string().contains("kmsctl keys rotate"));
    while world.clock.now() < policy().max_age {
        world.clock.advance(10 * MINUTE);
        assert!(!probe(&sealer).await);
    }
    seals_nothing(&sealer).await;
    world.kms.rotate();
    assert!(probe(&sealer).await);
    seals_for_others(&world, &sealer, "v3").await;
}

/// Neither kept nor wrapped anew: the adopted version's WDEK is unwrapped for each Encrypt.
#[tokio::test]
async fn an_adopted_version_seals_also_where_no_dek_is_kept() {
    let world = World::new(Policy { lifetime: Duration::ZERO, ..policy() });
    let (sealer, _) = restored(&world).await;
    assert!(!probe(&sealer).await);
    world.kms.adopt("v2");
    for _ in 0..3 {
        probe(&sealer).await;
        seals_for_others(&world, &sealer, "v2").await;
        world.clock.advance(2 * MINUTE);
    }
    assert!(sealer.ready().is_err());
}

/// With NEW_DEK each Encrypt needs a wrap, and the adopted version does not wrap.
#[tokio::test]
async fn an_adopted_version_does_not_help_where_each_encrypt_is_wrapped() {
    let world = World::new(Policy { new_dek: true, ..policy() });
    let (sealer, _) = restored(&world).await;
    assert!(!probe(&sealer).await);
    world.kms.adopt("v2");
    world.clock.advance(2 * MINUTE);
    assert!(!probe(&sealer).await);
    seals_nothing(&sealer).await;
    world.kms.rotate();
    assert!(probe(&sealer).await);
    seals_for_others(&world, &sealer, "v3").await;
}

#[tokio::test]
async fn replicas_that_lag_for_long_are_told_and_stop_nothing_that_can_be_opened() {
    let world = World::new(policy());
    let (sealer, _) = restored(&world).await;
    // As if by other replicas: v2 opens, v1 wraps.
    world.kms.adopt("v2");
    assert!(probe(&sealer).await, "for a moment");
    world.clock.advance(2 * MINUTE);
    assert!(!probe(&sealer).await);
    seals_for_others(&world, &sealer, "v2").await;
    let ready = sealer.ready().unwrap_err().to_string();
    assert!(ready.contains("v1") && ready.contains("v2"), "{ready}");
}

/// The CRK that the configuration has moved away from was restored, and still seals because the new one does not work.
#[tokio::test]
async fn a_crk_that_only_still_seals_is_judged_alike() {
    let world = World::new(policy());
    let (sealer, _) = restored(&world).await;
    let other = FakeKms::new();
    other.set(Mood::Unreachable);
    let previous = vec![world.crk("crk", 1, &world.kms)];
    let ring = Ring { current: world.crk("other", 2, &other), previous };
    sealer.install(ring, policy()).unwrap();
    assert!(!probe(&sealer).await);
    let says = sealer.status().unwrap_err().to_string();
    assert!(says.contains("wraps with version v1, which v2 had replaced"), "{says}");
    assert!(seal_v2(&sealer, b"x").await.is_err());
    other.set(Mood::Up);
    assert!(probe(&sealer).await);
    assert_eq!(sealer.status().unwrap().key_id.crk(), "other");
}

/// It finds out by itself, within a probe, and asks no more often than else while callers go on asking.
#[tokio::test]
async fn callers_of_a_restored_service_do_not_start_probes_without_end() {
    tokio::time::pause();
    let world = World::new(Policy { new_dek: true, ..policy() });
    let (sealer, _) = restored(&world).await;
    let shutdown = Shutdown::new();
    let probes = tokio::spawn(probe::run(sealer.clone(), HOUR, shutdown.clone()));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(sealer.status().is_err());
    let before = world.kms.asked().1;
    for _ in 0..100 {
        assert!(seal_v2(&sealer, b"x").await.is_err());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let probed = world.kms.asked().1 - before;
    assert!(probed < 20, "{probed} unwraps in five seconds");

    // An Encrypt may be the first to see the rotation.
    world.kms.rotate();
    seal_v2(&sealer, b"x").await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(sealer.ready(), Ok(()));
    shutdown.request();
    probes.await.unwrap();
}

/// It does not remember that v2 came after v1: it was started later.
#[tokio::test]
async fn a_plug_in_started_after_the_rotation_tells_the_loss_until_the_next_one() {
    for policy in policies() {
        for by_encrypt in [false, true] {
            let world = World::new(policy);
            world.kms.rotate();
            let sealer = world.started().await;
            let sealed = seal_v2(&sealer, b"x").await.unwrap();
            world.clock.advance(2 * MINUTE);
            world.kms.restore(1);
            if by_encrypt {
                // May be refused once; nothing but what others can open comes of it.
                let _refused_once = seal_v2(&sealer, b"x").await;
            }
            assert!(!probe(&sealer).await, "{policy:?}");
            probe(&sealer).await;
            seals_for_others(&world, &sealer, "v1").await;
            let told = sealer.ready().unwrap_err().to_string();
            assert!(told.contains("does not open what version v2 wrapped"), "{told}");
            assert!(told.contains("kmsctl keys rotate"), "{told}");
            if !policy.lifetime.is_zero() {
                assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"x", "from memory");
            }

            world.kms.rotate();
            assert!(probe(&sealer).await);
            seals_for_others(&world, &sealer, "v3").await;
            assert_eq!(sealer.ready(), Ok(()));
        }
    }
}

/// A replica that has not heard of v2 neither wraps with it nor opens what it wrapped.
#[tokio::test]
async fn a_key_id_that_is_young_is_not_given_up_for_a_replica_that_lags() {
    for remembers in [true, false] {
        let world = World::new(policy());
        if !remembers {
            world.kms.rotate();
        }
        let sealer = world.started().await;
        if remembers {
            world.kms.rotate();
            assert!(probe(&sealer).await);
        }
        let version = world.kms.forget_newest();
        for _ in 0..5 {
            world.clock.advance(Duration::from_secs(10));
            assert!(probe(&sealer).await, "remembers {remembers}");
            assert_eq!(reported(&sealer), version);
            assert_eq!(seal_v2(&sealer, b"y").await.unwrap().key_id.version(), version);
        }
        world.kms.remember(&version);
        assert!(probe(&sealer).await);
        assert_eq!(reported(&sealer), version);
    }
}

/// Only after that it is believed.
#[tokio::test]
async fn a_restore_within_the_first_minute_is_seen_after_it() {
    let world = World::new(policy());
    let sealer = world.started().await;
    world.kms.rotate();
    assert!(probe(&sealer).await);
    world.kms.restore(1);
    assert!(probe(&sealer).await);
    world.clock.advance(MINUTE);
    assert!(!probe(&sealer).await);
    seals_nothing(&sealer).await;
}

#[tokio::test]
async fn one_odd_answer_at_a_refresh_costs_nothing_and_two_a_new_dek() {
    for odd in [1, 2, 3] {
        let world = World::new(policy());
        let sealer = world.started().await;
        let before = seal_v1(&sealer, b"x").await.unwrap();
        world.clock.advance(46 * MINUTE);
        world.kms.answers_oddly(odd);
        assert!(probe(&sealer).await);
        assert_eq!(reported(&sealer), "v1");
        world.kms.set(Mood::Unreachable);
        seal_v2(&sealer, b"x").await.expect("the DEK that it has");
        world.kms.set(Mood::Up);
        for _ in 0..2 {
            assert!(probe(&sealer).await);
            assert_eq!(reported(&sealer), "v1", "Status and Encrypt agree");
            seal_v2(&sealer, b"x").await.unwrap();
        }
        assert_eq!(open_v1(&sealer, &before).await.unwrap(), b"x");
        // It was refreshed, or replaced.
        world.clock.advance(30 * MINUTE);
        world.kms.set(Mood::Unreachable);
        seal_v2(&sealer, b"x").await.unwrap();
    }
}

/// Nothing is held, so an Encrypt may find out first.
#[tokio::test]
async fn an_encrypt_that_finds_the_loss_tells_the_cause_and_has_it_looked_at() {
    tokio::time::pause();
    let world = World::new(Policy { lifetime: Duration::ZERO, ..policy() });
    let sealer = world.started().await;
    world.kms.rotate();
    assert!(probe(&sealer).await);
    world.clock.advance(2 * MINUTE);
    let shutdown = Shutdown::new();
    let probes = tokio::spawn(probe::run(sealer.clone(), HOUR, shutdown.clone()));
    tokio::time::sleep(Duration::from_secs(2)).await;
    world.kms.restore(1);
    let error = seal_v1(&sealer, b"x").await.unwrap_err().to_string();
    assert!(error.contains("does not open any more what would be sealed"), "{error}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    seals_nothing(&sealer).await;
    shutdown.request();
    probes.await.unwrap();
}
