//! The plug-in logs in with the token of a service account, which somebody has to keep fresh in its file: that ends,
//! or its issuer is away, or the profile is taken back. A file that is renewed in time is no row: nobody notices it.

use std::fs;
use std::path::PathBuf;

use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough, Shared, V1_PROVIDER, run_folder};
use keelson_e2e::clock::{Wrong, WrongClock};
use keelson_e2e::service_account::{self as account, AUDIENCE};
use keelson_e2e::{Error, Result};

use crate::columns::Before;
use crate::probe_often;

const NAME: &str = "outages-account";
const PROFILE: &str = "plugin";
/// kube-apiserver gives no token for less, and ours ends with it.
const SHORTEST: &str = "10m";
const AFTER_ITS_END: &str = "+660";
const UNUSABLE: &str = "CR_TOKEN_FILE cannot be used";

static CHAIN: Shared = Shared::new(|| {
    let mut chain =
        Chain::for_test(NAME, Some(Kubernetes::V1_37), SecretsThrough::V1, probe_often)?;
    account::trust_own_cluster(&mut chain, PROFILE, &["--role", "Viewer"])?;
    account::place(&file(), &account::token(chain.kubectl()?, SHORTEST)?)?;
    chain.plugin.restart_with(|config| {
        config.service_account = Some((file(), PROFILE.to_owned()));
    })?;
    Ok(chain)
});

