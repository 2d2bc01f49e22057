//! `cargo xtask build`: the programs as released, each with its size and what it says of itself. `--fips` makes them
//! with the FIPS module of AWS-LC, in a folder of their own, so that neither build undoes the other.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use keelson_e2e::assets::{self, PROGRAMS};
use keelson_e2e::{Error, Result, process};

use crate::{cargo, packages};

const NAMES: [&str; 3] = ["kmsplugin", "kms-server", "kmsctl"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// With the FIPS module of AWS-LC (docs/fips.md); needs cmake, Go, Perl and a C compiler.
    #[arg(long)]
    fips: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let build = Build { fips: args.fips };
    build.prepare()?;
    build.release()?;
    for name in NAMES {
        println!("{}", build.line(name)?);
    }
    Ok(ExitCode::SUCCESS)
}

/// Which of the two builds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Build {
    pub(crate) fips: bool,
}

impl Build {
    /// Gets what this build needs beside Rust.
    ///
    /// # Errors
    /// When something is missing and cannot be installed: names it and the command.
    pub(crate) fn prepare(self) -> Result<()> {
        if self.fips { packages::for_the_fips_module() } else { Ok(()) }
    }

    /// The three programs, as released.
    ///
    /// # Errors
    /// When the build fails; cargo has said why.
    pub(crate) fn release(self) -> Result<()> {
        let folder = self.folder();
        let mut args = vec!["build", "--release", "--locked"];
        args.extend(self.arguments(&folder));
        cargo::run(&args)
    }

    /// kmsplugin with the provider `pkcs11`, put beside the ordinary one for the end-to-end tests. To be made before
    /// [`Build::release`], which links the ordinary one again.
    ///
    /// # Errors
    /// When the build fails; cargo has said why.
    pub(crate) fn release_on_hsm(self) -> Result<()> {
        let folder = self.folder();
        let mut args = vec!["build", "--release", "--locked", "-p", "kms-plugin"];
        args.extend(["--features", "pkcs11"]);
        args.extend(self.arguments(&folder));
        cargo::run(&args)?;
        let target = self.programs().join(assets::ON_HSM);
        fs::create_dir_all(&target)
            .map_err(Error::machine(format!("make {}", target.display())))?;
        fs::copy(self.programs().join("kmsplugin"), target.join("kmsplugin"))
            .map(drop)
            .map_err(Error::machine("keep the plug-in for HSMs"))
    }

    /// Where cargo puts it.
    pub(crate) fn folder(self) -> String {
        let folder = assets::target_folder();
        let folder = if self.fips { folder.join("fips") } else { folder };
        folder.display().to_string()
    }

    /// What cargo is told beside the packages; `folder` is [`Build::folder`].
    pub(crate) fn arguments(self, folder: &str) -> Vec<&str> {
        if self.fips { vec!["--features", "fips", "--target-dir", folder] } else { Vec::new() }
    }

    /// What the end-to-end tests are told, so that they start the programs of this build.
    pub(crate) fn environment(self) -> Option<(&'static str, PathBuf)> {
        self.fips.then(|| (PROGRAMS, self.programs()))
    }

    fn programs(self) -> PathBuf {
        PathBuf::from(self.folder()).join("release")
    }

    /// `kmsplugin 0.1.0 (AWS-LC 5.12.0)  6.5 MB  target/release/kmsplugin`
    fn line(self, name: &str) -> Result<String> {
        let path = self.programs().join(name);
        let bytes = fs::metadata(&path)
            .map_err(Error::machine(format!("look at {}", path.display())))?
            .len();
        let mut command = Command::new(&path);
        command.arg("--version");
        let version = process::stdout(command, b"")?;
        let version = String::from_utf8_lossy(&version);
        let megabytes = format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10);
        Ok(format!("{:<40} {megabytes:>8}  {}", version.trim_end(), path.display()))
    }
}
