//! What an outage, a refusal and a hanging service do: to callers, to the DEKs that are held, and to Status.

use std::sync::Arc;
use std::time::Duration;

use kms_plugin::keys::{Policy, Ring};
use kms_plugin::probe::{self, probe};
use kms_plugin::provider::guard::Patience;
use kms_plugin::provider::{Backend, Error};
use kms_plugin::sealer::{Call, Refusal, Sealed, Sealer, SealerError};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::double::{
    FakeKms, HOUR, MINUTE, Mood, World, call, open_v1, open_v2, payload, policy, refused, reported,
    seal_v1, seal_v2,
};
use crate::log::Warnings;

#[tokio::test]
async fn max_retries_counts_attempts_beyond_the_first_and_only_for_lost_connections() {
    tokio::time::pause();
    for (mood, max_retries, attempts) in [
        (Mood::Unreachable, 0, 1),
        (Mood::Unreachable, 3, 4),
        (refused(Refusal::Access, "no"), 3, 1),
        (Mood::Fails(Error::Unusable { text: "502".into() }), 3, 1),
        (Mood::Hangs, 3, 1),
    ] {
        let world =
            World { patience: Patience { max_retries, timeout: None }, ..World::new(policy()) };
        world.kms.set(mood.clone());
        assert!(seal_v1(&world.start(), b"x").await.is_err());
        assert_eq!(world.kms.asked().0, attempts, "{mood:?}");
    }
}

#[tokio::test]
async fn retries_stay_inside_the_deadline_and_say_why_they_failed() {
    tokio::time::pause();
    let patience = Patience { max_retries: 20, timeout: None };
    let world = World { patience, ..World::new(policy()) };
    world.kms.set(Mood::Unreachable);
    let started = Instant::now();
    let error = seal_v1(&world.start(), b"x").await.unwrap_err();
    assert_eq!(error, SealerError::Unavailable { text: "connection refused".into() });
    assert!(started.elapsed() < Duration::from_millis(2600), "{:?}", started.elapsed());
    assert!(world.kms.asked().0 > 3, "it did try again");
}

#[tokio::test]
async fn a_service_that_hangs_is_given_up_before_the_caller_gives_up() {
    tokio::time::pause();
    let world = World::new(policy());
    world.kms.set(Mood::Hangs);
    let started = Instant::now();
    assert_eq!(
        seal_v1(&world.start(), b"x").await,
        Err(SealerError::TimedOut(Backend::KeyService))
    );
    assert_eq!(started.elapsed().as_millis() / 100, 25);

    let patience = Patience { max_retries: 0, timeout: Some(Duration::from_secs(1)) };
    let world = World { patience, ..World::new(policy()) };
    world.kms.set(Mood::Hangs);
    let started = Instant::now();
    assert_eq!(
        seal_v1(&world.start(), b"x").await,
        Err(SealerError::TimedOut(Backend::KeyService))
    );
    assert_eq!(started.elapsed().as_millis() / 100, 10, "KP_TIMEOUT");
}

#[tokio::test]
async fn hanging_calls_do_not_pile_up() {
    tokio::time::pause();
    let world = World::new(Policy { new_dek: true, ..policy() });
    let sealer = world.start();
    world.kms.set(Mood::Hangs);
    for _ in 0..3 {
        assert!(seal_v1(&sealer, b"x").await.is_err());
    }
    let started = Instant::now();
    for _ in 0..100 {
        assert_eq!(
            seal_v1(&sealer, b"x").await,
            Err(SealerError::TimedOut(Backend::KeyService)),
            "the known cause"
        );
    }
    assert_eq!((started.elapsed(), world.kms.asked().0), (Duration::ZERO, 3));
    // After a rest one caller goes and sees; when it comes back with an answer all may go again.
    world.clock.advance(Duration::from_secs(1));
    world.kms.set(Mood::Up);
    seal_v1(&sealer, b"x").await.unwrap();
    seal_v1(&sealer, b"x").await.unwrap();
    assert_eq!(world.kms.asked().0, 5);
}

/// What `kubectl --request-timeout=200ms` brings.
fn hurried() -> Call {
    Call { deadline: Duration::from_millis(200), ..call() }
}

