//! A changed configuration while requests go on: another CRK, another way to the same CRK, earlier entries.

use std::sync::Arc;
use std::time::Duration;

use kms_core::secret::Dek;
use kms_plugin::keys::{Keys, NotAdopted, Policy, Ring};
use kms_plugin::probe::probe;
use kms_plugin::provider::NewDek;
use kms_plugin::sealer::{Refusal, Sealer, SealerError};

use crate::double::{
    FakeKms, HOUR, MINUTE, Mood, World, call, open_v1, open_v2, policy, refused, reported, seal_v1,
    seal_v2,
};

#[tokio::test]
async fn another_crk_is_reported_only_after_it_has_wrapped() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let old = (seal_v1(&sealer, b"old").await.unwrap(), seal_v2(&sealer, b"old").await.unwrap());
    let other = FakeKms::new();
    other.set(refused(Refusal::NoSuchKey, "no such key"));
    let ring = || Ring {
        current: world.crk("other", 2, &other),
        previous: vec![world.crk("crk", 1, &world.kms)],
    };
    sealer.install(ring(), policy()).unwrap();

    assert!(!probe(&sealer).await);
    assert_eq!(sealer.ready().unwrap_err().to_string(), "no such key");
    let status = sealer.status().unwrap();
    assert_eq!(status.key_id, old.1.key_id, "the old one goes on");
    assert_eq!(seal_v2(&sealer, b"x").await.unwrap().key_id, status.key_id);

    other.set(Mood::Up);
    assert!(probe(&sealer).await);
    let new = (seal_v1(&sealer, b"new").await.unwrap(), seal_v2(&sealer, b"new").await.unwrap());
    assert_eq!(new.1.key_id.as_str(), "keelson/instance/other/v1/2");
    assert_eq!(sealer.status().unwrap().key_id, new.1.key_id);
    for sealer in [sealer, world.start_with(ring())] {
        assert_eq!(open_v1(&sealer, &old.0).await.unwrap(), b"old");
        assert_eq!(open_v2(&sealer, &old.1).await.unwrap(), b"old");
        assert_eq!(open_v1(&sealer, &new.0).await.unwrap(), b"new");
        assert_eq!(open_v2(&sealer, &new.1).await.unwrap(), b"new");
    }
}

#[tokio::test]
async fn an_entry_that_is_taken_away_opens_nothing_any_more() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let (old_v1, old_v2) =
        (seal_v1(&sealer, b"old").await.unwrap(), seal_v2(&sealer, b"old").await.unwrap());
    let other = FakeKms::new();
    let alone = || Ring { current: world.crk("other", 2, &other), previous: Vec::new() };
    let forgets = sealer.install(alone(), policy()).unwrap_err().to_string();
    assert!(forgets.contains("no entry is VERSION 1 of CRK instance/crk any more"), "{forgets}");
    assert!(probe(&sealer).await);
    assert_eq!(reported_crk(&sealer), "crk", "the old configuration runs on");

    let previous = vec![world.crk("crk", 1, &world.kms)];
    sealer.install(Ring { previous, ..alone() }, policy()).unwrap();
    assert!(sealer.install(alone(), policy()).is_err(), "until the other one seals");
    assert!(probe(&sealer).await);
    assert_eq!(reported_crk(&sealer), "other");
    sealer.install(alone(), policy()).unwrap();
    assert_eq!(sealer.snapshot().dek_cache_entries, 1, "the old DEK is wiped");
    let refused = open_v2(&sealer, &old_v2).await;
    assert!(matches!(refused, Err(SealerError::UnknownKey(_))), "{refused:?}");
    let refused = open_v1(&sealer, &old_v1).await;
    assert_eq!(
        refused.unwrap_err().to_string(),
        "KpVersion 1 names no CRK of this plug-in's configuration"
    );
}

