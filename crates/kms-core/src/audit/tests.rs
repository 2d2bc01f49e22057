//! A log as it is written, and a thousand ways to tamper with it.

use super::anchor::{KeyError, PublicKey, Statement};
use super::verify::{Finding, MAX_ANCHOR_DELAY, Summary, Verifier};
use super::*;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256};
use proptest::prelude::*;
use std::sync::LazyLock;

const AT: &str = "2026-01-02T03:04:05.678Z";
const KEY_ID: Uuid = Uuid::from_u128(99);

static KEY: LazyLock<KeyPair> = LazyLock::new(|| KeyPair::generate(KeySize::Rsa2048).unwrap());
/// 50 records of one node with an anchor after each ten, the last line being one.
static LOG: LazyLock<Vec<u8>> = LazyLock::new(|| Writer::new().records(50, 10).bytes);

fn public_key() -> PublicKey {
    // PKCS#1: SEQUENCE { INTEGER 0 ‖ modulus of 256 bytes, INTEGER 65537 }.
    let der = KEY.public_key().as_ref();
    PublicKey::from_parts(&der[9..265], &der[267..]).unwrap()
}

fn event(n: u64) -> Event<'static> {
    Event {
        node: "a".into(),
        at: AT.into(),
        action: "wrap".into(),
        outcome: DONE.into(),
        caller: Some("iam-ServiceId-1".into()),
        instance: Some(Uuid::from_u128(7)),
        correlation: Some(format!("request {n}\n\"quoted\"").into()),
        peer: Some("192.0.2.1:40000".into()),
        ..Event::default()
    }
}

struct Writer {
    link: Link,
    bytes: Vec<u8>,
    at: String,
}

impl Writer {
    fn new() -> Writer {
        Writer { link: Link::start(), bytes: Vec::new(), at: AT.to_owned() }
    }

    fn add(&mut self, content: &Content<'_>) {
        let (line, link) = self.link.extend(content).unwrap();
        self.bytes.extend(line);
        self.link = link;
    }

    fn event_at(&mut self, at: &str) -> Link {
        self.at = at.to_owned();
        self.add(&Content::Event(Event { at: at.to_owned().into(), ..event(0) }));
        self.link
    }

    fn anchor(&mut self, head: Link) {
        let at = self.at.clone();
        let statement = Statement { node: "a", at: &at, head, key: KEY_ID };
        let mut signature = vec![0; KEY.public_modulus_len()];
        KEY.sign(
            &RSA_PKCS1_SHA256,
            &SystemRandom::new(),
            &statement.signed_bytes(),
            &mut signature,
        )
        .unwrap();
        self.add(&Content::Anchor(Anchor::new(&statement, signature)));
    }

    fn records(mut self, count: u64, between_anchors: u64) -> Writer {
        for n in 1..=count {
            self.add(&Content::Event(event(n)));
            if n % between_anchors == 0 {
                // One record came while the HSM signed.
                let head = self.link;
                self.add(&Content::Event(event(n)));
                self.anchor(head);
            }
        }
        self
    }
}

/// The lines with something wrong, counted from 1, and the summary; line 0 stands for the end.
fn check(log: &[u8], witness: Option<&[u8]>) -> (Summary, Vec<(usize, Finding)>) {
    let keys = [public_key()];
    let owned = witness.map(|line| line.to_vec());
    let witness = owned.as_deref().map(|line| Anchor::parse_line(line).unwrap().into_owned());
    let mut verifier = Verifier::new(&keys, witness).begin_at(1);
    let mut all = Vec::new();
    for (number, line) in (1..).zip(log.split_inclusive(|byte| *byte == b'\n')) {
        let mut found = Vec::new();
        match line.strip_suffix(b"\n") {
            Some(line) => verifier.line(line, &mut found),
            None => found.push(Finding::Torn),
        }
        all.extend(found.into_iter().map(|finding| (number, finding)));
    }
    let (summary, end) = verifier.finish();
    all.extend(end.map(|finding| (0, finding)));
    (summary, all)
}

fn lines(log: &[u8]) -> Vec<Vec<u8>> {
    log.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
}

