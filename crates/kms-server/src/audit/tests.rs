//! The log as its users and its enemies see it: crashes, full disks, other hands on the file.

use super::*;
use kms_core::audit::{Content, parse};
use kms_core::clock::ManualClock;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use tempfile::TempDir;

/// A clock that is behind this has been set back.
#[tokio::test]
async fn the_time_of_the_last_record_is_known_at_the_next_opening() {
    let place = Place::new();
    assert_eq!(place.open().unwrap().last(), None);
    place.write(3).await;
    let expected = OffsetDateTime::from(ManualClock::new().wall());
    assert_eq!(place.open().unwrap().last(), Some(expected));
    // What a crash left of a line says nothing.
    let mut torn = place.bytes();
    torn.extend_from_slice(b"{\"seq\":4,\"at\":\"2099");
    fs::write(&place.path, torn).unwrap();
    assert_eq!(log::last_time(&place.path), Some(expected));
}

/// Longer than a loaded machine's disk takes.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Place {
    pub(super) folder: TempDir,
    pub(super) path: PathBuf,
}

impl Place {
    pub(super) fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.log");
        Place { folder, path }
    }

    pub(super) fn open(&self) -> Result<Audit, AuditError> {
        self.open_behind(None)
    }

    /// Where the database knows so much of it.
    pub(super) fn open_behind(&self, known: Option<Link>) -> Result<Audit, AuditError> {
        let audit = Audit::open(&self.path, "a", known, Arc::new(ManualClock::new()))?;
        Ok(audit.within(PATIENCE))
    }

    pub(super) async fn write(&self, count: usize) {
        let audit = self.open().unwrap();
        for _ in 0..count {
            audit.record(record()).await.unwrap();
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    /// Follows the whole chain of one file, from its first line.
    pub(super) fn check(&self) -> u64 {
        check(&self.bytes(), Link::start()).seq
    }

    fn torn(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.to_string_lossy().contains(".torn-")).collect()
    }
}

pub(super) fn record() -> Record {
    Record {
        caller: Some("iam-ServiceId-7".into()),
        api_key: Some(Uuid::from_u128(1)),
        instance: Some(Uuid::from_u128(2)),
        target: Some(Uuid::from_u128(3)),
        version: Some(Uuid::from_u128(4)),
        correlation: Some("request".into()),
        ..Record::new("wrap", Outcome::Done)
    }
}

pub(super) fn check(bytes: &[u8], start: Link) -> Link {
    assert!(bytes.is_empty() || bytes.ends_with(b"\n"));
    let lines = bytes.split_inclusive(|byte| *byte == b'\n');
    lines.fold(start, |link, line| link.follow(&line[..line.len() - 1]).unwrap())
}

