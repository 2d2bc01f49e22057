//! `docs/rotation.md`, for real: each kind of rotation while the plug-in runs, several nodes, many versions.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, Node, SecretsThrough, run_folder};
use keelson_e2e::driver::Driver;
use keelson_e2e::pki::{self, Pki};
use keelson_e2e::plugin::Plugin;
use keelson_e2e::{Error, Result, apiserver::Kubectl, wait};

/// The probe's interval, and one wrap and unwrap.
const PROBE_IN_SECONDS: u64 = 60;
const PLUGIN_FOLLOWS_WITHIN: Duration = Duration::from_secs(PROBE_IN_SECONDS + 5);
/// kube-apiserver asks Status once a minute.
const APISERVER_FOLLOWS_WITHIN: Duration = Duration::from_secs(60 + 10);
/// A probe each second, on a machine with other work.
const SOON: Duration = Duration::from_secs(60);

#[test]
fn case_22_two_nodes_follow_a_rotation_in_time_and_read_each_other_meanwhile() -> Result<()> {
    let chain = Chain::for_test("nodes", Some(Kubernetes::V1_37), SecretsThrough::V2, |config| {
        config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
    })?;
    let dir = run_folder("e2e/nodes").join("node-2");
    let node = Node::join(&chain, &dir, SecretsThrough::V2, |config| {
        config.more = vec![("PROBE_INTERVAL_IN_SECONDS", PROBE_IN_SECONDS.to_string())];
    })?;
    let (here, there) = (chain.kubectl()?, &node.apiserver.kubectl);
    let (first, second) = (Driver::connect(&chain.plugin.config.socket)?, driver(&node.plugin)?);
    let old = first.v2_status()?.key_id;
    assert_eq!(second.v2_status()?.key_id, old);

    // Right behind a probe of node 2, so that the nodes differ for as long as they can.
    probes_succeed(&node.plugin, 1, PLUGIN_FOLLOWS_WITHIN)?;
    chain.kmsctl.rotate_key(&chain.crk_id)?;
    let new = wait_for_status("node 1", &first, &old, PLUGIN_FOLLOWS_WITHIN)?;
    wait_for_write(&chain, here, "here", &new)?;
    assert_eq!(second.v2_status()?.key_id, old, "node 2 has not heard of it: this is the skew");
    there.create_secret("there", "password", "there")?;
    assert_eq!(key_id(&chain, "there")?, old);
    assert_eq!(there.secret_value("here", "password")?, "here");
    assert_eq!(here.secret_value("there", "password")?, "there");

    let followed = wait_for_status("node 2", &second, &old, PLUGIN_FOLLOWS_WITHIN)?;
    assert_eq!(followed, new);
    wait_for_write(&chain, there, "there-as-well", &new)?;
    assert_eq!(here.secret_value("there-as-well", "password")?, "there-as-well");
    Ok(())
}

#[test]
fn case_21_another_crk_and_back_again_without_a_restart() -> Result<()> {
    let mut chain =
        Chain::for_test("crks", Some(Kubernetes::V1_37), SecretsThrough::V2, |config| {
            config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
        })?;
    let (a, instance) = (chain.crk_id.clone(), chain.key_service.instance_id.clone());
    let b = chain.kmsctl.create_key("successor")?;
    let driver = driver(&chain.plugin)?;
    let first = driver.v2_status()?.key_id;
    chain.kubectl()?.create_secret("a", "password", "a")?;
    let cipher = driver.v1_encrypt(b"under the first entry")?;

    chain.plugin.reconfigure(|config| {
        (config.kp_version, config.crk_id) = (2, b.clone());
        config.previous = vec![(1, a.clone())];
    })?;
    let second = wait_for_status("the plug-in", &driver, &first, SOON)?;
    assert!(second.starts_with(&format!("keelson/{instance}/{b}/")), "{second}");
    wait_for_write(&chain, chain.kubectl()?, "b", &second)?;

    // A return under the VERSION that was left would bring back its key_id.
    let whole = chain.plugin.config.clone();
    let back = chain.plugin.reconfigure(|config| {
        (config.kp_version, config.crk_id) = (1, a.clone());
        config.previous = vec![(2, b.clone())];
    });
    assert!(back.is_err(), "it was taken over");
    assert_eq!(driver.v2_status()?.key_id, second, "the configuration before runs on");
    chain.plugin.config = whole;
    let before = chain.plugin.reloads()?;
    pki::write_private(&chain.plugin.config_file, &{
        let config = &mut chain.plugin.config;
        (config.kp_version, config.crk_id) = (3, a.clone());
        config.previous = vec![(2, b.clone()), (1, a.clone())];
        config.yaml()
    })?;
    wait::until("another configuration", SOON, &[], || {
        let now = chain.plugin.reloads().map_err(|error| error.to_string())?;
        if now == before { Err(now) } else { Ok(()) }
    })?;
    let third = wait_for_status("the plug-in", &driver, &second, SOON)?;
    assert_eq!(third, format!("{first}/3"), "the first CRK version, the third entry");
    wait_for_write(&chain, chain.kubectl()?, "a-again", &third)?;

    assert_eq!(driver.v1_decrypt(&cipher)?, b"under the first entry");
    chain.plugin.server.stop()?;
    chain.plugin.start()?;
    chain.cluster_mut()?.apiserver.restart()?;
    for (name, under) in [("a", &first), ("b", &second), ("a-again", &third)] {
        assert_eq!(key_id(&chain, name)?, *under);
        assert_eq!(chain.kubectl()?.secret_value(name, "password")?, name);
    }
    let driver = self::driver(&chain.plugin)?;
    assert_eq!(driver.v2_status()?.key_id, third, "the same after a restart");
    assert_eq!(driver.v1_decrypt(&cipher)?, b"under the first entry");
    Ok(())
}