#[tokio::test]
async fn callers_in_a_hurry_do_not_turn_the_others_away() {
    tokio::time::pause();
    let world = World::new(Policy { new_dek: true, ..policy() });
    let sealer = world.start();
    world.kms.set(Mood::Hangs);
    for _ in 0..10 {
        let error = sealer.encrypt_v1(payload(b"x"), hurried()).await.unwrap_err();
        assert_eq!(error, SealerError::TimedOut(Backend::KeyService));
    }
    world.kms.set(Mood::Up);
    seal_v1(&sealer, b"x").await.unwrap();
    // Those with time find an outage out, and none in a hurry takes the turn of the one who goes and sees. What is left
    // of three seconds is never the whole of them.
    world.kms.set(Mood::Hangs);
    for _ in 0..3 {
        let call = Call { deadline: Duration::from_micros(2_999_876), ..call() };
        sealer.encrypt_v1(payload(b"x"), call).await.unwrap_err();
    }
    let (asked, _) = world.kms.asked();
    world.clock.advance(Duration::from_secs(1));
    world.kms.set(Mood::Up);
    sealer.encrypt_v1(payload(b"x"), hurried()).await.unwrap_err();
    assert_eq!(world.kms.asked().0, asked, "it was not let through");
    seal_v1(&sealer, b"x").await.unwrap();
}

#[tokio::test]
async fn who_waits_for_a_caller_in_a_hurry_has_its_own_time() {
    tokio::time::pause();
    let world = World::new(policy());
    let sealed = seal_v2(&world.start(), b"x").await.unwrap();
    let sealer = world.start();
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    *world.kms.gate.lock().unwrap() = Some(gate.clone());
    let open = |call: Call| {
        let (sealer, ciphertext) = (sealer.clone(), sealed.ciphertext.clone());
        let key_id = sealed.key_id.as_str().to_owned();
        tokio::spawn(async move { sealer.decrypt_v2(&ciphertext, &key_id, call).await })
    };
    let (first, others) = (open(hurried()), [(); 3].map(|()| open(call())));
    let error = first.await.unwrap().unwrap_err();
    assert_eq!(error, SealerError::TimedOut(Backend::KeyService));
    gate.add_permits(10);
    for other in others {
        assert_eq!(other.await.unwrap().unwrap().as_slice(), b"x");
    }
}

#[tokio::test]
async fn while_the_service_is_down_one_caller_at_a_time_goes_and_sees() {
    tokio::time::pause();
    let world = World::new(Policy { new_dek: true, ..policy() });
    let sealer = world.start();
    world.kms.set(Mood::Unreachable);
    for _ in 0..3 {
        assert!(seal_v1(&sealer, b"x").await.is_err());
    }
    world.clock.advance(Duration::from_secs(1));
    world.kms.set(Mood::Hangs);
    let callers: Vec<_> = (0..10)
        .map(|_| {
            let sealer = sealer.clone();
            tokio::spawn(async move { seal_v1(&sealer, b"x").await })
        })
        .collect();
    for caller in callers {
        assert!(caller.await.unwrap().is_err());
    }
    assert_eq!(world.kms.asked().0, 4);
}

#[tokio::test]
async fn an_outage_lets_deks_live_until_they_expire_and_no_longer() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let (sealed, cipher) =
        (seal_v2(&sealer, b"2").await.unwrap(), seal_v1(&sealer, b"1").await.unwrap());
    world.kms.set(Mood::Unreachable);
    assert!(!probe(&sealer).await);
    world.clock.advance(HOUR - MINUTE);
    assert!(!probe(&sealer).await);
    assert_eq!(reported(&sealer), "v1");
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"2");
    assert_eq!(open_v1(&sealer, &cipher).await.unwrap(), b"1");
    seal_v2(&sealer, b"x").await.unwrap();

    world.clock.advance(MINUTE);
    let text = "connection refused";
    assert_eq!(sealer.status().unwrap_err().to_string(), text);
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap_err().to_string(), text);
    assert_eq!(seal_v2(&sealer, b"x").await.unwrap_err().to_string(), text);
    assert!(!probe(&sealer).await);
    assert_eq!(sealer.snapshot().dek_cache_entries, 0, "wiped, not only unused");
    assert_eq!(sealer.snapshot().dek_age, Duration::ZERO);

    world.kms.set(Mood::Up);
    world.clock.advance(MINUTE);
    assert!(probe(&sealer).await);
    assert_eq!(reported(&sealer), "v1");
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"2");
}