#[test]
fn a_line_is_one_json_object_with_what_happened() {
    let (line, link) = Link::start().extend(&Content::Event(event(1))).unwrap();
    let zeros = "0".repeat(64);
    let expected = format!(
        "{{\"seq\":1,\"prev\":\"{zeros}\",\"node\":\"a\",\"at\":\"{AT}\",\"action\":\"wrap\",\"outcome\":\"done\",\
         \"caller\":\"iam-ServiceId-1\",\"instance\":\"00000000-0000-0000-0000-000000000007\",\
         \"correlation\":\"request 1\\n\\\"quoted\\\"\",\"peer\":\"192.0.2.1:40000\"}}\n"
    );
    assert_eq!(String::from_utf8(line.clone()).unwrap(), expected);
    let read = parse(&line[..line.len() - 1]).unwrap();
    assert_eq!(read, Line { seq: 1, prev: Link::start().hash, content: Content::Event(event(1)) });
    assert_eq!(Hash::parse(&link.hash.to_string()), Some(link.hash));
}

#[test]
fn what_a_later_version_adds_to_a_record_is_passed_over_and_hashed() {
    let log = String::from_utf8(LOG.clone()).unwrap();
    let first = log.lines().next().unwrap();
    let more = first.replace("\"node\"", "\"tls\":\"1.3\",\"node\"");
    assert!(parse(more.as_bytes()).is_ok());
    assert_ne!(Hash::of(more.as_bytes()), Hash::of(first.as_bytes()));
}

/// Two lines as they were written before records had a peer: their bytes are what was hashed.
#[test]
fn the_logs_of_before_still_verify_and_are_continued() {
    let zeros = "0".repeat(64);
    let first = format!(
        "{{\"seq\":1,\"prev\":\"{zeros}\",\"node\":\"a\",\"at\":\"2026-01-02T03:04:05Z\",\"action\":\"issue_token\",\
         \"outcome\":\"done\",\"caller\":\"iam-ServiceId-1\",\"correlation\":\"r-1\"}}"
    );
    let second = "{\"seq\":2,\"prev\":\"a701e1af355d229f9fcc079136c5a0f44a95a52e4fce10f0c619964c88b4a7ce\",\"node\":\"a\",\
                  \"at\":\"2026-01-02T03:04:06Z\",\"action\":\"wrap\",\"outcome\":\"done\"}";
    let link = Link::start().follow(first.as_bytes()).unwrap();
    let link = link.follow(second.as_bytes()).unwrap();
    let Content::Event(old) = parse(first.as_bytes()).unwrap().content else { panic!() };
    assert_eq!(old.peer, None);
    let (again, _) = Link::start().extend(&Content::Event(old)).unwrap();
    assert_eq!(
        again,
        format!("{first}\n").into_bytes(),
        "the form of what has no peer has not changed"
    );
    let (third, _) = link.extend(&Content::Event(event(3))).unwrap();
    let (summary, found) =
        check(format!("{first}\n{second}\n{}", String::from_utf8(third).unwrap()).as_bytes(), None);
    assert_eq!((found, summary.records), (Vec::new(), 3));
}

#[test]
fn a_log_that_was_written_is_sound_and_says_what_anchors_cover() {
    let (summary, found) = check(&LOG, lines(&LOG).last().map(|line| &line[..line.len() - 1]));
    assert_eq!(found, []);
    assert_eq!((summary.first, summary.last, summary.records), (1, 60, 60));
    assert_eq!((summary.anchors, summary.anchored), (5, 58));
    assert_eq!(summary.node.as_deref(), Some("a"));
    assert_eq!(summary.anchored_at.as_deref(), Some(AT));
}

#[test]
fn each_tampering_is_named_at_its_line() {
    let written = lines(&LOG);
    let found = |lines: &[Vec<u8>]| check(&lines.concat(), None).1;
    let mut dropped = written.clone();
    dropped.drain(3..5);
    assert_eq!(found(&dropped), [(4, Finding::Missing { from: 4, to: 5 })]);
    let mut swapped = written.clone();
    swapped.swap(3, 4);
    assert_eq!(
        found(&swapped),
        [(4, Finding::Missing { from: 4, to: 4 }), (5, Finding::Misplaced { found: 4, wanted: 6 })]
    );
    let mut inserted = written.clone();
    inserted.insert(5, written[1].clone());
    assert_eq!(found(&inserted), [(6, Finding::Misplaced { found: 2, wanted: 6 })]);
    let mut junk = written.clone();
    junk.insert(5, b"junk\n".to_vec());
    assert_eq!(found(&junk), [(6, Finding::NotARecord)]);
    let mut changed = written.clone();
    changed[5] = String::from_utf8(changed[5].clone()).unwrap().replace("Id-1", "Id-2").into();
    assert_eq!(found(&changed), [(7, Finding::Changed { seq: 7 })]);
    let mut begun_late = written.clone();
    begun_late.remove(0);
    assert_eq!(found(&begun_late), [(1, Finding::Missing { from: 1, to: 1 })]);
    let mut torn = written.clone();
    torn[59].pop();
    assert_eq!(found(&torn), [(60, Finding::Torn)]);
    let witness = written[59].strip_suffix(b"\n");
    let (_, cut) = check(&written[..40].concat(), witness);
    assert_eq!(cut, [(0, Finding::Cut { from: 41, to: 58 })]);
}

