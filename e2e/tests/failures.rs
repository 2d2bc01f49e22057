//! Failures in the middle, with the real kube-apiserver. Nothing that was acknowledged is lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use keelson_e2e::apiserver::Kubectl;
use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough, Shared};
use keelson_e2e::driver::Driver;
use keelson_e2e::{Error, Result, wait};

static CHAIN: Shared = Shared::new(|| {
    Chain::for_test("failures", Some(Kubernetes::V1_37), SecretsThrough::V1, |config| {
        config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
    })
});

const SOON: Duration = Duration::from_secs(60);

#[test]
fn the_key_service_is_killed_and_restarted_under_writes() -> Result<()> {
    CHAIN.with(|chain| {
        let kubectl = chain.kubectl()?.clone();
        let acknowledged = while_writing(&kubectl, "killed", || {
            chain.key_service.server.kill()?;
            // The DEK is in the plug-in's memory: writes go on without the service.
            let kubectl = chain.kubectl()?;
            for number in 0..3 {
                kubectl.create_secret(&format!("during-{number}"), "password", "during")?;
            }
            chain.key_service.server.start()?;
            chain.key_service.wait_until_ready()
        })?;
        chain.plugin.restart_with(|_| ())?;
        chain.cluster_mut()?.apiserver.restart()?;
        all_there(chain.kubectl()?, &acknowledged)
    })
}

#[test]
fn the_key_service_hangs() -> Result<()> {
    CHAIN.with(|chain| {
        let kubectl = chain.kubectl()?;
        kubectl.create_secret("hanging", "password", "cached")?;
        let driver = Driver::connect(&chain.plugin.config.socket)?;
        let cipher = driver.v1_encrypt(b"cached")?;
        let sealed = driver.v2_encrypt(b"cached")?;

        let answers_at_once = || -> Result<()> {
            wait::at_once("Status", || driver.v2_status())?;
            wait::at_once("v1 Encrypt", || driver.v1_encrypt(b"under the DEK in memory"))?;
            assert_eq!(wait::at_once("v1 Decrypt", || driver.v1_decrypt(&cipher))?, b"cached");
            assert_eq!(wait::at_once("v2 Decrypt", || driver.v2_decrypt(&sealed))?, b"cached");
            Ok(())
        };
        chain.key_service.server.freeze()?;
        (0..20).try_for_each(|_| answers_at_once())?;
        // Also once the plug-in itself hangs in its probe of the service, and has seen it fail.
        chain.plugin.wait_for_probe("/healthz/readiness", 503)?;
        (0..20).try_for_each(|_| answers_at_once())?;
        assert_eq!(kubectl.secret_value("hanging", "password")?, "cached");
        let (status, body) = chain.plugin.probe("/healthz/liveness")?;
        assert_eq!(status, 200, "{body}");

        chain.key_service.server.thaw()?;
        chain.key_service.wait_until_ready()?;
        chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
        kubectl.create_secret("hung", "password", "thawed").map(drop)
    })
}

#[test]
fn the_plug_in_is_killed_and_restarted_over_its_stale_socket() -> Result<()> {
    CHAIN.with(|chain| {
        let kubectl = chain.kubectl()?.clone();
        let acknowledged = while_writing(&kubectl, "stale", || {
            chain.plugin.server.kill()?;
            assert!(chain.plugin.config.socket.exists(), "SIGKILL leaves the socket file behind");
            chain.plugin.start()
        })?;
        accepted(&kubectl, "over-stale-socket")?;
        chain.cluster_mut()?.apiserver.restart()?;
        all_there(&kubectl, &acknowledged)
    })
}

#[test]
fn kube_apiserver_restarts_while_the_key_service_is_down() -> Result<()> {
    CHAIN.with(|chain| {
        let kubectl = chain.kubectl()?.clone();
        kubectl.create_secret("outage", "password", "from the DEK cache")?;
        kubectl.create_configmap("outage", "greeting", "from the DEK cache")?;
        chain.key_service.server.kill()?;
        chain.cluster_mut()?.apiserver.restart()?;
        assert_eq!(kubectl.secret_value("outage", "password")?, "from the DEK cache");
        assert_eq!(kubectl.configmap_value("outage", "greeting")?, "from the DEK cache");
        chain.key_service.server.start()?;
        chain.key_service.wait_until_ready()
    })
}

const VALUE: &str = "acknowledged";

/// Creates secrets without a pause while `disturb` runs, and for ten more afterwards. Returns those that
/// kube-apiserver acknowledged; the others may fail.
fn while_writing(
    kubectl: &Kubectl,
    prefix: &str,
    disturb: impl FnOnce() -> Result<()>,
) -> Result<BTreeMap<String, String>> {
    let disturbed = AtomicBool::new(false);
    let (acknowledged, result) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut acknowledged = BTreeMap::new();
            let mut afterwards = 0;
            for number in 0.. {
                let (name, value) = (format!("{prefix}-{number}"), format!("value {number}"));
                if kubectl.create_secret(&name, "password", &value).is_ok() {
                    acknowledged.insert(name, value);
                    afterwards += usize::from(disturbed.load(Ordering::Acquire));
                }
                if afterwards >= 10 || number >= 500 {
                    break;
                }
            }
            acknowledged
        });
        let result = disturb();
        disturbed.store(true, Ordering::Release);
        (writer.join(), result)
    });
    result?;
    let acknowledged = acknowledged.map_err(|_| Error::answer("the writer", "it panicked"))?;
    assert!(acknowledged.len() >= 10, "writes did not go on: {acknowledged:?}");
    Ok(acknowledged)
}

fn all_there(kubectl: &Kubectl, acknowledged: &BTreeMap<String, String>) -> Result<()> {
    for (name, value) in acknowledged {
        assert_eq!(&kubectl.secret_value(name, "password")?, value, "{name} was acknowledged");
    }
    Ok(())
}

/// kube-apiserver may need a moment to connect to a restarted plug-in.
fn accepted(kubectl: &Kubectl, name: &str) -> Result<()> {
    wait::until("a secret is accepted", SOON, &[], || {
        kubectl.create_secret(name, "password", VALUE).map_err(|error| error.to_string())
    })
    .map(drop)
}
