//! The Debian packages that the chain needs beside Rust and Go.

use std::process::Command;

use keelson_e2e::{Error, Result, process, softhsm};

/// Installs what is missing when that is possible without asking, and says so.
///
/// # Errors
/// When something is missing and cannot be installed: names it and the command.
pub(crate) fn ensure() -> Result<()> {
    let missing: Vec<&Package> = PACKAGES.iter().filter(|package| !(package.is_there)()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    let command = format!("apt-get install {}", names.join(" "));
    if !rustix::process::geteuid().is_root() || !is_program("apt-get") {
        let why: Vec<String> = missing
            .iter()
            .map(|package| format!("{} ({})", package.name, package.reason))
            .collect();
        return Err(Error::Missing {
            what: why.join(", "),
            remedy: format!("run `{command}` as root"),
        });
    }
    eprintln!("installing Debian packages: {}", names.join(", "));
    apt(&["update", "-qq"])?;
    apt(&[&["install", "-y", "-qq", "--no-install-recommends"], names.as_slice()].concat())?;
    match missing.iter().find(|package| !(package.is_there)()) {
        None => Ok(()),
        Some(package) => Err(Error::Missing {
            what: format!("{} ({})", package.name, package.reason),
            remedy: "its package was installed, but it is not where it should be".to_owned(),
        }),
    }
}

/// Whether a program is in PATH.
pub(crate) fn is_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

struct Package {
    name: &'static str,
    reason: &'static str,
    is_there: fn() -> bool,
}

const PACKAGES: &[Package] = &[Package {
    name: "softhsm2",
    reason: "the HSM of the demo and of the tests",
    is_there: || softhsm::library().is_some(),
}];

fn apt(args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    process::stdout(command, b"").map(drop)
}
