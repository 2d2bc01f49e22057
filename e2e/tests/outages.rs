//! Rows of `docs/outages.md` that no other file proves, with the real kube-apiserver. Each test restores the chain.

use std::path::Path;
use std::time::Duration;

use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough, Shared, run_folder};
use keelson_e2e::driver::Driver;
use keelson_e2e::{Error, Result, wait};

static CHAIN: Shared = Shared::new(|| {
    Chain::for_test("outages", Some(Kubernetes::V1_37), SecretsThrough::V1, |config| {
        config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
    })
});

const SOON: Duration = Duration::from_secs(60);

#[test]
fn the_root_key_is_deleted() -> Result<()> {
    CHAIN.with(|chain| {
        let whole = chain.plugin.config.clone();
        let doomed = chain.kmsctl.create_key("doomed")?;
        chain.plugin.restart_with(|config| config.crk_id = doomed.clone())?;
        chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
        let driver = Driver::connect(&chain.plugin.config.socket)?;
        let cipher = driver.v1_encrypt(b"lost with its root key")?;

        chain.kmsctl.run(&["keys", "delete", &doomed, "--yes"], b"")?;
        chain.plugin.wait_for_probe("/healthz/readiness", 503)?;
        let (_, cause) = chain.plugin.probe("/healthz/readiness")?;
        assert!(cause.contains("KEY_DELETED"), "{cause}");
        refused_with(chain, "KEY_DELETED")?;
        // No DEK outlives the key: neither the one that seals nor those that open.
        assert!(matches!(driver.v2_status(), Err(Error::Rpc(_))));
        assert!(matches!(driver.v1_encrypt(b"refused"), Err(Error::Rpc(_))));
        assert!(matches!(driver.v1_decrypt(&cipher), Err(Error::Rpc(_))));
        let (alive, body) = chain.plugin.probe("/healthz/liveness")?;
        assert_eq!(alive, 200, "{body}");

        chain.plugin.restart_with(|config| *config = whole)?;
        accepted(chain, "after-deletion")
    })
}

#[test]
fn the_token_service_is_unreachable_from_the_start() -> Result<()> {
    CHAIN.with(|chain| {
        let whole = chain.plugin.config.clone();
        let nobody = keelson_e2e::ports::free()?;
        chain.plugin.restart_with(|config| {
            config.token_url = format!("https://127.0.0.1:{nobody}/oidc/token");
        })?;
        let driver = Driver::connect(&chain.plugin.config.socket)?;
        assert!(matches!(driver.v2_status(), Err(Error::Rpc(_))));
        assert!(matches!(driver.v1_encrypt(b"refused"), Err(Error::Rpc(_))));
        refused_with(chain, "the key service cannot be reached")?;
        let (ready, cause) = chain.plugin.probe("/healthz/readiness")?;
        assert_eq!(ready, 503, "{cause}");
        chain.plugin.restart_with(|config| *config = whole)?;
        accepted(chain, "after-token-service")
    })
}

#[test]
fn the_hsm_loses_its_token_and_gets_it_back() -> Result<()> {
    CHAIN.with(|chain| {
        chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
        accepted(chain, "before-the-loss")?;
        let driver = Driver::connect(&chain.plugin.config.socket)?;
        let cipher = driver.v1_encrypt(b"cached")?;
        let tokens = run_folder("e2e/outages").join("tokens");
        let away = tokens.with_extension("away");
        rename(&tokens, &away)?;
        chain.plugin.wait_for_probe("/healthz/readiness", 503)?;
        driver.v2_status()?;
        assert_eq!(driver.v1_decrypt(&cipher)?, b"cached");
        let (_, metrics) = chain.plugin.probe("/metrics")?;
        let not_ready = r#"kmsplugin_ready{region="IBMCloudPakForMCM"} 0"#;
        assert!(metrics.contains(not_ready), "{metrics}");
        accepted(chain, "under-the-dek-in-memory")?;
        let (alive, body) = chain.plugin.probe("/healthz/liveness")?;
        assert_eq!(alive, 200, "{body}");
        let (_, cause) = chain.plugin.probe("/healthz/readiness")?;
        assert!(cause.contains("Unavailable: "), "{cause}");

        rename(&away, &tokens)?;
        chain.key_service.wait_until_ready()?;
        chain.plugin.wait_for_probe("/healthz/readiness", 200)?;
        accepted(chain, "after-the-loss")
    })
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(Error::machine(format!("move {}", from.display())))
}

/// kube-apiserver may need a moment to connect to a restarted plug-in.
fn accepted(chain: &Chain, name: &str) -> Result<()> {
    let kubectl = chain.kubectl()?;
    wait::until("a secret is accepted", SOON, &[], || {
        kubectl.create_secret(name, "password", name).map_err(|error| error.to_string())
    })?;
    assert_eq!(kubectl.secret_value(name, "password")?, name);
    Ok(())
}

/// The cause reaches whoever runs kubectl.
fn refused_with(chain: &Chain, text: &str) -> Result<()> {
    let kubectl = chain.kubectl()?;
    wait::until(&format!("a refusal with {text:?}"), SOON, &[], || {
        match kubectl.create_secret("refused", "password", "refused") {
            Err(error) if error.to_string().contains(text) => Ok(()),
            Err(error) => Err(error.to_string()),
            Ok(_) => Err("the secret was created".to_owned()),
        }
    })
}
