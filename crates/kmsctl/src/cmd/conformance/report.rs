//! What came of each case: one row for people with the reason behind each failure, or one JSON document.

use serde::Serialize;

use super::cases::NOT_JUDGED;
use crate::error::Error;
use crate::output::{Format, Output};

/// Characters of SEEN in the table.
const WIDTH: usize = 100;

/// What was seen where the plug-in does as it should; else why it does not, or why the case says nothing.
pub(super) type Verdict = Result<String, Unmet>;

#[derive(Debug)]
pub(super) enum Unmet {
    Failed(String),
    Skipped(String),
}

impl<T: ToString> From<T> for Unmet {
    fn from(seen: T) -> Unmet {
        Unmet::Failed(seen.to_string())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    Pass,
    Fail,
    Skip,
}

#[derive(Debug, Serialize)]
pub(super) struct Finding {
    pub(super) number: u8,
    pub(super) name: &'static str,
    pub(super) result: Outcome,
    pub(super) seen: String,
    pub(super) why: &'static str,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    socket: String,
    passed: usize,
    failed: usize,
    skipped: usize,
    cases: Vec<Finding>,
    /// Numbers of the cases that cannot be judged through the socket.
    not_judged: &'static [u8],
}

impl Finding {
    pub(super) fn new(number: u8, name: &'static str, why: &'static str, verdict: Verdict) -> Self {
        let (result, seen) = match verdict {
            Ok(seen) => (Outcome::Pass, seen),
            Err(Unmet::Failed(seen)) => (Outcome::Fail, seen),
            Err(Unmet::Skipped(seen)) => (Outcome::Skip, seen),
        };
        Finding { number, name, result, seen, why }
    }
}

impl Report {
    /// In the order of the cases' numbers.
    pub(super) fn new(socket: String, mut cases: Vec<Finding>) -> Report {
        cases.sort_by_key(|case| case.number);
        let count = |result| cases.iter().filter(|case| case.result == result).count();
        let (passed, failed) = (count(Outcome::Pass), count(Outcome::Fail));
        let skipped = count(Outcome::Skip);
        Report { socket, passed, failed, skipped, cases, not_judged: NOT_JUDGED }
    }

    /// # Errors
    /// A case failed; or the report cannot be printed.
    pub(super) fn show(&self, output: &mut Output<'_>) -> Result<(), Error> {
        output.list(["CASE", "NAME", "RESULT", "SEEN"], self.rows(), self)?;
        for case in self.cases.iter().filter(|case| case.result == Outcome::Fail) {
            output.note("")?;
            output.note(&format!("FAIL {} {}: {}", case.number, case.name, case.seen))?;
            output.note(&format!("  Why it matters: {}", case.why))?;
        }
        if output.format() == Format::Table {
            output.note("")?;
        }
        output.note(&self.summary())?;
        match self.failed {
            0 => Ok(()),
            failed => Err(Error::NotConforming { failed, cases: self.cases.len() }),
        }
    }

    fn rows(&self) -> Vec<[String; 4]> {
        let row = |case: &Finding| {
            let result = match case.result {
                Outcome::Pass => "pass",
                Outcome::Fail => "FAIL",
                Outcome::Skip => "skip",
            };
            let number = format!("{:>4}", case.number);
            [number, case.name.to_owned(), result.to_owned(), cut(&case.seen)]
        };
        self.cases.iter().map(row).collect()
    }

    fn summary(&self) -> String {
        format!(
            "{} cases: {} passed, {} failed, {} skipped",
            self.cases.len(),
            self.passed,
            self.failed,
            self.skipped
        )
    }
}

/// A row stays a line on most terminals; the whole text of a failure is below the table.
fn cut(seen: &str) -> String {
    match seen.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &seen[..end]),
        None => seen.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verdict: Verdict) -> Report {
        let passed = Finding::new(9, "later", "because", Ok("good".to_owned()));
        let skipped = Err(Unmet::Skipped("not served".to_owned()));
        let skipped = Finding::new(2, "middle", "because", skipped);
        Report::new("/s".into(), vec![passed, skipped, Finding::new(1, "first", "why", verdict)])
    }

    fn shown(report: &Report, format: Format) -> (String, Result<(), Error>) {
        let mut bytes = Vec::new();
        let result = report.show(&mut Output::new(format, &mut bytes));
        (String::from_utf8(bytes).unwrap(), result)
    }

    #[test]
    fn a_failure_is_explained_below_the_table() {
        let (text, result) = shown(&report(Err("bad".into())), Format::Table);
        assert_eq!(
            text,
            "CASE  NAME    RESULT  SEEN\n   1  first   FAIL    bad\n   2  middle  skip    not served\n   \
             9  later   pass    good\n\nFAIL 1 first: bad\n  Why it matters: why\n\n\
             3 cases: 1 passed, 1 failed, 1 skipped\n"
        );
        assert!(matches!(result, Err(Error::NotConforming { failed: 1, cases: 3 })));
    }

    #[test]
    fn a_long_text_is_cut_in_the_table_alone() {
        let long = "ü".repeat(200);
        let (text, _) = shown(&report(Err(long.as_str().into())), Format::Table);
        assert!(text.contains(&format!("FAIL    {}…\n", "ü".repeat(100))), "{text}");
        assert!(text.contains(&format!("FAIL 1 first: {long}\n")), "{text}");
    }

    #[test]
    fn without_a_failure_it_is_well() {
        let (text, result) = shown(&report(Ok("good".into())), Format::Json);
        assert!(result.is_ok());
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&document["passed"], &document["failed"]), (&2.into(), &0.into()));
        assert_eq!(document["cases"][1]["result"], "skip");
        assert_eq!(document["cases"][1]["why"], "because");
    }
}
