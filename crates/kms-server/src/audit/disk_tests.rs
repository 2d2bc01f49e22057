//! The log on disks that refuse to sync, and on those that do not come back.

use super::tests::{PATIENCE, Place, check, record};
use super::*;
use crate::limits::{self, TooMuch};
use crate::metrics::{Metrics, Snapshot};
use kms_core::audit::{Content, parse};
use kms_core::clock::ManualClock;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::sync::Condvar;
use tokio::time::Instant;

/// A clock that stops whoever writes to the disk between two looks at it, as a disk that hangs does: what it looks at
/// first is when the sync begins.
#[derive(Debug, Default)]
struct Hanging {
    clock: ManualClock,
    state: Mutex<Hang>,
    goes_on: Condvar,
}

#[derive(Debug, Default)]
struct Hang {
    hangs: bool,
    /// Whoever writes is stopped.
    held: bool,
}

impl Hanging {
    fn set(&self, hangs: bool) {
        self.state.lock().unwrap().hangs = hangs;
        self.goes_on.notify_all();
    }

    async fn held(&self) {
        eventually("the sync", || self.state.lock().unwrap().held).await;
    }
}

impl Clock for Hanging {
    fn now(&self) -> Duration {
        if std::thread::current().name() == Some("audit") {
            let mut state = self.state.lock().unwrap();
            while state.hangs {
                state.held = true;
                state = self.goes_on.wait(state).unwrap();
            }
            state.held = false;
        }
        self.clock.now()
    }

    fn wall(&self) -> std::time::SystemTime {
        self.clock.wall()
    }
}

/// A test that fails ends, too: the log waits for its writer.
struct Release(Arc<Hanging>);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

fn on_a_hanging_disk(place: &Place) -> (Arc<Hanging>, Arc<Audit>, Release) {
    let clock = Arc::new(Hanging::default());
    let audit = Audit::open(&place.path, "a", None, clock.clone()).unwrap();
    (clock.clone(), Arc::new(audit.within(PATIENCE)), Release(clock))
}

fn asked(uid: &str) -> Record {
    let peer = Some("192.0.2.7:40000".parse().unwrap());
    Record { correlation: Some(uid.into()), peer, ..record() }
}

fn ask(audit: &Arc<Audit>, uid: &'static str) -> tokio::task::JoinHandle<Result<(), AuditError>> {
    let audit = audit.clone();
    tokio::spawn(async move { audit.record(asked(uid)).await })
}

/// Who asked, and what the log says came of it.
fn outcomes(place: &Place) -> Vec<(String, String)> {
    let bytes = place.bytes();
    let lines = bytes.split_inclusive(|byte| *byte == b'\n');
    let outcomes = lines.map(|line| match parse(&line[..line.len() - 1]).unwrap().content {
        Content::Event(event) => {
            (event.correlation.unwrap_or_default().into_owned(), event.outcome.into_owned())
        }
        Content::Anchor(_) => panic!("no anchor was written"),
    });
    outcomes.collect()
}

/// In real time, which is what disks take, also while virtual time stands still.
async fn eventually(what: &str, done: impl Fn() -> bool) {
    for _ in 0..60_000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
        tokio::task::yield_now().await;
    }
    panic!("{what} never came");
}

async fn head_is(audit: &Audit, seq: u64) {
    eventually("its last record", || audit.head().seq >= seq).await;
    assert_eq!(audit.head().seq, seq);
}

/// Bar A1: what a killed process leaves in the page cache is not what a power loss leaves.
#[tokio::test]
async fn an_answer_comes_only_after_the_sync_of_its_record() {
    let place = Place::new();
    let (clock, audit, _release) = on_a_hanging_disk(&place);
    clock.set(true);
    let waits = ask(&audit, "uid");
    clock.held().await;
    assert_eq!(place.check(), 1, "it is written, and the sync is about to begin");
    for _ in 0..1000 {
        tokio::task::yield_now().await;
        assert!(!waits.is_finished(), "answered before the sync");
    }
    assert_eq!(audit.syncs(), 0);
    clock.set(false);
    waits.await.unwrap().unwrap();
    assert_eq!(audit.syncs(), 1);
}

