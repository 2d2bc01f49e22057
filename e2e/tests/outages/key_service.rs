//! The key service is down, hangs, lost its HSM, or cannot write its audit log.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use keelson_e2e::{Error, Result};

use crate::columns::Before;
use crate::{CHAIN, folder};

#[test]
fn the_key_service_is_down() -> Result<()> {
    CHAIN.with(|chain| {
        let cause = "Unavailable: the key service cannot be reached";
        let before = Before::the_outage(chain, "down")?;
        chain.key_service.server.kill()?;
        before.goes_on(chain, cause, "unreachable")?;
        // With an empty memory there is nothing to go on with; kube-apiserver serves what it has in its own.
        chain.plugin.restart_with(|_| ())?;
        before.is_unavailable(chain, cause)?;
        chain.key_service.server.start()?;
        before.is_over(chain)
    })
}

#[test]
fn the_key_service_hangs() -> Result<()> {
    CHAIN.with(|chain| {
        let before = Before::the_outage(chain, "hangs")?;
        chain.key_service.server.freeze()?;
        before.goes_on(chain, "the key service did not answer in time", "timed_out")?;
        chain.key_service.server.thaw()?;
        before.is_over(chain)
    })
}

#[test]
fn the_hsm_is_away() -> Result<()> {
    CHAIN.with(|chain| {
        let before = Before::the_outage(chain, "hsm")?;
        let tokens = folder().join("tokens");
        let away = tokens.with_extension("away");
        rename(&tokens, &away)?;
        before.goes_on(chain, "HSM_UNAVAILABLE_ERR", "unusable")?;
        chain.key_service.wait_until_not_ready("HSM: ")?;
        rename(&away, &tokens)?;
        before.is_over(chain)
    })
}

#[test]
fn the_audit_disk_is_full() -> Result<()> {
    CHAIN.with(|chain| {
        let before = Before::the_outage(chain, "disk")?;
        let audit = chain.key_service.audit.clone();
        let kept = audit.with_extension("kept");
        rename(&audit, &kept)?;
        // The kernel's own full disk.
        symlink("/dev/full", &audit).map_err(Error::machine("fill the disk"))?;
        before.goes_on(chain, "AUDIT_UNAVAILABLE_ERR", "unusable")?;
        chain.key_service.wait_until_not_ready("audit log")?;
        fs::remove_file(&audit).map_err(Error::machine("empty the disk"))?;
        rename(&kept, &audit)?;
        before.is_over(chain)?;
        chain.key_service.wait_until_ready()
    })
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::machine(format!("move {}", from.display())))
}
