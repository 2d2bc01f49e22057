//! Clocks that are wrong, and the end of what lives through an outage: a token, a cached DEK.

use std::time::Duration;

use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough, Shared, run_folder};
use keelson_e2e::clock::{Wrong, WrongClock};
use keelson_e2e::relay::Relay;
use keelson_e2e::{Error, Result, wait};

use crate::columns::Before;
use crate::network::UNREACHABLE;
use crate::probe_often;

const NAME: &str = "outages-time";

static CHAIN: Shared =
    Shared::new(|| Chain::for_test(NAME, Some(Kubernetes::V1_37), SecretsThrough::V1, probe_often));

/// Its tokens are refused in both directions, and a new one is got in the same call: nobody notices.
#[test]
fn the_clock_of_the_key_service_is_wrong() -> Result<()> {
    CHAIN.with(|chain| {
        let clock = clock_of_the_key_service(chain, NAME)?;
        let before = Before::the_outage(chain, "server-clock")?;
        let tokens = chain.key_service.audited("issue_token")?;
        for (jumps, offset) in (1..).zip(["+1d", "-1d", "+0"]) {
            clock.set(offset)?;
            before.is_not_noticed(chain)?;
            let issued = chain.key_service.audited("issue_token")? - tokens;
            assert!(
                issued >= jumps,
                "a token that was good in another time is not good in {offset}"
            );
        }
        Ok(())
    })
}

/// Certificates are judged by it when a connection is made, tokens and DEKs are not.
#[test]
fn the_clock_of_the_plug_in_is_wrong() -> Result<()> {
    CHAIN.with(|chain| {
        let clock = clock_of_the_plug_in(chain, Wrong::TimeOfDay)?;
        let before = Before::the_outage(chain, "plugin-clock")?;
        for offset in ["+1d", "-1d", "+80y"] {
            clock.set(offset)?;
            before.is_not_noticed(chain)?;
        }
        chain.key_service.server.stop()?;
        chain.key_service.server.start()?;
        before.goes_on(chain, "certificate expired", "unreachable")?;
        clock.set("+0")?;
        before.is_over(chain)
    })
}

/// While its token lives nobody notices; then it is as if the key service were away.
#[test]
fn the_token_service_is_away() -> Result<()> {
    CHAIN.with(|chain| {
        let clock = clock_of_the_key_service(chain, NAME)?;
        let whole = chain.plugin.config.clone();
        let relay = Relay::to(port_in(&whole.token_url)?)?;
        let through = format!("https://127.0.0.1:{}/oidc/token", relay.port);
        chain.plugin.restart_with(|config| config.token_url = through)?;
        let before = Before::the_outage(chain, "token")?;
        relay.cut();
        before.is_not_noticed(chain)?;
        clock.set("+1d")?;
        before.goes_on(chain, UNREACHABLE, "unreachable")?;
        chain.plugin.restart_with(|_| ())?;
        before.is_unavailable(chain, UNREACHABLE)?;
        relay.mend();
        before.is_over(chain)?;
        clock.set("+0")?;
        chain.plugin.restart_with(|config| *config = whole)?;
        before.is_over(chain)
    })
}

/// CACHE_TIMEOUT_IN_HOURS (here 1) after the last answer of the key service its DEKs are gone.
#[test]
fn a_cached_dek_ends_in_an_outage() -> Result<()> {
    CHAIN.with(|chain| {
        let clock = clock_of_the_plug_in(chain, Wrong::Everything)?;
        let before = Before::the_outage(chain, "end")?;
        chain.key_service.server.kill()?;
        before.goes_on(chain, UNREACHABLE, "unreachable")?;
        clock.set("+3400")?;
        before.goes_on(chain, UNREACHABLE, "unreachable")?;
        clock.set("+3700")?;
        before.is_unavailable(chain, UNREACHABLE)?;
        chain.key_service.server.start()?;
        before.is_over(chain)
    })
}

/// What it sealed can be read for as long as it is there, with KMS v1. A kube-apiserver that starts meanwhile reads
/// nothing through v2: that asks for one good Status and Encrypt first. In a chain of its own, which it is the CRK of from
/// now on.
#[test]
fn the_crk_expires() -> Result<()> {
    let kubernetes = Some(Kubernetes::V1_37);
    let name = "outages-expired";
    let mut chain = Chain::for_test(name, kubernetes, SecretsThrough::V1, probe_often)?;
    let clock = clock_of_the_key_service(&mut chain, name)?;
    let crk = chain.kmsctl.create_key_until("expires", "2090-01-01T00:00:00Z")?;
    chain.plugin.restart_with(|config| config.crk_id = crk)?;
    let before = Before::the_outage(&chain, "expired")?;
    chain.kubectl()?.create_configmap("through-v2", "kept", "kept")?;
    clock.set("+80y")?;
    before.only_opens(&chain, "KEY_ACTION_INVALID_STATE_ERR")?;
    assert_eq!(chain.kubectl()?.configmap_value("through-v2", "kept")?, "kept");
    before.reads_go_on_in_a_new_kube_apiserver(&mut chain)?;
    let through_v2 = |wanted: &str| {
        let kubectl = chain.kubectl()?;
        let what = format!("{wanted:?} of a configmap through v2");
        wait::until(&what, Duration::from_secs(60), &[], || {
            let seen = match kubectl.configmap_value("through-v2", "kept") {
                Ok(value) => value,
                Err(error) => error.to_string(),
            };
            if seen.contains(wanted) { Ok(()) } else { Err(seen) }
        })
    };
    through_v2("nil transformer")?;
    clock.set("+0")?;
    through_v2("kept")?;
    before.is_over(&chain)
}

fn clock_of_the_key_service(chain: &mut Chain, name: &str) -> Result<WrongClock> {
    let clock = WrongClock::create(&run_folder(&format!("e2e/{name}")), "kms-server")?;
    chain.key_service.server.add_env(clock.envs(Wrong::TimeOfDay));
    chain.key_service.server.stop()?;
    chain.key_service.server.start()?;
    chain.key_service.wait_until_ready()?;
    Ok(clock)
}

fn clock_of_the_plug_in(chain: &mut Chain, wrong: Wrong) -> Result<WrongClock> {
    let clock = WrongClock::create(&run_folder(&format!("e2e/{NAME}")), "kmsplugin")?;
    chain.plugin.server.add_env(clock.envs(wrong));
    chain.plugin.restart_with(|_| ())?;
    Ok(clock)
}

fn port_in(url: &str) -> Result<u16> {
    let port = url.split([':', '/']).find_map(|part| part.parse().ok());
    port.ok_or_else(|| Error::answer("the chain", format!("no port in {url}")))
}
