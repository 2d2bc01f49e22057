//! `cargo xtask bench server`: kms-server and its SoftHSM2 token over HTTPS that stays open, with real tokens and the
//! audit log on disk before each answer; beside it, in the same rounds, the same HSM with no server at all and the same
//! server that refuses as soon as it knows who asks.
//!
//! The load comes from the machine that is measured. That costs the server up to half of it, and is said in the table.

mod chart;
mod full_token;
mod judge;
mod loads;
mod report;
mod service;
mod start;

use std::path::PathBuf;
use std::process::ExitCode;

use keelson_e2e::assets::{self, Programs};
use keelson_e2e::{Error, Result};

use self::loads::Measurements;
use self::service::{Prepared, Service, State};
use super::Finding;
use crate::{cargo, packages};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long each measurement takes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// How often each is repeated, in turn with the others; medians are shown.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: u64,
    /// How many keys the full token holds. They are made once, which takes minutes, and kept below target/bench.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    keys: u32,
    /// How many keys the full database holds.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rows: u32,
    /// Measure these programs (kms-server, kmsctl, bench-load) and build none.
    #[arg(long, value_name = "FOLDER")]
    programs: Option<PathBuf>,
    /// Put the tables into this document (docs/performance.md), in the place of the last ones.
    #[arg(long, value_name = "DOCUMENT")]
    record: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let programs = match &args.programs {
        Some(folder) => folder.clone(),
        None => {
            cargo::build_release()?;
            cargo::run(&["build", "--release", "--locked", "-p", "keelson-benches"])?;
            Programs::find()?;
            assets::target_folder().join("release")
        }
    };
    packages::for_the_chain()?;
    let prepared = Prepared {
        one: State::with_one_key(&programs)?,
        full_token: State::with_keys(&programs, args.keys)?,
        full_database: State::with_rows(&programs, args.rows)?,
    };
    let starts = start::findings(&prepared)?;
    let services = Service::all(&prepared)?;
    let measured = Measurements::take(&programs, &services, args.rounds, args.seconds)?;
    drop(services);
    measured.print();
    let mut findings = judge::findings(&measured);
    findings.extend(starts);
    println!();
    for Finding { text, held } in &findings {
        println!("{} {text}", if *held { "ok    " } else { "MISSED" });
    }
    super::save("server.json", &measured.rows(), &findings)?;
    chart::save(&measured.rows())?;
    if let Some(document) = &args.record {
        report::put_into(document, &args.command(), &measured.rows(), &findings)?;
    }
    let all_held = findings.iter().all(|finding| finding.held);
    Ok(if all_held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Args {
    /// What another run needs to be the same.
    fn command(&self) -> String {
        format!(
            "cargo xtask bench server --keys {} --rows {} --rounds {} --seconds {}",
            self.keys, self.rows, self.rounds, self.seconds
        )
    }
}

fn not_json(program: &str) -> impl Fn(serde_json::Error) -> Error + '_ {
    move |error| Error::answer(program, error.to_string())
}
