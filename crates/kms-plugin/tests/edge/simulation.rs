//! An API server and the plug-in through hours of virtual time: start, outage, rotation, disagreement, reload, upgrade.
//! The same scenario with the real kube-apiserver, as far as it fits into a minute, is in `e2e/tests/api_server.rs`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kms_core::clock::Clock;
use kms_daemon::lifecycle::Shutdown;
use kms_plugin::config::StatusVersion;
use kms_plugin::dek_cache::CrkName;
use kms_plugin::keys::{Crk, Policy, Ring};
use kms_plugin::metrics::Metrics;
use kms_plugin::probe;
use kms_plugin::provider::guard::{Guard, Patience, Tools};
use kms_plugin::random::Random;
use kms_plugin::sealer::{Refusal, Sealer};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::apiserver::{ApiServer, Etcd};
use crate::double::{FakeKms, HOUR, MINUTE, Mood, policy, refused};
use crate::serving::Plugin;

const SECOND: Duration = Duration::from_secs(1);
/// The plug-in's own default.
const PROBE_INTERVAL: Duration = Duration::from_secs(30);
/// How long a new key version or a returned service may take to reach an API server: a probe of the plug-in and a poll
/// of kube-apiserver.
const NOTICED: Duration = Duration::from_secs(30 + 60 + 1);

/// A control-plane node: its key service, its plug-in, what is stored.
struct Node {
    kms: Arc<FakeKms>,
    policy: Policy,
    version: StatusVersion,
    path: PathBuf,
    _dir: TempDir,
    etcd: Etcd,
    running: Option<(Plugin, Shutdown)>,
}

/// The plug-in's clock, which tokio's paused time moves.
#[derive(Debug)]
struct VirtualClock(Instant);

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + self.now()
    }
}

impl Node {
    /// Nothing runs yet.
    fn new(policy: Policy) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kms.sock");
        let (kms, etcd) = (FakeKms::new(), Etcd::default());
        Node { kms, policy, version: StatusVersion::V2, path, _dir: dir, etcd, running: None }
    }

    /// One that has run for a while.
    async fn running(policy: Policy) -> Node {
        let mut node = Node::new(policy);
        node.start();
        sleep(SECOND).await;
        node
    }

    fn start(&mut self) {
        let tools = Tools {
            clock: Arc::new(VirtualClock(Instant::now())),
            random: Random::system(),
            metrics: Metrics::unregistered(),
        };
        let patience = Patience { max_retries: 0, timeout: None };
        let service = Guard::new(self.kms.clone(), patience, tools.clone());
        let name = CrkName { instance: "instance".into(), crk: "crk".into() };
        let current = Arc::new(Crk { name, kp_version: 1, service });
        let ring = Ring { current, previous: Vec::new() };
        let sealer = Arc::new(Sealer::new(ring, self.policy, tools));
        let shutdown = Shutdown::new();
        tokio::spawn(probe::run(sealer.clone(), PROBE_INTERVAL, shutdown.clone()));
        let own = tempfile::tempdir().unwrap();
        let plugin = Plugin::serving(self.address(), own, sealer, self.version);
        self.running = Some((plugin, shutdown));
    }

    async fn stop(&mut self) {
        let (plugin, shutdown) = self.running.take().unwrap();
        shutdown.request();
        plugin.stop().await.unwrap();
    }

    fn address(&self) -> &str {
        self.path.to_str().unwrap()
    }

    async fn api_server(&self) -> ApiServer {
        ApiServer::start(self.address(), &self.etcd).await
    }
}

/// How long it takes, looked at every second, until this comes true.
async fn until(what: &str, mut come_true: impl AsyncFnMut() -> bool) -> Duration {
    let started = Instant::now();
    while !come_true().await {
        assert!(started.elapsed() < 2 * HOUR, "never: {what}");
        sleep(SECOND).await;
    }
    started.elapsed()
}

/// Whoever watches `/readyz`, every five seconds for this long.
async fn watched(api: &ApiServer, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        let _ = api.ready().await;
        sleep(5 * SECOND).await;
    }
}

