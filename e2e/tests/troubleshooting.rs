//! The texts that operators search for reach `kubectl create secret`, and the chain recovers when the cause is gone.

use std::time::Duration;

use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough, Shared};
use keelson_e2e::plugin::Config;
use keelson_e2e::{Result, wait};

static CHAIN: Shared = Shared::new(|| {
    Chain::for_test("troubleshooting", Some(Kubernetes::V1_37), SecretsThrough::V1, |_| ())
});

#[test]
fn a_wrong_api_key() -> Result<()> {
    let text = "rpc error: code = Unknown desc = BXNIM0415E:Provided API key could not be found";
    broken("api-key", text, |config| config.api_key = "no-such-api-key".to_owned())
}

#[test]
fn a_wrong_instance() -> Result<()> {
    let text = "desc = Bad Request: Request requires valid Instance Header containing a valid UUID";
    broken("instance", text, |config| config.instance_id = NOBODY.to_owned())
}

#[test]
fn a_wrong_root_key() -> Result<()> {
    broken("root-key", "rpc error: code = Unavailable desc = ", |config| {
        config.crk_id = NOBODY.to_owned();
    })
}

#[test]
fn a_service_that_does_not_answer() -> Result<()> {
    CHAIN.with(|chain| {
        chain.key_service.server.kill()?;
        chain.plugin.restart_with(|_| ())?;
        refused_with(chain, "no-service", "rpc error: code = Unavailable desc = ")?;
        chain.key_service.server.start()?;
        chain.key_service.wait_until_ready()?;
        accepted(chain, "no-service")
    })
}

const NOBODY: &str = "00000000-0000-4000-8000-000000000000";

/// Restarts the plug-in with a broken configuration, sees the text, repairs it and sees a secret accepted.
fn broken(name: &str, text: &str, break_it: fn(&mut Config)) -> Result<()> {
    CHAIN.with(|chain| {
        let whole = chain.plugin.config.clone();
        chain.plugin.restart_with(break_it)?;
        refused_with(chain, name, text)?;
        chain.plugin.restart_with(|config| *config = whole)?;
        accepted(chain, name)
    })
}

/// kube-apiserver may need a moment to connect to the restarted plug-in; until then it says so instead.
fn refused_with(chain: &Chain, name: &str, text: &str) -> Result<()> {
    let kubectl = chain.kubectl()?;
    wait::until(&format!("a refusal with {text:?}"), Duration::from_secs(60), &[], || match kubectl
        .create_secret(name, "password", name)
    {
        Err(error) if error.to_string().contains(text) => Ok(()),
        Err(error) => Err(error.to_string()),
        Ok(_) => Err("the secret was created".to_owned()),
    })
}

fn accepted(chain: &Chain, name: &str) -> Result<()> {
    let kubectl = chain.kubectl()?;
    wait::until("a secret is accepted again", Duration::from_secs(60), &[], || {
        kubectl.create_secret(name, "password", name).map_err(|error| error.to_string())
    })?;
    assert_eq!(kubectl.secret_value(name, "password")?, name);
    Ok(())
}
