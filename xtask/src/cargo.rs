//! Runs cargo, with its own progress on the terminal.

use std::ffi::OsString;
use std::process::{Command, Stdio};

use keelson_e2e::{Error, Result, assets, process};

use crate::{envtest, kryoptic};

/// The three programs and what is measured beside them, as released.
///
/// # Errors
/// When the build fails; cargo has said why.
pub(crate) fn build_release() -> Result<()> {
    run(&["build", "--release", "--locked"])
}

/// `cargo ARGS` in the workspace's root.
///
/// # Errors
/// When it fails; cargo has said why.
pub(crate) fn run(args: &[&str]) -> Result<()> {
    finish(command(args), &format!("cargo {}", args.join(" ")))
}

/// Runs `command`, called `name` where it fails.
///
/// # Errors
/// When it fails; cargo has said why.
pub(crate) fn finish(command: Command, name: &str) -> Result<()> {
    let mut child = process::spawn(command, "cargo")?;
    let status = child.wait().map_err(Error::machine("wait for cargo"))?;
    process::forget(&child);
    if status.success() {
        return Ok(());
    }
    Err(Error::Command {
        command: name.to_owned(),
        status: process::describe(status),
        output: "its messages are above".to_owned(),
    })
}

/// `cargo ARGS` in the workspace's root, in its own process group.
pub(crate) fn command(args: &[&str]) -> Command {
    use std::os::unix::process::CommandExt;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.args(args).current_dir(assets::root()).stdin(Stdio::null()).process_group(0);
    command.envs(envtest::given_folder().map(|folder| ("KUBEBUILDER_ASSETS", folder)));
    command.envs(kryoptic::found().map(|module| (kryoptic::VARIABLE, module)));
    command
}
