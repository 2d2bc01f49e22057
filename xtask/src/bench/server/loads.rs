//! Each kind of load at each server, in short rounds in turn, so that what else the machine does falls on all alike.

use std::collections::BTreeMap;
use std::path::Path;

use keelson_e2e::Result;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::not_json;
use super::service::{Kind, Service, USUAL_WORKERS, run_load};
use crate::bench::table::median;

/// Arrivals a second at which times are judged.
pub(super) const CALM: u32 = 1000;
/// In parts of what the same server did at most just before.
pub(super) const OVERLOAD: f64 = 4.0;
/// More than the server works on at once, and less than it accepts from four addresses.
const CROWD: u32 = 480;
const MANY: u32 = 32;

/// One kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Load {
    /// No server: kms-hsm's vault in the load generator.
    Vault {
        full: bool,
        callers: u32,
    },
    Noop {
        connections: u32,
    },
    /// What is known of a key: as a wrap, without the HSM.
    Read {
        connections: u32,
    },
    Wrap(Kind, u32),
    Unwrap(Kind, u32),
    /// So many arrivals a second, whatever the answers do.
    Calm,
    Overload,
}

/// What bench-load prints.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Measured {
    pub(super) good_per_second: f64,
    pub(super) refused_per_second: f64,
    pub(super) failed: u64,
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) p999_us: Option<f64>,
    pub(super) max_us: Option<f64>,
}

/// All rounds.
pub(super) struct Measurements(pub(super) BTreeMap<Load, Vec<Measured>>);

/// One line: the medians of all rounds, the longest answer, the sum of failures.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) load: String,
    pub(super) connections: u32,
    pub(super) good_per_second: f64,
    pub(super) refused_per_second: f64,
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) p999_us: Option<f64>,
    pub(super) max_us: Option<f64>,
    failed: u64,
}

impl Measurements {
    /// # Errors
    /// When a server does not answer at all.
    pub(super) fn take(
        programs: &Path,
        services: &[Service],
        rounds: u64,
        seconds: u64,
    ) -> Result<Measurements> {
        let mut all: BTreeMap<Load, Vec<Measured>> = BTreeMap::new();
        for round in 1..=rounds {
            eprintln!("-> round {round} of {rounds}");
            for load in Load::all() {
                let peak = all.get(&Load::PEAK).and_then(|rounds| rounds.last());
                let peak = peak.map_or(0.0, |peak| peak.good_per_second);
                let measured = load.measure(programs, services, seconds, peak)?;
                all.entry(load).or_default().push(measured);
            }
        }
        Ok(Measurements(all))
    }

    pub(super) fn rows(&self) -> Vec<Row> {
        self.0.iter().map(|(load, rounds)| Row::new(*load, rounds)).collect()
    }

    pub(super) fn print(&self) {
        println!("SoftHSM2; the load generator runs on the same processors as the server.\n");
        println!("{}", Row::TITLES);
        self.rows().iter().for_each(|row| println!("{}", row.line()));
    }
}

impl Load {
    pub(super) const PEAK: Load = Load::Wrap(Kind::Workers(USUAL_WORKERS), MANY);
    pub(super) const NOOP: Load = Load::Noop { connections: MANY };
    pub(super) const READ: Load = Load::Read { connections: MANY };
    pub(super) const FULL: Load = Load::Wrap(Kind::FullToken, MANY);

    pub(super) fn wrap_with_workers(workers: u32) -> Load {
        Load::Wrap(Kind::Workers(workers), MANY)
    }

    fn all() -> Vec<Load> {
        let mut all = Vec::new();
        for callers in [1, MANY] {
            let usual = Kind::Workers(USUAL_WORKERS);
            all.extend([
                Load::Vault { full: false, callers },
                Load::Noop { connections: callers },
                Load::Read { connections: callers },
                Load::Wrap(usual, callers),
                Load::Wrap(Kind::FullToken, callers),
                Load::Unwrap(usual, callers),
                Load::Unwrap(Kind::FullToken, callers),
            ]);
        }
        all.push(Load::Vault { full: true, callers: MANY });
        all.extend([1, 4].map(Load::wrap_with_workers));
        all.extend([Load::Calm, Load::Overload]);
        all
    }

    fn kind(self) -> Kind {
        match self {
            Load::Noop { .. } => Kind::Noop,
            Load::Wrap(kind, _) | Load::Unwrap(kind, _) => kind,
            Load::Vault { full: true, .. } => Kind::FullToken,
            Load::Vault { .. } | Load::Read { .. } | Load::Calm | Load::Overload => {
                Kind::Workers(USUAL_WORKERS)
            }
        }
    }

