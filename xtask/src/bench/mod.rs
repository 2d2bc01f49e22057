//! `cargo xtask bench plugin`: any KMS socket measured with the operator's own `kmsctl bench`, and in the same run a bare
//! tonic echo and a bare grpc-go echo of the same messages: the floor on this machine, today, in both languages.
//!
//! Of our own plug-in, what it promises is judged: the exit code says whether all of it held.

mod go_echo;
mod pod;
mod server;
mod table;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use keelson_e2e::assets::{self, Programs};
use keelson_e2e::chain::{Chain, Options, SecretsThrough, fresh_folder, run_folder};
use keelson_e2e::process::{Lifetime, Process, Spec};
use keelson_e2e::{Error, Result, pki, wait};
use serde::Serialize;
use serde_json::json;

use self::table::{Server, Table};
use crate::{cargo, packages};

#[derive(clap::Subcommand)]
pub(crate) enum Verb {
    /// A KMS plug-in's socket: requests/s, p50, p99, CPU and memory, beside bare echoes in Rust and Go.
    Plugin(Args),
    /// kms-server: wraps and unwraps/s, times, overload and start, beside the bare HSM and an authenticated no-op.
    Server(server::Args),
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The socket to measure; without it, our own plug-in with its key service and SoftHSM2.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 1)]
    seconds: u64,
    /// How often each is repeated, in turn with the others; medians are shown.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: u64,
}

/// One promise and what was seen of it.
pub(crate) struct Finding {
    pub(crate) text: String,
    pub(crate) held: bool,
}

pub(crate) fn run(verb: &Verb) -> Result<ExitCode> {
    match verb {
        Verb::Plugin(args) => plugin(args),
        Verb::Server(args) => server::run(args),
    }
}

fn plugin(args: &Args) -> Result<ExitCode> {
    cargo::build_release()?;
    cargo::run(&["build", "--release", "--locked", "-p", "keelson-benches"])?;
    let dir = run_folder("bench");
    fresh_folder(&dir)?;
    let programs = Programs::find()?;
    let kmsctl = programs.kmsctl.clone();
    let (chain, measured) = match &args.socket {
        Some(socket) => (None, Server { name: "plug-in", socket: socket.clone() }),
        None => {
            let chain = start_plugin(&dir, programs)?;
            let socket = chain.plugin.config.socket.clone();
            (Some(chain), Server { name: "kmsplugin", socket })
        }
    };
    let mut servers = vec![measured];
    let echo = assets::target_folder().join("release/bench-echo");
    let _tonic = start_echo("tonic echo", &echo, &dir, &mut servers)?;
    let _go = match go_echo::build()? {
        Some(echo) => Some(start_echo("Go echo", &echo, &dir, &mut servers)?),
        None => {
            println!("Go is not installed here: measured without the grpc-go echo.");
            None
        }
    };
    let table = Table::measure(&kmsctl, &servers, args.rounds, args.seconds)?;
    table.print();
    let mut findings = table.findings();
    if let Some(mut chain) = chain {
        findings.extend(pod::findings(&mut chain)?);
    }
    println!();
    for Finding { text, held } in &findings {
        println!("{} {text}", if *held { "ok    " } else { "MISSED" });
    }
    save("plugin.json", &table.rows(), &findings)?;
    let all_held = findings.iter().all(|finding| finding.held);
    Ok(if all_held || args.socket.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn start_plugin(dir: &Path, programs: Programs) -> Result<Chain> {
    packages::for_the_chain()?;
    let options = Options {
        dir,
        programs,
        assets: None,
        secrets: SecretsThrough::V1,
        usual_ports: false,
        lifetime: Lifetime::WithParent,
        configure: |_| (),
    };
    Chain::start(options, &mut |what| eprintln!("-> {what}"))
}

fn start_echo(
    name: &'static str,
    program: &Path,
    dir: &Path,
    servers: &mut Vec<Server>,
) -> Result<Process> {
    let file = name.replace(' ', "-");
    let socket = dir.join(format!("{file}.sock"));
    let spec = Spec::new(&file, program, dir, Lifetime::WithParent).arg(&socket);
    let process = Process::start(&spec)?;
    let what = format!("the socket of the {name}");
    wait::until(&what, Duration::from_secs(10), &[&process], || {
        UnixStream::connect(&socket).map(drop).map_err(|error| error.to_string())
    })?;
    servers.push(Server { name, socket });
    Ok(process)
}

fn save(name: &str, rows: &impl Serialize, findings: &[Finding]) -> Result<()> {
    let findings: Vec<_> = findings
        .iter()
        .map(|finding| json!({"text": finding.text, "held": finding.held}))
        .collect();
    let whole = json!({"rows": rows, "findings": findings});
    let json = serde_json::to_string_pretty(&whole)
        .map_err(|error| Error::answer("the table", error.to_string()))?;
    let folder = assets::target_folder().join("bench");
    fs::create_dir_all(&folder).map_err(Error::machine(format!("make {}", folder.display())))?;
    let kept = folder.join(name);
    pki::write_file(&kept, &(json + "\n"))?;
    println!("\nwritten to {}", kept.display());
    Ok(())
}
