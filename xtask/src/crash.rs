//! Kills kms-server again and again (`crates/kms-server/tests/server/kills.rs`), for as many rounds as one has time for.

use crate::cargo;
use keelson_e2e::Result;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How often it is killed. CI does 50.
    #[arg(long, default_value_t = 1000)]
    rounds: u64,
    /// Another sequence of random moments.
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let test = ["test", "-p", "kms-server", "--test", "server", "--locked"];
    let mut cargo = cargo::command(&[&test[..], &["--", "s2_", "--nocapture"]].concat());
    cargo.env("KEELSON_KILLS", args.rounds.to_string()).env("KEELSON_SEED", args.seed.to_string());
    cargo::finish(cargo, "cargo test s2_")?;
    Ok(ExitCode::SUCCESS)
}
