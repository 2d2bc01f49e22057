//! Rotate first, report afterwards: Status and Encrypt agree, and nothing becomes unreadable.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kms_core::key_id::KeyId;
use kms_core::secret::Dek;
use kms_daemon::lifecycle::Shutdown;
use kms_plugin::keys::{Asked, Keys, Next, NotAdopted, Policy};
use kms_plugin::probe::probe;
use kms_plugin::provider::{Backend, NewDek};
use kms_plugin::sealer::{Call, Refusal, SealerError};
use proptest::prelude::*;
use tokio::sync::Semaphore;

use crate::double::{HOUR, World, call, open_v1, open_v2, policy, reported, seal_v1, seal_v2};
use std::time::Duration;

#[tokio::test]
async fn the_probe_adopts_a_new_version_in_one_step() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let old = seal_v2(&sealer, b"old").await.unwrap();
    world.kms.rotate();
    assert_eq!((reported(&sealer), old.key_id.version()), ("v1".into(), "v1"));
    assert_eq!(seal_v2(&sealer, b"x").await.unwrap().key_id.version(), "v1", "not before Status");
    assert!(probe(&sealer).await);
    assert_eq!(reported(&sealer), "v2");
    assert_eq!(seal_v2(&sealer, b"x").await.unwrap().key_id.version(), "v2");
    assert_eq!(open_v2(&sealer, &old).await.unwrap(), b"old");
}

#[tokio::test]
async fn case_15_fifty_rotations_leave_everything_readable_also_after_a_restart() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let mut values = Vec::new();
    for number in 0..50u8 {
        world.kms.rotate();
        assert!(probe(&sealer).await);
        let sealed = seal_v2(&sealer, &[number]).await.unwrap();
        assert_eq!(sealed.key_id, sealer.status().unwrap().key_id);
        values.push((number, sealed, seal_v1(&sealer, &[number]).await.unwrap()));
    }
    let mut key_ids: Vec<_> = values.iter().map(|(_, sealed, _)| sealed.key_id.as_str()).collect();
    key_ids.dedup();
    assert_eq!(key_ids.len(), 50);
    let before = world.kms.asked().1;
    for sealer in [sealer, world.start()] {
        for (number, sealed, cipher) in &values {
            assert_eq!(open_v2(&sealer, sealed).await.unwrap(), [*number]);
            assert_eq!(open_v1(&sealer, cipher).await.unwrap(), [*number]);
        }
    }
    assert_eq!(world.kms.asked().1, before + 50, "after the restart each DEK is unwrapped once");
}

#[tokio::test]
async fn case_22_a_value_of_one_instance_opens_on_another_that_has_not_heard_of_the_rotation() {
    let world = World::new(policy());
    let (here, there) = (world.started().await, world.started().await);
    world.kms.rotate();
    assert!(probe(&here).await);
    let sealed = seal_v2(&here, b"new").await.unwrap();
    assert_eq!(reported(&there), "v1");
    assert_eq!(open_v2(&there, &sealed).await.unwrap(), b"new");
}

#[tokio::test]
async fn a_lagging_replica_does_not_bring_an_old_key_id_back() {
    for policy in [policy(), Policy { new_dek: true, ..policy() }] {
        let world = World::new(policy);
        let sealer = world.started().await;
        world.kms.rotate();
        assert!(probe(&sealer).await);
        world.kms.set_lag(true);
        assert!(probe(&sealer).await, "the service works");
        assert_eq!(reported(&sealer), "v2");
        match seal_v2(&sealer, b"x").await {
            Ok(sealed) => assert_eq!(sealed.key_id.version(), "v2"),
            Err(error) => {
                let told = matches!(error, SealerError::Refused { refusal: Refusal::Replaced, .. });
                assert!(policy.new_dek && told, "{error}");
            }
        }
        world.kms.set_lag(false);
        assert_eq!(seal_v2(&sealer, b"x").await.unwrap().key_id.version(), "v2");
    }
}

#[tokio::test]
async fn with_new_dek_true_the_encrypt_that_sees_a_rotation_changes_the_report() {
    let world = World::new(Policy { new_dek: true, ..policy() });
    let sealer = world.started().await;
    world.kms.rotate();
    let sealed = seal_v2(&sealer, b"x").await.unwrap();
    assert_eq!(sealed.key_id, sealer.status().unwrap().key_id);
    assert_eq!(reported(&sealer), "v2");
}