    fn connections(self) -> u32 {
        match self {
            Load::Vault { callers, .. } => callers,
            Load::Noop { connections } | Load::Read { connections } => connections,
            Load::Wrap(_, connections) | Load::Unwrap(_, connections) => connections,
            Load::Calm => MANY,
            Load::Overload => CROWD,
        }
    }

    fn measure(
        self,
        programs: &Path,
        services: &[Service],
        seconds: u64,
        peak: f64,
    ) -> Result<Measured> {
        let Some(service) = services.iter().find(|service| service.kind == self.kind()) else {
            return Ok(Measured::default());
        };
        let connections = self.connections();
        let (op, wanted, rate) = match self {
            Load::Vault { .. } => {
                let task = json!({"do": "vault", "config": service.config, "callers": connections,
                    "seconds": seconds});
                let measured = run_load(programs, &service.state.dir, &task)?;
                return serde_json::from_value(measured).map_err(not_json("bench-load"));
            }
            // What this server answers to whoever is known, and may be here, beyond one request a second.
            Load::Noop { .. } => ("wrap", 429, 0.0),
            Load::Read { .. } => ("metadata", 200, 0.0),
            Load::Unwrap(..) => ("unwrap", 200, 0.0),
            Load::Wrap(..) => ("wrap", 200, 0.0),
            Load::Calm => ("wrap", 200, f64::from(CALM)),
            Load::Overload => ("wrap", 200, OVERLOAD * peak),
        };
        let load = json!({"op": op, "wanted": wanted, "connections": connections, "seconds": seconds,
            "rate": whole(rate)});
        let measured = service.load(programs, load)?;
        serde_json::from_value(measured).map_err(not_json("bench-load"))
    }
}

/// Without its fraction; a rate is far below where that could fail.
fn whole(rate: f64) -> u32 {
    format!("{rate:.0}").parse().unwrap_or_default()
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of = |kind: &Kind| match kind {
            Kind::FullToken => ", full token".to_owned(),
            Kind::Workers(workers) if *workers != USUAL_WORKERS => format!(", {workers} workers"),
            Kind::Workers(_) | Kind::Noop => String::new(),
        };
        match self {
            Load::Vault { full: false, .. } => write!(f, "no server: wrap in the HSM"),
            Load::Vault { full: true, .. } => write!(f, "no server, full token"),
            Load::Noop { .. } => write!(f, "authenticated no-op"),
            Load::Read { .. } => write!(f, "metadata of a key, audited"),
            Load::Wrap(kind, _) => write!(f, "wrap{}", of(kind)),
            Load::Unwrap(kind, _) => write!(f, "unwrap{}", of(kind)),
            Load::Calm => write!(f, "wrap, {CALM} arrivals/s"),
            Load::Overload => write!(f, "wrap, {OVERLOAD} times the peak"),
        }
    }
}

impl Row {
    const TITLES: &'static str = "load                        connections    good/s  refused/s  p50 ms  p99 ms  p99.9 ms  longest ms  failed";

    fn new(load: Load, rounds: &[Measured]) -> Row {
        let middle = |figure: fn(&Measured) -> Option<f64>| {
            median(rounds.iter().filter_map(figure).collect())
        };
        Row {
            load: load.to_string(),
            connections: load.connections(),
            good_per_second: middle(|m| Some(m.good_per_second)).unwrap_or_default(),
            refused_per_second: middle(|m| Some(m.refused_per_second)).unwrap_or_default(),
            p50_us: middle(|m| m.p50_us),
            p99_us: middle(|m| m.p99_us),
            p999_us: middle(|m| m.p999_us),
            max_us: rounds.iter().filter_map(|m| m.max_us).max_by(f64::total_cmp),
            failed: rounds.iter().map(|m| m.failed).sum(),
        }
    }

    fn line(&self) -> String {
        let ms = |us: Option<f64>| us.map_or("-".to_owned(), |us| format!("{:.2}", us / 1000.0));
        format!(
            "{:<26}  {:>11}  {:>8.0}  {:>9.0}  {:>6}  {:>6}  {:>8}  {:>10}  {:>6}",
            self.load,
            self.connections,
            self.good_per_second,
            self.refused_per_second,
            ms(self.p50_us),
            ms(self.p99_us),
            ms(self.p999_us),
            ms(self.max_us),
            self.failed
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stands_under_its_titles() {
        let measured = Measured {
            good_per_second: 5123.4,
            refused_per_second: 0.0,
            failed: 0,
            p50_us: Some(6012.0),
            p99_us: Some(21_030.0),
            p999_us: Some(22_000.0),
            max_us: None,
        };
        let line = Row::new(Load::FULL, &[measured]).line();
        assert_eq!(
            line,
            "wrap, full token                     32      5123          0    6.01   21.03     22.00           -       0"
        );
        assert_eq!(line.chars().count(), Row::TITLES.chars().count());
    }
}
