//! Everything that CI runs, in order, with one line at the end that sums up what the test runners said.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};

use keelson_e2e::assets::Kubernetes;
use keelson_e2e::{Error, Result, process};
use kms_core::clock::{Clock, SystemClock};

use crate::build::Build;
use crate::progress::seconds;
use crate::{cargo, envtest, fuzz, kryoptic, packages, walls};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave out the end-to-end tests (and with them kube-apiserver and the release build).
    #[arg(long)]
    quick: bool,
    /// Only the end-to-end tests.
    #[arg(long, conflicts_with = "quick")]
    e2e: bool,
    /// In the build with the FIPS module of AWS-LC; format and lints, the same in both, are left to the other.
    #[arg(long)]
    fips: bool,
    /// Leave out the fuzz targets, which run for half a minute each.
    #[arg(long)]
    no_fuzz: bool,
    /// Only tests whose name contains this (and no fuzzing).
    name: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let build = Build { fips: args.fips };
    let folder = build.folder();
    let in_build = build.arguments(&folder);
    let mut report = Report { clock: SystemClock::new(), build, total: Summary::default() };
    prepare(args, &mut report)?;
    let name: Vec<&str> = args.name.iter().map(String::as_str).collect();
    if !args.e2e && !args.fips {
        source(&mut report)?;
    }
    if !args.e2e {
        let unit =
            ["test", "--workspace", "--locked", "--no-fail-fast", "--exclude", "keelson-e2e"];
        report.tests(
            "unit, property, contract and socket tests",
            &[&unit, &in_build[..], name.as_slice()].concat(),
        )?;
        report.tests(
            "the plug-in straight on an HSM",
            &[&["test", "--test", "pkcs11"], &ON_HSM[..], &in_build, &name].concat(),
        )?;
        let harness = ["test", "-p", "keelson-e2e", "--lib", "--locked"];
        report.tests("tests of the harness", &[&harness, name.as_slice()].concat())?;
    }
    if !args.quick && !args.e2e && !args.fips && !args.no_fuzz && args.name.is_none() {
        report.fuzz()?;
    }
    if !args.quick {
        let chain = ["test", "-p", "keelson-e2e", "--test", "*", "--locked", "--no-fail-fast"];
        report.tests("end-to-end tests", &[&chain, name.as_slice()].concat())?;
    }
    let Summary { passed, failed, skipped } = report.total;
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What can be said of the code without running it.
fn source(report: &mut Report) -> Result<()> {
    report.walls()?;
    report.check("format", &["fmt", "--all", "--check"])?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    report.check("lints", &clippy)?;
    let clippy_on_hsm =
        [&["clippy", "--all-targets"], &ON_HSM[..], &["--", "-D", "warnings"]].concat();
    report.check("lints with the provider pkcs11", &clippy_on_hsm)
}

/// What the tests need: without it there is nothing to count.
fn prepare(args: &Args, report: &mut Report) -> Result<()> {
    report.phase("Debian packages", || packages::for_the_tests().map(|()| true))?;
    let build = report.build;
    report.phase("what the build needs", || build.prepare().map(|()| true))?;
    report.phase("Kryoptic", || kryoptic::ensure().map(|_| true))?;
    if args.quick {
        return Ok(());
    }
    report.phase("kube-apiserver, kubectl and etcd", || {
        envtest::ensure(Kubernetes::V1_37)?;
        envtest::ensure(Kubernetes::V1_28).map(|_| true)
    })?;
    report.phase("release build with the provider pkcs11", || {
        build.release_on_hsm().map(|()| true)
    })?;
    report.phase("release build", || build.release().map(|()| true))?;
    Ok(())
}

const ON_HSM: [&str; 5] = ["-p", "kms-plugin", "--features", "pkcs11", "--locked"];

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Summary {
    passed: u64,
    failed: u64,
    skipped: u64,
}

struct Report {
    clock: SystemClock,
    build: Build,
    total: Summary,
}

impl Report {
    /// Runs one phase, prints its name and how long it took.
    fn phase(&mut self, name: &str, work: impl FnOnce() -> Result<bool>) -> Result<bool> {
        println!("== {name}");
        let start = self.clock.now();
        let good = work()?;
        let took = seconds(self.clock.now().saturating_sub(start));
        println!("== {name}: {} in {took}\n", if good { "done" } else { "FAILED" });
        Ok(good)
    }