#[test]
fn a_record_of_another_node_does_not_belong() {
    let mut writer = Writer::new();
    writer.add(&Content::Event(event(1)));
    writer.add(&Content::Event(Event { node: "b".into(), ..event(2) }));
    let (_, found) = check(&writer.bytes, None);
    assert_eq!(found, [(2, Finding::OtherNode { found: "b".into(), wanted: "a".into() })]);
}

#[test]
fn a_chain_that_was_computed_anew_is_found_at_the_next_anchor() {
    let forged = recomputed(&lines(&LOG), 30);
    let (summary, found) = check(&forged, None);
    assert!(matches!(found[0], (36, Finding::Rewritten { head: 34 })), "{found:?}");
    assert_eq!(summary.records, 60);
}

#[test]
fn an_anchor_of_another_key_or_place_proves_nothing() {
    let mut writer = Writer::new().records(3, 100);
    let other = Statement { node: "a", at: AT, head: writer.link, key: KEY_ID };
    writer.add(&Content::Anchor(Anchor::new(&other, vec![7; 256])));
    let head = Link { seq: 9, ..writer.link };
    writer.anchor(head);
    let (summary, found) = check(&writer.bytes, None);
    assert_eq!(found, [(4, Finding::BadSignature), (5, Finding::AnchorOutOfPlace { head: 9 })]);
    assert_eq!(summary.anchored, 0);
}

#[test]
fn an_anchor_comes_late_by_no_more_than_is_remembered() {
    let (mut verifier, mut writer, mut found) =
        (Verifier::new(&[], None), Writer::new(), Vec::new());
    writer.add(&Content::Event(event(1)));
    let first = writer.link;
    for n in 0..MAX_ANCHOR_DELAY as u64 - 1 {
        writer.add(&Content::Event(event(n)));
    }
    writer.anchor(first);
    writer.anchor(first);
    for line in lines(&writer.bytes) {
        verifier.line(&line[..line.len() - 1], &mut found);
    }
    assert_eq!(found, [Finding::AnchorOutOfPlace { head: 1 }], "only the second is too late");
}

#[test]
fn records_that_waited_long_for_an_anchor_are_told_and_are_no_tampering() {
    let told = |writer: &Writer| {
        let (summary, found) = check(&writer.bytes, None);
        assert_eq!(found, []);
        let longest =
            summary.longest.map(|one| (one.from, one.to, one.seconds, one.since, one.until));
        (summary.late, longest)
    };
    let mut writer = Writer::new();
    writer.event_at("2024-02-28T23:59:30Z");
    // 90 s: a minute is promised, and a slow HSM takes longer.
    let head = writer.event_at("2024-02-29T00:01:00.9Z");
    writer.anchor(head);
    // A night without records is not one without anchors.
    writer.event_at("2024-02-29T23:59:30Z");
    let head = writer.event_at("2024-03-01T00:00:00Z");
    // It came while the HSM signed: the next anchor is for it.
    writer.event_at("2024-03-01T00:00:29Z");
    writer.anchor(head);
    assert_eq!(told(&writer), (0, None));
    let head = writer.event_at("2024-03-01T02:00:29Z");
    writer.anchor(head);
    let signing = ("2024-03-01T00:00:29Z".to_owned(), "2024-03-01T02:00:29Z".to_owned());
    let longest = Some((6, 8, 7200, signing.0, signing.1));
    assert_eq!(told(&writer), (1, longest.clone()));
    // No anchor at all, up to the end.
    writer.event_at("2024-12-31T23:59:00Z");
    writer.event_at("2025-01-01T00:00:30Z");
    assert_eq!(told(&writer), (1, longest.clone()));
    writer.event_at("2025-01-01T00:00:31Z");
    assert_eq!(told(&writer), (2, longest));
    // What is no time, or goes back, is nothing to tell.
    for at in ["never", "2020-01-01T00:00:00Z", "\u{e9}\u{e9}\u{e9}\u{e9}-01-01T00:00:00Z"] {
        let mut writer = Writer::new();
        writer.event_at("2024-01-01T00:00:00Z");
        let head = writer.event_at(at);
        writer.anchor(head);
        assert_eq!(told(&writer), (0, None));
    }
}

