//! What is measured over the sockets: each kind of call at each server, in short rounds in turn, so that what else the
//! machine does falls on all servers alike.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use keelson_e2e::{Error, Result, process};
use serde::{Deserialize, Serialize};

use super::Finding;

/// Of a bare tonic echo's requests/s.
const LEAST_RATE: f64 = 0.8;
/// Of a bare grpc-go echo's CPU time per call.
const MOST_CPU: f64 = 0.6;
const MOST_MEMORY_KIB: u64 = 10 * 1024;

pub(super) struct Server {
    pub(super) name: &'static str,
    pub(super) socket: PathBuf,
}

/// One kind of call.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Load {
    api: &'static str,
    op: &'static str,
    callers: u32,
}

/// All rounds, of the measured server first.
pub(super) struct Table {
    servers: Vec<&'static str>,
    rounds: BTreeMap<(Load, usize), Vec<Measured>>,
}

/// What `kmsctl bench -o json` prints.
#[derive(Clone, Deserialize)]
struct Measured {
    errors: u64,
    requests_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    /// Unknown where the process behind the socket is not ours to look at.
    cpu_us_per_request: Option<f64>,
    peak_memory_kib: Option<u64>,
}

/// One line: the medians of all rounds.
#[derive(Serialize)]
pub(super) struct Row {
    server: &'static str,
    api: &'static str,
    op: &'static str,
    callers: u32,
    requests_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_us_per_request: Option<f64>,
    peak_memory_kib: Option<u64>,
    errors: u64,
}

impl Table {
    /// # Errors
    /// When a server does not answer at all.
    pub(super) fn measure(
        kmsctl: &Path,
        servers: &[Server],
        rounds: u64,
        seconds: u64,
    ) -> Result<Table> {
        let names = servers.iter().map(|server| server.name).collect();
        let mut table = Table { servers: names, rounds: BTreeMap::new() };
        for round in 1..=rounds {
            eprintln!("-> round {round} of {rounds}");
            for load in loads() {
                for (number, server) in servers.iter().enumerate() {
                    let measured = load.measure(kmsctl, &server.socket, seconds)?;
                    table.rounds.entry((load, number)).or_default().push(measured);
                }
            }
        }
        Ok(table)
    }

    pub(super) fn print(&self) {
        println!("{}", Row::TITLES);
        self.rows().iter().for_each(|row| println!("{}", row.line()));
    }

    pub(super) fn rows(&self) -> Vec<Row> {
        self.rounds
            .iter()
            .map(|((load, server), rounds)| Row::new(self.servers[*server], *load, rounds))
            .collect()
    }

    /// What is promised of the measured server, against the echoes of the same round.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let named = |name| self.servers.iter().position(|server| *server == name);
        let (tonic, go) = (named("tonic echo"), named("Go echo"));
        let mut findings = Vec::new();
        for load in loads() {
            let rate = |m: &Measured| Some(m.requests_per_second);
            if let Some(ratio) = self.ratio(load, tonic, rate) {
                let text =
                    format!("{load}: {ratio:.2} of the tonic echo's requests/s (>= {LEAST_RATE})");
                findings.push(Finding { text, held: ratio >= LEAST_RATE });
            }
            if let Some(ratio) = self.ratio(load, go, |m| m.cpu_us_per_request) {
                let text =
                    format!("{load}: {ratio:.2} of the Go echo's CPU per call (<= {MOST_CPU})");
                findings.push(Finding { text, held: ratio <= MOST_CPU });
            }
        }
        let peaks = self.rows().into_iter().filter(|row| row.server == self.servers[0]);
        if let Some(peak) = peaks.filter_map(|row| row.peak_memory_kib).max() {
            let text = format!("{} MiB resident at most (< 10)", mebibytes(peak));
            findings.push(Finding { text, held: peak < MOST_MEMORY_KIB });
        }
        let errors: u64 = self.rows().iter().map(|row| row.errors).sum();
        findings.push(Finding { text: format!("{errors} errors (0)"), held: errors == 0 });
        findings
    }

    /// The measured server's figure in parts of the other's: of each round, then the median.
    fn ratio(
        &self,
        load: Load,
        other: Option<usize>,
        figure: impl Fn(&Measured) -> Option<f64>,
    ) -> Option<f64> {
        let (ours, theirs) = (self.rounds.get(&(load, 0))?, self.rounds.get(&(load, other?))?);
        let ratio = |(ours, theirs)| Some(figure(ours)? / figure(theirs)?);
        median(ours.iter().zip(theirs).filter_map(ratio).collect())
    }
}

