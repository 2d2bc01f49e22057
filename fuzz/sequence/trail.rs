//! The audit log as it grows: what each answer has added to it.

use kms_core::audit::Link;
use kms_server::policy::iam_id;
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use uuid::Uuid;

pub struct Trail {
    path: PathBuf,
    at: u64,
    link: Option<Link>,
    /// All that was added since the sequence began.
    pub text: Vec<u8>,
}

impl Trail {
    pub fn end_of(path: &Path) -> Trail {
        let at = path.metadata().expect("an audit log").len();
        Trail { path: path.to_owned(), at, link: None, text: Vec::new() }
    }

    /// The records since the last time, each of which must follow from the one before it.
    pub fn read(&mut self) -> Vec<Value> {
        let mut file = File::open(&self.path).expect("an audit log");
        file.seek(SeekFrom::Start(self.at)).expect("an audit log");
        let mut added = Vec::new();
        file.read_to_end(&mut added).expect("an audit log");
        self.at += added.len() as u64;
        let lines: Vec<_> = added.split(|byte| *byte == b'\n').filter(|l| !l.is_empty()).collect();
        for line in &lines {
            let next = self.link.map_or_else(|| Link::join(line), |link| link.follow(line));
            self.link = Some(next.expect("a line that continues the chain"));
        }
        let records = lines.iter().map(|line| serde_json::from_slice(line).expect("JSON"));
        let records = records.collect();
        self.text.extend_from_slice(&added);
        records
    }

    /// A login was answered: this service ID got a token, or nobody did.
    pub fn logged_in(&mut self, service_id: Option<Uuid>) {
        let records = self.read();
        let done: Vec<_> = records.iter().filter(|one| one["outcome"] == "done").collect();
        assert!(records.iter().all(|one| one["action"] == "issue_token"), "{records:?}");
        match (service_id, &done[..]) {
            (Some(id), [one]) => assert_eq!(one["caller"], iam_id(id)),
            // Of those that are refused over and over, not each has a record of its own.
            (None, []) => assert!(records.len() <= 1, "{records:?}"),
            _ => panic!("a login with {records:?}"),
        }
    }
}