#[tokio::test]
async fn a_record_is_in_the_file_when_it_is_answered() {
    let place = Place::new();
    let audit = place.open().unwrap();
    for seq in 1..=3 {
        audit.record(record()).await.unwrap();
        assert_eq!(place.check(), seq);
    }
    let mode = fs::metadata(&place.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_reopened_log_continues_its_chain() {
    let place = Place::new();
    for opened in 1..=3 {
        place.write(5).await;
        assert_eq!(place.check(), opened * 5);
    }
    assert_eq!(place.torn(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_long_log_is_continued_from_its_end() {
    let place = Place::new();
    let audit = Arc::new(place.open().unwrap());
    write_at_once(&audit, 2000).await;
    drop(audit);
    assert!(place.bytes().len() > 512 * 1024, "longer than what is read at opening");
    place.write(1).await;
    assert_eq!(place.check(), 2001);
}

#[tokio::test]
async fn records_that_wait_together_share_a_sync() {
    let place = Place::new();
    let audit = Arc::new(place.open().unwrap());
    write_at_once(&audit, 1000).await;
    assert_eq!(place.check(), 1000);
    assert!(audit.syncs() < 500, "{} syncs for 1000 records", audit.syncs());
}

#[tokio::test]
async fn a_line_torn_at_any_byte_is_set_aside_and_recorded() {
    let place = Place::new();
    place.write(3).await;
    let whole = place.bytes();
    let last = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
    for cut in last + 1..whole.len() {
        let place = Place::new();
        fs::write(&place.path, &whole[..cut]).unwrap();
        place.write(1).await;
        // Two records from before, one about the torn line, one new.
        assert_eq!(place.check(), 4, "cut at {cut}");
        let [aside] = &place.torn()[..] else { panic!("cut at {cut}: {:?}", place.torn()) };
        assert_eq!(fs::read(aside).unwrap(), &whole[last..cut]);
        let text = String::from_utf8(place.bytes()).unwrap();
        let third = text.lines().nth(2).unwrap();
        assert!(third.contains("\"action\":\"audit_recovered\""), "{third}");
        assert!(third.contains("\"correlation\":\"audit.torn-3\""), "{third}");
    }
}

#[tokio::test]
async fn blocks_that_never_reached_the_disk_are_set_aside() {
    let place = Place::new();
    place.write(2).await;
    let mut bytes = place.bytes();
    let lost = [&[0; 100][..], b"\"outcome\":\"done\"}\n{\"seq\":5"].concat();
    bytes.extend_from_slice(&lost);
    fs::write(&place.path, bytes).unwrap();
    place.write(1).await;
    assert_eq!(place.check(), 4);
    assert_eq!(fs::read(&place.torn()[0]).unwrap(), lost);
}

#[tokio::test]
async fn a_crash_while_setting_aside_is_repeated_safely() {
    let place = Place::new();
    place.write(1).await;
    let mut bytes = place.bytes();
    bytes.extend_from_slice(b"{\"seq\":2,");
    fs::write(&place.path, &bytes).unwrap();
    fs::write(place.folder.path().join("audit.torn-2"), b"{\"se").unwrap();
    place.write(1).await;
    assert_eq!(place.check(), 3);
    assert_eq!(fs::read(&place.torn()[0]).unwrap(), b"{\"seq\":2,");
}

#[tokio::test]
async fn a_changed_log_is_not_continued() {
    let place = Place::new();
    place.write(5).await;
    let whole = place.bytes();
    let text = String::from_utf8(whole.clone()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let without_third = [lines[0], lines[1], lines[3], lines[4], ""].join("\n");
    let another_caller = text.replacen("ServiceId-7", "ServiceId-8", 1);
    let junk_line = format!("{text}not a record\n");
    for changed in [without_third, another_caller, junk_line] {
        fs::write(&place.path, &changed).unwrap();
        assert!(matches!(place.open(), Err(AuditError::Broken { .. })), "{changed}");
        assert_eq!(place.bytes(), changed.as_bytes(), "evidence must stay as it is");
    }
}

#[tokio::test]
async fn a_full_disk_is_reported_and_used_again_when_it_has_room() {
    let place = Place::new();
    symlink("/dev/full", &place.path).unwrap();
    let audit = place.open().unwrap();
    for _ in 0..3 {
        let refused = audit.record(record()).await;
        assert!(
            matches!(&refused, Err(AuditError::Write { cause, .. })
                if cause.kind() == std::io::ErrorKind::StorageFull),
            "{refused:?}"
        );
    }
    assert!(audit.probe().await.is_err(), "whoever asks for readiness is told");
    fs::remove_file(&place.path).unwrap();
    audit.record(record()).await.unwrap();
    assert_eq!(place.check(), 1);
    audit.probe().await.unwrap();
    assert_eq!(place.check(), 1, "nothing is written where nothing was wrong");
}

#[tokio::test]
async fn the_log_says_itself_that_it_goes_on_when_nobody_else_writes() {
    let place = Place::new();
    symlink("/dev/full", &place.path).unwrap();
    let audit = place.open().unwrap();
    audit.record(record()).await.unwrap_err();
    fs::remove_file(&place.path).unwrap();
    audit.probe().await.unwrap();
    assert_eq!(place.check(), 1);
    assert!(String::from_utf8(place.bytes()).unwrap().contains("audit_resumed"));
}

#[tokio::test]
async fn a_file_rotated_away_is_followed_by_one_that_continues_the_chain() {
    let place = Place::new();
    let audit = place.open().unwrap();
    audit.record(record()).await.unwrap();
    audit.record(record()).await.unwrap();
    let old = place.folder.path().join("audit.log.1");
    fs::rename(&place.path, &old).unwrap();
    audit.record(record()).await.unwrap();
    let end_of_old = check(&fs::read(&old).unwrap(), Link::start());
    assert_eq!((end_of_old.seq, check(&place.bytes(), end_of_old).seq), (2, 3));
    drop(audit);
    // Also after a restart.
    place.write(1).await;
    assert_eq!(check(&place.bytes(), end_of_old).seq, 4);
}

#[tokio::test]
async fn other_hands_on_the_file_are_noticed_while_it_is_open() {
    let place = Place::new();
    let audit = place.open().unwrap();
    audit.record(record()).await.unwrap();
    let first = place.bytes();
    audit.record(record()).await.unwrap();
    let both = place.bytes();

    fs::write(&place.path, &first).unwrap();
    let refused = audit.record(record()).await;
    assert!(matches!(refused, Err(AuditError::Broken { .. })), "cut: {refused:?}");

    let forged = String::from_utf8(both.clone()).unwrap().replace("ServiceId-7", "ServiceId-88");
    fs::write(&place.path, forged).unwrap();
    let refused = audit.record(record()).await;
    assert!(matches!(refused, Err(AuditError::Broken { .. })), "forged: {refused:?}");

    fs::write(&place.path, &both).unwrap();
    audit.record(record()).await.unwrap();
    assert_eq!(place.check(), 3);
}

#[tokio::test]
async fn one_process_at_a_time_writes() {
    let place = Place::new();
    let audit = place.open().unwrap();
    assert!(matches!(place.open(), Err(AuditError::InUse { .. })));
    drop(audit);
    assert!(place.open().is_ok());
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_named() {
    let audit =
        Audit::open(Path::new("/nowhere/audit.log"), "a", None, Arc::new(ManualClock::new()));
    let text = audit.unwrap_err().to_string();
    assert!(text.starts_with("cannot open the audit log /nowhere/audit.log: "), "{text}");
}

async fn write_at_once(audit: &Arc<Audit>, count: usize) {
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..count {
        let audit = audit.clone();
        writers.spawn(async move { audit.record(record()).await });
    }
    while let Some(written) = writers.join_next().await {
        written.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_file_that_is_removed_under_the_server_is_replaced_at_once_and_that_is_recorded() {
    let place = Place::new();
    let audit = place.open().unwrap();
    audit.record(record()).await.unwrap();
    let end = check(&place.bytes(), Link::start());
    fs::remove_file(&place.path).unwrap();
    tokio::time::timeout(Duration::from_secs(60), audit.record(record())).await.unwrap().unwrap();
    audit.probe().await.unwrap();
    assert_eq!(check(&place.bytes(), end).seq, 3);
    let text = String::from_utf8(place.bytes()).unwrap();
    assert!(text.lines().next().unwrap().contains("\"action\":\"audit_file_removed\""), "{text}");
}

#[tokio::test]
async fn a_log_goes_on_from_where_the_database_knows_it_to_have_been() {
    let place = Place::new();
    place.write(5).await;
    let head = check(&place.bytes(), Link::start());
    let whole = place.bytes();
    let open = || place.open_behind(Some(head));
    drop(open().unwrap());
    assert_eq!(place.bytes(), whole, "nothing to say");

    let cut = whole.len() / 2;
    fs::write(&place.path, &whole[..cut]).unwrap();
    let refused = open().unwrap_err().to_string();
    assert!(refused.contains("it ends with record 2, not 5"), "{refused}");
    assert_eq!(place.bytes(), whole[..cut], "nothing of it is touched");

    let forged = String::from_utf8(whole.clone()).unwrap();
    let last = forged.rfind("request").unwrap();
    let forged = format!("{}REQUEST{}", &forged[..last], &forged[last + 7..]);
    fs::write(&place.path, forged).unwrap();
    let refused = open().unwrap_err().to_string();
    assert!(refused.contains("record 5 is not the one written"), "{refused}");

    fs::remove_file(&place.path).unwrap();
    let audit = open().unwrap();
    audit.record(record()).await.unwrap();
    assert_eq!(audit.head().seq, 7);
    assert_eq!(check(&place.bytes(), head), audit.head());
    let text = String::from_utf8(place.bytes()).unwrap();
    assert!(text.lines().next().unwrap().contains("\"action\":\"audit_file_missing\""), "{text}");
}

/// The lines from number `from` on, the first of them with another caller, and every hash after it made to fit.
fn rewritten(log: &[u8], from: usize) -> Vec<u8> {
    let (mut bytes, mut link) = (Vec::new(), Link::start());
    for (number, line) in (1..).zip(log.split_inclusive(|byte| *byte == b'\n')) {
        let Content::Event(mut event) = parse(&line[..line.len() - 1]).unwrap().content else {
            panic!("no anchor was written")
        };
        if number == from {
            event.caller = Some("iam-ServiceId-8".into());
        }
        let (line, next) = link.extend(&Content::Event(event)).unwrap();
        bytes.extend(line);
        link = next;
    }
    bytes
}

#[tokio::test]
async fn a_log_that_was_computed_anew_far_behind_its_last_anchor_is_not_continued() {
    let place = Place::new();
    let audit = Arc::new(place.open().unwrap());
    write_at_once(&audit, 3000).await;
    drop(audit);
    let whole = place.bytes();
    let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
    let known = check(&lines[..100].concat(), Link::start());
    let behind = lines[100..].concat().len();
    assert!(behind > 3 * 256 * 1024, "blocks are read until the anchor: {behind} bytes");
    let open = |log: &[u8]| {
        fs::write(&place.path, log).unwrap();
        let opened = place.open_behind(Some(known));
        assert_eq!(
            place.bytes(),
            log,
            "what is refused is evidence, and what is sound needs no word"
        );
        opened.map(|audit| audit.head().seq).map_err(|why| why.to_string())
    };
    let refused = |log: &[u8], why: &str| {
        let said = open(log).unwrap_err();
        assert!(said.contains(why), "{said}");
    };
    assert_eq!(open(&whole), Ok(3000));
    for from in [1, 50, 100] {
        refused(&rewritten(&whole, from), "record 100 is not the one written");
    }
    // What is behind the last anchor nothing proves but the chain.
    assert_eq!(open(&rewritten(&whole, 101)), Ok(3000));
    // Not computed anew: a line changed, dropped, or made into none, far from the end.
    let changed = [&rewritten(&whole, 500)[..lines[..500].concat().len()], &lines[500..].concat()];
    refused(&changed.concat(), "record 501 does not follow");
    refused(&[&lines[..99], &lines[100..]].concat().concat(), "record 101 does not follow");
    refused(
        &[&lines[..200], &[&b"junk\n"[..]], &lines[200..]].concat().concat(),
        "no audit record",
    );
    let long = vec![b'x'; 600 * 1024];
    refused(
        &[&lines[..200], &[&long[..], b"\n"], &lines[200..]].concat().concat(),
        "no whole line",
    );
    // The record of the anchor is the last of the file that was moved away: the first line here names its hash.
    assert_eq!(open(&lines[100..].concat()), Ok(3000));
    let forged = rewritten(&whole, 100);
    let forged: Vec<&[u8]> = forged.split_inclusive(|byte| *byte == b'\n').collect();
    refused(&forged[100..].concat(), "record 100 is not the one written");
}

#[tokio::test]
async fn the_log_of_another_server_is_not_continued() {
    let place = Place::new();
    place.write(1).await;
    let whole = place.bytes();
    let error = Audit::open(&place.path, "b", None, Arc::new(ManualClock::new())).unwrap_err();
    assert!(
        error.to_string().contains("is of node \"a\", and this server is node \"b\""),
        "{error}"
    );
    assert_eq!(place.bytes(), whole);
}