#[tokio::test(start_paused = true)]
async fn case_29_an_hour_of_writes_costs_one_encrypt_and_some_polls() {
    let node = Node::running(policy()).await;
    let api = node.api_server().await;
    assert_eq!(api.asked(), [1, 1, 0], "primed while the configuration was loaded");
    for _ in 0..60 {
        sleep(MINUTE).await;
        api.write("secret", b"value").unwrap();
        assert_eq!(api.read("secret").await.unwrap(), b"value");
    }
    sleep(SECOND).await;
    assert_eq!(api.asked(), [61, 1, 0]);
    watched(&api, HOUR).await;
    let [polls, encrypts, decrypts] = api.asked();
    assert!(
        (3 * 60 - 5..=3 * 60 + 65).contains(&(polls - 61)),
        "{polls}: one in 20 s, and the loop"
    );
    assert_eq!([encrypts, decrypts], [1, 0]);
    let [wraps, unwraps] = <[usize; 2]>::from(node.kms.asked());
    assert!(wraps + unwraps < 600, "{wraps} {unwraps}: only the plug-in's own probes");
}

#[tokio::test(start_paused = true)]
async fn case_29_whoever_starts_first_nothing_is_stuck() {
    // First the API server, then the plug-in, at last the key service.
    let mut node = Node::new(policy());
    let api = node.api_server().await;
    assert_eq!(api.write("early", b"x").unwrap_err(), "there was no seed yet");
    node.kms.set(Mood::Unreachable);
    node.start();
    sleep(MINUTE).await;
    assert_eq!(api.ready().await.unwrap_err(), "connection refused");
    node.kms.set(Mood::Up);
    let took = until("a write", async || api.write("secret", b"x").is_ok()).await;
    assert!(took < NOTICED, "{took:?}");
    assert_eq!(api.read("secret").await.unwrap(), b"x");

    // With an empty memory, a key service that is away stops reads and writes alike, until it returns.
    node.stop().await;
    node.kms.set(Mood::Hangs);
    node.start();
    drop(api);
    let api = node.api_server().await;
    assert!(api.write("late", b"x").is_err());
    assert!(api.read("secret").await.is_err());
    node.kms.set(Mood::Up);
    until("a read", async || api.read("secret").await.is_ok()).await;
}

#[tokio::test(start_paused = true)]
async fn case_29_an_outage_stops_writes_three_minutes_after_the_last_dek_and_reads_never() {
    let node = Node::running(policy()).await;
    let api = node.api_server().await;
    api.write("secret", b"x").unwrap();
    node.kms.set(Mood::Unreachable);
    let went_on = until("writes stop", async || api.write("more", b"x").is_err()).await;
    let dek_and_seed = HOUR + 3 * MINUTE;
    assert!((HOUR - MINUTE..=dek_and_seed + MINUTE).contains(&went_on), "{went_on:?}");
    assert_eq!(api.ready().await.unwrap_err(), "connection refused");
    assert_eq!(api.read("secret").await.unwrap(), b"x", "kube-apiserver holds the seed");
    node.kms.set(Mood::Up);
    let took = until("a write", async || api.write("more", b"x").is_ok()).await;
    assert!(took <= 21 * SECOND, "{took:?}: a probe every 5 s, a poll every 10 s");
    assert_eq!(api.asked()[1..], [1, 0], "the same key_id, so the same seed");
}

#[tokio::test(start_paused = true)]
async fn case_29_a_withdrawn_key_stops_writes_within_minutes() {
    let node = Node::running(policy()).await;
    let api = node.api_server().await;
    node.kms.set(refused(Refusal::KeyState, "the key is disabled"));
    let went_on = until("writes stop", async || api.write("more", b"x").is_err()).await;
    assert!(went_on <= 3 * MINUTE + NOTICED, "{went_on:?}");
    assert_eq!(api.ready().await.unwrap_err(), "the key is disabled");
}

#[tokio::test(start_paused = true)]
async fn case_29_a_rotation_is_followed_and_each_stale_object_is_rewritten_once() {
    let node = Node::running(policy()).await;
    let api = node.api_server().await;
    for name in ["moved", "left"] {
        api.write(name, name.as_bytes()).unwrap();
    }
    let old = api.key_id("moved");
    let second_node = node.api_server().await;
    node.kms.rotate();
    assert!(!api.touch("moved").await.unwrap(), "nobody knows yet");
    let took = until("the new key_id", async || {
        api.write("new", b"new").unwrap();
        api.key_id("new") != old
    });
    let took = took.await;
    assert!(took < NOTICED, "{took:?}");
    assert!(api.touch("moved").await.unwrap());
    assert!(!api.touch("moved").await.unwrap(), "a second time there is nothing to do");
    assert_eq!(api.asked()[1], 2, "one Encrypt for each key_id");
    // Another API server may not have polled yet; what the first one wrote it can read.
    assert_eq!(second_node.read("moved").await.unwrap(), b"moved");

    drop(api);
    let api = node.api_server().await;
    for name in ["moved", "left", "new", "left"] {
        assert_eq!(api.read(name).await.unwrap(), name.as_bytes());
    }
    assert_eq!(api.asked()[2], 2, "one Decrypt for each seed");
}

