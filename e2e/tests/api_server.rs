//! The scenario of `crates/kms-plugin/tests/edge/simulation.rs` with the real kube-apiserver, as far as it fits into a
//! minute or two: who starts first, polls, a plug-in that is away, a changed Status version, rotation, cold caches.

use std::time::Duration;

use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough};
use keelson_e2e::{Error, Result, wait};

/// Longer than kube-apiserver keeps a probe's outcome (20 s), and than it waits between two attempts to connect after
/// an outage of seconds.
const SOON: Duration = Duration::from_secs(90);

#[test]
fn case_29_a_real_api_server_and_the_plug_in_through_each_other_s_absence() -> Result<()> {
    let mut chain =
        Chain::for_test("api_server", Some(Kubernetes::V1_37), SecretsThrough::V2, |config| {
            config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
        })?;
    write(&chain, "before")?;
    the_api_server_starts_first(&mut chain)?;
    assert_eq!(asked(&chain, "Encrypt")?, 1, "primed");
    assert_eq!(chain.kubectl()?.secret_value("before", "password")?, "before");
    asked_for_each(1, asked(&chain, "Decrypt")?);
    for number in 0..10 {
        write(&chain, &format!("secret-{number}"))?;
    }
    assert_eq!(asked(&chain, "Encrypt")?, 1, "never per write");

    the_plug_in_is_away(&mut chain)?;
    its_status_version_changes(&mut chain)?;
    assert_eq!(asked(&chain, "Encrypt")?, 1, "the same key_id, so the same seed");

    chain.kmsctl.rotate_key(&chain.crk_id)?;
    let kubectl = chain.kubectl()?.clone();
    wait::until("a second Encrypt", SOON, &[], || {
        kubectl.run(&["get", "--raw", "/readyz"], b"").map_err(|error| error.to_string())?;
        match asked(&chain, "Encrypt").map_err(|error| error.to_string())? {
            2 => Ok(()),
            count => Err(format!("{count} Encrypts")),
        }
    })?;
    write(&chain, "after")?;
    chain.cluster_mut()?.apiserver.restart()?;
    for name in ["before", "secret-0", "secret-9", "after"] {
        assert_eq!(chain.kubectl()?.secret_value(name, "password")?, name);
    }
    assert_eq!(asked(&chain, "Encrypt")?, 1);
    // Of the first API server, and of the second one before and after the rotation.
    asked_for_each(3, asked(&chain, "Decrypt")?);
    Ok(())
}

/// Each seed that is in no cache is asked for, by every worker that decodes an object under it meanwhile: ten for
/// secrets, ten for configmaps.
fn asked_for_each(seeds: u64, decrypts: u64) {
    assert!((seeds..=20 * seeds).contains(&decrypts), "{decrypts} Decrypts for {seeds} seeds");
}

fn the_api_server_starts_first(chain: &mut Chain) -> Result<()> {
    chain.plugin.server.stop()?;
    let server = &mut chain.cluster_mut()?.apiserver.server;
    server.kill()?;
    server.start()?;
    let kubectl = chain.kubectl()?.clone();
    // It listens at once; its other checks wait a minute for a storage that can be read.
    wait::until("kube-apiserver without its plug-in", SOON, &[], || {
        kubectl.run(&["get", "--raw", "/livez/ping"], b"").map_err(|error| error.to_string())
    })?;
    assert!(kubectl.run(&["get", "--raw", "/readyz"], b"").is_err());
    let too_early = ["create", "configmap", "too-early", "--request-timeout=3s"];
    assert!(kubectl.run(&too_early, b"").is_err());
    assert!(kubectl.run(&["get", "secret", "before", "--request-timeout=3s"], b"").is_err());
    chain.plugin.start()?;
    ready(chain)?;
    write(chain, "no-longer-too-early")
}

fn the_plug_in_is_away(chain: &mut Chain) -> Result<()> {
    chain.plugin.server.kill()?;
    unready(chain)?;
    // The key state lives for three minutes, and no write asks the plug-in.
    write(chain, "without-the-plug-in")?;
    assert_eq!(chain.kubectl()?.secret_value("before", "password")?, "before");
    chain.plugin.start()?;
    ready(chain)
}

/// Nobody should do this; what kube-apiserver makes of it is why the plug-in never changes it while it runs.
fn its_status_version_changes(chain: &mut Chain) -> Result<()> {
    let whole = chain.plugin.config.clone();
    chain.plugin.restart_with(|config| {
        config.more.push(("KMS_V2_STATUS_VERSION", "v2beta1".to_owned()));
    })?;
    let cause = unready(chain)?;
    assert!(cause.contains("kms-providers failed"), "{cause}");
    write(chain, "under-another-version")?;
    chain.plugin.restart_with(|config| *config = whole)?;
    ready(chain)
}

fn write(chain: &Chain, name: &str) -> Result<()> {
    chain.kubectl()?.create_secret(name, "password", name).map(drop)
}

fn ready(chain: &Chain) -> Result<()> {
    let kubectl = chain.kubectl()?;
    wait::until("kube-apiserver's readiness", SOON, &[], || {
        kubectl.run(&["get", "--raw", "/readyz"], b"").map_err(|error| error.to_string())
    })
    .map(drop)
}

/// Waits until it is not ready, and returns what it says.
fn unready(chain: &Chain) -> Result<String> {
    let kubectl = chain.kubectl()?;
    wait::until("kube-apiserver says that it is not ready", SOON, &[], || {
        match kubectl.run(&["get", "--raw", "/readyz"], b"") {
            Ok(_) => Err("it is ready".to_owned()),
            Err(error) => Ok(error.to_string()),
        }
    })
}

/// How many calls of a method were answered, by kube-apiserver's own count since it was started.
fn asked(chain: &Chain, method: &str) -> Result<u64> {
    let metrics = chain.kubectl()?.run(&["get", "--raw", "/metrics"], b"")?;
    let name = "apiserver_envelope_encryption_kms_operations_latency_seconds_count{";
    let wanted = [r#"grpc_status_code="OK""#, &format!("KeyManagementService/{method}\"")];
    let count = metrics
        .lines()
        .filter(|line| line.starts_with(name) && wanted.iter().all(|text| line.contains(text)))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
        .sum();
    if metrics.contains(name) { Ok(count) } else { Err(Error::answer("/metrics", metrics)) }
}
