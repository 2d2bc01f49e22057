//! Lists whose entries are kept by tests: the number of an entry stands in the name of each of its tests.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Where tests are.
const FOLDERS: [&str; 3] = ["crates", "e2e", "xtask/src"];

/// All tests of one list, by number.
pub(crate) struct Numbered(BTreeMap<usize, Vec<String>>);

impl Numbered {
    /// Tests whose names begin with `prefix` and a number.
    pub(crate) fn of(prefix: &str) -> Numbered {
        let mut tests: BTreeMap<usize, Vec<String>> = BTreeMap::new();
        for file in sources() {
            for name in tests_of(&fs::read_to_string(&file).unwrap(), prefix) {
                tests.entry(number(&name)).or_default().push(name);
            }
        }
        Numbered(tests)
    }

    /// Every entry has a test, and no test has a number without an entry.
    pub(crate) fn cover(&self, entries: &[&str]) {
        let missing: Vec<String> = (1..=entries.len())
            .filter(|number| !self.0.contains_key(number))
            .map(|number| format!("{number} {}", entries[number - 1]))
            .collect();
        assert!(missing.is_empty(), "no test is named after these: {missing:#?}");
        let unknown: Vec<_> = self.0.range(entries.len() + 1..).chain(self.0.range(..1)).collect();
        assert!(unknown.is_empty(), "{unknown:#?}");
    }
}

/// The names of all such tests in a file: functions under an attribute that makes them tests, and those that a macro
/// is told to make tests of (`module::name,` on a line).
pub(crate) fn tests_of(text: &str, prefix: &str) -> Vec<String> {
    let (mut found, mut attributes) = (Vec::new(), String::new());
    for line in text.lines().map(str::trim) {
        if line.starts_with("#[") {
            attributes.push_str(line);
            continue;
        }
        let function = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
        let name = function.and_then(|rest| rest.split_once('(')).map(|(name, _)| name);
        let run = attributes.contains("test") && !attributes.contains("#[ignore");
        let listed = line.strip_suffix(',').and_then(|line| line.split_once("::"));
        let listed = listed.filter(|(module, _)| !module.starts_with('/')).map(|(_, name)| name);
        let names = name.filter(|_| run).into_iter().chain(listed);
        found.extend(names.filter(|name| name.starts_with(prefix)).map(str::to_owned));
        attributes.clear();
    }
    found
}

fn number(name: &str) -> usize {
    name.split('_').nth(1).and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn sources() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut open: Vec<PathBuf> = FOLDERS.iter().map(|folder| root.join(folder)).collect();
    let mut found = Vec::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}