#[test]
fn a_token_that_is_renewed_in_its_file_is_taken_over() -> Result<()> {
    CHAIN.with(|chain| {
        let clocks = Clocks::of(chain)?;
        fresh_token(chain)?;
        let before = Before::the_outage(chain, "renewed")?;
        let stored = chain.cluster()?.etcd.value("/registry/secrets/default/renewed-before")?;
        assert!(stored.starts_with(format!("k8s:enc:kms:v1:{V1_PROVIDER}:").as_bytes()));
        let audit = fs::read_to_string(&chain.key_service.audit);
        let audit = audit.map_err(Error::machine("read the audit log"))?;
        let mut wraps = audit.lines().filter(|line| line.contains(r#""action":"wrap""#));
        assert!(wraps.next_back().is_some_and(|line| line.contains("iam-Profile-")), "{audit}");

        let issued = chain.key_service.audited("issue_token")?;
        account::place(&file(), &account::token(chain.kubectl()?, "1h")?)?;
        clocks.set(AFTER_ITS_END)?;
        before.is_not_noticed(chain)?;
        assert!(chain.key_service.audited("issue_token")? > issued, "the first token has ended");
        clocks.set("+0")
    })
}

#[test]
fn the_service_accounts_token_is_not_renewed() -> Result<()> {
    CHAIN.with(|chain| {
        let clocks = Clocks::of(chain)?;
        fresh_token(chain)?;
        let before = Before::the_outage(chain, "stale")?;
        clocks.set(AFTER_ITS_END)?;
        let cause = "CR_TOKEN_FILE cannot be used: the token in it ended";
        before.goes_on(chain, cause, "unusable")?;
        chain.plugin.restart_with(|_| ())?;
        before.is_unavailable(chain, cause)?;
        account::place(&file(), &account::token(chain.kubectl()?, "1h")?)?;
        before.is_over(chain)?;
        clocks.set("+0")
    })
}

/// While the token that it was traded for lives, nobody notices.
#[test]
fn the_file_with_the_service_accounts_token_is_gone() -> Result<()> {
    CHAIN.with(|chain| {
        let clocks = Clocks::of(chain)?;
        fresh_token(chain)?;
        let before = Before::the_outage(chain, "gone")?;
        fs::remove_file(file()).map_err(Error::machine("remove a token"))?;
        before.is_not_noticed(chain)?;
        clocks.set(AFTER_ITS_END)?;
        before.goes_on(chain, UNUSABLE, "unusable")?;
        chain.plugin.restart_with(|_| ())?;
        before.is_unavailable(chain, UNUSABLE)?;
        account::place(&file(), &account::token(chain.kubectl()?, "1h")?)?;
        before.is_over(chain)?;
        clocks.set("+0")
    })
}

/// Another cluster issues the token, as where control planes are hosted. It is away, and the key service starts anew and
/// has none of its keys.
#[test]
fn the_issuer_of_the_service_accounts_token_is_away() -> Result<()> {
    CHAIN.with(|chain| {
        let clocks = Clocks::of(chain)?;
        let (_etcd, mut issuer) = account::another_cluster(&folder().join("hosting"))?;
        let own = (chain.cluster()?.apiserver.url.clone(), chain.cluster()?.apiserver.ca.clone());
        let both = [(&*own.0, &*own.1), (&*issuer.url, &*issuer.ca)];
        chain.key_service.trust(&both, AUDIENCE)?;
        account::profile(chain, &issuer, "hosted", &["--role", "Viewer"])?;
        account::place(&file(), &account::token(&issuer.kubectl, SHORTEST)?)?;
        chain.plugin.restart_with(|config| {
            config.service_account = Some((file(), "hosted".to_owned()));
        })?;
        let before = Before::the_outage(chain, "issuer")?;
        issuer.server.kill()?;
        chain.key_service.server.stop()?;
        chain.key_service.server.start()?;
        chain.key_service.wait_until_ready()?;
        before.is_not_noticed(chain)?;
        clocks.set(AFTER_ITS_END)?;
        let cause = "the token service says: ISSUER_UNAVAILABLE_ERR";
        before.goes_on(chain, cause, "unusable")?;
        issuer.start_again()?;
        account::place(&file(), &account::token(&issuer.kubectl, "1h")?)?;
        before.is_over(chain)?;
        clocks.set("+0")?;
        fresh_token(chain)?;
        chain.plugin.restart_with(|config| {
            config.service_account = Some((file(), PROFILE.to_owned()));
        })?;
        before.is_over(chain)
    })
}

/// It takes the account's token for one that has ended, or that is not good yet.
#[test]
fn the_clock_of_the_key_service_is_wrong_for_an_accounts_token() -> Result<()> {
    CHAIN.with(|chain| {
        let clocks = Clocks::of(chain)?;
        fresh_token(chain)?;
        let before = Before::the_outage(chain, "account-clock")?;
        for offset in ["+1d", "-1d"] {
            clocks.0[1].set(offset)?;
            before.goes_on(chain, "CR_TOKEN_FILE cannot be used: BXNIM0407E", "unusable")?;
        }
        clocks.set("+0")?;
        before.is_over(chain)
    })
}

#[test]
fn the_profile_is_deleted() -> Result<()> {
    CHAIN.with(|chain| {
        fresh_token(chain)?;
        let before = Before::the_outage(chain, "profile")?;
        let (owner, issuer) = account::delete_profile(chain, PROFILE)?;
        before.is_refused(chain, "BXNIM0513E")?;
        before.reads_end_with_kube_apiserver(chain, "BXNIM0513E")?;
        account::profile_for(chain, &owner, &issuer, PROFILE)?;
        before.is_over(chain)
    })
}

/// A token of [`SHORTEST`] life in the file, and in use.
fn fresh_token(chain: &mut Chain) -> Result<()> {
    account::place(&file(), &account::token(chain.kubectl()?, SHORTEST)?)?;
    chain.plugin.restart_with(|_| ())
}

/// The times of day of the plug-in and of its key service, which go together.
struct Clocks([WrongClock; 2]);

impl Clocks {
    fn of(chain: &mut Chain) -> Result<Clocks> {
        let clock = |name| WrongClock::create(&folder(), name);
        let clocks = [clock("kmsplugin")?, clock("kms-server")?];
        chain.plugin.server.add_env(clocks[0].envs(Wrong::TimeOfDay));
        chain.key_service.server.add_env(clocks[1].envs(Wrong::TimeOfDay));
        chain.key_service.server.stop()?;
        chain.key_service.server.start()?;
        chain.key_service.wait_until_ready()?;
        chain.plugin.restart_with(|_| ())?;
        Ok(Clocks(clocks))
    }

    fn set(&self, offset: &str) -> Result<()> {
        self.0.iter().try_for_each(|clock| clock.set(offset))
    }
}

fn folder() -> PathBuf {
    run_folder(&format!("e2e/{NAME}"))
}

fn file() -> PathBuf {
    folder().join("account.token")
}