#[tokio::test]
async fn a_new_api_key_or_url_keeps_the_deks_and_is_used_for_the_next_question() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let sealed = seal_v2(&sealer, b"x").await.unwrap();
    world.kms.set(Mood::Unreachable);
    // The same CRK behind another door: the fake shares nothing with the first, so it must make its own DEKs.
    let moved = FakeKms::new();
    let ring = Ring { current: world.crk("crk", 1, &moved), previous: Vec::new() };
    sealer.install(ring, policy()).unwrap();
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"x", "from the cache");
    assert!(probe(&sealer).await);
    assert!(moved.asked().0 > 0);
    assert_eq!(reported(&sealer), "v1");
}

#[tokio::test]
async fn a_refusal_of_the_old_api_key_withdraws_nothing_under_the_new_one() {
    let world = World::new(policy());
    let unknown = seal_v2(&world.start(), b"unknown").await.unwrap();
    let sealer = world.started().await;
    let sealed = seal_v2(&sealer, b"x").await.unwrap();
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    *world.kms.gate.lock().unwrap() = Some(gate.clone());
    let asked = world.kms.asked().1;
    let late = tokio::spawn({
        let sealer = sealer.clone();
        async move { open_v2(&sealer, &unknown).await }
    });
    while world.kms.asked().1 == asked {
        tokio::task::yield_now().await;
    }
    // The new key is taken over while the question with the old one is under way; then the old one is revoked.
    let ring = Ring { current: world.crk("crk", 1, &FakeKms::new()), previous: Vec::new() };
    sealer.install(ring, policy()).unwrap();
    world.kms.set(refused(Refusal::Access, "revoked"));
    gate.add_permits(1);
    assert_eq!(late.await.unwrap().unwrap_err().to_string(), "revoked");
    assert_eq!(reported(&sealer), "v1");
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"x");
    assert_eq!(sealer.ready(), Ok(()));
}

/// The entry that still seals is asked as the new configuration says, too.
#[tokio::test]
async fn a_crk_that_only_still_seals_is_asked_with_its_new_api_key() {
    let world = World::new(Policy { new_dek: true, ..policy() });
    let sealer = world.started().await;
    let (other, moved) = (FakeKms::new(), FakeKms::new());
    other.set(Mood::Unreachable);
    world.kms.set(refused(Refusal::Access, "revoked"));
    let previous = vec![world.crk("crk", 1, &moved)];
    let ring = Ring { current: world.crk("other", 2, &other), previous };
    sealer.install(ring, Policy { new_dek: true, ..policy() }).unwrap();
    assert!(!probe(&sealer).await);
    assert_eq!(reported_crk(&sealer), "crk");
    assert_eq!(seal_v2(&sealer, b"x").await.unwrap().key_id.crk(), "crk");
}

#[tokio::test]
async fn probes_keep_a_distance_however_often_one_is_wanted() {
    tokio::time::pause();
    let world = World::new(policy());
    let sealer = world.start();
    let shutdown = kms_daemon::lifecycle::Shutdown::new();
    let probes = tokio::spawn(kms_plugin::probe::run(sealer.clone(), HOUR, shutdown.clone()));
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        sealer.install(world.ring(), policy()).unwrap();
    }
    let probed = world.kms.asked().0;
    assert!((5..=12).contains(&probed), "{probed} probes in five seconds");
    shutdown.request();
    probes.await.unwrap();
}

fn reported_crk(sealer: &Sealer) -> String {
    sealer.status().unwrap().key_id.crk().to_owned()
}

/// A configuration as the operator writes it: the entry that wraps, then the earlier ones.
fn entries(kmses: &[(&str, i64, &Arc<FakeKms>)], world: &World) -> Ring {
    let mut crks = kmses.iter().map(|(crk, version, kms)| world.crk(crk, *version, kms));
    Ring { current: crks.next().unwrap(), previous: crks.collect() }
}

