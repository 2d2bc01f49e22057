//! `kmsctl audit tail`: the last records, and those that come. A file that is rotated is followed to its successor.

use std::collections::VecDeque;
use std::fs::{File, Metadata};
use std::io::{BufReader, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kms_core::audit::parse;

use super::lines::{Lines, error};
use super::show::human;
use crate::error::Error;
use crate::output::{Format, Output, printable};

pub(super) const EXAMPLES: &str = "\
Examples:
  kmsctl audit tail -f /var/log/keelson/audit.jsonl
  kmsctl audit tail -n 100 /var/log/keelson/audit.jsonl

With -o json the lines are printed as they stand in the file.";

/// Where to begin for one record more: few are longer.
const BYTES_PER_RECORD: u64 = 1024;
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The audit file of a server
    file: PathBuf,
    /// Go on with the records that come, until interrupted
    #[arg(short, long)]
    follow: bool,
    /// How many records to begin with
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
    lines: u64,
}

pub(super) async fn run(args: &Args, output: &mut Output<'_>) -> Result<(), Error> {
    let path = args.file.as_path();
    let mut place = last(path, args.lines, output)?;
    if !args.follow {
        return Ok(());
    }
    loop {
        tokio::time::sleep(POLL).await;
        place = go_on(path, place, output)?;
    }
}

/// Up to where a file was shown.
struct Place {
    file: File,
    offset: u64,
}

fn last(path: &Path, count: u64, output: &mut Output<'_>) -> Result<Place, Error> {
    let file = File::open(path).map_err(|cause| error(path, cause))?;
    let size = file.metadata().map_err(|cause| error(path, cause))?.len();
    // One byte before, so that a line that begins just there is whole.
    let from = size.saturating_sub(count.saturating_mul(BYTES_PER_RECORD).saturating_add(1));
    let mut ring = VecDeque::new();
    let mut first = from > 0;
    let mut place = Place { file, offset: from };
    read(path, &mut place, |line| {
        if !std::mem::take(&mut first) {
            ring.push_back(line.to_vec());
        }
        if u64::try_from(ring.len()).is_ok_and(|shown| shown > count) {
            ring.pop_front();
        }
        Ok(())
    })?;
    ring.iter().try_for_each(|line| print(line, output))?;
    Ok(place)
}

fn go_on(path: &Path, mut place: Place, output: &mut Output<'_>) -> Result<Place, Error> {
    read(path, &mut place, |line| print(line, output))?;
    let ours = place.file.metadata().map_err(|cause| error(path, cause))?;
    // Between the two files of a rotation there is none.
    let Ok(there) = std::fs::metadata(path) else { return Ok(place) };
    if same(&ours, &there) && there.len() >= place.offset {
        return Ok(place);
    }
    let file = File::open(path).map_err(|cause| error(path, cause))?;
    Ok(Place { file, offset: 0 })
}

fn same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Gives every whole line after `place` to `each`, and moves on behind it.
fn read(
    path: &Path,
    place: &mut Place,
    mut each: impl FnMut(&[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let failed = |cause| error(path, cause);
    let mut file = place.file.try_clone().map_err(failed)?;
    file.seek(SeekFrom::Start(place.offset)).map_err(failed)?;
    let mut lines = Lines::of(path, Box::new(BufReader::new(file)));
    while let Some(line) = lines.next()? {
        if !line.whole {
            break;
        }
        place.offset += line.length;
        each(line.bytes)?;
    }
    Ok(())
}

fn print(line: &[u8], output: &mut Output<'_>) -> Result<(), Error> {
    let text = match (output.format(), parse(line)) {
        (Format::Table, Ok(record)) => human(&record),
        (Format::Table, Err(_)) => {
            format!("no audit record: {}", printable(&String::from_utf8_lossy(line)))
        }
        (Format::Json, _) => String::from_utf8_lossy(line).into_owned(),
    };
    output.raw(format!("{text}\n").as_bytes())
}