#[tokio::test]
async fn case_07_a_refusal_drops_the_deks_at_once() {
    for (refusal, text) in [
        (Refusal::Access, "BXNIM0415E:Provided API key could not be found"),
        (Refusal::NoSuchKey, "Not Found: key does not exist"),
        (Refusal::KeyState, "Conflict: Key is not in a valid state"),
    ] {
        let world = World::new(policy());
        let sealer = world.started().await;
        let sealed = seal_v2(&sealer, b"x").await.unwrap();
        world.kms.set(refused(refusal, text));
        assert!(!probe(&sealer).await);
        assert_eq!(sealer.snapshot().dek_cache_entries, 0);
        let says = SealerError::Refused { refusal, text: text.into() };
        assert_eq!(sealer.status(), Err(says.clone()));
        assert_eq!(seal_v1(&sealer, b"x").await, Err(says.clone()));
        assert_eq!(open_v2(&sealer, &sealed).await, Err(says));
        // Access is given back: the same key version, so the same key_id.
        world.kms.set(Mood::Up);
        assert!(probe(&sealer).await);
        assert_eq!(sealer.status().unwrap().key_id, sealed.key_id);
        assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"x");
    }
}

#[tokio::test]
async fn a_refusal_that_a_request_meets_counts_as_well() {
    let world = World::new(policy());
    let other = seal_v2(&*world.started().await, b"other").await.unwrap();
    let sealer = world.started().await;
    world.kms.set(refused(Refusal::KeyState, "disabled"));
    assert_eq!(open_v2(&sealer, &other).await.unwrap_err().to_string(), "disabled");
    assert_eq!(sealer.status().unwrap_err().to_string(), "disabled");
    assert_eq!(sealer.snapshot().dek_cache_entries, 0);
}

/// A plug-in with a current and a previous CRK, and a value that the previous one has sealed, its DEK in memory.
async fn with_a_previous_crk(world: &World) -> (Arc<Sealer>, Arc<FakeKms>, Sealed) {
    let old = FakeKms::new();
    let previous = world.crk("old", 1, &old);
    let sealed_by = Ring { current: previous.clone(), previous: Vec::new() };
    let sealed = seal_v2(&world.start_with(sealed_by), b"old").await.unwrap();
    let ring = Ring { current: world.crk("new", 2, &world.kms), previous: vec![previous] };
    let sealer = world.start_with(ring);
    assert!(probe(&sealer).await);
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"old");
    (sealer, old, sealed)
}

#[tokio::test]
async fn access_to_a_previous_crk_ends_with_the_next_probe() {
    let world = World::new(policy());
    let (sealer, old, sealed) = with_a_previous_crk(&world).await;
    old.set(refused(Refusal::KeyState, "disabled"));
    assert!(probe(&sealer).await, "the current CRK is as it was");
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap_err().to_string(), "disabled");
    assert!(sealer.status().is_ok());
    old.set(Mood::Up);
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"old");
}

#[tokio::test]
async fn access_to_a_previous_crk_that_ends_is_logged_once() {
    let world = World::new(policy());
    let (sealer, old, sealed) = with_a_previous_crk(&world).await;
    let (warnings, _guard) = Warnings::watched();
    old.set(refused(Refusal::KeyState, "disabled"));
    assert!(probe(&sealer).await);
    let told = warnings.taken();
    assert!(told.len() == 1 && told[0].contains("instance/old"), "{told:?}");
    assert!(probe(&sealer).await);
    assert!(open_v2(&sealer, &sealed).await.is_err());
    assert_eq!(warnings.taken(), [""; 0]);
}

#[tokio::test]
async fn an_outage_of_a_previous_crk_leaves_its_deks() {
    let world = World::new(policy());
    let (sealer, old, sealed) = with_a_previous_crk(&world).await;
    old.set(Mood::Unreachable);
    assert!(probe(&sealer).await);
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"old");
}

#[tokio::test]
async fn an_unused_dek_of_a_previous_crk_ends_though_it_is_watched() {
    let world = World::new(policy());
    let (sealer, old, sealed) = with_a_previous_crk(&world).await;
    for _ in 0..6 {
        world.clock.advance(10 * MINUTE);
        assert!(probe(&sealer).await);
    }
    let asked = old.asked().1;
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"old");
    assert_eq!(old.asked().1, asked + 1);
}

#[tokio::test]
async fn an_answer_that_was_under_way_when_access_ended_brings_no_dek_back() {
    let world = World::new(policy());
    let (sealer, old, _) = with_a_previous_crk(&world).await;
    let other = Ring { current: world.crk("old", 1, &old), previous: Vec::new() };
    let other = seal_v2(&world.start_with(other), b"other").await.unwrap();
    let gate = Arc::new(Semaphore::new(0));
    *old.gate.lock().unwrap() = Some(gate.clone());
    let asked = old.asked().1;
    let late = tokio::spawn({
        let sealer = sealer.clone();
        async move { open_v2(&sealer, &other).await.map(|opened| (other, opened)) }
    });
    while old.asked().1 == asked {
        tokio::task::yield_now().await;
    }
    // The probe is let through first, and is refused; then the answer of before comes.
    *old.gate.lock().unwrap() = None;
    old.set(refused(Refusal::Access, "revoked"));
    assert!(probe(&sealer).await);
    old.set(Mood::Up);
    gate.add_permits(1);
    let (other, opened) = late.await.unwrap().unwrap();
    assert_eq!(opened, b"other", "it was asked for in time");
    old.set(refused(Refusal::Access, "revoked"));
    let kept = open_v2(&sealer, &other).await;
    assert_eq!(kept.unwrap_err().to_string(), "revoked");
}

