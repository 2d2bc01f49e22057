//! Runs the fuzz targets of `fuzz/`: built by plain cargo and the compiler of the workspace, with the coverage counters
//! that libFuzzer follows. Without AddressSanitizer, which only a nightly compiler has: what is fuzzed is safe Rust.
//!
//! What a target has learnt is kept in `fuzz/corpus/`, an input that brought it down in `fuzz/artifacts/`; neither is
//! checked in. `fuzz/seeds/` is, and starts those that would not guess their format.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::PoisonError;

use keelson_e2e::{Error, Result, assets, process};

use crate::cargo;

/// What CI gives each target.
pub(crate) const SECONDS: u32 = 30;
/// One for each core of the smallest machine that this runs on.
const AT_ONCE: usize = 2;
/// How much a target says is shown when it fails; the input stands in the end of it.
const SHOWN: usize = 60;

/// For the compiler: an edge of the code, a comparison, is something that the fuzzer sees.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                        -Cllvm-args=-sanitizer-coverage-pc-table \
                        -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// One target; without it, all of them, two at a time.
    target: Option<String>,
    /// How long each target runs.
    #[arg(long, default_value_t = SECONDS)]
    seconds: u32,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
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
    build()?;
    let failed = run_all(&chosen, args.seconds)?;
    println!("{} targets, {failed} failed", chosen.len());
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All targets there are, by name.
///
/// # Errors
/// When their folder cannot be read.
pub(crate) fn targets() -> Result<Vec<String>> {
    let folder = folder("fuzz_targets");
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

/// # Errors
/// When the build fails; cargo has said why.
pub(crate) fn build() -> Result<()> {
    // Not --locked: a dependency that is new in the workspace must not stop the tests here.
    // Flags for a named target are not those of build scripts and macros, which nobody fuzzes.
    let manifest = folder("Cargo.toml").display().to_string();
    let args = ["build", "--bins", "--manifest-path", &manifest, "--target", &triple()];
    let mut command = cargo::command(&args);
    command.env("RUSTFLAGS", COVERAGE).env("CARGO_TARGET_DIR", folder("target"));
    cargo::finish(command, "cargo build of the fuzz targets")
}

/// Runs `targets` for `seconds` each; how many failed.
///
/// # Errors
/// When one cannot be started.
pub(crate) fn run_all(targets: &[String], seconds: u32) -> Result<u64> {
    let left = Mutex::new(targets.iter());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || -> Result<u64> {
        let mut failed = 0;
        while let Some(target) = next() {
            failed += u64::from(!fuzz(target, seconds)?);
        }
        Ok(failed)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_fold(0, |sum, worker| {
            let gone = |_| Error::answer("a fuzz target", "its thread ended");
            Ok(sum + worker.join().map_err(gone)??)
        })
    })
}

/// Says what came of it in one line; with what the target said when it failed.
fn fuzz(target: &str, seconds: u32) -> Result<bool> {
    let output = process::output(command(target, seconds)?, b"")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        let inputs = inputs(&said).unwrap_or("0");
        println!("fuzz {target}: {inputs} inputs in {seconds} s, none brought it down");
        return Ok(true);
    }
    let lines: Vec<&str> = said.lines().collect();
    let shown = lines.get(lines.len().saturating_sub(SHOWN)..).unwrap_or_default().join("\n");
    let status = process::describe(output.status);
    println!("{shown}\nfuzz {target}: FAILED ({status}); the input is in fuzz/artifacts/{target}/");
    Ok(false)
}

fn command(target: &str, seconds: u32) -> Result<Command> {
    let [corpus, artifacts] = ["corpus", "artifacts"].map(|name| folder(name).join(target));
    for folder in [&corpus, &artifacts] {
        fs::create_dir_all(folder)
            .map_err(Error::machine(format!("create {}", folder.display())))?;
    }
    let program = folder("target").join(triple()).join("debug").join(target);
    let mut command = Command::new(program);
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1"])
        .arg(&corpus)
        .current_dir(assets::root())
        .stdin(Stdio::null());
    // Where a target keeps files, their syncs to a disk would be all that it does.
    if Path::new("/dev/shm").is_dir() {
        command.env("TMPDIR", "/dev/shm");
    }
    let seeds = folder("seeds").join(target);
    if seeds.is_dir() {
        command.arg(seeds);
    }
    Ok(command)
}

/// `stat::number_of_executed_units: 1048576`
fn inputs(said: &str) -> Option<&str> {
    said.lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .map(str::trim)
}

fn folder(name: &str) -> PathBuf {
    assets::root().join("fuzz").join(name)
}

fn triple() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_built_and_nothing_else_is() {
        let manifest = fs::read_to_string(folder("Cargo.toml")).unwrap();
        let mut built: Vec<&str> = manifest
            .lines()
            .filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")?.strip_suffix(".rs\""))
            .collect();
        built.sort_unstable();
        assert_eq!(targets().unwrap(), built);
    }

    #[test]
    fn every_target_is_in_the_table_for_contributors() {
        let text = fs::read_to_string(assets::root().join("CONTRIBUTING.md")).unwrap();
        let (_, table) = text.split_once("## Fuzz targets").unwrap();
        let (table, _) = table.split_once("## ").unwrap();
        // Beside the targets, backquotes hold the folder and a program.
        let mut named: Vec<&str> = table.split('`').skip(1).step_by(2).collect();
        named.retain(|name| !["fuzz/fuzz_targets/", "kmsctl"].contains(name));
        named.sort_unstable();
        assert_eq!(named, targets().unwrap());
    }

    #[test]
    fn what_a_target_counts_is_found_in_what_it_says() {
        let said =
            "Done 7 runs in 1 second(s)\nstat::number_of_executed_units: 7\nstat::peak_rss_mb: 40";
        assert_eq!(inputs(said), Some("7"));
        assert_eq!(inputs("==1== ERROR: libFuzzer: deadly signal"), None);
    }
}
