//! `kmsctl conformance`: judges any KMS plug-in by what kube-apiserver demands of one, through the socket alone. It
//! encrypts, decrypts and asks for the status; it changes no key and nothing that is stored.

mod cases;
pub mod hpack;
mod leaks;
mod load;
mod raw;
mod report;
mod status;
mod subject;
mod tamper;
mod v1;
mod v2;
mod wire;

use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};

use self::cases::{CASES, Case};
use self::report::{Finding, Report, Unmet, Verdict};
use self::subject::{Api, Failure, Subject};
use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl conformance --socket /etc/kubernetes/kmsplugin/kms.sock
  kmsctl conformance --socket @kms.sock --api v2 --timeout 10s
  kmsctl conformance --socket \"$KMS_SOCKET\" -o json | jq '.cases[] | select(.result == \"fail\")'

Each case has a number that it keeps. Those that need more than the socket are not judged: 4, 5, 7, 15, 18, 20, 21, \
22, 26, 29 and 30 (the host, the HSM, a second plug-in, a restart, a rotation or an API server). Of case 14 the text is \
judged, not the time.

No key is rotated and nothing is stored, but the plug-in gets some thousands of calls within seconds, up to 200 at a \
time: run it beside a busy API server only if the plug-in can take that.

Exit codes: 0 no case failed, 1 a case failed or nobody answers, 2 wrong command line.";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The plug-in's socket: a path, or @name in the abstract namespace
    #[arg(long, value_name = "PATH")]
    socket: String,
    /// Which versions of the interface it must serve; without it, those that it does serve are judged
    #[arg(long, value_enum)]
    api: Option<Choice>,
    /// How long one call may take: kube-apiserver's `timeout`, such as 3s or 500ms
    #[arg(long, default_value = "3s", value_name = "TIME", value_parser = duration)]
    timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Choice {
    V1,
    V2,
    Both,
}

pub(crate) async fn run(args: Args, output: &mut Output<'_>) -> Result<(), Error> {
    let asked = args.api.unwrap_or(Choice::Both).apis();
    let required = args.api.map_or(&[][..], Choice::apis);
    let subject = Subject::meet(&args.socket, args.timeout, asked, required)
        .await
        .map_err(|failure| no_socket(&args.socket, failure))?;
    let wanted = |case: &&Case| case.needs.iter().all(|api| asked.contains(api));
    let cases: Vec<&Case> = CASES.iter().filter(wanted).collect();
    let progress = progress(cases.len());
    let mut findings = Vec::new();
    for case in cases {
        progress.set_message(case.name);
        findings.push(Finding::new(case.number, case.name, case.why, judge(case, &subject).await));
        progress.inc(1);
    }
    progress.finish_and_clear();
    Report::new(args.socket, findings).show(output)
}

async fn judge(case: &Case, subject: &Subject) -> Verdict {
    match case.needs.iter().find(|api| !subject.serves(**api)) {
        Some(api) => Err(Unmet::Skipped(format!("the plug-in does not serve KMS {api}"))),
        None => (case.check)(subject).await,
    }
}

fn no_socket(socket: &str, failure: Failure) -> Error {
    let cause = match failure {
        Failure::Lost(cause) => cause,
        other => other.to_string(),
    };
    Error::Socket { socket: socket.to_owned(), cause }
}

impl Choice {
    fn apis(self) -> &'static [Api] {
        match self {
            Choice::V1 => &[Api::V1],
            Choice::V2 => &[Api::V2],
            Choice::Both => &[Api::V1, Api::V2],
        }
    }
}

/// On standard error, and only if that is a terminal.
fn progress(cases: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}");
    let cases = u64::try_from(cases).unwrap_or(u64::MAX);
    ProgressBar::new(cases).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// As kube-apiserver's configuration writes it, in whole numbers; without a unit, seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let unit = text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit);
    let millis = match unit {
        "ms" => 1,
        "s" | "" => 1000,
        "m" => 60_000,
        _ => return Err("write it as 3s, 500ms or 1m".to_owned()),
    };
    let millis = number.parse::<u64>().ok().and_then(|number| number.checked_mul(millis));
    let millis = millis.filter(|millis| (1..=600_000).contains(millis));
    millis.map(Duration::from_millis).ok_or_else(|| "from 1ms to 10m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_written_as_for_kube_apiserver() {
        for (text, millis) in [("3s", 3000), ("500ms", 500), ("2", 2000), ("1m", 60_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "s", "0s", "11m", "3h", "-1s", "1.5s", "99999999999999999999s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