#[test]
fn a_new_api_key_in_its_file_takes_the_place_of_a_revoked_one() -> Result<()> {
    let mut chain = Chain::for_test("api-key-file", None, SecretsThrough::V2, |config| {
        config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
    })?;
    let file = run_folder("e2e/api-key-file").join("api-key");
    let old = chain.kmsctl.create_credential("old", "Viewer")?;
    pki::write_private(&file, &old.api_key)?;
    chain.plugin.reconfigure(|config| config.api_key_file = Some(file.clone()))?;
    let driver = driver(&chain.plugin)?;
    let sealed = driver.v2_encrypt(&[7; 32])?;

    let new = chain.kmsctl.create_credential("new", "Viewer")?;
    let before = chain.plugin.reloads()?;
    replace(&file, &new.api_key)?;
    chain.plugin.wait_for_reload(&before)?;
    chain.kmsctl.revoke_api_key(&old.api_key_id)?;
    some_probes_succeed(&chain.plugin)?;
    assert_eq!(driver.v2_status()?.key_id, sealed.key_id);
    assert_eq!(driver.v2_decrypt(&sealed)?, [7; 32]);

    // And it is the new one that counts: without it there is no way in.
    chain.kmsctl.revoke_api_key(&new.api_key_id)?;
    chain.plugin.wait_for_probe("/healthz/readiness", 503)
}

#[test]
fn a_new_ca_of_key_service_and_token_service_is_taken_over() -> Result<()> {
    let mut chain = Chain::for_test("new-ca", None, SecretsThrough::V2, |config| {
        config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
    })?;
    let dir = run_folder("e2e/new-ca");
    let driver = driver(&chain.plugin)?;
    let sealed = driver.v2_encrypt(&[7; 32])?;
    let ca = chain.key_service.ca.clone();
    let old_ca = read(&ca)?;
    let new = {
        let folder = dir.join("new-pki");
        fs::create_dir(&folder).map_err(Error::machine("make a folder"))?;
        Pki::create(&folder)?
    };
    let new_ca = read(&new.ca)?;

    // Both, while the servers' certificates change.
    let before = chain.plugin.reloads()?;
    replace(&ca, &format!("{old_ca}{new_ca}"))?;
    chain.plugin.wait_for_reload(&before)?;
    some_probes_succeed(&chain.plugin)?;
    replace(&dir.join("server.crt"), &read(&new.server_cert)?)?;
    replace(&dir.join("server.key"), &read(&new.server_key)?)?;
    chain.key_service.server.stop()?;
    chain.key_service.server.start()?;
    chain.key_service.wait_until_ready()?;
    chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
    some_probes_succeed(&chain.plugin)?;

    // Then the new one alone; and the old one alone is not trusted any more.
    let before = chain.plugin.reloads()?;
    replace(&ca, &new_ca)?;
    chain.plugin.wait_for_reload(&before)?;
    some_probes_succeed(&chain.plugin)?;
    assert_eq!(driver.v2_decrypt(&sealed)?, [7; 32]);
    assert_eq!(driver.v2_status()?.key_id, sealed.key_id);
    let before = chain.plugin.reloads()?;
    replace(&ca, &old_ca)?;
    chain.plugin.wait_for_reload(&before)?;
    chain.plugin.wait_for_probe("/healthz/readiness", 503)
}

