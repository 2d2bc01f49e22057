//! Reads sections of names and values, and keeps a list of everything that is wrong with them.
//!
//! Which names exist is not written down twice: whatever has been asked for by the end is known, the rest is not.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

type Sections = BTreeMap<String, Option<BTreeMap<String, Value>>>;

pub(super) struct Reader {
    sections: Sections,
    known: BTreeMap<&'static str, BTreeSet<&'static str>>,
    mistakes: Vec<String>,
}

impl Reader {
    /// # Errors
    /// The text is not YAML, or not a map of maps.
    pub(super) fn new(text: &str) -> Result<Reader, String> {
        let sections = serde_saphyr::from_str::<Sections>(text).map_err(|e| e.to_string())?;
        Ok(Reader { sections, known: BTreeMap::new(), mistakes: Vec::new() })
    }

    /// Text, or a number or flag that was meant as one. An empty value is the same as none.
    pub(super) fn text(&mut self, section: &'static str, name: &'static str) -> Option<String> {
        match self.value(section, name)? {
            Value::String(text) if text.is_empty() => None,
            Value::String(text) => Some(text),
            Value::Number(number) => Some(number.to_string()),
            Value::Bool(flag) => Some(flag.to_string()),
            Value::Null => None,
            Value::Array(_) | Value::Object(_) => {
                self.mistake(section, name, "must be a single value");
                None
            }
        }
    }

    pub(super) fn required_text(
        &mut self,
        section: &'static str,
        name: &'static str,
    ) -> Option<String> {
        let text = self.text(section, name);
        if text.is_none() {
            self.mistake(section, name, "is required");
        }
        text
    }

    pub(super) fn number(
        &mut self,
        section: &'static str,
        name: &'static str,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> Option<u64> {
        let Some(text) = self.text(section, name) else { return Some(default) };
        let number = text.parse().ok().filter(|number| range.contains(number));
        if number.is_none() {
            let (least, most) = (range.start(), range.end());
            self.mistake(section, name, &format!("must be a whole number from {least} to {most}"));
        }
        number
    }

    pub(super) fn flag(
        &mut self,
        section: &'static str,
        name: &'static str,
        default: bool,
    ) -> Option<bool> {
        let Some(text) = self.text(section, name) else { return Some(default) };
        let flag = text.to_ascii_lowercase().parse().ok();
        if flag.is_none() {
            self.mistake(section, name, "must be true or false");
        }
        flag
    }

    pub(super) fn mistake(&mut self, section: &str, name: &str, why: &str) {
        self.mistakes.push(format!("{section}.{name} {why}"));
    }

    /// All mistakes, those of unknown names last.
    pub(super) fn finish(self) -> Vec<String> {
        let Reader { sections, known, mut mistakes } = self;
        for (section, names) in sections {
            let Some(known_names) = known.get(section.as_str()) else {
                let near = suggestion(&section, known.keys().copied());
                mistakes.push(format!("{section} is not a known section{near}"));
                continue;
            };
            for name in names.unwrap_or_default().into_keys() {
                if !known_names.contains(name.as_str()) {
                    let near = suggestion(&name, known_names.iter().copied());
                    mistakes.push(format!("{section}.{name} is not known{near}"));
                }
            }
        }
        mistakes
    }

    fn value(&mut self, section: &'static str, name: &'static str) -> Option<Value> {
        self.known.entry(section).or_default().insert(name);
        self.sections.get(section)?.as_ref()?.get(name).cloned()
    }
}

/// `; did you mean ...?` where some known name is near enough to be meant.
fn suggestion<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let name = name.to_ascii_uppercase();
    known
        .map(|candidate| (strsim::damerau_levenshtein(&name, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| distance * 3 <= candidate.len())
        .map(|(_, candidate)| format!("; did you mean {candidate}?"))
        .unwrap_or_default()
}