/// Bar A1: whoever takes the bytes of /dev/null has them nowhere, and the system says so to whoever asks.
#[tokio::test]
async fn without_its_sync_a_record_that_was_written_counts_for_nothing() {
    fs::write("/dev/null", "it takes what is written").unwrap();
    let place = Place::new();
    symlink("/dev/null", &place.path).unwrap();
    let audit = place.open().unwrap();
    let refused = audit.record(record()).await;
    assert!(
        matches!(&refused, Err(AuditError::Write { cause, .. })
            if cause.kind() == std::io::ErrorKind::InvalidInput),
        "{refused:?}"
    );
    assert_eq!(audit.head(), Link::start());
    fs::remove_file(&place.path).unwrap();
    audit.record(record()).await.unwrap();
    assert_eq!(place.check(), 1);
}

/// Bar A1: a file is found again only when its folder was synced, and that of /proc cannot be.
#[tokio::test]
async fn without_the_sync_of_its_folder_a_new_file_takes_no_record() {
    let place = Place::new();
    let file = fs::File::create(&place.path).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let open = || {
        let audit = Audit::open(&path, "a", None, Arc::new(ManualClock::new()));
        audit.map(|audit| audit.within(PATIENCE))
    };
    let unsynced = |error: &AuditError| {
        matches!(error, AuditError::Open { cause, .. }
            if cause.kind() == std::io::ErrorKind::InvalidInput)
    };
    let refused = open().unwrap_err();
    assert!(unsynced(&refused), "{refused:?}");
    // What is not empty was synced when it was begun.
    place.write(2).await;
    let audit = open().unwrap();
    audit.record(record()).await.unwrap();
    // A new file in the place of the one before, as at a rotation.
    file.set_len(0).unwrap();
    let refused = audit.record(record()).await.unwrap_err();
    assert!(unsynced(&refused), "{refused:?}");
    assert_eq!(place.bytes(), b"");
}

/// Bar A3, in virtual time, with a deadline that no loaded machine reaches by itself.
#[tokio::test]
async fn a_disk_that_hangs_is_waited_for_until_the_deadline_and_then_not_at_all_until_it_is_back() {
    let place = Place::new();
    let (clock, audit, _release) = on_a_hanging_disk(&place);
    audit.record(asked("before")).await.unwrap();
    clock.set(true);
    tokio::time::pause();
    let began = Instant::now();
    let mut waiting = vec![ask(&audit, "first")];
    clock.held().await;
    waiting.extend([ask(&audit, "second"), ask(&audit, "third")]);
    for waits in waiting {
        let refused = waits.await.unwrap();
        assert!(matches!(refused, Err(AuditError::TimedOut { .. })), "{refused:?}");
    }
    let over = began.elapsed().checked_sub(PATIENCE);
    assert!(over.is_some_and(|over| over <= Duration::from_millis(10)), "{over:?}");
    assert!(DEADLINE + Duration::from_millis(100) < Duration::from_secs(1), "what is promised");
    let began = Instant::now();
    for _ in 0..1000 {
        let refused = audit.record(asked("at once")).await;
        assert!(matches!(refused, Err(AuditError::TimedOut { .. })), "{refused:?}");
        audit.probe().await.unwrap_err();
    }
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(audit.lag().waiting, 3, "nothing gathers behind a disk that hangs");
    tokio::time::resume();
    clock.set(false);
    // Without anybody's help. Who was refused meanwhile is told apart from who was answered.
    head_is(&audit, 7).await;
    audit.probe().await.unwrap();
    audit.record(asked("after")).await.unwrap();
    let said = outcomes(&place);
    let said: Vec<_> = said.iter().map(|(uid, outcome)| (&**uid, &**outcome)).collect();
    let expected = [
        ("before", "done"),
        ("first", "done"),
        ("first", "unanswered"),
        ("second", "done"),
        ("third", "done"),
        ("second", "unanswered"),
        ("third", "unanswered"),
        ("after", "done"),
    ];
    assert_eq!(said, expected);
    assert_eq!(audit.lag().waiting, 0);
}

#[tokio::test]
async fn that_nobody_was_answered_is_not_forgotten_where_the_disk_is_full_meanwhile() {
    let place = Place::new();
    let (clock, audit, _release) = on_a_hanging_disk(&place);
    clock.set(true);
    let waits = ask(&audit, "first");
    clock.held().await;
    tokio::time::pause();
    waits.await.unwrap().unwrap_err();
    tokio::time::resume();
    // It is on the disk that comes back; the next one is full.
    let aside = place.folder.path().join("aside");
    fs::rename(&place.path, &aside).unwrap();
    symlink("/dev/full", &place.path).unwrap();
    clock.set(false);
    head_is(&audit, 1).await;
    audit.record(asked("second")).await.unwrap_err();
    fs::remove_file(&place.path).unwrap();
    fs::rename(&aside, &place.path).unwrap();
    audit.record(asked("third")).await.unwrap();
    let said = outcomes(&place);
    let said: Vec<_> = said.iter().map(|(uid, outcome)| (&**uid, &**outcome)).collect();
    assert_eq!(said, [("first", "done"), ("first", "unanswered"), ("third", "done")]);
}

