//! Reading a configuration file: YAML sections of UPPER_CASE names, each value overridable by an environment
//! variable of the same name. Every mistake is found in one go, and an unknown name is answered with the nearest
//! known one.
//!
//! Values are never repeated in a message: one of them may be an API key that stands in the wrong place.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use zeroize::Zeroizing;

/// No PIN and no API key is as long, in bytes.
const MAX_SECRET: usize = 4096;

/// The environment, passed in so that tests need no process of their own.
pub type Environment = BTreeMap<String, String>;

/// A configuration file while it is read. What is asked for becomes known; what nobody asked for is a mistake.
#[derive(Debug)]
pub struct Settings {
    sections: Map<String, Value>,
    environment: Environment,
    /// Every name that was asked for, by section.
    known: BTreeMap<&'static str, Vec<&'static str>>,
    unknown: Vec<(String, &'static str, String)>,
    mistakes: Vec<String>,
    overridden: Vec<&'static str>,
}

/// All that is wrong with a configuration; one mistake for each line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes(pub Vec<String>);

/// A secret of the configuration, wiped when it goes.
pub struct Secret {
    pub text: Zeroizing<String>,
    /// The file it was read from, if it does not stand in the configuration itself.
    pub file: Option<PathBuf>,
}

/// One section, or one entry of a list of sections.
#[derive(Debug)]
pub struct Section<'a> {
    settings: &'a mut Settings,
    values: Map<String, Value>,
    /// How the section is called in messages.
    path: String,
    name: &'static str,
    overridable: bool,
}

impl Settings {
    /// # Errors
    /// If the text is no YAML mapping; the place is told.
    pub fn parse(text: &str, environment: Environment) -> Result<Settings, Mistakes> {
        // Without the snippet: it would show the lines around the mistake, and with them an API key.
        let options = serde_saphyr::options! { with_snippet: false };
        let tree = serde_saphyr::from_str_with_options(text, options);
        match tree.map_err(|error| Mistakes(vec![format!("not valid YAML: {error}")]))? {
            Value::Object(sections) => Ok(Settings::new(sections, environment)),
            Value::Null => Ok(Settings::new(Map::new(), environment)),
            _ => Err(Mistakes(vec!["not a configuration: it must consist of sections".into()])),
        }
    }

    /// The same from sections that come from elsewhere than a file.
    pub fn new(sections: Map<String, Value>, environment: Environment) -> Settings {
        let (known, unknown, mistakes, overridden) = Default::default();
        Settings { sections, environment, known, unknown, mistakes, overridden }
    }

    /// True if this section is there, even empty.
    pub fn has(&self, section: &str) -> bool {
        self.sections.contains_key(section)
    }

    /// Replaces a section as a whole.
    pub fn replace(&mut self, name: &str, section: Value) {
        self.sections.insert(name.to_owned(), section);
    }

    /// Sets a value that is not there; a value of the environment still comes before it.
    pub fn default(&mut self, section: &str, name: &str, value: Value) {
        let section = self.sections.entry(section).or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(values) = section {
            values.entry(name).or_insert(value);
        }
    }