#[tokio::test]
async fn a_crk_that_only_wraps_no_more_goes_on_opening_also_in_an_outage() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let sealed = seal_v2(&sealer, b"x").await.unwrap();
    world.kms.set(Mood::FailsToWrap(Error::Refused {
        refusal: Refusal::NoWrap,
        text: "expired".into(),
    }));
    assert!(!probe(&sealer).await);
    assert_eq!(sealer.status().unwrap_err().to_string(), "expired");
    assert_eq!(seal_v2(&sealer, b"y").await.unwrap_err().to_string(), "expired");
    assert!(!probe(&sealer).await);
    world.kms.set(Mood::Unreachable);
    assert!(!probe(&sealer).await);
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"x");
    // Nor does it unwrap any more: the next probe finds out.
    world.kms.set(refused(Refusal::NoWrap, "disabled"));
    assert!(!probe(&sealer).await);
    world.kms.set(refused(Refusal::KeyState, "disabled"));
    assert!(!probe(&sealer).await);
    assert_eq!(sealer.snapshot().dek_cache_entries, 0);
}

#[tokio::test]
async fn the_deks_of_one_crk_are_refreshed_while_the_service_of_another_is_away() {
    for current_is_away in [false, true] {
        let world = World::new(policy());
        let old = FakeKms::new();
        let (current, previous) = (world.crk("new", 2, &world.kms), world.crk("old", 1, &old));
        let mut values = Vec::new();
        for crk in [&current, &previous] {
            for _ in 0..8 {
                let ring = Ring { current: crk.clone(), previous: Vec::new() };
                values.push(seal_v2(&world.start_with(ring), b"x").await.unwrap());
            }
        }
        let sealer = world.start_with(Ring { current, previous: vec![previous] });
        assert!(probe(&sealer).await);
        world.clock.advance(MINUTE);
        for value in &values {
            open_v2(&sealer, value).await.unwrap();
            world.clock.advance(Duration::from_secs(1));
            open_v2(&sealer, value).await.unwrap();
        }
        let (away, works, of_works) = match current_is_away {
            true => (&world.kms, &old, &values[8..]),
            false => (&old, &world.kms, &values[..8]),
        };
        away.set(Mood::Unreachable);
        world.clock.advance(50 * MINUTE);
        probe(&sealer).await;
        works.set(Mood::Unreachable);
        world.clock.advance(15 * MINUTE);
        for value in of_works {
            assert_eq!(open_v2(&sealer, value).await.unwrap(), b"x", "{current_is_away}");
        }
    }
}

