//! Runs the fuzz targets of `fuzz/` with cargo-fuzz.

use std::fs;
use std::process::ExitCode;

use keelson_e2e::{Error, Result, assets, process};

use crate::{cargo, packages};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// One target; without it, all of them one after the other.
    target: Option<String>,
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if !packages::is_program("cargo-fuzz") {
        return Err(Error::Missing {
            what: "cargo-fuzz".to_owned(),
            remedy: "run `cargo install cargo-fuzz --locked`".to_owned(),
        });
    }
    let known = targets()?;
    let chosen = match &args.target {
        Some(target) if known.contains(target) => vec![target.clone()],
        Some(target) => {
            return Err(Error::Missing {
                what: format!("the fuzz target {target}"),
                remedy: format!("there are: {}", known.join(", ")),
            });
        }
        None => known,
    };
    for target in chosen {
        fuzz(&target, args.seconds)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn targets() -> Result<Vec<String>> {
    let folder = assets::root().join("fuzz/fuzz_targets");
    let entries =
        fs::read_dir(&folder).map_err(Error::machine(format!("read {}", folder.display())))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            entry.ok()?.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned)
        })
        .collect();
    names.sort();
    Ok(names)
}

fn fuzz(target: &str, seconds: u32) -> Result<()> {
    eprintln!("fuzz {target} for {seconds} s");
    let mut command =
        cargo::command(&["fuzz", "run", target, "--", &format!("-max_total_time={seconds}")]);
    // cargo-fuzz wants flags of the unstable compiler; the stable one has them in bootstrap mode.
    command.env("RUSTC_BOOTSTRAP", "1");
    let mut child = process::spawn(command, "cargo fuzz")?;
    let status = child.wait().map_err(Error::machine("wait for cargo fuzz"))?;
    process::forget(&child);
    if status.success() {
        return Ok(());
    }
    Err(Error::Command {
        command: format!("cargo fuzz run {target}"),
        status: process::describe(status),
        output: "its messages are above; the input is kept below fuzz/artifacts/".to_owned(),
    })
}
