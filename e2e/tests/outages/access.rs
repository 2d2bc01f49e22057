//! Somebody took the right to use the CRK away: what is refused stays refused, whatever is in memory.

use keelson_e2e::Result;
use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough};

use crate::columns::Before;
use crate::{CHAIN, probe_often};

#[test]
fn the_api_key_is_revoked() -> Result<()> {
    CHAIN.with(|chain| {
        let whole = chain.plugin.config.clone();
        let doomed = chain.kmsctl.create_credential("doomed", "Viewer")?;
        chain.plugin.restart_with(|config| config.api_key = doomed.api_key.clone())?;
        let before = Before::the_outage(chain, "revoked")?;
        let cause = "BXNIM0415E:Provided API key could not be found";
        chain.kmsctl.revoke_api_key(&doomed.api_key_id)?;
        before.is_refused(chain, cause)?;
        before.reads_end_with_kube_apiserver(chain, cause)?;
        // A new API key in the configuration, and no restart.
        chain.plugin.reload_with(|config| *config = whole)?;
        before.is_over(chain)
    })
}

#[test]
fn the_crk_is_disabled() -> Result<()> {
    CHAIN.with(|chain| {
        let before = Before::the_outage(chain, "disabled")?;
        let crk = chain.crk_id.clone();
        chain.kmsctl.run(&["keys", "disable", &crk], b"")?;
        before.is_refused(chain, "KEY_ACTION_INVALID_STATE_ERR")?;
        before.reads_end_with_kube_apiserver(chain, "KEY_ACTION_INVALID_STATE_ERR")?;
        chain.kmsctl.run(&["keys", "enable", &crk], b"")?;
        before.is_over(chain)
    })
}

/// A chain of its own: what is in its etcd cannot be read by anybody any more.
#[test]
fn the_crk_is_deleted() -> Result<()> {
    let kubernetes = Some(Kubernetes::V1_37);
    let name = "outages-deleted";
    let mut chain = Chain::for_test(name, kubernetes, SecretsThrough::V1, probe_often)?;
    let before = Before::the_outage(&chain, "deleted")?;
    let crk = chain.crk_id.clone();
    chain.kmsctl.run(&["keys", "delete", &crk, "--yes"], b"")?;
    before.is_refused(&chain, "KEY_DELETED_ERR")?;
    before.reads_end_with_kube_apiserver(&mut chain, "KEY_DELETED_ERR")
}
