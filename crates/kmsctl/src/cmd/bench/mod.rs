//! `kmsctl bench`: drives a KMS plug-in's socket as hard as it can and says what that costs. It knows only the two
//! Kubernetes interfaces, so any plug-in can be compared with any other.

mod load;
mod plugin;
mod process;
mod quantile;

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use kms_api::grpc;
use kms_core::clock::{Clock, SystemClock};
use serde::Serialize;

use self::load::{Api, Op, Tally};
use self::process::Process;
use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl bench --socket /etc/kubernetes/kmsplugin/kms.sock --api v2 --op both
  kmsctl bench --socket \"$KMS_SOCKET\" --api v1 --op decrypt --callers 1 --seconds 30 -o json

CPU and memory are those of the process at the other end of the socket (--pid to name another, such as the one
behind a proxy). Peak memory counts from that process's start, not from the start of the measurement.";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The plug-in's socket: a path, or @name in the abstract namespace
    #[arg(long, value_name = "PATH")]
    socket: String,
    #[arg(long, value_enum, default_value_t = Api::V2)]
    api: Api,
    /// Which calls to make; `both` encrypts and decrypts in turn
    #[arg(long, value_enum, default_value_t = Op::Both)]
    op: Op,
    /// How many calls are on their way at any time, all over one connection
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    callers: u32,
    /// How long to measure, after a short warm-up
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Whose CPU time and memory to report
    #[arg(long, default_value = "auto", value_name = "auto|PID", value_parser = pid)]
    pid: Pid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pid {
    Auto,
    Given(u32),
}

/// The result, flat, in the units of its names. What cannot be known is null.
#[derive(Debug, Serialize)]
struct Report {
    socket: String,
    api: Api,
    op: Op,
    callers: u32,
    seconds: f64,
    requests: u64,
    errors: u64,
    first_error: Option<String>,
    requests_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
    pid: Option<u32>,
    cpu_us_per_request: Option<f64>,
    peak_memory_kib: Option<u64>,
}

pub(crate) async fn run(args: Args, output: &mut Output<'_>) -> Result<(), Error> {
    let no_socket = |cause: &(dyn std::error::Error + 'static)| Error::socket(&args.socket, cause);
    let process = match args.pid {
        Pid::Given(pid) => Some(Process::new(pid)),
        Pid::Auto => process::behind(&args.socket).map_err(|cause| no_socket(&cause))?,
    };
    let channel = grpc::connect(&args.socket).await.map_err(|cause| no_socket(&cause))?;
    let clock = SystemClock::new();
    let load = load::Load { channel, api: args.api, op: args.op, callers: args.callers };

    let seconds = Duration::from_secs(args.seconds);
    let warm_up = (seconds / 10).min(Duration::from_secs(1));
    at_least_one(load.run(warm_up, clock, |_| ()).await)?;
    let before = process.as_ref().and_then(Process::observe);
    let started = clock.now();
    let progress = progress(args.seconds);
    let tally = load
        .run(seconds, clock, |done| show_progress(&progress, done, clock.now() - started))
        .await;
    let lasted = clock.now() - started;
    progress.finish_and_clear();
    let after = process.as_ref().and_then(Process::observe);

    let cpu =
        before.zip(after.as_ref()).map(|(before, after)| after.cpu.saturating_sub(before.cpu));
    let report = Report {
        pid: process.map(|process| process.pid()),
        peak_memory_kib: after.and_then(|after| after.peak_memory_kib),
        ..report(&args, at_least_one(tally)?, lasted, cpu)
    };
    show(&report, output)
}

fn at_least_one(tally: Tally) -> Result<Tally, Error> {
    if tally.requests() > 0 {
        return Ok(tally);
    }
    let first = tally.first_error.unwrap_or_else(|| "no answer in time".to_owned());
    Err(Error::AllCallsFailed { calls: tally.errors, first })
}

fn report(args: &Args, tally: Tally, lasted: Duration, cpu: Option<Duration>) -> Report {
    let requests = tally.requests();
    let micros = |share: f64| tenths(tally.latencies.quantile(share).as_secs_f64() * 1e6);
    let calls = (requests + tally.errors) as f64;
    Report {
        socket: args.socket.clone(),
        api: args.api,
        op: args.op,
        callers: args.callers,
        seconds: tenths(lasted.as_secs_f64()),
        requests,
        errors: tally.errors,
        requests_per_second: tenths(requests as f64 / lasted.as_secs_f64()),
        p50_us: micros(0.5),
        p99_us: micros(0.99),
        max_us: micros(1.0),
        pid: None,
        cpu_us_per_request: cpu.map(|cpu| tenths(cpu.as_secs_f64() * 1e6 / calls)),
        peak_memory_kib: None,
        first_error: tally.first_error,
    }
}

/// More digits would claim more than was measured.
fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn show(report: &Report, output: &mut Output<'_>) -> Result<(), Error> {
    let calls =
        format!("{:?} {:?}, {} callers", report.api, report.op, report.callers).to_lowercase();
    let members = [
        ("calls", Some(calls)),
        ("requests/s", Some(format!("{:.0}", report.requests_per_second))),
        ("p50", Some(format!("{:.0} µs", report.p50_us))),
        ("p99", Some(format!("{:.0} µs", report.p99_us))),
        ("max", Some(format!("{:.0} µs", report.max_us))),
        ("errors", Some(report.errors.to_string())),
        ("first error", report.first_error.clone()),
        ("cpu/request", report.cpu_us_per_request.map(|cpu| format!("{cpu:.1} µs"))),
        (
            "peak memory",
            report.peak_memory_kib.map(|kib| format!("{:.1} MiB", kib as f64 / 1024.0)),
        ),
        ("process", report.pid.map(|pid| pid.to_string())),
    ];
    output.thing(&members, report)
}

/// On standard error, and only if that is a terminal.
fn progress(seconds: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {elapsed}/{len} s  {msg}");
    ProgressBar::new(seconds).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn show_progress(bar: &ProgressBar, done: u64, elapsed: Duration) {
    bar.set_position(elapsed.as_secs());
    bar.set_message(format!("{:.0} requests/s", done as f64 / elapsed.as_secs_f64().max(0.001)));
}

fn pid(text: &str) -> Result<Pid, String> {
    if text == "auto" {
        return Ok(Pid::Auto);
    }
    text.parse().map(Pid::Given).map_err(|_| "neither `auto` nor a process id".to_owned())
}
