//! `kmsctl audit query`: the records that fit, in the order of the files. One record at a time is in memory.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use kms_core::audit::{ANCHOR, BEGUN, Content, DONE, Line, UNANSWERED, parse};
use kms_core::clock::{Clock, SystemClock};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::lines::Lines;
use super::show::{TITLES, human};
use crate::error::Error;
use crate::output::{Format, Output};

pub(super) const EXAMPLES: &str = "\
Examples:
  kmsctl audit query /var/log/keelson/audit.jsonl.1 /var/log/keelson/audit.jsonl --since 2h --action unwrap
  kmsctl audit query audit.jsonl --uid 9b1f3c52-6c0e-4a3e-8a55-1d2f6f0b7c11     the call that kube-apiserver made
  kmsctl audit query audit.jsonl --key 11111111-2222-3333-4444-555555555555 --outcome refused -o json
  kmsctl audit query audit.jsonl --peer 192.0.2.7 --since 1d      what this node asked for
  zcat audit.jsonl.*.gz | kmsctl audit query - --who ServiceId-33333333-4444-5555-6666-777777777777

A record must fit all that is given. What was found says nothing of what was removed: see `kmsctl audit verify`.";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Audit files, or - for standard input
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Not before: a time such as 2026-01-31T12:00:00Z, or how long ago, such as 90s, 15m, 2h, 7d
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<OffsetDateTime>,
    /// Not after, in the same form
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<OffsetDateTime>,
    /// The caller, or a part of its name, such as a service ID
    #[arg(long, value_name = "CALLER")]
    who: Option<String>,
    /// The key, or whatever else the action was done to
    #[arg(long, value_name = "UUID")]
    key: Option<Uuid>,
    /// wrap, unwrap, create_key, issue_token, use_token (with one that was refused), ...
    #[arg(long, value_name = "ACTION")]
    action: Option<String>,
    /// The uid of kube-apiserver's call (its correlation id)
    #[arg(long, value_name = "UID")]
    uid: Option<String>,
    /// The other end of the connection: an IP address with or without a port (a proxy's, where there is one)
    #[arg(long, value_name = "ADDRESS", value_parser = Peer::parse)]
    peer: Option<Peer>,
    /// done, begun, unanswered, refused, or a reason code such as KEY_NOT_FOUND_ERR or TOKEN_EXPIRED
    #[arg(long, value_name = "OUTCOME")]
    outcome: Option<String>,
    #[arg(long, value_name = "UUID")]
    instance: Option<Uuid>,
    /// Which server wrote it
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
}

pub(super) fn run(args: &Args, output: &mut Output<'_>) -> Result<(), Error> {
    let mut printer = Printer { printed: 0, output };
    let mut strange: u64 = 0;
    for path in &args.files {
        let mut lines = Lines::open(path)?;
        while let Some(line) = lines.next()? {
            match parse(line.bytes) {
                Ok(record) if args.fit(&record) => printer.print(line.bytes, &record)?,
                Ok(_) => {}
                Err(_) => strange += 1,
            }
        }
    }
    printer.finish()?;
    if strange > 0 {
        eprintln!("kmsctl: {strange} lines are no audit records; `kmsctl audit verify` says where");
    }
    Ok(())
}

impl Args {
    fn fit(&self, line: &Line<'_>) -> bool {
        let is = |wanted: &Option<String>, there: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| there == Some(wanted))
        };
        is(&self.node, Some(line.node())) && self.in_time(line) && self.fit_content(line, is)
    }

    fn fit_content(
        &self,
        line: &Line<'_>,
        is: impl Fn(&Option<String>, Option<&str>) -> bool,
    ) -> bool {
        let event = match &line.content {
            Content::Event(event) => event,
            // It has nothing else that could fit.
            Content::Anchor(_) => {
                return is(&self.action, Some(ANCHOR))
                    && (&self.who, &self.uid, &self.outcome) == (&None, &None, &None)
                    && (self.key, self.instance, self.peer) == (None, None, None);
            }
        };
        let caller = event.caller.as_deref().unwrap_or_default();
        is(&self.action, Some(&event.action))
            && is(&self.uid, event.correlation.as_deref())
            && self.who.as_ref().is_none_or(|who| caller.contains(who))
            && self.key.is_none_or(|key| event.target == Some(key))
            && self.instance.is_none_or(|instance| event.instance == Some(instance))
            && self.peer.is_none_or(|peer| event.peer.as_deref().is_some_and(|it| peer.is(it)))
            && self.outcome.as_ref().is_none_or(|wanted| match wanted.as_str() {
                "refused" => ![DONE, BEGUN, UNANSWERED].contains(&&*event.outcome),
                wanted => event.outcome == wanted,
            })
    }

    fn in_time(&self, line: &Line<'_>) -> bool {
        if self.since.is_none() && self.until.is_none() {
            return true;
        }
        OffsetDateTime::parse(line.at(), &Rfc3339).is_ok_and(|at| {
            self.since.is_none_or(|since| at >= since) && self.until.is_none_or(|until| at <= until)
        })
    }
}

