//! Gets the PKCS#11 module of Kryoptic, the second software token that the HSM layer is tested with.
//!
//! The file that KEELSON_KRYOPTIC names; else built once from the crates that `xtask/kryoptic/Cargo.lock` pins, and
//! kept outside the clone. Tests find it by that same variable.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use keelson_e2e::{Error, Result, assets, process};

use crate::{cache, cargo, packages};

pub(crate) const VARIABLE: &str = "KEELSON_KRYOPTIC";

/// Prints where the module is: `KEELSON_KRYOPTIC=$(cargo xtask kryoptic) cargo test -p kms-hsm`.
pub(crate) fn run() -> Result<ExitCode> {
    println!("{}", ensure()?.display());
    Ok(ExitCode::SUCCESS)
}

/// The module, if it need not be built.
pub(crate) fn found() -> Option<PathBuf> {
    given().or_else(|| Some(folder().ok()?.join(MODULE)).filter(|module| module.is_file()))
}

/// The module, found or built.
///
/// # Errors
/// When a Debian package is missing and cannot be installed, or the build fails; cargo has said why.
pub(crate) fn ensure() -> Result<PathBuf> {
    if let Some(module) = found() {
        return Ok(module);
    }
    packages::for_kryoptic()?;
    let folder = folder()?;
    // A build that broke off goes on here the next time.
    let build = folder.join("unfinished");
    fs::create_dir_all(&build).map_err(Error::machine(format!("make {}", build.display())))?;
    make(&build)?;
    let module = folder.join(MODULE);
    fs::rename(build.join("release").join(MODULE), &module)
        .map_err(Error::machine("keep Kryoptic's module"))?;
    fs::remove_dir_all(&build).map_err(Error::machine(format!("empty {}", build.display())))?;
    Ok(module)
}

const MODULE: &str = "libkryoptic_pkcs11.so";

/// As an absolute path: tests run in other folders than this program.
fn given() -> Option<PathBuf> {
    let given = std::env::var_os(VARIABLE).filter(|value| !value.is_empty())?;
    std::path::absolute(given).ok()
}

fn folder() -> Result<PathBuf> {
    let read = |name| {
        let path = source().join(name);
        fs::read_to_string(&path).map_err(Error::machine(format!("read {}", path.display())))
    };
    let key = cache::key(&[&read("Cargo.toml")?, &read("Cargo.lock")?, std::env::consts::ARCH]);
    Ok(cache::folder("kryoptic")?.join(key))
}

fn make(target: &Path) -> Result<()> {
    eprintln!("build Kryoptic's PKCS#11 module (once, about a minute) ...");
    let mut command =
        cargo::command(&["build", "-p", "kryoptic", "--release", "--locked", "--quiet"]);
    command.arg("--manifest-path").arg(source().join("Cargo.toml"));
    command.arg("--target-dir").arg(target);
    process::stdout(command, b"").map(drop)
}

fn source() -> PathBuf {
    assets::root().join("xtask/kryoptic")
}
