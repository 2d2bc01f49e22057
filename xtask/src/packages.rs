//! The Debian packages that the chain needs beside Rust and Go.

use std::process::Command;

use keelson_e2e::{Error, Result, process, softhsm};

/// What a running chain needs.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn for_the_chain() -> Result<()> {
    ensure(&[SOFTHSM2])
}

/// What a running chain and the tests need.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn for_the_tests() -> Result<()> {
    ensure(&[SOFTHSM2, PYTHON3_VENV])
}

/// Installs what is missing when that is possible without asking, and says so.
///
/// # Errors
/// When something is missing and cannot be installed: names it and the command.
fn ensure(packages: &[Package]) -> Result<()> {
    let missing: Vec<&Package> = packages.iter().filter(|package| !(package.is_there)()).collect();
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

const SOFTHSM2: Package = Package {
    name: "softhsm2",
    reason: "the HSM of the demo and of the tests",
    is_there: || softhsm::library().is_some(),
};

const PYTHON3_VENV: Package = Package {
    name: "python3-venv",
    reason: "IBM's own Python client, which the tests run against kms-server",
    is_there: || {
        let mut python = Command::new("python3");
        python.args(["-c", "import venv, ensurepip"]);
        process::stdout(python, b"").is_ok()
    },
};

fn apt(args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    process::stdout(command, b"").map(drop)
}