impl Load {
    fn measure(self, kmsctl: &Path, socket: &Path, seconds: u64) -> Result<Measured> {
        let mut command = Command::new(kmsctl);
        command
            .args(["bench", "-o", "json", "--api", self.api, "--op", self.op, "--socket"])
            .arg(socket)
            .args(["--callers", &self.callers.to_string(), "--seconds", &seconds.to_string()]);
        let printed = process::stdout(command, b"")?;
        serde_json::from_slice(&printed)
            .map_err(|error| Error::answer("kmsctl bench", error.to_string()))
    }
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}, {} callers", self.api, self.op, self.callers)
    }
}

impl Row {
    const TITLES: &'static str = "server      API  call     callers  requests/s  p50 µs  p99 µs  CPU µs/call  peak MiB  errors";

    fn new(server: &'static str, load: Load, rounds: &[Measured]) -> Row {
        let Load { api, op, callers } = load;
        let middle = |figure: fn(&Measured) -> Option<f64>| {
            median(rounds.iter().filter_map(figure).collect())
        };
        Row {
            server,
            api,
            op,
            callers,
            requests_per_second: middle(|m| Some(m.requests_per_second)).unwrap_or_default(),
            p50_us: middle(|m| Some(m.p50_us)).unwrap_or_default(),
            p99_us: middle(|m| Some(m.p99_us)).unwrap_or_default(),
            cpu_us_per_request: middle(|m| m.cpu_us_per_request),
            peak_memory_kib: rounds.iter().filter_map(|m| m.peak_memory_kib).max(),
            errors: rounds.iter().map(|m| m.errors).sum(),
        }
    }

    fn line(&self) -> String {
        let cpu = self.cpu_us_per_request.map_or("-".to_owned(), |cpu| format!("{cpu:.1}"));
        let memory = self.peak_memory_kib.map_or("-".to_owned(), mebibytes);
        format!(
            "{:<10}  {:<3}  {:<7}  {:>7}  {:>10.0}  {:>6.0}  {:>6.0}  {cpu:>11}  {memory:>8}  {:>6}",
            self.server,
            self.api,
            self.op,
            self.callers,
            self.requests_per_second,
            self.p50_us,
            self.p99_us,
            self.errors
        )
    }
}

fn loads() -> impl Iterator<Item = Load> {
    ["v1", "v2"].into_iter().flat_map(|api| {
        ["encrypt", "decrypt"]
            .into_iter()
            .flat_map(move |op| [1, 32].into_iter().map(move |callers| Load { api, op, callers }))
    })
}

/// Of an even number the upper one of the two in the middle.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn mebibytes(kib: u64) -> String {
    let tenths = kib * 10 / 1024;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(rate: f64, cpu: f64) -> Measured {
        Measured {
            errors: 0,
            requests_per_second: rate,
            p50_us: 601.2,
            p99_us: 2103.0,
            cpu_us_per_request: Some(cpu),
            peak_memory_kib: Some(5325),
        }
    }

    #[test]
    fn a_line_stands_under_its_titles() {
        let load = Load { api: "v2", op: "encrypt", callers: 32 };
        let line = Row::new("kmsplugin", load, &[measured(50_123.4, 7.84)]).line();
        assert_eq!(
            line,
            "kmsplugin   v2   encrypt       32       50123     601    2103          7.8       5.2       0"
        );
        assert_eq!(line.chars().count(), Row::TITLES.chars().count());
    }

    #[test]
    fn a_promise_is_judged_round_by_round() {
        let mut rounds = BTreeMap::new();
        for load in loads() {
            // The machine is slow in the second round: the rates fall, their ratios stay.
            rounds.insert(
                (load, 0),
                vec![measured(90.0, 6.0), measured(9.0, 5.0), measured(91.0, 6.0)],
            );
            rounds.insert(
                (load, 1),
                vec![measured(100.0, 5.0), measured(10.0, 5.0), measured(100.0, 5.0)],
            );
            rounds.insert(
                (load, 2),
                vec![measured(50.0, 9.0), measured(50.0, 9.0), measured(50.0, 9.0)],
            );
        }
        let table = Table { servers: vec!["kmsplugin", "tonic echo", "Go echo"], rounds };
        let findings = table.findings();
        let of = |text: &str| findings.iter().find(|finding| finding.text.contains(text)).unwrap();
        let rate = of("v2 decrypt, 32 callers: 0.90 of the tonic echo's requests/s");
        assert!(rate.held);
        let cpu = of("v1 encrypt, 1 callers: 0.67 of the Go echo's CPU per call");
        assert!(!cpu.held);
    }
}
