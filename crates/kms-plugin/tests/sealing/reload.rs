//! A changed configuration while requests go on: another CRK, another way to the same CRK, earlier entries.

use std::sync::Arc;
use std::time::Duration;

use kms_core::secret::Dek;
use kms_plugin::keys::{Keys, NotAdopted, Policy, Ring};
use kms_plugin::probe::probe;
use kms_plugin::provider::NewDek;
use kms_plugin::sealer::{Refusal, SealerError};

use crate::double::{
    FakeKms, Mood, World, open_v1, open_v2, policy, refused, reported, seal_v1, seal_v2,
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
    sealer.install(ring(), policy());

    assert!(!probe(&sealer).await);
    assert_eq!(sealer.ready().unwrap_err().to_string(), "no such key");
    let status = sealer.status().unwrap();
    assert_eq!(status.key_id, old.1.key_id, "the old one goes on");
    assert_eq!(seal_v2(&sealer, b"x").await.unwrap().key_id, status.key_id);

    other.set(Mood::Up);
    assert!(probe(&sealer).await);
    let new = (seal_v1(&sealer, b"new").await.unwrap(), seal_v2(&sealer, b"new").await.unwrap());
    assert_eq!(new.1.key_id.as_str(), "keelson/instance/other/v1");
    assert_eq!(sealer.status().unwrap().key_id, new.1.key_id);
    for sealer in [sealer, Arc::new(restarted(&world, ring()))] {
        assert_eq!(open_v1(&sealer, &old.0).await.unwrap(), b"old");
        assert_eq!(open_v2(&sealer, &old.1).await.unwrap(), b"old");
        assert_eq!(open_v1(&sealer, &new.0).await.unwrap(), b"new");
        assert_eq!(open_v2(&sealer, &new.1).await.unwrap(), b"new");
    }
}

fn restarted(world: &World, ring: Ring) -> kms_plugin::sealer::Sealer {
    let tools = kms_plugin::provider::guard::Tools {
        clock: world.clock.clone(),
        random: kms_plugin::random::Random::system(),
        metrics: world.metrics.clone(),
    };
    kms_plugin::sealer::Sealer::new(ring, world.policy, tools)
}

#[tokio::test]
async fn an_entry_that_is_taken_away_opens_nothing_any_more() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let (old_v1, old_v2) =
        (seal_v1(&sealer, b"old").await.unwrap(), seal_v2(&sealer, b"old").await.unwrap());
    let other = FakeKms::new();
    sealer.install(Ring { current: world.crk("other", 2, &other), previous: Vec::new() }, policy());
    assert_eq!(open_v2(&sealer, &old_v2).await.unwrap(), b"old", "until the other one seals");
    assert!(probe(&sealer).await);
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
    sealer.install(Ring { current: world.crk("crk", 1, &moved), previous: Vec::new() }, policy());
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"x", "from the cache");
    assert!(probe(&sealer).await);
    assert!(moved.asked().0 > 0);
    assert_eq!(reported(&sealer), "v1");
}

#[tokio::test]
async fn a_crk_that_was_left_may_be_returned_to() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let other = FakeKms::new();
    for (crk, kms) in [("other", &other), ("crk", &world.kms)] {
        sealer.install(Ring { current: world.crk(crk, 1, kms), previous: Vec::new() }, policy());
        assert!(probe(&sealer).await);
        assert_eq!(sealer.status().unwrap().key_id.crk(), crk);
    }
}

#[tokio::test]
async fn a_changed_policy_holds_at_once() {
    let world = World::new(policy());
    let sealer = world.started().await;
    seal_v2(&sealer, b"x").await.unwrap();
    let lifetime = std::time::Duration::ZERO;
    sealer.install(world.ring(), Policy { lifetime, ..policy() });
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
    let ring = |crk| Ring { current: world.crk(crk, 2, &world.kms), previous: Vec::new() };
    keys.install(ring("momentary"), policy());
    let asked = keys.to_probe();
    keys.install(ring("final"), policy());
    assert!(matches!(keys.adopt(&asked, &new, now), Err(NotAdopted::Stale)));
    keys.set_ready(Ok(()));
    assert_eq!(keys.status(now).unwrap().key_id, first);
    let last = keys.adopt(&keys.to_probe(), &new, now).unwrap().sealing.key_id;
    assert_eq!(last.crk(), "final");
}