    /// A phase that is right or wrong as a whole; wrong counts as one failure.
    fn check(&mut self, name: &str, args: &[&str]) -> Result<()> {
        let good = self.phase(name, || Ok(cargo::run(args).is_ok()))?;
        self.total.failed += u64::from(!good);
        Ok(())
    }

    /// The boundaries between the crates.
    fn walls(&mut self) -> Result<()> {
        let good = self.phase("walls between the crates", || {
            let violations = walls::violations()?;
            violations.iter().for_each(|violation| println!("{violation}"));
            Ok(violations.is_empty())
        })?;
        self.total.failed += u64::from(!good);
        Ok(())
    }

    /// Every fuzz target, each a test that passes or fails.
    fn fuzz(&mut self) -> Result<()> {
        let targets = fuzz::targets()?;
        let mut failed = 0;
        self.phase("fuzz targets", || {
            fuzz::build()?;
            failed = fuzz::run_all(&targets, fuzz::SECONDS)?;
            Ok(failed == 0)
        })?;
        self.total.failed += failed;
        self.total.passed += u64::try_from(targets.len()).unwrap_or(0).saturating_sub(failed);
        Ok(())
    }

    /// A phase whose runner says what passed and failed. One that fails without a failed test (it does not
    /// compile, it crashes) counts as one failure.
    fn tests(&mut self, name: &str, args: &[&str]) -> Result<()> {
        let mut summary = Summary::default();
        let mut command = cargo::command(args);
        command.envs(self.build.environment());
        let good = self.phase(name, || run_tests(command, &mut summary, &mut std::io::stdout()))?;
        self.total.passed += summary.passed;
        self.total.skipped += summary.skipped;
        self.total.failed += if good { summary.failed } else { summary.failed.max(1) };
        Ok(())
    }
}

/// Runs a test runner, passes its output on and adds up its summary lines.
fn run_tests(mut command: Command, summary: &mut Summary, out: &mut impl Write) -> Result<bool> {
    command.stdout(Stdio::piped());
    let mut child = process::spawn(command, "cargo test")?;
    for line in child.stdout.take().into_iter().flat_map(|pipe| BufReader::new(pipe).lines()) {
        let line = line.map_err(Error::machine("read the output of the tests"))?;
        // A reader that went away (a closed pipe) does not change what is tested.
        let _ = writeln!(out, "{line}");
        add(summary, &line);
    }
    let status = child.wait().map_err(Error::machine("wait for the tests"))?;
    process::forget(&child);
    Ok(status.success())
}

/// `test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.1s`
fn add(summary: &mut Summary, line: &str) {
    let Some((_, counts)) =
        line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
    else {
        return;
    };
    for part in counts.split(';') {
        let mut words = part.split_whitespace();
        let (Some(Ok(count)), Some(what)) = (words.next().map(str::parse::<u64>), words.next())
        else {
            continue;
        };
        match what {
            "passed" => summary.passed += count,
            "failed" => summary.failed += count,
            "ignored" => summary.skipped += count,
            _ => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_lines_are_added_up_and_others_ignored() {
        let mut summary = Summary::default();
        for line in [
            "running 13 tests",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.10s",
            "test nothing_is_lost ... ok",
            "test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 91.02s",
            "note: test result: ok. 100 passed; 0 failed",
        ] {
            add(&mut summary, line);
        }
        assert_eq!(summary, Summary { passed: 16, failed: 2, skipped: 1 });
    }

    #[test]
    fn a_runner_that_fails_is_seen_and_its_counts_kept() {
        let mut summary = Summary::default();
        let mut runner = Command::new("sh");
        runner.args(["-c", "echo 'test result: FAILED. 1 passed; 1 failed; 0 ignored'; exit 101"]);
        let mut passed_on = Vec::new();
        assert!(!run_tests(runner, &mut summary, &mut passed_on).unwrap());
        assert_eq!(passed_on, b"test result: FAILED. 1 passed; 1 failed; 0 ignored\n");
        assert_eq!(summary, Summary { passed: 1, failed: 1, skipped: 0 });
    }
}