    /// Reads one section; an absent one is empty.
    pub fn section<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&mut Section<'_>) -> T,
    ) -> T {
        let values = match self.sections.remove(name) {
            Some(Value::Object(values)) => values,
            Some(Value::Null) | None => Map::new(),
            Some(_) => {
                self.mistake(format!("{name} must consist of names and values"));
                Map::new()
            }
        };
        self.read(name.to_owned(), name, values, true, read)
    }

    /// Reads a list of sections; an absent one is empty. The environment overrides nothing in them.
    pub fn sections<T>(
        &mut self,
        name: &'static str,
        mut read: impl FnMut(&mut Section<'_>) -> T,
    ) -> Vec<T> {
        let entries = match self.sections.remove(name) {
            Some(Value::Array(entries)) => entries,
            Some(Value::Null) | None => Vec::new(),
            Some(_) => {
                self.mistake(format!("{name} must be a list"));
                Vec::new()
            }
        };
        self.known.entry(name).or_default();
        let mut all = Vec::with_capacity(entries.len());
        for (index, entry) in entries.into_iter().enumerate() {
            let path = format!("{name}[{index}]");
            match entry {
                Value::Object(values) => {
                    all.push(self.read(path, name, values, false, &mut read));
                }
                _ => self.mistake(format!("{path} must consist of names and values")),
            }
        }
        all
    }

    /// Adds what only the reader of several settings can see.
    pub fn mistake(&mut self, text: String) {
        self.mistakes.push(text);
    }

    /// The names whose values came from the environment.
    pub fn overridden(&self) -> &[&'static str] {
        &self.overridden
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// All mistakes, the unknown names included.
    pub fn finish(mut self) -> Result<(), Mistakes> {
        let sections: Vec<_> = self.known.keys().copied().collect();
        for name in self.sections.keys() {
            let nearest = nearest(name, &sections);
            self.mistakes.push(format!("{name} is not a known section; {nearest}"));
        }
        for (path, section, name) in &self.unknown {
            let hint = self.hint(section, name);
            self.mistakes.push(format!("{path}.{name} is not a known name; {hint}"));
        }
        if self.mistakes.is_empty() { Ok(()) } else { Err(Mistakes(self.mistakes)) }
    }

    fn read<T>(
        &mut self,
        path: String,
        name: &'static str,
        values: Map<String, Value>,
        overridable: bool,
        read: impl FnOnce(&mut Section<'_>) -> T,
    ) -> T {
        self.known.entry(name).or_default();
        let mut section = Section { settings: self, values, path, name, overridable };
        let result = read(&mut section);
        let Section { values, path, .. } = section;
        self.unknown.extend(values.into_iter().map(|(left, _)| (path.clone(), name, left)));
        result
    }

    fn hint(&self, section: &str, name: &str) -> String {
        let elsewhere = self.known.iter().find(|(_, names)| names.contains(&name));
        match elsewhere {
            Some((elsewhere, _)) => format!("it belongs into {elsewhere}"),
            None => nearest(name, self.known.get(section).map_or(&[], Vec::as_slice)),
        }
    }
}

impl Section<'_> {
    /// A text, if it is there and not empty.
    pub fn text(&mut self, name: &'static str) -> Option<String> {
        let text = match self.take(name)? {
            Value::String(text) => text,
            // YAML has already made something else of it, such as 7 of 007.
            Value::Number(_) | Value::Bool(_) => {
                self.mistake(name, "must be written in quotes");
                return None;
            }
            _ => {
                self.mistake(name, "must be a text");
                return None;
            }
        };
        Some(text).filter(|text| !text.is_empty())
    }

    /// A text that has to be there. Without it the result is empty, and the mistake is noted.
    pub fn required(&mut self, name: &'static str) -> String {
        let before = self.settings.mistakes.len();
        let text = self.text(name);
        if text.is_none() && self.settings.mistakes.len() == before {
            self.mistake(name, "is missing");
        }
        text.unwrap_or_default()
    }

    /// A secret that has to be there: written down as `name`, or in the file that `in_file` names; never both, for nobody
    /// could say which is meant. Without it there is no result, and the mistake is noted.
    pub fn secret(&mut self, name: &'static str, in_file: &'static str) -> Option<Secret> {
        let before = self.settings.mistakes.len();
        let here = self.text(name).map(Zeroizing::new);
        let elsewhere = self.text(in_file).map(PathBuf::from);
        match (here, elsewhere) {
            _ if self.settings.mistakes.len() > before => None,
            (Some(text), None) => Some(Secret { text, file: None }),
            (None, Some(path)) => match read_secret(&path) {
                Ok(text) => Some(Secret { text, file: Some(path) }),
                Err(cause) => {
                    self.mistake(in_file, &format!("names a file that cannot be used: {cause}"));
                    None
                }
            },
            (Some(_), Some(_)) => {
                let both = format!("and {in_file} are both set; only one of them may be");
                self.mistake(name, &both);
                None
            }
            (None, None) => {
                let missing = format!("is missing (or {in_file}, the file that holds it)");
                self.mistake(name, &missing);
                None
            }
        }
    }

    pub fn number(&mut self, name: &'static str, range: RangeInclusive<u64>, default: u64) -> u64 {
        let Some(value) = self.take(name) else { return default };
        let number = match &value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        number.filter(|number| range.contains(number)).unwrap_or_else(|| {
            let (from, to) = range.into_inner();
            self.mistake(name, &format!("must be a whole number from {from} to {to}"));
            default
        })
    }

    pub fn flag(&mut self, name: &'static str, default: bool) -> bool {
        match self.take(name) {
            None => default,
            Some(Value::Bool(flag)) => flag,
            Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => true,
            Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => false,
            Some(_) => {
                self.mistake(name, "must be true or false");
                default
            }
        }
    }

    /// A list of numbers; in the environment they are separated by commas.
    pub fn numbers(&mut self, name: &'static str) -> Vec<u32> {
        let numbers = match self.take(name) {
            None => return Vec::new(),
            Some(Value::Array(values)) => values
                .iter()
                .map(|value| value.as_u64().and_then(|number| u32::try_from(number).ok()))
                .collect(),
            Some(Value::String(text)) => {
                text.split(',').map(|number| number.trim().parse().ok()).collect::<Option<Vec<_>>>()
            }
            Some(_) => None,
        };
        numbers.unwrap_or_else(|| {
            self.mistake(name, "must be a list of whole numbers");
            Vec::new()
        })
    }

    /// What `parse` makes of a text. Its error says what the text must be.
    pub fn parsed<T>(
        &mut self,
        name: &'static str,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> T {
        // A port such as 20358 or a level needs no quotes to be understood.
        let text = match self.take(name) {
            None => return default,
            Some(Value::String(text)) => text,
            Some(value) => value.to_string(),
        };
        parse(&text).unwrap_or_else(|must_be| {
            self.mistake(name, &must_be);
            default
        })
    }

    /// True if a value is given.
    pub fn has(&self, name: &str) -> bool {
        self.override_of(name).is_some()
            || self.values.get(name).is_some_and(|value| !value.is_null())
    }

    /// Notes a mistake of the setting `name` in this section.
    pub fn mistake(&mut self, name: &str, text: &str) {
        let text = format!("{}.{name} {text}", self.path);
        self.settings.mistake(text);
    }

    /// The value, from the environment first; the name is known from now on.
    fn take(&mut self, name: &'static str) -> Option<Value> {
        let known = self.settings.known.entry(self.name).or_default();
        if !known.contains(&name) {
            known.push(name);
        }
        let value = self.values.remove(name).filter(|value| !value.is_null());
        match self.override_of(name).cloned() {
            Some(text) => {
                self.settings.overridden.push(name);
                Some(Value::String(text))
            }
            None => value,
        }
    }

    fn override_of(&self, name: &str) -> Option<&String> {
        let text = self.settings.environment.get(name);
        text.filter(|text| self.overridable && !text.is_empty())
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Mistakes {}

/// The first and only line of a file. What blanks it begins or ends with belong to it.
///
/// # Errors
/// Those of reading it, and a file that is empty, has several lines, or is no text.
pub fn read_secret(path: &Path) -> io::Result<Zeroizing<String>> {
    let refused = |what: &str| Err(io::Error::other(what));
    // Of the whole size at once: a buffer that grows leaves copies behind.
    let mut text = Zeroizing::new(String::with_capacity(MAX_SECRET));
    let most = u64::try_from(MAX_SECRET).unwrap_or(u64::MAX);
    File::open(path)?.take(most).read_to_string(&mut text)?;
    let length = text.trim_end_matches(['\r', '\n']).len();
    match length {
        _ if text.trim().is_empty() => return refused("it is empty"),
        MAX_SECRET => return refused("it is too long"),
        _ => text.truncate(length),
    }
    if text.contains('\n') { refused("it has more than one line") } else { Ok(text) }
}

/// `did you mean X?`, or all names if none is near.
fn nearest(name: &str, known: &[&str]) -> String {
    let name = name.to_uppercase();
    let likeness = |known: &&&str| strsim::normalized_damerau_levenshtein(&name, known);
    match known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))) {
        Some(nearest) if likeness(&nearest) >= 0.4 => format!("did you mean {nearest}?"),
        _ => format!("known are {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Settings {
        Settings::parse(text, Environment::new()).unwrap()
    }

    #[test]
    fn values_are_read_and_defaults_filled_in() {
        let mut settings =
            settings("A:\n  TEXT: \"x\"\n  NUMBER: 7\n  FLAG: true\n  LIST: [1, 2]\n");
        let read = settings.section("A", |a| {
            let texts = (a.text("TEXT"), a.text("OTHER"));
            (
                texts,
                a.number("NUMBER", 0..=9, 1),
                a.number("N", 0..=9, 3),
                a.flag("FLAG", false),
                a.numbers("LIST"),
            )
        });
        assert_eq!(read, ((Some("x".into()), None), 7, 3, true, vec![1, 2]));
        assert_eq!(settings.finish(), Ok(()));
    }

    #[test]
    fn the_environment_comes_first() {
        let environment = [("NUMBER", "8"), ("FLAG", "false"), ("LIST", "3, 4"), ("EMPTY", "")];
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let text = "A:\n  NUMBER: 7\n  FLAG: true\n  EMPTY: \"kept\"\nL:\n- NUMBER: 1\n";
        let mut settings = Settings::parse(text, environment.into()).unwrap();
        let read = settings.section("A", |a| {
            (a.number("NUMBER", 0..=9, 1), a.flag("FLAG", true), a.numbers("LIST"), a.text("EMPTY"))
        });
        assert_eq!(read, (8, false, vec![3, 4], Some("kept".into())));
        assert_eq!(settings.sections("L", |l| l.number("NUMBER", 0..=9, 0)), [1]);
        assert_eq!(settings.overridden(), ["NUMBER", "FLAG", "LIST"]);
    }

    #[test]
    fn all_mistakes_are_reported_at_once_without_any_value() {
        let text = "A:\n  TEXT: 007\n  NUMBER: 10\n  FLAG: maybe\n  NUMBR: 1\n  ELSEWHERE: SECRET\n  zzz: SECRET\nBB: 1\nC: []\n";
        let mut settings = settings(text);
        settings.section("A", |a| {
            a.text("TEXT");
            a.required("GONE");
            a.number("NUMBER", 0..=9, 1);
            a.flag("FLAG", true);
        });
        settings.section("C", |c| c.text("ELSEWHERE"));
        settings.sections("B", |b| b.text("X"));
        let Mistakes(mistakes) = settings.finish().unwrap_err();
        assert_eq!(
            mistakes,
            [
                "A.TEXT must be written in quotes",
                "A.GONE is missing",
                "A.NUMBER must be a whole number from 0 to 9",
                "A.FLAG must be true or false",
                "C must consist of names and values",
                "BB is not a known section; did you mean B?",
                "A.ELSEWHERE is not a known name; it belongs into C",
                "A.NUMBR is not a known name; did you mean NUMBER?",
                "A.zzz is not a known name; known are TEXT, GONE, NUMBER, FLAG",
            ]
        );
    }

    #[test]
    fn a_secret_stands_in_the_configuration_or_in_a_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pin");
        let in_file = format!("A:\n  PIN_FILE: {}\n", path.display());
        let read = |text: &str| {
            let mut settings = settings(text);
            let secret = settings.section("A", |a| a.secret("PIN", "PIN_FILE"));
            settings.finish().map(|()| secret.map(|secret| (secret.text.to_string(), secret.file)))
        };
        let mistake = |text: &str| read(text).unwrap_err().0;
        assert_eq!(read("A:\n  PIN: \" 12 34\"\n"), Ok(Some((" 12 34".into(), None))));
        std::fs::write(&path, " 98 76\r\n").unwrap();
        assert_eq!(read(&in_file), Ok(Some((" 98 76".into(), Some(path.clone())))));

        let both = mistake(&format!("{in_file}  PIN: \"1\"\n"));
        assert_eq!(both, ["A.PIN and PIN_FILE are both set; only one of them may be"]);
        for none in ["", "A:\n  PIN: \"\"\n", "A:\n  PIN_FILE: \"\"\n"] {
            assert_eq!(mistake(none), ["A.PIN is missing (or PIN_FILE, the file that holds it)"]);
        }
        assert_eq!(mistake("A:\n  PIN: 1234\n"), ["A.PIN must be written in quotes"]);
        let long = "x".repeat(MAX_SECRET + 1);
        for (content, what) in [
            (" \n", "it is empty"),
            ("12\n34\n", "it has more than one line"),
            (&long, "it is too long"),
        ] {
            std::fs::write(&path, content).unwrap();
            let text = format!("A.PIN_FILE names a file that cannot be used: {what}");
            assert_eq!(mistake(&in_file), [text]);
        }
        std::fs::remove_file(&path).unwrap();
        let gone = "A.PIN_FILE names a file that cannot be used: No such file";
        assert!(mistake(&in_file)[0].starts_with(gone), "{:?}", mistake(&in_file));
    }

    #[test]
    fn what_is_no_yaml_is_refused_with_its_place_and_without_its_text() {
        for text in [
            "A:\n  KEY: \"SECRET\n",
            "A: {KEY: SECRET",
            "A:\n  KEY: SECRET\n  KEY: SECRET\n",
            "SECRET",
        ] {
            let Mistakes(mistakes) = Settings::parse(text, Environment::new()).unwrap_err();
            assert_eq!(mistakes.len(), 1);
            assert!(!mistakes[0].contains("SECRET"), "{mistakes:?}");
        }
        assert!(Settings::parse("", Environment::new()).is_ok());
    }
}