/// Without a port: any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Peer {
    ip: IpAddr,
    port: Option<u16>,
}

impl Peer {
    fn parse(text: &str) -> Result<Peer, String> {
        let with_port =
            |peer: SocketAddr| Peer { ip: peer.ip().to_canonical(), port: Some(peer.port()) };
        let without = |ip: IpAddr| Peer { ip: ip.to_canonical(), port: None };
        text.parse().map(with_port).or_else(|_| text.parse().map(without)).map_err(|_| {
            "must be an IP address, with or without a port, such as 192.0.2.7, 192.0.2.7:40000 or [2001:db8::7]:40000"
                .to_owned()
        })
    }

    /// Whether `recorded`, in a record's form, is this one. An address has more than one form.
    fn is(self, recorded: &str) -> bool {
        Peer::parse(recorded).is_ok_and(|found| {
            found.ip == self.ip && (self.port.is_none() || self.port == found.port)
        })
    }
}

/// One JSON document or one table, however long, without keeping it.
struct Printer<'o, 't> {
    printed: u64,
    output: &'o mut Output<'t>,
}

impl Printer<'_, '_> {
    fn print(&mut self, bytes: &[u8], line: &Line<'_>) -> Result<(), Error> {
        let text = match (self.output.format(), self.printed) {
            (Format::Table, 0) => format!("{TITLES}\n{}\n", human(line)),
            (Format::Table, _) => human(line) + "\n",
            (Format::Json, printed) => {
                let before = if printed == 0 { "[\n" } else { ",\n" };
                format!("{before}{}", String::from_utf8_lossy(bytes))
            }
        };
        self.printed += 1;
        self.output.raw(text.as_bytes())
    }

    fn finish(self) -> Result<(), Error> {
        match (self.output.format(), self.printed) {
            (Format::Table, _) => Ok(()),
            (Format::Json, 0) => self.output.raw(b"[]\n"),
            (Format::Json, _) => self.output.raw(b"\n]\n"),
        }
    }
}

fn moment(text: &str) -> Result<OffsetDateTime, String> {
    if let Ok(at) = OffsetDateTime::parse(text, &Rfc3339) {
        return Ok(at);
    }
    let wrong =
        "must be a time such as 2026-01-31T12:00:00Z, or how long ago, such as 90s, 15m, 2h, 7d";
    let ago = ago(text).ok_or(wrong)?;
    OffsetDateTime::from(SystemClock::new().wall()).checked_sub(ago).ok_or_else(|| wrong.into())
}

fn ago(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let count: i64 = text.strip_suffix(unit)?.parse().ok().filter(|count| *count >= 0)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return None,
    };
    Some(Duration::seconds(count.checked_mul(seconds)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_an_address_in_any_of_its_forms() {
        for (asked, recorded, same) in [
            ("192.0.2.7", "192.0.2.7:40000", true),
            ("192.0.2.7:40000", "192.0.2.7:40000", true),
            ("192.0.2.7:40001", "192.0.2.7:40000", false),
            ("192.0.2.70", "192.0.2.7:40000", false),
            ("::ffff:192.0.2.7", "192.0.2.7:40000", true),
            ("2001:db8:0:0::7", "[2001:db8::7]:40000", true),
            ("[2001:db8::7]:1", "[2001:db8::7]:40000", false),
            ("192.0.2.7", "somebody", false),
        ] {
            assert_eq!(Peer::parse(asked).unwrap().is(recorded), same, "{asked} {recorded}");
        }
        for wrong in ["", "kms-0", "192.0.2", "192.0.2.7:", "192.0.2.7:70000"] {
            assert!(Peer::parse(wrong).unwrap_err().starts_with("must be an IP"), "{wrong}");
        }
    }

    #[test]
    fn how_long_ago_is_a_number_and_a_unit() {
        assert_eq!(ago("90s"), Some(Duration::seconds(90)));
        assert_eq!(ago("7d"), Some(Duration::days(7)));
        for wrong in ["", "h", "2", "2w", "-2h", "2 h", "9223372036854775807d", "2é"] {
            assert_eq!(ago(wrong), None, "{wrong}");
            assert!(moment(wrong).is_err(), "{wrong}");
        }
        assert_eq!(moment("2026-01-31T12:00:00Z").unwrap().unix_timestamp(), 1_769_860_800);
    }
}
