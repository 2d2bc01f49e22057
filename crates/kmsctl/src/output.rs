//! What a command prints on standard output: a table for people, or one JSON document. Texts of the services are
//! made harmless for a terminal here, and nowhere else.

use std::io::{self, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::error::Error;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

pub(crate) struct Output<'a> {
    format: Format,
    to: &'a mut dyn Write,
}

impl<'a> Output<'a> {
    pub(crate) fn new(format: Format, to: &'a mut dyn Write) -> Self {
        Output { format, to }
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// One line for people; nothing where JSON is wanted.
    pub(crate) fn note(&mut self, text: &str) -> Result<(), Error> {
        match self.format {
            Format::Table => self.line(&printable(text)),
            Format::Json => Ok(()),
        }
    }

    /// The same content in the form that was asked for: `rows` under `titles`, or `document`.
    pub(crate) fn list<const N: usize>(
        &mut self,
        titles: [&str; N],
        rows: Vec<[String; N]>,
        document: &impl Serialize,
    ) -> Result<(), Error> {
        match self.format {
            Format::Table => self.table(titles, rows),
            Format::Json => self.json(document),
        }
    }

    /// One thing: `members` one below the other, or `document`. Members without a value are left out.
    pub(crate) fn thing(
        &mut self,
        members: &[(&str, Option<String>)],
        document: &impl Serialize,
    ) -> Result<(), Error> {
        if self.format == Format::Json {
            return self.json(document);
        }
        let width = members.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
        for (name, value) in members {
            let Some(value) = value else { continue };
            self.line(&format!("{name:width$}{}", printable(value)))?;
        }
        Ok(())
    }

    pub(crate) fn json(&mut self, document: &impl Serialize) -> Result<(), Error> {
        let text =
            serde_json::to_string_pretty(document).map_err(|error| Error::Output(error.into()))?;
        self.line(&text)
    }

    /// Exactly these bytes.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.to.write_all(bytes).and_then(|()| self.to.flush()).map_err(Error::Output)
    }

    fn table<const N: usize>(
        &mut self,
        titles: [&str; N],
        rows: Vec<[String; N]>,
    ) -> Result<(), Error> {
        let rows: Vec<[String; N]> =
            rows.into_iter().map(|row| row.map(|cell| printable(&cell))).collect();
        let mut widths = titles.map(str::len);
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        self.line(&aligned(&titles.map(str::to_owned), &widths))?;
        rows.iter().try_for_each(|row| self.line(&aligned(row, &widths)))
    }

    fn line(&mut self, text: &str) -> Result<(), Error> {
        self.raw(format!("{text}\n").as_bytes())
    }
}

/// Standard output, and the place to lock it.
pub(crate) fn standard() -> io::StdoutLock<'static> {
    io::stdout().lock()
}

fn aligned(cells: &[String], widths: &[usize]) -> String {
    let mut line = String::new();
    for (cell, width) in cells.iter().zip(widths) {
        line.push_str(&format!("{cell:width$}  "));
    }
    line.truncate(line.trim_end().len());
    line
}

/// A name that somebody gave a key could move the cursor or set the title of the operator's terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(format: Format, print: impl FnOnce(&mut Output<'_>) -> Result<(), Error>) -> String {
        let mut bytes = Vec::new();
        print(&mut Output::new(format, &mut bytes)).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![["1".to_owned(), "größe".to_owned()], ["22".to_owned(), String::new()]];
        let text = shown(Format::Table, |output| output.list(["ID", "NAME"], rows, &()));
        assert_eq!(text, "ID  NAME\n1   größe\n22\n");
    }

    #[test]
    fn json_takes_the_place_of_tables_and_notes() {
        let text = shown(Format::Json, |output| {
            output.note("done")?;
            output.list(["ID"], vec![["1".to_owned()]], &["x"])
        });
        assert_eq!(text, "[\n  \"x\"\n]\n");
    }

    #[test]
    fn absent_members_are_left_out() {
        let members =
            [("id", Some("1".to_owned())), ("deleted", None), ("name", Some("n".to_owned()))];
        let text = shown(Format::Table, |output| output.thing(&members, &()));
        assert_eq!(text, "id       1\nname     n\n");
    }

    #[test]
    fn a_terminal_gets_no_control_characters() {
        let text = shown(Format::Table, |output| output.note("\u{1b}]0;title\u{7}"));
        assert_eq!(text, "\u{fffd}]0;title\u{fffd}\n");
    }
}
