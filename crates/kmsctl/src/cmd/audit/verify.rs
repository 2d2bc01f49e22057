//! `kmsctl audit verify`: whether the logs of one or more servers are as they were written, and what is wrong where.
//!
//! Files of one server are put in the order of their records, whatever the order on the command line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kms_core::audit::anchor::{Anchor, PublicKey};
use kms_core::audit::parse;
use kms_core::audit::verify::{
    Finding, Loss, MAX_UNANCHORED_SECONDS, Summary, Unanchored, Verifier,
};
use serde::Serialize;

use super::lines::{Line, Lines, error, is_stdin};
use super::progress::Progress;
use crate::error::Error;
use crate::output::{Format, Output};

pub(super) const EXAMPLES: &str = "\
Examples:
  kmsctl audit verify /var/log/keelson/audit.jsonl* --key /etc/keelson/audit.pem --anchor /backup/audit.anchor
  kmsctl audit verify node-1/audit.jsonl* node-2/audit.jsonl* --key audit.pem -o json
  zcat audit.jsonl.3.gz audit.jsonl.2.gz | kmsctl audit verify - --first 1

Without --key the signatures of anchors are not checked, and whoever can write the files can compute the chain anew.
Without --anchor records that are missing at the end are not seen. kms-server writes both beside its audit file
(audit.pem and audit.anchor beside audit.jsonl): copy them to where its host cannot write (docs/audit.md).

Exit codes: 0 sound, 1 tampered with, 2 it could not be found out.";

/// More are counted, and not told one by one.
const MOST_TOLD: usize = 1000;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Audit files of any number of servers, in any order; or - for standard input
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// PEM file of a key that may have signed the anchors; may be repeated
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// File with an anchor that was kept elsewhere: the records it covers must be there; may be repeated
    #[arg(long, value_name = "FILE")]
    anchor: Vec<PathBuf>,
    /// The number of the first record, so that one that is missing before it is seen: 1, or where the last check ended
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    first: Option<u64>,
}

pub(super) fn run(args: &Args, output: &mut Output<'_>) -> Result<(), Error> {
    let report = examine(args).map_err(|error| Error::NotVerified(Box::new(error)))?;
    show(&report, output)?;
    if report.sound { Ok(()) } else { Err(Error::Tampered { findings: report.found }) }
}

/// The members are the command's JSON, in this order.
#[derive(Debug, Serialize)]
struct Report {
    sound: bool,
    /// Signatures of anchors were checked.
    signatures: bool,
    chains: Vec<Chain>,
    /// How many; `findings` tells at most a thousand of them.
    found: u64,
    findings: Vec<Told>,
}

#[derive(Debug, Serialize)]
struct Chain {
    node: Option<String>,
    files: Vec<PathBuf>,
    records: u64,
    first: u64,
    last: u64,
    anchors: u64,
    /// The last record that a good anchor covers; what comes after it only hangs on the chain.
    anchored: u64,
    anchored_at: Option<String>,
    /// How often records waited for an anchor for longer than a running server with its HSM lets them; no tampering.
    late: u64,
    longest: Option<Unanchored>,
    /// How often the server did not find a file, or the beginning of one, where it was left; no tampering where that is
    /// among the files.
    losses: u64,
    last_loss: Option<Loss>,
}

#[derive(Debug, Serialize)]
struct Told {
    file: Option<PathBuf>,
    line: Option<u64>,
    sequence: Option<u64>,
    what: String,
}

#[derive(Default)]
struct Findings {
    count: u64,
    told: Vec<Told>,
}

impl Findings {
    /// Without a line: at the end of the file.
    fn add(&mut self, file: Option<&Path>, line: Option<&Line<'_>>, finding: &Finding) {
        self.count += 1;
        if self.told.len() < MOST_TOLD {
            self.told.push(Told {
                file: file.map(Path::to_owned),
                line: line.map(|line| line.number),
                sequence: line.and_then(|line| Some(parse(line.bytes).ok()?.seq)),
                what: finding.to_string(),
            });
        }
    }
}

