//! Whose DEKs are refreshed between two probes, and for how long.

use std::sync::Arc;
use std::time::Duration;

use kms_plugin::keys::{Crk, Ring};
use kms_plugin::probe::probe;
use kms_plugin::sealer::{Sealed, Sealer};

use crate::double::{FakeKms, MINUTE, Mood, World, open_v2, policy, seal_v2};

/// As many values as given, each with a DEK of its own.
async fn values_of(world: &World, crk: &Arc<Crk>, count: usize) -> Vec<Sealed> {
    let mut values = Vec::new();
    for _ in 0..count {
        let ring = Ring { current: crk.clone(), previous: Vec::new() };
        values.push(seal_v2(&world.start_with(ring), b"x").await.unwrap());
    }
    values
}

/// Opened, and used later than that.
async fn in_use(world: &World, sealer: &Sealer, values: &[Sealed]) {
    for _ in 0..2 {
        for value in values {
            open_v2(sealer, value).await.unwrap();
        }
        world.clock.advance(MINUTE);
    }
}

#[tokio::test]
async fn the_many_deks_of_a_service_that_is_away_take_no_turns_from_others() {
    let world = World::new(policy());
    let old = FakeKms::new();
    let (current, previous) = (world.crk("new", 2, &world.kms), world.crk("old", 1, &old));
    let of_old = values_of(&world, &previous, 300).await;
    let of_new = values_of(&world, &current, 8).await;
    let sealer = world.start_with(Ring { current, previous: vec![previous] });
    assert!(probe(&sealer).await);
    in_use(&world, &sealer, &of_old).await;
    in_use(&world, &sealer, &of_new).await;
    old.set(Mood::Unreachable);
    world.clock.advance(50 * MINUTE);
    probe(&sealer).await;
    world.kms.set(Mood::Unreachable);
    world.clock.advance(15 * MINUTE);
    for value in &of_new {
        assert_eq!(open_v2(&sealer, value).await.unwrap(), b"x");
    }
}

#[tokio::test]
async fn refreshing_ends_in_time_for_the_next_probe_and_goes_on_after_it() {
    let world = World::new(policy());
    let values = values_of(&world, &world.crk("crk", 1, &world.kms), 20).await;
    let sealer = world.started().await;
    in_use(&world, &sealer, &values).await;
    world.clock.advance(46 * MINUTE);
    *world.kms.slow.lock().unwrap() = Some((world.clock.clone(), Duration::from_secs(2)));
    for _ in 0..10 {
        let before = world.kms.asked().1;
        assert!(probe(&sealer).await);
        let asked = world.kms.asked().1 - before;
        assert!(asked <= 6, "{asked} unwraps of two seconds between two probes");
    }
    *world.kms.slow.lock().unwrap() = None;
    world.kms.set(Mood::Unreachable);
    world.clock.advance(20 * MINUTE);
    for value in &values {
        assert_eq!(open_v2(&sealer, value).await.unwrap(), b"x");
    }
}
