//! The limits, one by one.

use super::*;
use kms_core::clock::ManualClock;
use tokio::sync::oneshot;
use tokio::time::Instant;

fn limits(settings: Settings) -> (Limits, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::new());
    (Limits::new(settings, clock.clone()), clock)
}

/// As many of `wanted` connections as are let in.
fn come(limits: &Limits, port: Port, from: &str, wanted: usize) -> Vec<Place> {
    let address = from.parse().unwrap();
    (0..wanted).map_while(|_| limits.connect(port, address).ok()).collect()
}

#[test]
fn connections_are_counted_by_address_and_together() {
    let settings = Settings { connections: 3, connections_per_address: 2, ..Settings::default() };
    let (limits, _) = limits(settings);
    let [one, same, two]: [IpAddr; 3] =
        ["10.0.0.1", "::ffff:10.0.0.1", "10.0.0.2"].map(|text| text.parse().unwrap());
    let first = limits.connect(Port::Keys, one).unwrap();
    let _second = limits.connect(Port::Tokens, same).unwrap();
    assert_eq!(limits.connect(Port::Keys, one).unwrap_err(), TooMuch::ConnectionsOfAddress);
    let _third = limits.connect(Port::Keys, two).unwrap();
    assert_eq!(limits.connect(Port::Keys, two).unwrap_err(), TooMuch::Connections);
    drop(first);
    let _fourth = limits.connect(Port::Keys, one).unwrap();
    assert_eq!(limits.connections(), 3);
    assert_eq!(limits.refused().map(|(_, count)| count), [1, 1, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn all_addresses_of_one_ipv6_network_are_one_peer() {
    let (limits, _) = limits(Settings { connections_per_address: 2, ..Settings::default() });
    let _one = come(&limits, Port::Keys, "2001:db8::1", 1);
    let _two = come(&limits, Port::Tokens, "2001:db8::ffff:0:0:2", 1);
    let same = "2001:db8::3".parse().unwrap();
    assert_eq!(limits.connect(Port::Keys, same).unwrap_err(), TooMuch::ConnectionsOfAddress);
    assert_eq!(come(&limits, Port::Keys, "2001:db8:0:1::1", 3).len(), 2, "another network");
}

#[test]
fn neither_some_addresses_nor_one_port_take_every_connection() {
    let (limits, _) = limits(Settings::default());
    let mut held = Vec::new();
    for port in [Port::Keys, Port::Tokens] {
        for host in 1..=4 {
            held.extend(come(&limits, port, &format!("192.0.2.{host}"), 512));
        }
        for host in 1..=9 {
            let from = format!("198.51.100.{host}");
            assert_eq!(come(&limits, port, &from, FEW).len(), FEW, "{port:?} from {from}");
        }
    }
    // The ports of the same addresses, one behind the other: what each of them can take at most.
    assert_eq!(held.len(), 448);
    drop(held);
    let from = |host| format!("203.0.113.{host}");
    let held: Vec<_> =
        (0..200).flat_map(|host| come(&limits, Port::Tokens, &from(host), FEW)).collect();
    assert_eq!(held.len(), 384, "of one port, by however many");
    assert_eq!(come(&limits, Port::Keys, &from(250), 100).len(), 64, "up to the last eighth");
    drop(held);
    assert_eq!(limits.connections(), 0);
    assert!(lock(&limits.open).networks.is_empty());
}

#[tokio::test(start_paused = true)]
async fn requests_take_turns_that_are_not_those_of_logins_and_a_refusal_takes_a_moment() {
    let (limits, _) = limits(Settings { requests: 1, logins: 1, ..Settings::default() });
    let beside = async {
        let began = Instant::now();
        assert_eq!(limits.request(async {}).await.unwrap_err(), TooMuch::Requests);
        assert!(began.elapsed() >= MOMENT);
        let second = limits.login(async { limits.login(async {}).await });
        assert_eq!(second.await.unwrap().unwrap_err(), TooMuch::Logins);
        limits.requests()
    };
    assert_eq!(limits.request(beside).await, Ok(1));
    assert_eq!(limits.refused().map(|(_, count)| count), [0, 0, 1, 1, 0, 0, 0, 0]);
    assert_eq!(limits.request(async { 7 }).await, Ok(7));
}

#[tokio::test(start_paused = true)]
async fn work_that_hangs_is_not_torn_and_gives_its_turn_back() {
    let (limits, _) = limits(Settings { requests: 1, ..Settings::default() });
    let limits = Arc::new(limits);
    let (end, ended) = oneshot::channel();
    let hanging = tokio::spawn({
        let limits = limits.clone();
        async move { limits.request(ended).await }
    });
    tokio::time::sleep(LONGEST_TURN - MOMENT).await;
    assert_eq!(limits.requests(), 1);
    tokio::time::sleep(MOMENT * 2).await;
    assert_eq!(limits.request(async {}).await, Ok(()));
    end.send("done").unwrap();
    assert_eq!(hanging.await.unwrap(), Ok(Ok("done")));
}

#[test]
fn a_rate_is_that_of_one_instance_and_comes_back_with_time() {
    let (limits, clock) = limits(Settings { rate_per_instance: 10, ..Settings::default() });
    let [noisy, quiet] = [1, 2].map(Uuid::from_u128).map(Whose::Instance);
    let spend = |whose| (0..100).filter(|_| limits.spend(whose).is_ok()).count();
    assert_eq!(spend(noisy), 10);
    assert_eq!(spend(quiet), 10, "another instance is not told of it");
    clock.advance(Duration::from_millis(500));
    assert_eq!(spend(noisy), 5);
    clock.advance(Duration::from_secs(3600));
    assert_eq!(spend(noisy), 10, "no more than a second's worth is saved up");
}

#[test]
fn each_rate_has_its_own_limit() {
    let settings = Settings {
        rate_per_instance: 3,
        rate_per_caller: 5,
        management_rate_per_caller: 7,
        login_rate_per_caller: 2,
        ..Settings::default()
    };
    let (limits, _) = limits(settings);
    let id = Uuid::from_u128(1);
    let spend = |whose| (0..100).filter(|_| limits.spend(whose).is_ok()).count();
    let whose = [Whose::Instance(id), Whose::Caller(id), Whose::Management(id), Whose::Logins(id)];
    assert_eq!(whose.map(spend), [3, 5, 7, 10]);
    assert_eq!(limits.refused().map(|(_, count)| count), [0, 0, 0, 0, 97, 95, 93, 90]);
}

/// Each has no token: at a cold start, or since the API key of all of them has a new secret.
#[test]
fn a_thousand_plug_ins_of_one_service_id_log_in_at_once() {
    let (limits, clock) = limits(Settings::default());
    let spend = |whose| (0..10_000).filter(|_| limits.spend(whose).is_ok()).count();
    let [busy, other] = [1, 2].map(Uuid::from_u128).map(Whose::Logins);
    assert!((1000..10_000).contains(&spend(busy)));
    clock.advance(Duration::from_secs(1));
    assert!((500..1000).contains(&spend(busy)), "and as many a second as go on trying");
    assert!(spend(other) >= 1000, "another service ID is not told of it");
}

#[test]
fn of_two_callers_in_one_instance_none_takes_it_all() {
    let (limits, _) = limits(Settings::default());
    let instance = Whose::Instance(Uuid::nil());
    let ask = |caller| {
        let whose = Whose::Caller(Uuid::from_u128(caller));
        (0..10_000)
            .filter(|_| limits.spend(whose).and_then(|()| limits.spend(instance)).is_ok())
            .count()
    };
    let (noisy, quiet) = (ask(1), ask(2));
    assert_eq!((noisy, quiet), (1000, 1000));
}

#[test]
fn no_rate_is_no_limit_and_many_instances_are_not_kept_for_ever() {
    let (unlimited, _) = limits(Settings { rate_per_instance: 0, ..Settings::default() });
    let nil = Whose::Instance(Uuid::nil());
    assert!((0..10_000).all(|_| unlimited.spend(nil).is_ok()));
    let (limits, clock) = limits(Settings::default());
    for instance in 0..25_000 {
        clock.advance(Duration::from_millis(1));
        limits.spend(Whose::Instance(Uuid::from_u128(instance))).unwrap();
    }
    assert!(lock(&limits.buckets).len() <= MOST_BUCKETS);
}

/// The clock stands still: none of them has become quiet.
#[test]
fn beyond_so_many_at_once_all_others_share_one_rate() {
    let (limits, _) = limits(Settings { rate_per_caller: 10, ..Settings::default() });
    let spend = |ids: std::ops::RangeInclusive<u128>| {
        let ids = ids.map(|id| Whose::Caller(Uuid::from_u128(id)));
        ids.filter(|whose| limits.spend(*whose).is_ok()).count()
    };
    assert_eq!(spend(1..=10_000), 10_000);
    assert_eq!(spend(10_001..=11_000), 10);
    assert_eq!(spend(1..=10), 10, "who is known has their own");
    assert_eq!(lock(&limits.buckets).len(), MOST_BUCKETS + 1);
}
