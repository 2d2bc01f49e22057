//! A new version of the root key: new secrets go under it, old ones stay readable and can be moved.

use std::time::Duration;

use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough};
use keelson_e2e::driver::Driver;
use keelson_e2e::{Error, Result, wait};

#[test]
fn after_rotation_new_secrets_use_the_new_key_and_old_ones_can_be_moved() -> Result<()> {
    let mut chain =
        Chain::for_test("rotation", Some(Kubernetes::V1_37), SecretsThrough::V2, |_| ())?;
    for name in ["moved", "left"] {
        chain.kubectl()?.create_secret(name, "password", name)?;
    }
    let old = key_id(&chain, "moved")?;

    chain.kmsctl.rotate_key(&chain.crk_id)?;
    let new = wait_for_another_key(&chain, &old)?;
    let status = Driver::connect(&chain.plugin.config.socket)?.v2_status()?;
    assert_eq!(status.key_id, new, "Status and what was stored name different keys");

    // Nothing is rewritten by itself, and the old version still opens what it sealed.
    assert_eq!(key_id(&chain, "moved")?, old);
    assert_eq!(chain.kubectl()?.secret_value("moved", "password")?, "moved");

    let json = chain.kubectl()?.run(&["get", "secret", "moved", "-o", "json"], b"")?;
    chain.kubectl()?.run(&["replace", "-f", "-"], json.as_bytes())?;
    assert_eq!(key_id(&chain, "moved")?, new);

    // With empty memories on the whole way, both versions are asked of the HSM again.
    chain.plugin.server.stop()?;
    chain.plugin.start()?;
    chain.cluster_mut()?.apiserver.restart()?;
    assert_eq!(key_id(&chain, "left")?, old);
    for name in ["moved", "left", "new"] {
        assert_eq!(chain.kubectl()?.secret_value(name, "password")?, name);
    }
    Ok(())
}

/// Writes until a secret is sealed under another key_id than `old`. kube-apiserver asks Status once a minute, and
/// when it is asked for its own health.
fn wait_for_another_key(chain: &Chain, old: &str) -> Result<String> {
    let kubectl = chain.kubectl()?;
    kubectl.create_secret("new", "password", "new")?;
    wait::until("a secret under the new key_id", Duration::from_secs(180), &[], || {
        let attempt = || -> Result<String> {
            kubectl.run(&["get", "--raw", "/readyz"], b"")?;
            kubectl.run(&["delete", "secret", "new"], b"")?;
            kubectl.create_secret("new", "password", "new")?;
            key_id(chain, "new")
        };
        match attempt() {
            Ok(new) if new != old => Ok(new),
            Ok(_) => Err("still the old key_id".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    })
}

/// The key_id under which a secret is stored.
fn key_id(chain: &Chain, name: &str) -> Result<String> {
    let stored = chain.cluster()?.etcd.value(&format!("/registry/secrets/default/{name}"))?;
    let explained = chain.kmsctl.inspect(&stored)?;
    explained["key_id"]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::answer("kmsctl inspect", explained.to_string()))
}