#[tokio::test]
async fn a_file_that_is_emptied_under_the_server_is_as_good_as_removed() {
    let place = Place::new();
    let audit = place.open().unwrap();
    audit.record(record()).await.unwrap();
    let end = check(&place.bytes(), Link::start());
    fs::write(&place.path, "").unwrap();
    audit.record(record()).await.unwrap();
    assert_eq!(check(&place.bytes(), end).seq, 3);
    let text = String::from_utf8(place.bytes()).unwrap();
    assert!(text.lines().next().unwrap().contains("\"action\":\"audit_file_removed\""), "{text}");
    assert_eq!(audit.lag().losses, 1);
}

#[tokio::test]
async fn a_log_whose_beginning_was_moved_away_says_what_was_looked_for() {
    let place = Place::new();
    place.write(30).await;
    let whole = place.bytes();
    let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
    let known = check(&lines[..10].concat(), Link::start());
    let open = |log: &[u8]| {
        fs::write(&place.path, log).unwrap();
        place.open_behind(Some(known)).unwrap()
    };
    // A file that goes on right behind it, as every rotation leaves it, and one that holds it.
    for from in [0, 9, 10] {
        let audit = open(&lines[from..].concat());
        assert_eq!((audit.head().seq, audit.lag().losses), (30, 0), "from {from}");
    }
    let audit = open(&lines[20..].concat());
    assert_eq!((audit.head().seq, audit.lag().losses), (31, 1));
    let said = String::from_utf8(place.bytes()).unwrap();
    let said = said.lines().last().unwrap();
    assert!(said.contains("\"action\":\"audit_past_missing\""), "{said}");
    assert!(said.contains("\"correlation\":\"record 10 before record 21\""), "{said}");
    let before = check(&lines[..20].concat(), Link::start());
    assert_eq!(check(&place.bytes(), before), audit.head());
}

#[tokio::test]
async fn how_many_records_wait_for_the_disk_and_how_long_is_shown_while_they_do() {
    let place = Place::new();
    let (clock, audit, _release) = on_a_hanging_disk(&place);
    let metrics = Metrics::new();
    audit.show_sync_times(metrics.audit_sync_seconds());
    audit.record(record()).await.unwrap();
    assert_eq!(audit.lag(), Lag { unanchored: 1, ..Lag::default() });

    clock.set(true);
    let mut writers = tokio::task::JoinSet::new();
    for waiting in 1..=3 {
        let writer = audit.clone();
        writers.spawn(async move { writer.record(record()).await });
        while audit.lag().waiting < waiting {
            tokio::task::yield_now().await;
        }
        clock.clock.advance(Duration::from_secs(2));
    }
    let hanging = Lag { waiting: 3, oldest: Duration::from_secs(6), unanchored: 1, losses: 0 };
    assert_eq!(audit.lag(), hanging, "the oldest of those that are at work and those that wait");
    let snapshot = Snapshot {
        connections: 0,
        requests: 0,
        limits: limits::Settings::default(),
        refused: TooMuch::ALL.map(|limit| (limit, 0)),
        audit_syncs: audit.syncs(),
        audit: audit.lag(),
        certificate_ends: None,
    };
    let shown = metrics.render(&snapshot);
    for sample in [
        "kms_server_audit_waiting_records 3\n",
        "kms_server_audit_oldest_waiting_seconds 6.0\n",
        "kms_server_audit_unanchored_records 1\n",
        "kms_server_audit_sync_seconds_count 1\n",
    ] {
        assert!(shown.contains(sample), "{sample} is not in {shown}");
    }

    clock.set(false);
    while let Some(written) = writers.join_next().await {
        written.unwrap().unwrap();
    }
    assert_eq!(audit.lag(), Lag { unanchored: 4, ..Lag::default() });
    let count = format!("kms_server_audit_sync_seconds_count {}\n", audit.syncs());
    assert!(metrics.render(&snapshot).contains(&count), "each sync is timed");
}