fn examine(args: &Args) -> Result<Report, Error> {
    let keys = args.key.iter().map(|path| key(path)).collect::<Result<Vec<_>, _>>()?;
    let mut witnesses = witnesses(&args.anchor, &keys)?;
    let mut findings = Findings::default();
    let mut chains = Vec::new();
    let mut progress = Progress::of(&args.files);
    for (node, files) in ordered(&args.files)? {
        // What is on standard input is known only when it is read: there is one chain, and one witness.
        let witness = match node {
            Some(node) => witnesses.remove(&node),
            None => witnesses.pop_first().map(|(_, witness)| witness),
        };
        let mut verifier = Verifier::new(&keys, witness);
        if let Some(first) = args.first {
            verifier = verifier.begin_at(first);
        }
        for path in &files {
            read(path, &mut verifier, &mut findings, &mut progress)?;
        }
        chains.push(conclude(verifier, files, &mut findings));
    }
    // An anchor of a node of which there is no record at all.
    for witness in witnesses.into_values() {
        chains.push(conclude(Verifier::new(&keys, Some(witness)), Vec::new(), &mut findings));
    }
    Ok(Report {
        sound: findings.count == 0,
        signatures: !keys.is_empty(),
        chains,
        found: findings.count,
        findings: findings.told,
    })
}

fn read(
    path: &Path,
    verifier: &mut Verifier<'_>,
    findings: &mut Findings,
    progress: &mut Progress,
) -> Result<(), Error> {
    verifier.next_file();
    let mut lines = Lines::open(path)?;
    let mut found = Vec::new();
    while let Some(line) = lines.next()? {
        progress.add(line.length);
        if line.whole {
            verifier.line(line.bytes, &mut found);
        } else {
            found.push(Finding::Torn);
        }
        for finding in found.drain(..) {
            findings.add(Some(path), Some(&line), &finding);
        }
    }
    Ok(())
}

fn conclude(verifier: Verifier<'_>, files: Vec<PathBuf>, findings: &mut Findings) -> Chain {
    let (summary, cut) = verifier.finish();
    if let Some(cut) = cut {
        findings.add(files.last().map(PathBuf::as_path), None, &cut);
    }
    let Summary { node, first, last, records, anchors, anchored, anchored_at, .. } = summary;
    let Summary { late, longest, losses, last_loss, .. } = summary;
    Chain {
        node,
        files,
        records,
        first,
        last,
        anchors,
        anchored,
        anchored_at,
        late,
        longest,
        losses,
        last_loss,
    }
}

/// The files of each node, oldest records first. One without any record is looked at with those of no node.
fn ordered(files: &[PathBuf]) -> Result<BTreeMap<Option<String>, Vec<PathBuf>>, Error> {
    if files.iter().any(|path| is_stdin(path)) {
        return match files {
            [stdin] => Ok(BTreeMap::from([(None, vec![stdin.clone()])])),
            _ => Err(Error::Input {
                what: "-".to_owned(),
                cause: "standard input is looked at alone, without other files".to_owned(),
            }),
        };
    }
    let mut by_node: BTreeMap<_, Vec<(u64, PathBuf)>> = BTreeMap::new();
    for path in files {
        let (node, seq) = beginning(path)?;
        by_node.entry(node).or_default().push((seq, path.clone()));
    }
    let sorted = by_node.into_iter().map(|(node, mut files)| {
        files.sort();
        (node, files.into_iter().map(|(_, path)| path).collect())
    });
    Ok(sorted.collect())
}

fn beginning(path: &Path) -> Result<(Option<String>, u64), Error> {
    let mut lines = Lines::open(path)?;
    while let Some(line) = lines.next()? {
        if let Ok(record) = parse(line.bytes) {
            return Ok((Some(record.node().to_owned()), record.seq));
        }
    }
    Ok((None, 0))
}

fn key(path: &Path) -> Result<PublicKey, Error> {
    let text = std::fs::read_to_string(path).map_err(|cause| error(path, cause))?;
    PublicKey::parse_pem(&text).map_err(|cause| Error::Input {
        what: path.display().to_string(),
        cause: cause.to_string(),
    })
}

