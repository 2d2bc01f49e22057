//! The Debian packages that the chain needs beside Rust and Go.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use keelson_e2e::{Error, Result, clock, process, softhsm};

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
    ensure(&[SOFTHSM2, OPENSC, PYTHON3_VENV, SYSTEMD, LIBFAKETIME, PROMETHEUS])
}

/// What the build of Kryoptic needs: its OpenSSL and SQLite are the machine's.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn for_kryoptic() -> Result<()> {
    ensure(&[PKG_CONFIG, LIBSSL_DEV, LIBSQLITE3_DEV, LIBCLANG_DEV])
}

/// What the build of the FIPS module needs: its own build scripts are in CMake, Go and Perl.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn for_the_fips_module() -> Result<()> {
    ensure(&[CMAKE, GO, PERL, GCC])
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
    names.iter().try_for_each(|name| end_service(name))?;
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

const LIBFAKETIME: Package = Package {
    name: "libfaketime",
    reason: "a wrong clock for one process of the end-to-end tests",
    is_there: || clock::library().is_some(),
};

const OPENSC: Package = Package {
    name: "opensc",
    reason: "its pkcs11-tool makes the tokens of the end-to-end tests",
    is_there: || is_program("pkcs11-tool"),
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

const SYSTEMD: Package = Package {
    name: "systemd",
    reason: "passes the plug-in its socket and judges its units; it is not started",
    is_there: || is_program("systemd-analyze") && is_program("systemd-socket-activate"),
};

const PROMETHEUS: Package = Package {
    name: "prometheus",
    reason: "loads the alert rules and evaluates the Grafana board in the tests",
    is_there: || is_program("prometheus") && is_program("promtool"),
};

const CMAKE: Package =
    Package { name: "cmake", reason: "builds the FIPS module", is_there: || is_program("cmake") };

const GO: Package = Package {
    name: "golang-go",
    reason: "computes the integrity hash of the FIPS module",
    is_there: || is_program("go"),
};

const PERL: Package = Package {
    name: "perl",
    reason: "writes the assembler code of the FIPS module",
    is_there: || is_program("perl"),
};

const GCC: Package =
    Package { name: "gcc", reason: "compiles the FIPS module", is_there: || is_program("cc") };

const PKG_CONFIG: Package = Package {
    name: "pkg-config",
    reason: "Kryoptic's build asks it where libraries are",
    is_there: || is_program("pkg-config"),
};

const LIBSSL_DEV: Package = Package {
    name: "libssl-dev",
    reason: "the cryptography of Kryoptic, a token of the tests",
    is_there: || is_library("libssl"),
};

const LIBSQLITE3_DEV: Package = Package {
    name: "libsqlite3-dev",
    reason: "where Kryoptic, a token of the tests, keeps its keys",
    is_there: || is_library("sqlite3"),
};

const LIBCLANG_DEV: Package = Package {
    name: "libclang-dev",
    reason: "reads OpenSSL's headers for the build of Kryoptic",
    is_there: has_libclang,
};

fn is_library(name: &str) -> bool {
    let mut pkg_config = Command::new("pkg-config");
    pkg_config.args(["--exists", name]);
    process::stdout(pkg_config, b"").is_ok()
}

/// libclang-cpp is another library.
fn has_libclang() -> bool {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let toolchains = entries(Path::new("/usr/lib")).map(|entry| entry.path().join("lib"));
    let triplet = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let folders = toolchains.chain(["/usr/lib64", "/usr/lib", &triplet].map(PathBuf::from));
    let is_it = |name: &str| name.starts_with("libclang.so") || name.starts_with("libclang-1");
    folders
        .into_iter()
        .any(|folder| entries(&folder).any(|entry| entry.file_name().to_str().is_some_and(is_it)))
}

/// A package that brings a service has it started, now and at each start of the machine. Only its programs were wanted.
fn end_service(name: &str) -> Result<()> {
    if !Path::new("/etc/init.d").join(name).is_file() {
        return Ok(());
    }
    eprintln!("stopping and disabling the service that the package brought: {name}");
    run("service", &[name, "stop"])?;
    run("update-rc.d", &[name, "disable"])
}

fn apt(args: &[&str]) -> Result<()> {
    run("apt-get", args)
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let mut command = Command::new(program);
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    process::stdout(command, b"").map(drop)
}