#[tokio::test]
async fn a_thousand_decrypts_after_a_restart_cost_one_unwrap() {
    let world = World::new(policy());
    let sealed = Arc::new(seal_v2(&world.start(), b"payload").await.unwrap());
    let sealer = world.start();
    let gate = Arc::new(Semaphore::new(0));
    *world.kms.gate.lock().unwrap() = Some(gate.clone());
    let callers: Vec<_> = (0..1000)
        .map(|_| {
            let (sealer, sealed) = (sealer.clone(), sealed.clone());
            tokio::spawn(async move { open_v2(&sealer, &sealed).await.unwrap() })
        })
        .collect();
    while world.kms.unwraps.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    // A second unwrap would get a permit, too, and be counted.
    gate.add_permits(10);
    for caller in callers {
        assert_eq!(caller.await.unwrap(), b"payload");
    }
    assert_eq!(world.kms.asked().1, 1);
}

#[tokio::test]
async fn case_16_a_key_id_that_is_not_configured_is_refused_without_asking() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let sealed = seal_v2(&sealer, b"x").await.unwrap();
    let before = world.kms.asked();
    for key_id in
        ["keelson/instance/other/v1", "keelson/other/crk/v1", "1", "", "keelson/instance/crk"]
    {
        let result = sealer.decrypt_v2(&sealed.ciphertext, key_id, call()).await;
        assert!(matches!(result, Err(SealerError::UnknownKey(_))), "{key_id}: {result:?}");
    }
    let other = World::new(policy());
    let ring = kms_plugin::keys::Ring { current: other.crk("crk", 7, &other.kms), ..other.ring() };
    let sealer = other.start_with(ring);
    let cipher = seal_v1(&world.start(), b"x").await.unwrap();
    assert!(open_v1(&sealer, &cipher).await.is_err());
    assert_eq!(world.kms.asked().1, before.1);
}

#[tokio::test]
async fn another_key_id_or_a_changed_bit_does_not_authenticate() {
    let world = World::new(policy());
    let sealer = world.started().await;
    let mut sealed = seal_v2(&sealer, b"x").await.unwrap();
    let wrong = KeyId::new("instance", "crk", "v9").unwrap();
    let result = sealer.decrypt_v2(&sealed.ciphertext, wrong.as_str(), call()).await;
    assert!(matches!(result, Err(SealerError::NotAuthentic)), "{result:?}");
    *sealed.ciphertext.last_mut().unwrap() ^= 1;
    assert_eq!(open_v2(&sealer, &sealed).await, Err(SealerError::NotAuthentic));
}

#[tokio::test]
async fn an_old_wdek_s_unwrap_is_a_hint_that_the_crk_was_rotated() {
    tokio::time::pause();
    let world = World::new(policy());
    let old = seal_v2(&*world.started().await, b"old").await.unwrap();
    let sealer = world.start();
    let shutdown = Shutdown::new();
    let probes = tokio::spawn(kms_plugin::probe::run(sealer.clone(), HOUR, shutdown.clone()));
    let seconds = |seconds| tokio::time::sleep(Duration::from_secs(seconds));
    seconds(10).await;
    world.kms.rotate();
    seconds(60).await;
    assert_eq!(reported(&sealer), "v1", "the next probe is due in an hour");
    open_v2(&sealer, &old).await.unwrap();
    seconds(1).await;
    assert_eq!(reported(&sealer), "v2");
    shutdown.request();
    probes.await.unwrap();
}

#[tokio::test]
async fn a_replica_that_missed_a_rotation_in_between_is_not_followed() {
    let world = World::new(policy());
    let sealer = world.started().await;
    world.kms.rotate();
    world.kms.rotate();
    world.kms.set_lag(true);
    assert!(probe(&sealer).await, "the service works");
    assert_eq!(reported(&sealer), "v1", "v2 was never the newest here, and is not now");
    world.kms.set_lag(false);
    assert!(probe(&sealer).await);
    assert_eq!(reported(&sealer), "v3");
}

/// What may happen between two looks at the sealer, in any order.
#[derive(Debug, Clone)]
enum Step {
    AskToSeal,
    AskToProbe,
    /// The oldest question that is still open is answered by a replica that lags by so many versions.
    Answer {
        lag: usize,
    },
    Rotate,
    Encrypt,
    Wait {
        minutes: u64,
    },
    Withdraw,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::AskToSeal),
        2 => Just(Step::AskToProbe),
        4 => (0..3usize).prop_map(|lag| Step::Answer { lag }),
        1 => Just(Step::Rotate),
        4 => Just(Step::Encrypt),
        1 => (0..90u64).prop_map(|minutes| Step::Wait { minutes }),
        1 => Just(Step::Withdraw),
    ]
}