#[tokio::test]
async fn case_21_a_return_to_an_earlier_crk_is_a_third_key_id_and_everything_stays_readable() {
    let world = World::new(policy());
    let (a, b) = (world.kms.clone(), FakeKms::new());
    let sealer = world.started().await;
    let mut values = vec![seal_v2(&sealer, b"payload").await.unwrap()];
    let returns = [
        vec![("b", 2, &b), ("crk", 1, &a)],
        vec![("crk", 3, &a), ("b", 2, &b), ("crk", 1, &a)],
        // On nodes that forget what nothing needs any more the key_ids are the same.
        vec![("b", 4, &b), ("crk", 3, &a)],
        vec![("crk", 5, &a), ("b", 4, &b)],
    ];
    for kmses in &returns {
        sealer.install(entries(kmses, &world), policy()).unwrap();
        assert!(probe(&sealer).await);
        let sealed = seal_v2(&sealer, b"payload").await.unwrap();
        assert_eq!(sealed.key_id, sealer.status().unwrap().key_id);
        values.push(sealed);
        // Rotated in the key service while on it, forth and never back.
        kmses[0].2.rotate();
        assert!(probe(&sealer).await);
        values.push(seal_v2(&sealer, b"payload").await.unwrap());
        a.set_lag(true);
        assert!(probe(&sealer).await);
        assert_eq!(sealer.status().unwrap().key_id, values.last().unwrap().key_id);
        a.set_lag(false);
    }
    let key_ids: Vec<_> = values.iter().map(|sealed| sealed.key_id.as_str()).collect();
    let i = "keelson/instance";
    let expected = ["crk/v1", "b/v1/2", "b/v2/2", "crk/v1/3", "crk/v2/3", "b/v2/4", "b/v3/4"];
    let expected = expected.into_iter().chain(["crk/v2/5", "crk/v3/5"]);
    assert_eq!(key_ids, expected.map(|id| format!("{i}/{id}")).collect::<Vec<_>>());

    let restarted = world.start_with(entries(&returns[3], &world));
    assert!(probe(&restarted).await);
    assert_eq!(restarted.status().unwrap().key_id, values.last().unwrap().key_id);
    for sealed in &values {
        assert_eq!(open_v2(&sealer, sealed).await.unwrap(), b"payload");
        assert_eq!(open_v2(&restarted, sealed).await.unwrap(), b"payload");
    }
}

#[tokio::test]
async fn case_21_a_return_under_the_old_version_is_refused_and_the_new_crk_goes_on() {
    let world = World::new(policy());
    let (a, b) = (world.kms.clone(), FakeKms::new());
    let sealer = world.started().await;
    sealer.install(entries(&[("b", 2, &b), ("crk", 1, &a)], &world), policy()).unwrap();
    // Nothing was sealed under the new one yet: taking the change back is no return.
    sealer.install(entries(&[("crk", 1, &a)], &world), policy()).unwrap();
    assert!(probe(&sealer).await);
    sealer.install(entries(&[("b", 2, &b), ("crk", 1, &a)], &world), policy()).unwrap();
    assert!(probe(&sealer).await);

    let back = entries(&[("crk", 1, &a), ("b", 2, &b)], &world);
    let refused = sealer.install(back, policy()).unwrap_err().to_string();
    assert_eq!(
        refused,
        "KP_CONFIG goes back to VERSION 1 of CRK instance/crk, which was left, and a key_id is never used twice: give \
         KP_CONFIG a VERSION that was never used, such as 3, and list VERSION 1 in KP_CONFIG_PREVIOUS"
    );
    assert!(probe(&sealer).await);
    assert_eq!(seal_v2(&sealer, b"x").await.unwrap().key_id.as_str(), "keelson/instance/b/v1/2");
}

#[tokio::test]
async fn case_21_equal_key_bytes_under_another_name_are_another_key_id() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let old = seal_v2(&sealer, b"x").await.unwrap();
    // One and the same key service answers for both names.
    let same = entries(&[("twin", 2, &world.kms), ("crk", 1, &world.kms)], &world);
    sealer.install(same, policy()).unwrap();
    assert!(probe(&sealer).await);
    let new = seal_v2(&sealer, b"x").await.unwrap();
    assert_ne!(new.key_id, old.key_id);
    let swapped = sealer.decrypt_v2(&new.ciphertext, old.key_id.as_str(), call()).await;
    assert!(matches!(swapped, Err(SealerError::NotAuthentic)), "{swapped:?}");
}

