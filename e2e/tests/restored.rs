//! The key service is restored from a backup of before a rotation, and a plug-in lives through it: it must not go on
//! sealing under a version that nobody can unwrap, and is well again after a rotation, without a restart.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use keelson_e2e::assets::{Kubernetes, Programs};
use keelson_e2e::chain::{Chain, SecretsThrough, run_folder};
use keelson_e2e::driver::Driver;
use keelson_e2e::{Error, Result, process, wait};

const NAME: &str = "restored";
const SOON: Duration = Duration::from_secs(60);
const CAUSE: &str = "had replaced: if it was restored from a backup, rotate the key";
/// What `restore` and `check` end with when the token holds a version that the database does not know.
const LEFT_OVER: i32 = 3;

#[test]
fn a_plug_in_that_lives_through_a_restore_seals_nothing_that_nobody_can_open() -> Result<()> {
    let mut chain = Chain::for_test(NAME, Some(Kubernetes::V1_37), SecretsThrough::V2, |config| {
        config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
    })?;
    let dir = run_folder(&format!("e2e/{NAME}"));
    let backup = dir.join("backup.db");
    chain.kubectl()?.create_secret("old", "password", "old")?;
    let before = key_id(&chain)?;
    assert_eq!(kms_server(&chain, &["backup", "--to", &shown(&backup)])?, 0);
    chain.kmsctl.rotate_key(&chain.crk_id)?;
    let lost = another_key_id(&chain, &[&before])?;
    stored_under(&chain, "lost", &lost)?;

    chain.key_service.server.stop()?;
    for name in ["kms.db", "kms.db-wal", "kms.db-shm"] {
        let (from, to) = (dir.join(name), dir.join(name.replace("kms.db", "gone.db")));
        if from.exists() {
            std::fs::rename(&from, to).map_err(Error::machine("move the database away"))?;
        }
    }
    assert_eq!(kms_server(&chain, &["restore", "--from", &shown(&backup)])?, LEFT_OVER);
    chain.key_service.server.start()?;
    chain.key_service.wait_until_ready()?;

    seals_nothing(&chain)?;
    // What is in memory is still read, and so can be saved.
    assert_eq!(chain.kubectl()?.secret_value("lost", "password")?, "lost");

    chain.kmsctl.rotate_key(&chain.crk_id)?;
    let new = another_key_id(&chain, &[&before, &lost])?;
    chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
    stored_under(&chain, "new", &new)?;
    let json = chain.kubectl()?.run(&["get", "secret", "lost", "-o", "json"], b"")?;
    chain.kubectl()?.run(&["replace", "-f", "-"], json.as_bytes())?;

    // With empty memories on the whole way.
    chain.plugin.server.stop()?;
    chain.plugin.start()?;
    chain.cluster_mut()?.apiserver.restart()?;
    for name in ["old", "lost", "new"] {
        assert_eq!(chain.kubectl()?.secret_value(name, "password")?, name);
    }
    Ok(())
}

fn seals_nothing(chain: &Chain) -> Result<()> {
    // The rotation is so young that it might be a replica that lags: a minute longer.
    wait::until(&format!("readiness without {CAUSE:?}"), 3 * SOON, &[], || {
        match chain.plugin.probe("/healthz/readiness") {
            Ok((503, text)) if text.contains(CAUSE) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })?;
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    for (call, answer) in [
        ("Status", driver.v2_status().map(drop)),
        ("v2 Encrypt", driver.v2_encrypt(b"now").map(drop)),
        ("v1 Encrypt", driver.v1_encrypt(b"now").map(drop)),
    ] {
        match answer {
            Err(Error::Rpc(status)) if status.message().contains(CAUSE) => {}
            other => return Err(Error::answer(call, format!("{other:?}"))),
        }
    }
    let (_, metrics) = chain.plugin.probe("/metrics")?;
    let ready = metrics.lines().find(|line| line.starts_with("kmsplugin_ready{"));
    assert!(ready.is_some_and(|line| line.ends_with(" 0")), "{ready:?}");
    Ok(())
}

fn key_id(chain: &Chain) -> Result<String> {
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    Ok(driver.v2_status()?.key_id)
}

fn another_key_id(chain: &Chain, than: &[&str]) -> Result<String> {
    wait::until("another key_id", SOON, &[], || match key_id(chain) {
        Ok(key_id) if !than.contains(&&*key_id) => Ok(key_id),
        other => Err(format!("{other:?}")),
    })
}

/// Writes until it is. kube-apiserver asks Status once a minute, and when it is asked for its own health.
fn stored_under(chain: &Chain, name: &str, wanted: &str) -> Result<()> {
    let kubectl = chain.kubectl()?;
    wait::until(&format!("{name} under {wanted}"), 3 * SOON, &[], || {
        let attempt = || -> Result<Option<String>> {
            kubectl.run(&["get", "--raw", "/readyz"], b"")?;
            kubectl.run(&["delete", "secret", name, "--ignore-not-found"], b"")?;
            kubectl.create_secret(name, "password", name)?;
            let stored =
                chain.cluster()?.etcd.value(&format!("/registry/secrets/default/{name}"))?;
            let explained = chain.kmsctl.inspect(&stored)?;
            Ok(explained["key_id"].as_str().map(str::to_owned))
        };
        match attempt() {
            Ok(Some(key_id)) if key_id == wanted => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
}

/// Runs one of kms-server's commands on the chain's database and token, and returns its exit code.
fn kms_server(chain: &Chain, args: &[&str]) -> Result<i32> {
    let config = &chain.key_service.config;
    let mut command = Command::new(Programs::find()?.kms_server);
    command.args(args).arg("--config").arg(config);
    command.env("SOFTHSM2_CONF", config.with_file_name("softhsm2.conf"));
    let output = process::output(command, b"")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    output.status.code().ok_or_else(|| Error::answer("kms-server", text))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
