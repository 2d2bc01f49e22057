//! The plug-in straight on an HSM, with the real kube-apiserver: its keys in SoftHSM2, and in Kryoptic.

use std::time::Duration;

use keelson_e2e::driver::Driver;
use keelson_e2e::on_hsm::OnHsm;
use keelson_e2e::token::Model;
use keelson_e2e::{Error, Result, wait};

const SOON: Duration = Duration::from_secs(60);
const ROTATIONS: usize = 5;

#[test]
fn secrets_outlive_rotations_and_the_loss_of_softhsm() -> Result<()> {
    secrets_outlive(&mut OnHsm::for_test("on_hsm_soft", Model::SoftHsm)?)
}

#[test]
fn secrets_outlive_rotations_and_the_loss_of_kryoptic() -> Result<()> {
    secrets_outlive(&mut OnHsm::for_test("on_hsm_kryoptic", Model::Kryoptic)?)
}

fn secrets_outlive(chain: &mut OnHsm) -> Result<()> {
    create_and_read(chain, "first")?;
    let stored = chain.cluster.etcd.value("/registry/secrets/default/first")?;
    assert!(stored.starts_with(b"k8s:enc:kms:v2:"), "{}", String::from_utf8_lossy(&stored));
    rotations_leave_all_keys_readable(chain)?;
    a_loss_is_survived_without_a_restart(chain)?;
    a_start_without_the_hsm_waits_for_it(chain)
}

/// Every version is in the token, and a plug-in with an empty memory reads what each of them has wrapped.
fn rotations_leave_all_keys_readable(chain: &mut OnHsm) -> Result<()> {
    let mut sealed = Vec::new();
    for round in 0..=ROTATIONS {
        let driver = Driver::connect(&chain.plugin.config.socket)?;
        sealed.push(driver.v2_encrypt(format!("{round:032}").as_bytes())?);
        if round == ROTATIONS {
            break;
        }
        let version = chain.rotate()?;
        wait::until("the new CRK version", SOON, &[], || match driver.v2_status() {
            Ok(status) if status.key_id.ends_with(&version) => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
    }
    chain.plugin.server.stop()?;
    chain.plugin.start()?;
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    for (round, sealed) in sealed.iter().enumerate() {
        assert_eq!(driver.v2_decrypt(sealed)?, format!("{round:032}").as_bytes());
    }
    chain.cluster.apiserver.restart()?;
    assert_eq!(chain.cluster.apiserver.kubectl.secret_value("first", "password")?, "first");
    create_and_read(chain, "after-rotations")
}

fn a_loss_is_survived_without_a_restart(chain: &OnHsm) -> Result<()> {
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    let cached = driver.v2_encrypt(b"under the DEK in memory")?;
    chain.token.lose()?;
    chain.plugin.wait_for_probe("/healthz/readiness", 503)?;
    driver.v2_status()?;
    assert_eq!(driver.v2_decrypt(&cached)?, b"under the DEK in memory");
    create_and_read(chain, "while-away")?;
    let (alive, body) = chain.plugin.probe("/healthz/liveness")?;
    assert_eq!(alive, 200, "{body}");
    let (_, cause) = chain.plugin.probe("/healthz/readiness")?;
    assert!(cause.contains("the HSM is not available"), "{cause}");
    chain.token.give_back()?;
    chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
    create_and_read(chain, "after-the-loss")
}

fn a_start_without_the_hsm_waits_for_it(chain: &mut OnHsm) -> Result<()> {
    chain.plugin.server.stop()?;
    chain.token.unplug()?;
    chain.plugin.start_unready()?;
    let driver = Driver::connect(&chain.plugin.config.socket)?;
    assert!(matches!(driver.v2_status(), Err(Error::Rpc(_))));
    chain.token.plug_in()?;
    chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
    chain.cluster.apiserver.restart()?;
    for name in ["first", "after-rotations", "while-away", "after-the-loss"] {
        assert_eq!(chain.cluster.apiserver.kubectl.secret_value(name, "password")?, name);
    }
    create_and_read(chain, "after-the-cold-start")
}

/// kube-apiserver may need a moment to connect to a restarted plug-in.
fn create_and_read(chain: &OnHsm, name: &str) -> Result<()> {
    let kubectl = &chain.cluster.apiserver.kubectl;
    wait::until("a secret is accepted", SOON, &[], || {
        kubectl.create_secret(name, "password", name).map_err(|error| error.to_string())
    })?;
    assert_eq!(kubectl.secret_value(name, "password")?, name);
    Ok(())
}