#[tokio::test]
async fn case_20_a_rotation_that_fails_keeps_the_old_key_id_and_is_unhealthy_after_a_dek_s_life() {
    for new_dek in [false, true] {
        let policy = Policy { new_dek, max_age: 10 * HOUR, ..policy() };
        let world = World::new(policy);
        let (a, b) = (world.kms.clone(), FakeKms::new());
        b.set(refused(Refusal::KeyState, "disabled"));
        let sealer = world.started().await;
        let old = sealer.status().unwrap();
        sealer.install(entries(&[("b", 2, &b), ("crk", 1, &a)], &world), policy).unwrap();
        for _ in 0..39 {
            assert!(!probe(&sealer).await);
            assert_eq!(sealer.ready().unwrap_err().to_string(), "disabled", "readiness at once");
            assert_eq!(sealer.status().unwrap(), old);
            assert_eq!(seal_v2(&sealer, b"x").await.unwrap().key_id, old.key_id);
            world.clock.advance(15 * MINUTE);
        }
        // A changed API key or URL does not begin the time anew.
        sealer.install(entries(&[("b", 2, &b), ("crk", 1, &a)], &world), policy).unwrap();
        world.clock.advance(15 * MINUTE);
        assert!(!probe(&sealer).await);
        assert_eq!(sealer.status().unwrap_err().to_string(), "disabled");
        assert_eq!(seal_v2(&sealer, b"x").await.unwrap_err().to_string(), "disabled");
        b.set(Mood::Up);
        assert!(probe(&sealer).await);
        assert_eq!(reported_crk(&sealer), "b");
        seal_v2(&sealer, b"x").await.unwrap();
    }
}

/// Where no DEK is kept, Status follows the CRK that really seals.
#[tokio::test]
async fn while_a_rotation_fails_an_outage_of_the_old_crk_is_seen() {
    let policy = Policy { new_dek: true, ..policy() };
    let world = World::new(policy);
    let (a, b) = (world.kms.clone(), FakeKms::new());
    b.set(refused(Refusal::KeyState, "disabled"));
    let sealer = world.started().await;
    sealer.install(entries(&[("b", 2, &b), ("crk", 1, &a)], &world), policy).unwrap();
    a.set(Mood::Unreachable);
    assert!(!probe(&sealer).await);
    assert_eq!(sealer.status().unwrap_err().to_string(), "connection refused");
    a.set(Mood::Up);
    assert!(!probe(&sealer).await);
    assert_eq!(reported_crk(&sealer), "crk");
}

#[tokio::test]
async fn a_changed_policy_holds_at_once() {
    let world = World::new(policy());
    let sealer = world.started().await;
    seal_v2(&sealer, b"x").await.unwrap();
    let lifetime = std::time::Duration::ZERO;
    sealer.install(world.ring(), Policy { lifetime, ..policy() }).unwrap();
    assert_eq!(sealer.snapshot().dek_cache_entries, 0);
    let before = world.kms.asked().1;
    seal_v2(&sealer, b"x").await.unwrap();
    assert_eq!(world.kms.asked().1, before + 1);
}

#[test]
fn the_answer_of_a_crk_that_was_configured_for_a_moment_only_is_not_taken() {
    let world = World::new(policy());
    let mut keys = Keys::new(world.ring(), policy());
    let new = NewDek {
        dek: Dek::from_bytes([0; 32]),
        wdek: b"wdek".as_slice().into(),
        version: "v1".into(),
    };
    let now = Duration::ZERO;
    let first = keys.adopt(&keys.to_probe(), &new, now).unwrap().sealing.key_id;
    keys.set_ready(Ok(()));
    let ring = |crk| Ring {
        current: world.crk(crk, 2, &world.kms),
        previous: vec![world.crk("crk", 1, &world.kms)],
    };
    keys.install(ring("momentary"), policy(), now).unwrap();
    let asked = keys.to_probe();
    keys.install(ring("final"), policy(), now).unwrap();
    assert!(matches!(keys.adopt(&asked, &new, now), Err(NotAdopted::Stale)));
    assert_eq!(keys.status(now).unwrap().key_id, first);
    let last = keys.adopt(&keys.to_probe(), &new, now).unwrap().sealing.key_id;
    assert_eq!(last.crk(), "final");
}