/// After a power cut the end of the file may be what the file system had set aside for a write: zeros, with pages of it in
/// between.
#[tokio::test]
async fn what_a_crash_left_of_a_write_is_set_aside_however_long_it_is() {
    const WINDOW: usize = 256 * 1024;
    let place = Place::new();
    place.write(14).await;
    let whole = place.bytes();
    let known = check(&whole[..end_of_line(&whole, 3)], Link::start());
    // Lines that would go on from there, and nearly fill what is looked at.
    let audit = place.open().unwrap();
    let long = || Record { correlation: Some("x".repeat(8000)), ..record() };
    for _ in 0..30 {
        audit.record(long()).await.unwrap();
    }
    drop(audit);
    let later = place.bytes().split_off(whole.len());
    assert!((WINDOW / 2..WINDOW).contains(&later.len()), "{}", later.len());
    for torn in [
        vec![0; 300 * 1024],
        vec![0; 3 * 1024 * 1024],
        // All but the end of the last line.
        vec![0; WINDOW - 100],
        vec![b'{'; WINDOW + 1],
        [vec![0; WINDOW / 2], later].concat(),
    ] {
        let place = Place::new();
        fs::write(&place.path, [&whole[..], &torn].concat()).unwrap();
        let audit = place.open_behind(Some(known)).unwrap();
        assert_eq!(audit.head().seq, 15);
        audit.record(record()).await.unwrap();
        assert_eq!(place.check(), 16);
        assert_eq!(fs::read(place.path.with_extension("torn-15")).unwrap(), torn);
        drop(audit);
        let again = place.open_behind(Some(known)).unwrap();
        assert_eq!((again.head().seq, again.last().is_some()), (16, true));
    }
}

#[tokio::test]
async fn a_file_with_no_record_far_and_wide_is_not_continued() {
    let place = Place::new();
    place.write(3).await;
    let file = fs::OpenOptions::new().write(true).open(&place.path).unwrap();
    file.set_len(65 * 1024 * 1024).unwrap();
    let refused = place.open().unwrap_err();
    assert!(
        matches!(&refused, AuditError::Broken { what, .. } if what.contains("64 MiB")),
        "{refused}"
    );
    assert_eq!(file.metadata().unwrap().len(), 65 * 1024 * 1024, "nothing of it is touched");
}

#[tokio::test]
async fn a_log_that_is_cut_while_it_is_in_use_is_refused_until_it_is_moved_away() {
    for cut in ["behind a line", "in the last line", "in the first line"] {
        let place = Place::new();
        let audit = place.open().unwrap();
        for _ in 0..3 {
            audit.record(record()).await.unwrap();
        }
        let whole = place.bytes();
        let len = match cut {
            "behind a line" => end_of_line(&whole, 2),
            "in the last line" => whole.len() - 10,
            _ => 10,
        };
        let file = fs::OpenOptions::new().write(true).open(&place.path).unwrap();
        file.set_len(u64::try_from(len).unwrap()).unwrap();
        for _ in 0..2 {
            let refused = audit.record(record()).await.unwrap_err();
            let wanted = format!("was cut to {len} of {} bytes", whole.len());
            assert!(refused.to_string().contains(&wanted), "{cut}: {refused}");
            audit.probe().await.unwrap_err();
        }
        assert_eq!(place.bytes(), whole[..len], "{cut}: nothing of it is touched");
        fs::rename(&place.path, place.folder.path().join("evidence")).unwrap();
        audit.record(record()).await.unwrap();
        let text = String::from_utf8(place.bytes()).unwrap();
        assert!(
            text.lines().next().unwrap().contains("\"action\":\"audit_file_removed\""),
            "{text}"
        );
        assert_eq!(check(&place.bytes(), check(&whole, Link::start())).seq, audit.head().seq);
        assert_eq!(audit.lag().losses, 1, "{cut}");
    }
}

/// What the database knows was durable: no crash has torn it.
#[tokio::test]
async fn a_log_that_lacks_its_last_known_record_is_not_taken_for_torn() {
    let place = Place::new();
    place.write(3).await;
    let whole = place.bytes();
    let known = check(&whole, Link::start());
    fs::write(&place.path, &whole[..whole.len() - 10]).unwrap();
    let refused = place.open_behind(Some(known)).unwrap_err();
    assert!(matches!(refused, AuditError::Broken { .. }), "{refused}");
    assert_eq!(place.bytes(), whole[..whole.len() - 10], "nothing of it is touched");
}

fn end_of_line(bytes: &[u8], line: usize) -> usize {
    let mut feeds = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
    feeds.nth(line - 1).unwrap().0 + 1
}
