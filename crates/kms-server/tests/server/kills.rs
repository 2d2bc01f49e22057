//! The server is killed while it makes, rotates, suspends, destroys and purges keys: at every point at which something has just
//! become durable, and at random moments under load. What was acknowledged is there afterwards; what was not is whole or
//! of no use; what is left over is told and stays.
//!
//! `KEELSON_KILLS` is the number of rounds, `KEELSON_SEED` makes another sequence.

use crate::harness::new_key;
use crate::harness::rig::{Client, Rig};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
const ROUNDS: u64 = 50;
const CALLERS: u32 = 4;
const ATTEMPTS: u32 = 50;
/// A host's token fills up with what is never deleted, and each look at it takes longer: after so many rounds another
/// host begins.
const ROUNDS_ON_A_HOST: u64 = 100;

/// What is asked for when the server dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Create,
    Import,
    Rotate,
    Delete,
    Purge,
    Disable,
    Enable,
    ApiKey,
}

/// Where it dies.
#[derive(Debug, Clone, Copy)]
enum Point {
    /// A line of the fault injector.
    Call(&'static str),
    /// When this file has grown this often.
    Growth(&'static str, u32),
    /// So many milliseconds after as many answers under load as there are callers.
    Moment(u64),
}

const IN_THE_HSM: &[(Verb, &str)] = &[
    (Verb::Create, "kill C_GenerateRandom"),
    (Verb::Create, "kill C_GenerateKey"),
    (Verb::Create, "kill C_GenerateKey late"),
    (Verb::Create, "kill C_GenerateKey after=1"),
    (Verb::Create, "kill C_GenerateKey after=1 late"),
    (Verb::Create, "kill C_Sign"),
    (Verb::Create, "kill C_Sign late"),
    (Verb::Import, "kill C_GenerateKeyPair late"),
    (Verb::Import, "kill C_UnwrapKey"),
    (Verb::Import, "kill C_UnwrapKey late"),
    (Verb::Import, "kill C_GenerateKey"),
    (Verb::Import, "kill C_GenerateKey late"),
    (Verb::Rotate, "kill C_GenerateKey"),
    (Verb::Rotate, "kill C_GenerateKey late"),
    (Verb::Rotate, "kill C_GenerateKey after=1"),
    (Verb::Rotate, "kill C_GenerateKey after=1 late"),
    (Verb::Rotate, "kill C_Sign late"),
    (Verb::Purge, "kill C_DestroyObject"),
    (Verb::Purge, "kill C_DestroyObject late"),
    (Verb::Purge, "kill C_DestroyObject after=1"),
    (Verb::Purge, "kill C_DestroyObject after=1 late"),
    (Verb::ApiKey, "kill C_GenerateRandom"),
    (Verb::ApiKey, "kill C_GenerateRandom late"),
];

/// The write-ahead log grows with each commit: a row, a check value, the state.
const IN_THE_STORE: &[(Verb, u32)] = &[
    (Verb::Create, 3),
    (Verb::Import, 3),
    (Verb::Rotate, 3),
    (Verb::Delete, 1),
    (Verb::Purge, 2),
    (Verb::Disable, 1),
    (Verb::Enable, 1),
    (Verb::ApiKey, 1),
];

/// The state of a key that is not there any more; no state on the wire.
const GONE: u64 = 0;

/// A key that was acknowledged.
#[derive(Debug, Clone)]
struct Held {
    /// As on the wire. Several: nobody knows whether the last change was made.
    states: BTreeSet<u64>,
    wdeks: Vec<String>,
}

/// Everything that was acknowledged, and nothing else.
#[derive(Default)]
struct Ledger {
    keys: BTreeMap<String, Held>,
    api_keys: Vec<String>,
    /// Versions that nothing uses, as `check` has told.
    leftovers: BTreeSet<String>,
    killed: u64,
    acknowledged: u64,
    /// What there was on earlier hosts.
    before: [usize; 2],
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s2_nothing_acknowledged_is_lost_wherever_the_server_is_killed() {
    let Some(mut rig) = Rig::make() else { return };
    let rounds = number("KEELSON_KILLS", ROUNDS);
    let mut seed = number("KEELSON_SEED", 42);
    let points = points();
    let mut ledger = Ledger::default();
    for round in 0..rounds {
        let at = usize::try_from(round).unwrap();
        // Each point once; then every fourth round one of them, in turn, and the others at random.
        let (verb, point) = match points.get(at) {
            Some(point) => *point,
            None if at.is_multiple_of(4) => points[(at / 4) % points.len()],
            None => (Verb::Create, Point::Moment(random(&mut seed) % 700)),
        };
        let told = format!("round {round}, {verb:?} at {point:?}");
        kill_at(&mut rig, &mut ledger, verb, point, round).await;
        let last = round % ROUNDS_ON_A_HOST == ROUNDS_ON_A_HOST - 1 || round + 1 == rounds;
        examine(&mut rig, &mut ledger, round % 20 == 19 || last, &told).await;
        if last {
            ledger.leave_host();
            rig = Rig::make().unwrap();
        }
    }
    let [keys, left_over] = ledger.before;
    eprintln!(
        "{rounds} rounds, {} killed in the middle, {} calls acknowledged, {keys} keys, {left_over} left over",
        ledger.killed, ledger.acknowledged
    );
    assert!(ledger.acknowledged >= rounds, "{} is hardly any load", ledger.acknowledged);
}

impl Ledger {
    fn leave_host(&mut self) {
        let [keys, left_over] = self.before;
        self.before = [keys + self.keys.len(), left_over + self.leftovers.len()];
        self.keys.clear();
        self.api_keys.clear();
        self.leftovers.clear();
    }
}

fn points() -> Vec<(Verb, Point)> {
    let calls = IN_THE_HSM.iter().map(|(verb, line)| (*verb, Point::Call(line)));
    let commits = IN_THE_STORE.iter().flat_map(|(verb, most)| {
        let grown = (1..=*most).map(|nth| Point::Growth("kms.db-wal", nth));
        grown.chain([Point::Growth("audit.log", 1)]).map(|point| (*verb, point))
    });
    calls.chain(commits).collect()
}

/// One life of the server, up to its violent end.
async fn kill_at(rig: &mut Rig, ledger: &mut Ledger, verb: Verb, point: Point, round: u64) {
    let in_process = matches!(point, Point::Call(_));
    rig.configure(if in_process { "none" } else { "process" });
    rig.control.clear().unwrap();
    rig.start().await;
    let client = rig.admin().await;
    match point {
        Point::Moment(millis) => kill_under_load(rig, ledger, &client, millis, round).await,
        Point::Call(line) => {
            let target = prepare(&client, ledger, verb, round).await;
            rig.control.set(line).unwrap();
            ask(&client, ledger, verb, &target, round).await;
            assert!(rig.died().await, "{verb:?} has not come to {line:?}\n{}", rig.log());
            ledger.killed += 1;
            rig.kill();
        }
        Point::Growth(name, nth) => {
            let watched = rig.path(name);
            let mut killed = false;
            // Where the killer had no processor for a moment, it has missed one of the commits.
            for _ in 0..ATTEMPTS {
                let target = prepare(&client, ledger, verb, round).await;
                let killer = Killer::of(rig.pid(), watched.clone(), nth);
                let answered = ask(&client, ledger, verb, &target, round).await;
                killed = killer.has_killed();
                ledger.killed += u64::from(!answered);
                if killed {
                    break;
                }
                assert!(answered, "{verb:?} has ended by itself\n{}", rig.log());
            }
            assert!(killed, "{verb:?} wrote less than {nth} times into {name}");
            rig.kill();
        }
    }
    rig.control.clear().unwrap();
}

/// Nobody but the server dies, and it dies at once: whatever it has answered was said by a server that is well, so each
/// answer but the expected one is a failure, and so is none before the kill.
async fn kill_under_load(
    rig: &mut Rig,
    ledger: &mut Ledger,
    client: &Client,
    millis: u64,
    round: u64,
) {
    let answers = Arc::new(Semaphore::new(0));
    let workers: Vec<_> = (0..CALLERS)
        .map(|worker| {
            let (client, answers) = (client.clone(), answers.clone());
            tokio::spawn(load(client, format!("load {round}-{worker}"), answers))
        })
        .collect();
    let begun = timeout(Duration::from_secs(120), answers.acquire_many(CALLERS)).await;
    tokio::time::sleep(Duration::from_millis(millis)).await;
    let stopped = begun.is_err() || workers.iter().any(|worker| worker.is_finished());
    rig.kill();
    ledger.killed += 1;
    for worker in workers {
        let done = worker.await;
        let (keys, acknowledged) = done.unwrap_or_else(|e| panic!("{e}\n{}", rig.log()));
        ledger.keys.extend(keys);
        ledger.acknowledged += acknowledged;
    }
    assert!(!stopped, "no answer before the kill\n{}", rig.log());
}

/// The key that the verb is about to change.
async fn prepare(client: &Client, ledger: &mut Ledger, verb: Verb, round: u64) -> String {
    let name = format!("target {round}");
    if matches!(verb, Verb::Create | Verb::Import | Verb::ApiKey) {
        return name;
    }
    let id = client.create(&name).await.unwrap();
    let wrapped = client.wrap(&id, PLAINTEXT).await.unwrap().json();
    let wdeks = vec![wrapped["ciphertext"].as_str().unwrap().to_owned()];
    let mut states = BTreeSet::from([1]);
    if verb == Verb::Enable {
        assert_eq!(act(client, &id, "disable").await, Some(204));
        states = BTreeSet::from([2]);
    }
    if verb == Verb::Purge {
        client.may_purge().await.unwrap();
        let deleted = client.call("DELETE", &format!("/{id}"), "").await.unwrap();
        assert_eq!(deleted.status, 204, "{deleted:?}");
        states = BTreeSet::from([5]);
    }
    ledger.keys.insert(id.clone(), Held { states, wdeks });
    ledger.acknowledged += 2;
    id
}

/// Asks for it, and writes down what is known afterwards. Whether it was answered.
async fn ask(client: &Client, ledger: &mut Ledger, verb: Verb, target: &str, round: u64) -> bool {
    let (status, from, to) = match verb {
        Verb::Create | Verb::Import => {
            let payload = format!("\"extractable\":false,\"payload\":\"{PLAINTEXT}\"");
            let body = match verb {
                Verb::Import => new_key(target).replace("\"extractable\":false", &payload),
                _ => new_key(&format!("target {round}")),
            };
            let made = client.call("POST", "", &body).await;
            if let Some(made) = &made {
                assert_eq!(made.status, 201, "{made:?}");
                let id = made.json()["resources"][0]["id"].as_str().unwrap().to_owned();
                let held = Held { states: BTreeSet::from([1]), wdeks: Vec::new() };
                ledger.keys.insert(id, held);
            }
            ledger.acknowledged += u64::from(made.is_some());
            return made.is_some();
        }
        Verb::ApiKey => {
            let made = client.create_api_key().await;
            let answered = made.is_some();
            ledger.api_keys.extend(made);
            ledger.acknowledged += u64::from(answered);
            return answered;
        }
        Verb::Rotate => (act(client, target, "rotate").await, 1, 1),
        Verb::Disable => (act(client, target, "disable").await, 1, 2),
        Verb::Enable => (act(client, target, "enable").await, 2, 1),
        Verb::Delete => {
            (client.call("DELETE", &format!("/{target}"), "").await.map(|it| it.status), 1, 5)
        }
        Verb::Purge => (purge(client, target).await, 5, GONE),
    };
    let states = match status {
        Some(204) => BTreeSet::from([to]),
        Some(other) => panic!("{verb:?}: {other}"),
        None => BTreeSet::from([from, to]),
    };
    ledger.keys.get_mut(target).unwrap().states = states;
    ledger.acknowledged += u64::from(status.is_some());
    status.is_some()
}

async fn purge(client: &Client, key: &str) -> Option<u16> {
    Some(client.call("DELETE", &format!("/{key}/purge"), "").await?.status)
}

async fn act(client: &Client, key: &str, verb: &str) -> Option<u16> {
    Some(client.call("POST", &format!("/{key}/actions/{verb}"), "").await?.status)
}

/// Makes keys, and uses, rotates, suspends and destroys them, until nobody answers.
async fn load(
    client: Client,
    name: String,
    answers: Arc<Semaphore>,
) -> (BTreeMap<String, Held>, u64) {
    let (mut keys, mut acknowledged) = (BTreeMap::new(), 0);
    while let Some(id) = client.create(&name).await {
        acknowledged += 1;
        answers.add_permits(1);
        let mut held = Held { states: BTreeSet::from([1]), wdeks: Vec::new() };
        if live(&client, &id, &mut held, &mut acknowledged).await.is_some() {
            keys.insert(id, held);
            continue;
        }
        keys.insert(id, held);
        break;
    }
    (keys, acknowledged)
}

/// The life of one key. `None` when there was no answer any more.
async fn live(client: &Client, id: &str, held: &mut Held, acknowledged: &mut u64) -> Option<()> {
    for verb in ["wrap", "rotate", "wrap", "disable", "enable", "wrap"] {
        if verb == "wrap" {
            let wrapped = client.wrap(id, PLAINTEXT).await?;
            assert_eq!(wrapped.status, 200, "{wrapped:?}");
            held.wdeks.push(wrapped.json()["ciphertext"].as_str().unwrap().to_owned());
        } else {
            let before = held.states.clone();
            let after = if verb == "disable" { 2 } else { 1 };
            held.states.insert(after);
            assert_eq!(act(client, id, verb).await?, 204, "{verb} from {before:?}");
            held.states = BTreeSet::from([after]);
        }
        *acknowledged += 1;
    }
    Some(())
}

/// Looks at what is left, while the server is down, and when it is up again.
async fn examine(rig: &mut Rig, ledger: &mut Ledger, whole: bool, told: &str) {
    let (code, found) = rig.check();
    assert!(matches!(code, 0 | 3), "{told}: check ends with {code}: {found}");
    let mut leftovers: BTreeSet<String> = BTreeSet::new();
    let mut strangers = BTreeSet::new();
    let mut purging = BTreeMap::new();
    for key in found["keys"].as_array().unwrap() {
        let (state, id) = (key["state"].as_str().unwrap(), key["key"].as_str().unwrap());
        match state {
            "ok" => {}
            "unfinished" | "never made" => {
                leftovers.insert(key["version"].as_str().unwrap().to_owned());
                strangers.insert(id.to_owned());
            }
            "purging" => {
                purging.insert(key["version"].as_str().unwrap().to_owned(), id.to_owned());
            }
            other => panic!("{told}: {other}: {key}"),
        }
    }
    assert_eq!(found["extra"], json!([]), "{told}: every object has a row");
    for part in found["incomplete"].as_array().unwrap() {
        let part = part.as_str().unwrap();
        let known = leftovers.contains(part) || purging.contains_key(part);
        assert!(known, "{told}: half a version without a row");
    }
    assert_eq!(code == 3, !leftovers.is_empty() || !purging.is_empty(), "{told}");
    let gone: Vec<_> = ledger.leftovers.difference(&leftovers).collect();
    assert!(gone.is_empty(), "{told}: deleted by itself: {gone:?}");
    let fresh: Vec<&String> = leftovers.difference(&ledger.leftovers).collect();
    assert!(fresh.len() <= 4, "{told}: one for each call that was under way: {fresh:?}");
    ledger.leftovers = leftovers;
    if whole {
        examine_all(rig, ledger, &strangers, &purging.into_values().collect(), told).await;
    }
}

async fn examine_all(
    rig: &mut Rig,
    ledger: &mut Ledger,
    strangers: &BTreeSet<String>,
    purging: &BTreeSet<String>,
    told: &str,
) {
    rig.configure("process");
    rig.start().await;
    let client = rig.admin().await;
    let visible = visible(&client).await;
    for (id, state) in &visible {
        // One that was made and not acknowledged is as good as any other.
        let held = ledger
            .keys
            .entry(id.clone())
            .or_insert_with(|| Held { states: BTreeSet::from([*state]), wdeks: Vec::new() });
        assert!(held.states.contains(state), "{told}: {id} is {state}, not {:?}", held.states);
        held.states = BTreeSet::from([*state]);
        examine_key(&client, id, *state, held, told).await;
    }
    ledger.keys.retain(|id, held| {
        let there = visible.contains_key(id);
        assert!(there || held.states.contains(&GONE), "{told}: the acknowledged key {id} is lost");
        there
    });
    for id in purging {
        assert_eq!(visible.get(id), Some(&5), "{told}: what is being purged is destroyed");
        assert_eq!(purge(&client, id).await, Some(204), "{told}: and is purged when asked again");
        assert_eq!(purge(&client, id).await, Some(404), "{told}");
        ledger.keys.remove(id);
    }
    for id in strangers.difference(&visible.keys().cloned().collect()) {
        let answer = client.wrap(id, PLAINTEXT).await.unwrap();
        assert_eq!(answer.status, 404, "{told}: half a key is used: {answer:?}");
    }
    for api_key in &ledger.api_keys {
        assert_eq!(rig.client().log_in(api_key).await, Some(200), "{told}: an API key is lost");
    }
    rig.kill();
}

async fn examine_key(client: &Client, id: &str, state: u64, held: &mut Held, told: &str) {
    if state == 1 && held.wdeks.is_empty() {
        let wrapped = client.wrap(id, PLAINTEXT).await.unwrap();
        assert_eq!(wrapped.status, 200, "{told}: {wrapped:?}");
        held.wdeks.push(wrapped.json()["ciphertext"].as_str().unwrap().to_owned());
    }
    for wdek in &held.wdeks {
        let opened = client.unwrap(id, wdek).await.unwrap();
        match state {
            1 => assert_eq!(opened.json()["plaintext"], PLAINTEXT, "{told}: {id}: {opened:?}"),
            _ => assert!((400..500).contains(&opened.status), "{told}: {id}: {opened:?}"),
        }
    }
}

async fn visible(client: &Client) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    loop {
        let path = format!("?state=1,2,3,5&limit=200&offset={}", found.len());
        let page = client.call("GET", &path, "").await.unwrap().json();
        let keys = page["resources"].as_array().cloned().unwrap_or_default();
        if keys.is_empty() {
            return found;
        }
        let id = |key: &Value| key["id"].as_str().unwrap().to_owned();
        found.extend(keys.iter().map(|key| (id(key), key["state"].as_u64().unwrap())));
    }
}

type Look = (u64, i64, i64);

fn look(path: &PathBuf) -> Look {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(path);
    found.map(|it| (it.len(), it.mtime(), it.mtime_nsec())).unwrap_or_default()
}

/// A thread that kills the server when a file has grown so often.
struct Killer {
    thread: JoinHandle<bool>,
    answered: Arc<AtomicBool>,
}

impl Killer {
    /// It looks without a pause: what happens between two commits takes less than any sleep.
    fn of(pid: u32, path: PathBuf, nth: u32) -> Killer {
        let answered = Arc::new(AtomicBool::new(false));
        let (over, mut before, mut seen) = (answered.clone(), look(&path), 0);
        let thread = std::thread::spawn(move || {
            while seen < nth {
                // Read before the file is: all that was written for the answer is there then.
                let over = over.load(Ordering::Acquire);
                let now = look(&path);
                if now != before {
                    (before, seen) = (now, seen + 1);
                } else if over {
                    return false;
                }
            }
            let kill = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
            kill.is_ok()
        });
        Killer { thread, answered }
    }

    /// Once there is an answer, or will be none.
    fn has_killed(self) -> bool {
        self.answered.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// The same sequence for the same seed (splitmix64).
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *seed;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
