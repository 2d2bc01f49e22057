//! Every chore of the project, in one place and in Rust: `cargo xtask demo | test | build | envtest | packages | bench | fuzz | crash`.
//!
//! Whatever is started here ends with this process, also on Ctrl-C; only `demo --keep` leaves something running.

mod bench;
mod build;
mod cache;
mod cargo;
mod crash;
mod demo;
mod envtest;
mod fuzz;
mod interrupt;
mod kryoptic;
mod packages;
mod progress;
mod test;
mod walls;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use keelson_e2e::process;

#[derive(Parser)]
#[command(
    bin_name = "cargo xtask",
    about = "Every chore of the project",
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Show the whole chain: kube-apiserver encrypts a secret with a key that lives in an HSM.
    Demo(demo::Args),
    /// Run everything that CI runs; ends with one line: passed, failed, skipped.
    Test(test::Args),
    /// Get the real kube-apiserver, kubectl, etcd and etcdctl: found or built once.
    Envtest(envtest::Args),
    /// Get the PKCS#11 module of Kryoptic, found or built once; prints where it is.
    Kryoptic,
    /// Get the Debian packages that the chain and the tests need.
    Packages,
    /// Build the programs as released, also with the FIPS module.
    Build(build::Args),
    /// Measure.
    #[command(subcommand)]
    Bench(bench::Verb),
    /// Kill kms-server while it works; nothing acknowledged may be lost.
    Crash(crash::Args),
    /// Fuzz the parsers.
    Fuzz(fuzz::Args),
}

fn main() -> ExitCode {
    let verb = Cli::parse().verb;
    let result = interrupt::watch().and_then(|()| match verb {
        Verb::Demo(args) => demo::run(&args),
        Verb::Test(args) => test::run(&args),
        Verb::Envtest(args) => envtest::run(&args),
        Verb::Kryoptic => kryoptic::run(),
        Verb::Packages => packages::for_the_tests()
            .and_then(|()| packages::for_kryoptic())
            .map(|()| ExitCode::SUCCESS),
        Verb::Build(args) => build::run(&args),
        Verb::Bench(verb) => bench::run(&verb),
        Verb::Crash(args) => crash::run(&args),
        Verb::Fuzz(args) => fuzz::run(&args),
    });
    match result {
        Ok(code) => code,
        Err(_) if process::is_interrupted() => interrupt::stay_until_exit(),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