#[tokio::test(start_paused = true)]
async fn case_29_when_status_and_encrypt_disagree_the_old_seed_goes_on_until_they_agree() {
    // A new DEK for each Encrypt: the one mode in which an Encrypt can see a rotation before Status does.
    let node = Node::running(Policy { new_dek: true, ..policy() }).await;
    let api = node.api_server().await;
    api.write("secret", b"x").unwrap();
    let first = api.key_id("secret");
    node.kms.rotate();
    api.between_status_and_encrypt({
        let kms = node.kms.clone();
        move || drop(kms.rotate())
    });
    let failed = until("a disagreement", async || api.ready().await.is_err()).await;
    assert!(failed < NOTICED, "{failed:?}");
    let text = api.ready().await.unwrap_err();
    assert!(text.starts_with("Status says key_id keelson/instance/crk/v2, Encrypt"), "{text}");
    api.write("secret", b"x").unwrap();
    assert_eq!(api.key_id("secret"), first, "the old seed");
    let took = until("health", async || api.ready().await.is_ok()).await;
    assert!(took <= 10 * SECOND, "{took:?}");
    api.write("secret", b"x").unwrap();
    assert!(api.key_id("secret").ends_with("/v3"));
}

#[tokio::test(start_paused = true)]
async fn case_29_a_reload_takes_a_new_seed_and_an_unhealthy_one_changes_nothing() {
    let node = Node::running(policy()).await;
    let mut api = node.api_server().await;
    api.write("secret", b"x").unwrap();
    api.reload().await.unwrap();
    assert_eq!(api.asked()[1], 2, "a seed of its own");
    for _ in 0..3 {
        assert_eq!(api.read("secret").await.unwrap(), b"x");
    }
    assert_eq!(api.asked()[2], 1, "and a cold cache");

    node.kms.set(refused(Refusal::Access, "the API key was revoked"));
    sleep(PROBE_INTERVAL).await;
    api.reload().await.unwrap_err();
    assert_eq!(api.read("secret").await.unwrap(), b"x", "the old configuration serves on");
    api.write("secret", b"y").unwrap();
}

#[tokio::test(start_paused = true)]
async fn case_29_a_changed_status_version_is_refused_until_a_reload_and_stops_no_write() {
    let mut node = Node::running(policy()).await;
    let mut api = node.api_server().await;
    node.stop().await;
    node.version = StatusVersion::V2Beta1;
    node.start();
    until("it is refused", async || api.ready().await.is_err()).await;
    assert_eq!(api.ready().await.unwrap_err(), "version was v2 and is v2beta1");
    sleep(HOUR).await;
    api.write("secret", b"x").unwrap();
    api.reload().await.unwrap();
    assert_eq!(api.ready().await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn case_26_five_minutes_without_the_plug_in_cost_at_most_the_backoff_of_the_api_server() {
    let mut node = Node::running(policy()).await;
    let api = node.api_server().await;
    api.write("secret", b"x").unwrap();
    node.stop().await;
    let went_on = until("writes stop", async || api.write("more", b"x").is_err()).await;
    assert!((2 * MINUTE..=4 * MINUTE).contains(&went_on), "{went_on:?}");
    sleep(5 * MINUTE - went_on).await;
    assert_eq!(api.read("secret").await.unwrap(), b"x");
    node.start();
    let took = until("a write", async || api.write("more", b"x").is_ok()).await;
    assert!(took <= Duration::from_secs(144 + 13), "{took:?}: 120 s and jitter, and a poll");
    assert_eq!(api.asked()[1..], [1, 0]);
}

#[tokio::test(start_paused = true)]
async fn case_26_an_upgrade_of_the_plug_in_is_seen_by_no_probe() {
    let mut node = Node::running(policy()).await;
    let api = node.api_server().await;
    for _ in 0..10 {
        node.stop().await;
        node.start();
        watched(&api, MINUTE).await;
        assert_eq!(api.ready().await, Ok(()));
        api.write("secret", b"x").unwrap();
    }
    assert_eq!(api.asked()[1], 1);
}
