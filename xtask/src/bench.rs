//! `cargo xtask bench plugin`: any KMS socket measured with the operator's own `kmsctl bench`, and in the same run a
//! bare tonic echo of the same messages: the floor on this machine, today.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use keelson_e2e::assets::{self, Programs};
use keelson_e2e::chain::{Chain, Options, SecretsThrough, fresh_folder, run_folder};
use keelson_e2e::process::{self, Lifetime, Process, Spec};
use keelson_e2e::{Error, Result, pki, wait};
use serde::{Deserialize, Serialize};

use crate::{cargo, packages};

#[derive(clap::Subcommand)]
pub(crate) enum Verb {
    /// A KMS plug-in's socket: requests/s, p50, p99, CPU and memory, beside a bare tonic echo.
    Plugin(Args),
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The socket to measure; without it, our own plug-in with its key service and SoftHSM2.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// How long each of the measurements takes.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

pub(crate) fn run(verb: &Verb) -> Result<ExitCode> {
    let Verb::Plugin(args) = verb;
    cargo::build_release()?;
    cargo::run(&["build", "--release", "--locked", "-p", "keelson-benches"])?;
    let dir = run_folder("bench");
    fresh_folder(&dir)?;
    let programs = Programs::find()?;
    let kmsctl = programs.kmsctl.clone();
    let (chain, socket) = match &args.socket {
        Some(socket) => (None, socket.clone()),
        None => {
            let chain = start_plugin(&dir, programs)?;
            let socket = chain.plugin.config.socket.clone();
            (Some(chain), socket)
        }
    };
    let name = if chain.is_some() { "kmsplugin" } else { "plug-in" };
    let (_echo, echo_socket) = start_echo(&dir)?;

    let mut rows = Vec::new();
    println!("{}", Row::TITLES);
    for (api, callers) in [("v1", 1), ("v1", 32), ("v2", 1), ("v2", 32)] {
        for (server, socket) in [(name, &socket), ("bare echo", &echo_socket)] {
            let measured = measure(&kmsctl, socket, api, callers, args.seconds)?;
            let row = Row { server, measured };
            println!("{}", row.line());
            rows.push(row);
        }
    }
    save("plugin.json", &rows)?;
    Ok(ExitCode::SUCCESS)
}

/// One measurement: what `kmsctl bench -o json` prints, with the name of the server.
#[derive(Serialize)]
struct Row<'a> {
    server: &'a str,
    #[serde(flatten)]
    measured: Measured,
}

#[derive(Serialize, Deserialize)]
struct Measured {
    api: String,
    op: String,
    callers: u32,
    seconds: f64,
    requests: u64,
    errors: u64,
    requests_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    /// Unknown where the process behind the socket is not ours to look at.
    cpu_us_per_request: Option<f64>,
    peak_memory_kib: Option<u64>,
}

impl Row<'_> {
    const TITLES: &'static str =
        "server     API  callers  requests/s   p50 µs   p99 µs  CPU µs/request  peak MiB  errors";

    fn line(&self) -> String {
        let m = &self.measured;
        let cpu = m.cpu_us_per_request.map_or("-".to_owned(), |cpu| format!("{cpu:.1}"));
        let memory = m.peak_memory_kib.map_or("-".to_owned(), mebibytes);
        format!(
            "{:<9}  {:<3}  {:>7}  {:>10.0}  {:>7.0}  {:>7.0}  {cpu:>14}  {memory:>8}  {:>6}",
            self.server, m.api, m.callers, m.requests_per_second, m.p50_us, m.p99_us, m.errors
        )
    }
}

fn mebibytes(kib: u64) -> String {
    let tenths = kib * 10 / 1024;
    format!("{}.{}", tenths / 10, tenths % 10)
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

fn start_echo(dir: &Path) -> Result<(Process, PathBuf)> {
    let program = assets::target_folder().join("release/bench-echo");
    let socket = dir.join("echo.sock");
    let process =
        Process::start(&Spec::new("bench-echo", &program, dir, Lifetime::WithParent).arg(&socket))?;
    wait::until("the echo's socket", Duration::from_secs(10), &[&process], || {
        UnixStream::connect(&socket).map(drop).map_err(|error| error.to_string())
    })?;
    Ok((process, socket))
}

fn measure(
    kmsctl: &Path,
    socket: &Path,
    api: &str,
    callers: u32,
    seconds: u64,
) -> Result<Measured> {
    let mut command = Command::new(kmsctl);
    command
        .args(["bench", "--op", "both", "-o", "json", "--api", api, "--socket"])
        .arg(socket)
        .args(["--callers", &callers.to_string(), "--seconds", &seconds.to_string()]);
    let printed = process::stdout(command, b"")?;
    serde_json::from_slice(&printed)
        .map_err(|error| Error::answer("kmsctl bench", error.to_string()))
}

fn save(name: &str, rows: &[Row<'_>]) -> Result<()> {
    let json = serde_json::to_string_pretty(rows)
        .map_err(|error| Error::answer("the table", error.to_string()))?;
    let folder = assets::target_folder().join("bench");
    fs::create_dir_all(&folder).map_err(Error::machine(format!("make {}", folder.display())))?;
    let kept = folder.join(name);
    pki::write_file(&kept, &(json + "\n"))?;
    println!("\nwritten to {}", kept.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stands_under_its_titles() {
        let measured = Measured {
            api: "v2".to_owned(),
            op: "both".to_owned(),
            callers: 32,
            seconds: 5.0,
            requests: 250_000,
            errors: 0,
            requests_per_second: 50_123.4,
            p50_us: 601.2,
            p99_us: 2103.0,
            cpu_us_per_request: Some(7.84),
            peak_memory_kib: Some(5325),
        };
        let line = Row { server: "kmsplugin", measured }.line();
        assert_eq!(
            line,
            "kmsplugin  v2        32       50123      601     2103             7.8       5.2       0"
        );
        assert_eq!(line.chars().count(), Row::TITLES.chars().count());
    }
}