#[test]
fn case_15_fifty_rotations_leave_everything_readable() -> Result<()> {
    let mut chain = Chain::for_test("fifty", None, SecretsThrough::V2, |config| {
        config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
    })?;
    let driver = driver(&chain.plugin)?;
    let mut sealed = Vec::new();
    for number in 0..=50u8 {
        let payload = [number; 32];
        sealed.push((payload, driver.v1_encrypt(&payload)?, driver.v2_encrypt(&payload)?));
        let reported = driver.v2_status()?.key_id;
        assert_eq!(sealed.last().map(|(_, _, v2)| &v2.key_id), Some(&reported));
        if number < 50 {
            chain.kmsctl.rotate_key(&chain.crk_id)?;
            wait_for_status("the plug-in", &driver, &reported, SOON)?;
        }
    }
    let mut key_ids: Vec<_> = sealed.iter().map(|(_, _, v2)| v2.key_id.clone()).collect();
    key_ids.sort();
    key_ids.dedup();
    assert_eq!(key_ids.len(), 51, "a key_id came back");
    all_open(&driver, &sealed)?;
    chain.plugin.server.stop()?;
    chain.plugin.start()?;
    all_open(&self::driver(&chain.plugin)?, &sealed)
}

type Both = ([u8; 32], Vec<u8>, kms_api::grpc::v2::EncryptResponse);

fn all_open(driver: &Driver, sealed: &[Both]) -> Result<()> {
    for (payload, v1, v2) in sealed {
        assert_eq!(driver.v1_decrypt(v1)?, payload);
        assert_eq!(driver.v2_decrypt(v2)?, payload);
    }
    Ok(())
}

fn driver(plugin: &Plugin) -> Result<Driver> {
    Driver::connect(&plugin.config.socket)
}

fn wait_for_status(who: &str, driver: &Driver, old: &str, within: Duration) -> Result<String> {
    wait::until(&format!("another key_id from {who}"), within, &[], || match driver.v2_status() {
        Ok(status) if status.key_id != old => Ok(status.key_id),
        Ok(_) => Err("still the old one".to_owned()),
        Err(error) => Err(error.to_string()),
    })
}

/// Writes `name` until it is stored under `key_id`.
fn wait_for_write(chain: &Chain, kubectl: &Kubectl, name: &str, key_id: &str) -> Result<()> {
    let what = format!("{name} under {key_id}");
    wait::until(&what, APISERVER_FOLLOWS_WITHIN, &[], || {
        let attempt = || -> Result<String> {
            // It asks Status for its own health, too, at most every 20 seconds.
            kubectl.run(&["get", "--raw", "/readyz"], b"")?;
            let _ = kubectl.run(&["delete", "secret", name], b"");
            kubectl.create_secret(name, "password", name)?;
            self::key_id(chain, name)
        };
        match attempt() {
            Ok(seen) if seen == key_id => Ok(()),
            Ok(seen) => Err(seen),
            Err(error) => Err(error.to_string()),
        }
    })
}

/// Two more wraps and unwraps come back from the key service, so that at least one was asked for after this call.
fn some_probes_succeed(plugin: &Plugin) -> Result<()> {
    probes_succeed(plugin, 2, SOON)?;
    plugin.wait_for_probe("/healthz/readiness", 200)
}

fn probes_succeed(plugin: &Plugin, more: u64, within: Duration) -> Result<()> {
    let first = probes(plugin)?;
    wait::until(&format!("{more} more probes"), within, &[], || match probes(plugin) {
        Ok(now) if now >= first + more => Ok(()),
        Ok(now) => Err(format!("{now} after {first}")),
        Err(error) => Err(error.to_string()),
    })
}

fn probes(plugin: &Plugin) -> Result<u64> {
    let (_, metrics) = plugin.probe("/metrics")?;
    let successes = metrics
        .lines()
        .filter(|line| line.starts_with("kmsplugin_provider_calls_total"))
        .filter(|line| line.contains("\"unwrap\"") && line.contains("\"ok\""))
        .find_map(|line| line.rsplit(' ').next()?.parse().ok());
    successes.ok_or_else(|| Error::answer("kmsplugin", metrics))
}

/// As editors and the kubelet do: the file is there, whole, at every moment.
fn replace(path: &Path, text: &str) -> Result<()> {
    let new: PathBuf = path.with_extension("new");
    pki::write_private(&new, text)?;
    fs::rename(&new, path).map_err(Error::machine(format!("replace {}", path.display())))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(Error::machine(format!("read {}", path.display())))
}

/// The key_id under which a secret is stored.
fn key_id(chain: &Chain, name: &str) -> Result<String> {
    let stored = chain.cluster()?.etcd.value(&format!("/registry/secrets/default/{name}"))?;
    let explained = chain.kmsctl.inspect(&stored)?;
    let key_id = explained["key_id"].as_str().map(str::to_owned);
    key_id.ok_or_else(|| Error::answer("kmsctl inspect", explained.to_string()))
}