#[test]
fn an_anchor_of_a_record_that_was_not_read_covers_nothing() {
    let mut lines = lines(&LOG);
    lines.truncate(36);
    assert_eq!(check(&lines.concat(), None).0.anchored, 34);
    lines.drain(29..35);
    let (summary, found) = check(&lines.concat(), None);
    assert_eq!(found, [(30, Finding::Missing { from: 30, to: 35 })]);
    assert_eq!((summary.anchors, summary.anchored), (3, 22));
}

#[test]
fn a_public_key_is_written_and_read_as_pem() {
    let (key, pem) = (public_key(), public_key().pem());
    assert!(pem.lines().all(|line| line.len() <= 64), "{pem}");
    assert_eq!(PublicKey::parse_pem(&pem), Ok(key));
    for wrong in ["", "-----BEGIN PUBLIC KEY-----", &pem.replace('M', "!"), &pem.repeat(2)] {
        assert_eq!(PublicKey::parse_pem(wrong), Err(KeyError::Pem), "{wrong}");
    }
    let cut = format!(
        "{}\n-----END PUBLIC KEY-----",
        pem.lines()
            .nth(1)
            .map_or(String::new(), |line| format!("-----BEGIN PUBLIC KEY-----\n{line}"))
    );
    assert_eq!(PublicKey::parse_pem(&cut), Err(KeyError::NotRsa));
}

/// The log with line `at` changed, and every hash after it made to fit; signatures stay as they were.
fn recomputed(lines: &[Vec<u8>], at: usize) -> Vec<u8> {
    let mut writer = Writer::new();
    for (number, line) in lines.iter().enumerate() {
        let mut content = parse(&line[..line.len() - 1]).unwrap().content;
        if let (Content::Event(event), true) = (&mut content, number == at) {
            event.caller = Some("iam-ServiceId-2".into());
        }
        writer.add(&content);
    }
    writer.bytes
}

/// The line with another caller, and for an anchor with another time; the rest, its place included, as it was.
fn reworded(line: &[u8], caller: u64) -> Vec<u8> {
    let read = parse(&line[..line.len() - 1]).unwrap();
    let before = Link { seq: read.seq - 1, hash: read.prev };
    let content = match read.content {
        Content::Event(event) => {
            Content::Event(Event { caller: Some(format!("iam-{caller}").into()), ..event })
        }
        Content::Anchor(anchor) => {
            let text = String::from_utf8(line.to_vec()).unwrap();
            let at = format!("2026-01-02T03:04:{:02}Z", caller % 60);
            return text.replace(anchor.at(), &at).into_bytes();
        }
    };
    before.extend(&content).unwrap().0
}

/// What somebody does who can write the file.
#[derive(Debug, Clone)]
enum Tampering {
    /// Any byte: mostly no record is left.
    Edit(prop::sample::Index, u8),
    /// It stays a record, and says something else.
    Reword(prop::sample::Index, u64),
    Drop(prop::sample::Index, usize),
    Swap(prop::sample::Index, prop::sample::Index),
    Insert(prop::sample::Index, prop::sample::Index),
    /// Inserts a new one with number and hash as they must be there.
    Forge(prop::sample::Index),
    Recompute(prop::sample::Index),
    CutTail(prop::sample::Index),
}

impl Tampering {
    fn any() -> impl Strategy<Value = Tampering> {
        let at = any::<prop::sample::Index>;
        prop_oneof![
            (at(), 1u8..).prop_map(|(at, change)| Tampering::Edit(at, change)),
            (at(), any::<u64>()).prop_map(|(at, caller)| Tampering::Reword(at, caller)),
            (at(), 1usize..5).prop_map(|(at, count)| Tampering::Drop(at, count)),
            (at(), at()).prop_map(|(one, other)| Tampering::Swap(one, other)),
            (at(), at()).prop_map(|(from, to)| Tampering::Insert(from, to)),
            at().prop_map(Tampering::Forge),
            at().prop_map(Tampering::Recompute),
            at().prop_map(Tampering::CutTail),
        ]
    }