/// The newest anchor of each node in these files. A forged one would make a good log look bad, or a bad one good.
fn witnesses(
    files: &[PathBuf],
    keys: &[PublicKey],
) -> Result<BTreeMap<String, Anchor<'static>>, Error> {
    let mut newest: BTreeMap<String, Anchor<'static>> = BTreeMap::new();
    for path in files {
        let input = |cause: &str| Error::Input {
            what: path.display().to_string(),
            cause: cause.to_owned(),
        };
        let mut lines = Lines::open(path)?;
        while let Some(line) = lines.next()? {
            let anchor = Anchor::parse_line(line.bytes)
                .map_err(|_| input("a line is not an anchor as kms-server writes it"))?;
            if !keys.is_empty() && !keys.iter().any(|key| anchor.is_signed_by(key)) {
                return Err(input("the anchor is not signed by the key that was given"));
            }
            let known = newest.get(anchor.node()).map_or(0, |known| known.head().seq);
            if anchor.head().seq > known {
                newest.insert(anchor.node().to_owned(), anchor.into_owned());
            }
        }
    }
    Ok(newest)
}

fn show(report: &Report, output: &mut Output<'_>) -> Result<(), Error> {
    if output.format() == Format::Json {
        return output.json(report);
    }
    for told in &report.findings {
        let place = match (&told.file, told.line) {
            (Some(file), Some(line)) => format!("{}: line {line}", file.display()),
            (Some(file), None) => format!("{}: end", file.display()),
            (None, _) => "no file".to_owned(),
        };
        let sequence = told.sequence.map_or(String::new(), |seq| format!(", record {seq}"));
        output.note(&format!("{place}{sequence}: {}", told.what))?;
    }
    if report.found > report.findings.len().try_into().unwrap_or(u64::MAX) {
        output.note(&format!("... {} findings in all", report.found))?;
    }
    for chain in &report.chains {
        output.note(&sentence(chain, report.signatures))?;
        if let Some(longest) = &chain.longest {
            output.note(&late(chain.late, longest))?;
        }
        if let Some(loss) = &chain.last_loss {
            output.note(&lost(chain.losses, loss, chain.first))?;
        }
    }
    Ok(())
}

fn sentence(chain: &Chain, signatures: bool) -> String {
    let node = chain.node.as_deref().unwrap_or("unknown");
    let read = format!("node {node}: records {} to {}", chain.first, chain.last);
    let anchors = match (&chain.anchored_at, signatures) {
        (Some(at), _) => format!("signed up to record {} at {at}", chain.anchored),
        (None, true) => "no signed anchor".to_owned(),
        (None, false) => format!("{} anchors, not checked: give --key", chain.anchors),
    };
    let files = match chain.files.len() {
        1 => "1 file".to_owned(),
        count => format!("{count} files"),
    };
    format!("{read} in {files}, {anchors}")
}

fn lost(times: u64, last: &Loss, first: u64) -> String {
    let Loss { record, at, action, detail } = last;
    let times = if times == 1 { "once".to_owned() } else { format!("{times} times") };
    let detail = detail.as_ref().map(|detail| format!(" ({detail})")).unwrap_or_default();
    let scope = if first == 1 {
        "its records are looked for above, from record 1 on".to_owned()
    } else {
        format!("what was before record {first} is not among these files: check that you have it")
    };
    format!(
        "  the server did not find a file of the log where it was left: {times}, the last time at record {record}, {at}: \
         {action}{detail}; {scope}"
    )
}

fn late(times: u64, longest: &Unanchored) -> String {
    let Unanchored { from, to, since, until, seconds } = longest;
    let times = if times == 1 { "once".to_owned() } else { format!("{times} times") };
    format!(
        "  without an anchor for more than {MAX_UNANCHORED_SECONDS} s: {times}, the longest for {seconds} s, records {from} \
         to {to}, {since} to {until}"
    )
}
