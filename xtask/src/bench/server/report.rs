//! The figures as two tables of a document, put where its marks are: nobody copies a number by hand.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use keelson_e2e::{Error, Result};

use super::loads::Row;
use crate::bench::Finding;

const BEGIN: &str = "<!-- figures of cargo xtask bench server: begin -->\n";
const END: &str = "<!-- figures of cargo xtask bench server: end -->";

/// Puts the tables of this run into `document` in the place of the last ones. `command` is how they came about.
pub(super) fn put_into(
    document: &Path,
    command: &str,
    rows: &[Row],
    findings: &[Finding],
) -> Result<()> {
    let text = fs::read_to_string(document)
        .map_err(Error::machine(format!("read {}", document.display())))?;
    let figures = format!("Measured with `{command}`:\n\n{}", tables(rows, findings));
    let text = replaced(&text, &figures)
        .ok_or_else(|| Error::answer(document.display().to_string(), format!("no {BEGIN}")))?;
    fs::write(document, text).map_err(Error::machine(format!("write {}", document.display())))?;
    println!("written to {}", document.display());
    Ok(())
}

fn replaced(text: &str, figures: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{figures}\n{END}{after}"))
}

fn tables(rows: &[Row], findings: &[Finding]) -> String {
    let mut text = String::from(
        "| load | connections | good/s | refused/s | p50 ms | p99 ms | p99.9 ms | longest ms |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    let ms = |us: Option<f64>| us.map_or("–".to_owned(), |us| format!("{:.2}", us / 1000.0));
    for row in rows {
        // Writing into a string cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {:.0} | {:.0} | {} | {} | {} | {} |",
            row.load,
            row.connections,
            row.good_per_second,
            row.refused_per_second,
            ms(row.p50_us),
            ms(row.p99_us),
            ms(row.p999_us),
            ms(row.max_us),
        );
    }
    text.push_str("\n| promise (bound in brackets) | held |\n|---|---|\n");
    for Finding { text: what, held } in findings {
        let _ = writeln!(text, "| {what} | {} |", if *held { "yes" } else { "no" });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::loads::{Load, Measured, Measurements};
    use super::*;

    #[test]
    fn the_last_figures_are_replaced_and_nothing_else() {
        let document = format!("# Speed\n\n{BEGIN}old\n| 1 |\n{END}\n\nAnd so on.\n");
        let text = replaced(&document, "new").unwrap();
        assert_eq!(text, format!("# Speed\n\n{BEGIN}\nnew\n{END}\n\nAnd so on.\n"));
        assert_eq!(replaced(&text, "new").unwrap(), text);
        assert_eq!(replaced("# Speed\n", "new"), None);
    }

    #[test]
    fn every_load_and_every_promise_has_a_line() {
        let wrap =
            Measured { good_per_second: 5123.4, p99_us: Some(9950.0), ..Measured::default() };
        let measured = Measurements([(Load::PEAK, vec![wrap])].into());
        let finding = Finding { text: "so many (>= 5)".to_owned(), held: false };
        let text = tables(&measured.rows(), &[finding]);
        assert!(text.contains("| wrap | 32 | 5123 | 0 | – | 9.95 | – | – |\n"), "{text}");
        assert!(text.contains("| so many (>= 5) | no |\n"), "{text}");
    }

    #[test]
    fn the_document_has_the_marks() {
        let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/performance.md");
        assert!(replaced(&fs::read_to_string(document).unwrap(), "").is_some());
    }
}