fn answer(version: usize, number: usize) -> NewDek {
    NewDek {
        dek: Dek::from_bytes([0; 32]),
        wdek: format!("wdek-{number}").into_bytes().into(),
        version: format!("v{version}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Status and Encrypt agree after every step, and no key_id is reported again once it was replaced.
    #[test]
    fn case_19_status_and_encrypt_agree_after_any_steps(
        steps in proptest::collection::vec(step(), 1..60),
        new_dek in any::<bool>(),
        lifetime_hours in 0..3u64,
    ) {
        let policy = Policy { new_dek, lifetime: HOUR * u32::try_from(lifetime_hours).unwrap(), ..policy() };
        let world = World::new(policy);
        let mut keys = Keys::new(world.ring(), policy);
        keys.set_ready(Ok(()));
        let name = world.ring().current.name.clone();
        let cause = SealerError::TimedOut(Backend::KeyService);
        let (mut now, mut newest, mut wraps) = (Duration::ZERO, 1, 0);
        let mut open: Vec<(Asked, usize)> = Vec::new();
        let mut history: Vec<KeyId> = Vec::new();
        for step in steps {
            match step {
                Step::AskToSeal => open.push((keys.to_seal(), history.len())),
                Step::AskToProbe => open.push((keys.to_probe(), history.len())),
                Step::Answer { lag } if !open.is_empty() => {
                    wraps += 1;
                    let new = answer(newest - lag.min(newest - 1), wraps);
                    keys.set_ready(Ok(()));
                    let (asked, known) = open.remove(0);
                    match keys.adopt(&asked, &new, now) {
                        Ok(adopted) => {
                            let key_id = keys.status(now).unwrap().key_id;
                            prop_assert_eq!(adopted.sealing.key_id, key_id);
                            // What was asked before the last change must not bring about another.
                            prop_assert!(!adopted.changed || known == history.len());
                        }
                        Err(error) => prop_assert!(!matches!(error, NotAdopted::KeyId(_))),
                    }
                }
                Step::Answer { .. } => {}
                Step::Rotate => newest += 1,
                Step::Encrypt => {
                    let key_id = match keys.next(now) {
                        Next::FromMemory(sealing) => Some(sealing.key_id),
                        Next::Unwrap(wrapped) => Some(wrapped.key_id),
                        Next::Renew | Next::New => None,
                    };
                    if let (Some(key_id), Ok(status)) = (key_id, keys.status(now)) {
                        prop_assert_eq!(key_id, status.key_id);
                    }
                }
                Step::Wait { minutes } => {
                    now += Duration::from_secs(60 * minutes);
                    keys.expire(now);
                }
                Step::Withdraw => {
                    keys.withdraw(&name, &cause);
                }
            }
            if let Ok(status) = keys.status(now)
                && history.last() != Some(&status.key_id)
            {
                prop_assert!(!history.contains(&status.key_id), "{} came back", status.key_id);
                history.push(status.key_id);
            }
        }
    }
}

/// The same with real tasks: one rotates, others encrypt and ask for the status.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn status_never_goes_back_while_many_encrypt_and_the_crk_rotates() {
    let world = World::new(Policy { new_dek: true, ..policy() });
    let sealer = world.started().await;
    let number = |version: &str| version[1..].parse::<u32>().unwrap();
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let sealer = sealer.clone();
            tokio::spawn(async move {
                for _ in 0..200 {
                    let before = number(&reported(&sealer));
                    let call =
                        Call { uid: String::new(), trace: None, deadline: Duration::from_secs(3) };
                    let sealed = sealer.encrypt_v2(crate::double::payload(b"x"), call).await;
                    let after = number(&reported(&sealer));
                    let sealed = number(sealed.unwrap().key_id.version());
                    assert!((before..=after).contains(&sealed), "{before} {sealed} {after}");
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for _ in 0..50 {
        world.kms.rotate();
        probe(&sealer).await;
        tokio::task::yield_now().await;
    }
    for caller in callers {
        caller.await.unwrap();
    }
}