    /// The log afterwards, and the first line that is not as it was, counted from 1.
    fn apply(&self, log: &[u8]) -> (Vec<u8>, usize) {
        let mut changed = lines(log);
        let count = changed.len();
        let place = match self {
            Tampering::Edit(at, change) => {
                let (mut log, at) = (log.to_vec(), at.index(log.len()));
                log[at] ^= change;
                let before = log[..at].iter().filter(|byte| **byte == b'\n').count();
                return (log, before + 1);
            }
            Tampering::Reword(at, caller) => {
                let at = at.index(count);
                changed[at] = reworded(&changed[at], *caller);
                at
            }
            Tampering::Drop(at, lines) => {
                let at = at.index(count - 5);
                changed.drain(at..at + lines);
                at
            }
            Tampering::Swap(one, other) => {
                let (one, other) = (one.index(count), other.index(count));
                changed.swap(one, other);
                one.min(other)
            }
            Tampering::Insert(from, to) => {
                let to = to.index(count + 1);
                changed.insert(to, changed[from.index(count)].clone());
                to
            }
            Tampering::Forge(at) => {
                let at = at.index(count);
                let before = |line: &Vec<u8>| Link::join(&line[..line.len() - 1]).unwrap();
                let link = at.checked_sub(1).map_or(Link::start(), |at| before(&changed[at]));
                changed.insert(at, link.extend(&Content::Event(event(0))).unwrap().0);
                at
            }
            Tampering::Recompute(at) => {
                let at = at.index(count - 2);
                return (recomputed(&changed, at), at + 1);
            }
            Tampering::CutTail(at) => {
                let left = at.index(log.len());
                let log = log[..left].to_vec();
                let place = lines(&log).len();
                return (log, place);
            }
        };
        (changed.concat(), place + 1)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Against the last anchor, kept elsewhere as well.
    #[test]
    fn a_thousand_tamperings_are_all_found_where_they_are(tampering in Tampering::any()) {
        let (log, place) = tampering.apply(&LOG);
        let last = lines(&LOG).pop().unwrap();
        let (_, found) = check(&log, last.strip_suffix(b"\n"));
        // Whole records behind the last anchor can be cut off unseen: docs/audit.md says so.
        let cut_unseen = log.ends_with(b"\n") && place >= 58;
        prop_assume!(log != *LOG && !(matches!(tampering, Tampering::CutTail(_)) && cut_unseen));
        let Some((line, _)) = found.first() else { panic!("{tampering:?} at line {place} is not found") };
        // A line is wrong by itself or at its successor; a chain computed anew, at the next anchor; a tail, at the end.
        let near = match tampering {
            Tampering::Recompute(_) => place..=place + 14,
            Tampering::CutTail(_) => 0..=place,
            _ => place..=place + 1,
        };
        prop_assert!(near.contains(line), "{tampering:?} at line {place} is told as {found:?}");
    }
}

proptest! {
    #[test]
    fn no_line_is_too_strange_to_be_judged(line in any::<Vec<u8>>()) {
        prop_assert_eq!(parse(&line), Err(NotARecord));
        prop_assert_eq!(Link::start().follow(&line), Err(Broken::NotARecord));
        prop_assert_eq!(Link::join(&line), Err(Broken::NotARecord));
        let (_, found) = check(&line, None);
        prop_assert!(line.is_empty() || !found.is_empty());
    }

    #[test]
    fn what_was_written_is_read_again(
        seq in 1..=MAX_SEQ, caller in any::<Option<String>>(), correlation in any::<Option<String>>(),
        peer in any::<Option<String>>(), key: u128,
    ) {
        let event = Event {
            caller: caller.map(Cow::from),
            correlation: correlation.map(Cow::from),
            peer: peer.map(Cow::from),
            target: Some(Uuid::from_u128(key)),
            ..event(1)
        };
        let link = Link { seq: seq - 1, ..Link::start() };
        let (line, next) = link.extend(&Content::Event(event.clone())).unwrap();
        let line = &line[..line.len() - 1];
        prop_assert!(!line.contains(&b'\n'));
        prop_assert_eq!(link.follow(line), Ok(next));
        prop_assert_eq!(parse(line).unwrap().content, Content::Event(event));
    }
}