#[tokio::test]
async fn decrypts_with_a_crk_that_only_unwraps_start_no_probes() {
    tokio::time::pause();
    let world = World::new(Policy { lifetime: Duration::ZERO, ..policy() });
    let sealed = seal_v2(&*world.started().await, b"x").await.unwrap();
    let (refusal, text) = (Refusal::NoWrap, "expired".into());
    world.kms.set(Mood::FailsToWrap(Error::Refused { refusal, text }));
    let sealer = world.start();
    let shutdown = kms_daemon::lifecycle::Shutdown::new();
    let probes = tokio::spawn(probe::run(sealer.clone(), HOUR, shutdown.clone()));
    tokio::time::sleep(Duration::from_millis(10)).await;
    let before = world.kms.asked().0;
    for _ in 0..100 {
        open_v2(&sealer, &sealed).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let probed = world.kms.asked().0 - before;
    assert!(probed <= 3, "{probed} probes in five seconds");
    shutdown.request();
    probes.await.unwrap();
}

#[tokio::test]
async fn a_refused_request_withdraws_nothing() {
    let world = World::new(policy());
    let sealer = world.started().await;
    world.kms.set(refused(Refusal::Request, "Bad Request: no valid UUID"));
    assert!(!probe(&sealer).await);
    assert_eq!(reported(&sealer), "v1");
    seal_v2(&sealer, b"x").await.unwrap();
}

#[tokio::test]
async fn a_forged_wdek_costs_nobody_else_anything() {
    let world = World::new(policy());
    let stranger = World::new(policy());
    let forged = {
        let sealer = stranger.started().await;
        stranger.kms.rotate();
        seal_v1(&sealer, b"x").await.unwrap()
    };
    let sealer = world.start();
    let ours = seal_v1(&sealer, b"ours").await.unwrap();
    let (fresh, entries) = (world.start(), sealer.snapshot().dek_cache_entries);
    // The fake's WDEK names repeat, so the stranger's is only unknown to a service that has wrapped nothing yet.
    let unknown = World { kms: FakeKms::new(), ..World::new(policy()) };
    assert_eq!(open_v1(&unknown.start(), &forged).await, Err(SealerError::NotAuthentic));
    assert_eq!(open_v1(&fresh, &ours).await.unwrap(), b"ours");
    assert_eq!(sealer.snapshot().dek_cache_entries, entries);
}

#[tokio::test]
async fn deks_in_use_are_refreshed_before_anyone_has_to_wait() {
    let world = World::new(policy());
    let old = seal_v2(&*world.started().await, b"old").await.unwrap();
    let sealer = world.started().await;
    open_v2(&sealer, &old).await.unwrap();
    for _ in 0..10 {
        world.clock.advance(10 * MINUTE);
        open_v2(&sealer, &old).await.unwrap();
        seal_v2(&sealer, b"x").await.unwrap();
        assert!(probe(&sealer).await);
    }
    // 100 minutes: without the refresh both would have ended after 60. Nobody waits, for nobody can be asked.
    world.kms.set(Mood::Hangs);
    open_v2(&sealer, &old).await.unwrap();
    seal_v2(&sealer, b"x").await.unwrap();
    assert_eq!(reported(&sealer), "v1");
}

#[tokio::test]
async fn case_09_status_and_cached_opens_do_not_wait_while_the_service_hangs() {
    tokio::time::pause();
    let world = World::new(policy());
    let unknown = seal_v2(&*world.started().await, b"unknown").await.unwrap();
    let sealer = world.started().await;
    let sealed = seal_v2(&sealer, b"known").await.unwrap();
    world.kms.set(Mood::Hangs);
    let waiting: Vec<_> = (0..200)
        .map(|_| {
            let (sealer, key_id) = (sealer.clone(), unknown.key_id.as_str().to_owned());
            let ciphertext = unknown.ciphertext.clone();
            tokio::spawn(async move { sealer.decrypt_v2(&ciphertext, &key_id, call()).await })
        })
        .collect();
    tokio::task::yield_now().await;
    let started = Instant::now();
    assert_eq!(reported(&sealer), "v1");
    assert_eq!(open_v2(&sealer, &sealed).await.unwrap(), b"known");
    seal_v2(&sealer, b"x").await.unwrap();
    assert_eq!(started.elapsed(), Duration::ZERO);
    for waiter in waiting {
        let error = waiter.await.unwrap().unwrap_err();
        assert_eq!(error, SealerError::TimedOut(Backend::KeyService));
    }
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_the_others_their_answer() {
    let world = World::new(policy());
    let sealed = seal_v2(&world.start(), b"x").await.unwrap();
    let sealer = world.start();
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    *world.kms.gate.lock().unwrap() = Some(gate.clone());
    let open = || {
        let (sealer, ciphertext) = (sealer.clone(), sealed.ciphertext.clone());
        let key_id = sealed.key_id.as_str().to_owned();
        tokio::spawn(async move { sealer.decrypt_v2(&ciphertext, &key_id, call()).await })
    };
    let (first, second) = (open(), open());
    tokio::task::yield_now().await;
    first.abort();
    tokio::task::yield_now().await;
    gate.add_permits(1);
    assert_eq!(second.await.unwrap().unwrap().as_slice(), b"x");
}

#[tokio::test]
async fn recovery_is_seen_within_seconds_and_without_any_request() {
    tokio::time::pause();
    let world = World::new(policy());
    world.kms.set(Mood::Unreachable);
    let sealer = world.start();
    let shutdown = kms_daemon::lifecycle::Shutdown::new();
    let probes = tokio::spawn(probe::run(sealer.clone(), 30 * MINUTE, shutdown.clone()));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(sealer.ready().is_err());
    world.kms.set(Mood::Up);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(sealer.ready(), Ok(()));
    assert_eq!(reported(&sealer), "v1");
    shutdown.request();
    probes.await.unwrap();
}

#[tokio::test]
async fn case_06_a_service_that_unwraps_to_something_else_is_not_ready() {
    let world = World::new(policy());
    world.kms.set(Mood::Lies);
    let sealer = world.start();
    assert!(!probe(&sealer).await);
    let cause = sealer.ready().unwrap_err().to_string();
    assert!(cause.contains("something else"), "{cause}");
}
