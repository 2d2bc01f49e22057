//! A SoftHSM2 token with thousands of keys, in minutes instead of half an hour.
//!
//! SoftHSM looks at every object of the token whenever it makes a key, so a token takes the longer the fuller it is. But
//! an object is a file that any process with the token's own file can read: so the keys are made fifty at a time in an
//! almost empty token, each fifty are put aside, and in the end they are all put back.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use keelson_e2e::{Error, Result};
use serde_json::json;

use super::service::{State, run_load};

const AT_ONCE: u32 = 50;

/// Adds `keys` keys to token and database. No server may run meanwhile.
pub(super) fn make(programs: &Path, state: &State, keys: u32) -> Result<()> {
    let token = only_folder(&state.dir.join("tokens"))?;
    let aside = state.dir.join("aside");
    fs::create_dir(&aside).map_err(Error::machine(format!("make {}", aside.display())))?;
    let before = files(&token)?;
    let mut left = keys;
    while left > 0 {
        let some = left.min(AT_ONCE);
        let config = state.dir.join("kms-server.yaml");
        let task =
            json!({"do": "make", "config": config, "instance": state.instance, "keys": some});
        run_load(programs, &state.dir, &task)?;
        let made = files(&token)?;
        carry(made.difference(&before), &token, &aside)?;
        left -= some;
    }
    carry(files(&aside)?.iter(), &aside, &token)?;
    fs::remove_dir(&aside).map_err(Error::machine(format!("remove {}", aside.display())))
}

fn carry<'a>(names: impl Iterator<Item = &'a OsString>, from: &Path, to: &Path) -> Result<()> {
    for name in names {
        fs::rename(from.join(name), to.join(name)).map_err(Error::machine(format!(
            "move {} to {}",
            name.display(),
            to.display()
        )))?;
    }
    Ok(())
}

fn files(folder: &Path) -> Result<BTreeSet<OsString>> {
    let failed = || Error::machine(format!("list {}", folder.display()));
    let entries = fs::read_dir(folder).map_err(failed())?;
    entries.map(|entry| Ok(entry.map_err(failed())?.file_name())).collect()
}

fn only_folder(tokens: &Path) -> Result<PathBuf> {
    let names = files(tokens)?;
    let name = names.first().ok_or_else(|| {
        Error::machine(format!("find the token in {}", tokens.display()))(
            std::io::ErrorKind::NotFound.into(),
        )
    })?;
    Ok(tokens.join(name))
}
