//! The lines of a file, one at a time: memory does not grow with the file, nor with a line that has no end.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use kms_core::limits::MAX_AUDIT_LINE;

use crate::error::Error;

/// Standard input, as a file name.
const STDIN: &str = "-";

pub(super) struct Lines {
    path: PathBuf,
    from: Box<dyn BufRead>,
    line: Vec<u8>,
    number: u64,
}

/// One line, without its line feed. Of one that is too long there is only the beginning, which is too long as well.
pub(super) struct Line<'l> {
    pub(super) bytes: &'l [u8],
    /// Counted from 1.
    pub(super) number: u64,
    /// How many bytes of the file it takes, with its line feed.
    pub(super) length: u64,
    /// It has its line feed.
    pub(super) whole: bool,
}

impl Lines {
    pub(super) fn open(path: &Path) -> Result<Lines, Error> {
        let from: Box<dyn BufRead> = if is_stdin(path) {
            Box::new(BufReader::new(io::stdin()))
        } else {
            let file = File::open(path).map_err(|cause| error(path, cause))?;
            Box::new(BufReader::with_capacity(256 * 1024, file))
        };
        Ok(Lines::of(path, from))
    }

    /// `path` is where errors say that it came from.
    pub(super) fn of(path: &Path, from: Box<dyn BufRead>) -> Lines {
        Lines { path: path.to_owned(), from, line: Vec::new(), number: 0 }
    }

    pub(super) fn next(&mut self) -> Result<Option<Line<'_>>, Error> {
        self.line.clear();
        let failed = |cause| error(&self.path, cause);
        let most = u64::try_from(MAX_AUDIT_LINE).unwrap_or(u64::MAX).saturating_add(2);
        let mut length =
            (&mut self.from).take(most).read_until(b'\n', &mut self.line).map_err(failed)?;
        if length == 0 {
            return Ok(None);
        }
        self.number += 1;
        let whole = match self.line.last() {
            Some(b'\n') => {
                self.line.pop();
                true
            }
            _ if self.line.len() > MAX_AUDIT_LINE => {
                length += self.from.skip_until(b'\n').map_err(failed)?;
                true
            }
            _ => false,
        };
        let length = u64::try_from(length).unwrap_or(u64::MAX);
        Ok(Some(Line { bytes: &self.line, number: self.number, length, whole }))
    }
}

pub(super) fn is_stdin(path: &Path) -> bool {
    path == Path::new(STDIN)
}

pub(super) fn error(path: &Path, cause: io::Error) -> Error {
    Error::File { path: path.display().to_string(), cause }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn a_line_without_end_is_one_line_and_not_kept() {
        let long = "x".repeat(3 * MAX_AUDIT_LINE);
        let text = format!("first\n{long}\nthird\nrest");
        let mut lines = Lines::of(Path::new("f"), Box::new(Cursor::new(text)));
        let mut seen = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            seen.push((line.number, line.bytes.len(), line.whole));
        }
        assert_eq!(
            seen,
            [(1, 5, true), (2, MAX_AUDIT_LINE + 2, true), (3, 5, true), (4, 4, false)]
        );
    }
}
