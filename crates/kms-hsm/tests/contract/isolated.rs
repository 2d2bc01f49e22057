//! What a vault promises whose library runs in another process: crashes, hangs and deaths of either process.
//!
//! The worker is this same test binary, asked for the one test that is the worker.

use crate::cases::pattern;
use crate::shim::{Shim, attempts_within, long_run, take_at_most, timed};
use crate::token::{LABEL, PIN, SO_PIN, TestToken, eventually, secret};
use kms_hsm::pkcs11::{Pin, Settings, TokenChoice, init_token};
use kms_hsm::process::{Isolated, Program};
use kms_hsm::{Vault, VaultError};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::{BTreeSet, HashSet};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use uuid::Uuid;

const WORKER: &str = "isolated::this_is_the_worker";
const SERVICE: &str = "isolated::this_is_a_service";

#[test]
#[ignore = "the worker of other tests"]
fn this_is_the_worker() {
    if kms_hsm::process::has_service() {
        crate::token::block_on(kms_hsm::process::serve()).unwrap();
    }
}

/// Opens a vault and waits to be killed.
#[test]
#[ignore = "a service of another test"]
fn this_is_a_service() {
    let Some(library) = std::env::var_os(pkcs11_shim::MODULE) else { return };
    let settings = Settings {
        library: library.into(),
        token: TokenChoice::Label(LABEL.to_owned()),
        pin: secret(PIN).into(),
        sessions: 2,
        queue: 16,
        deadline: Duration::from_secs(10),
        gcm: None,
    };
    crate::token::block_on(async {
        let _vault = open(settings);
        std::future::pending::<()>().await;
    });
}

pub(crate) fn open(settings: Settings) -> Isolated {
    Isolated::open(settings, program()).unwrap()
}

fn program() -> Program {
    Program {
        path: std::env::current_exe().unwrap(),
        name: "worker".into(),
        args: ["--ignored", "--exact", WORKER, "--nocapture"].map(Into::into).to_vec(),
    }
}

fn with_deadline(shim: &Shim, deadline: Duration) -> Isolated {
    open(Settings { deadline, pin: Pin::new(secret(PIN)), ..shim.settings.clone() })
}

/// Sixteen callers without a pause, until they are told to stop.
struct Load {
    callers: JoinSet<(u32, Duration)>,
    stop: tokio::sync::watch::Sender<bool>,
}

impl Load {
    fn on(vault: &Arc<Isolated>, id: Uuid) -> Self {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let mut callers = JoinSet::new();
        for _ in 0..16 {
            let (vault, stopped) = (vault.clone(), stopped.clone());
            callers.spawn(async move {
                let (mut served, mut longest) = (0, Duration::ZERO);
                while !*stopped.borrow() {
                    let (done, took) = timed(wrap_and_unwrap(&vault, id)).await;
                    assert_eq!(done, Ok(()), "after {took:?}");
                    served += 1;
                    longest = longest.max(took);
                }
                (served, longest)
            });
        }
        Self { callers, stop }
    }

    /// How many requests were served, and how long the longest took. None has failed.
    async fn end(self) -> (u32, Duration) {
        self.stop.send(true).unwrap();
        let callers = self.callers.join_all().await;
        let served = callers.iter().map(|(served, _)| served).sum();
        (served, callers.into_iter().map(|(_, longest)| longest).max().unwrap_or_default())
    }
}

async fn wrap_and_unwrap(vault: &Isolated, id: Uuid) -> Result<(), VaultError> {
    let wrapped = vault.wrap(id, b"c", pattern(32)).await?;
    let opened = vault.unwrap(id, b"c", wrapped).await?;
    assert_eq!(opened.as_slice(), pattern(32).as_slice());
    Ok(())
}

/// SIGSEGV and abort, at every call of a use.
pub(crate) async fn a_crash_under_load_fails_no_request(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = Arc::new(with_deadline(&shim, Duration::from_secs(10)));
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    let uses = [
        "C_EncryptInit",
        "C_Encrypt",
        "C_DecryptInit",
        "C_Decrypt",
        "C_SignInit",
        "C_Sign",
        "C_GenerateRandom",
    ];
    for (function, how) in
        uses.map(|function| (function, "segv")).into_iter().chain([("C_Sign", "abort")])
    {
        take_at_most([Duration::from_secs(2)], function, async || {
            let before = workers();
            let load = Load::on(&vault, id);
            shim.order(&format!("crash {function} {how} once after=50"));
            eventually("there is another worker", async || {
                let now = workers();
                now.len() == 1 && now != before
            })
            .await;
            eventually("it serves", async || vault.probe().await.is_ok()).await;
            let (served, longest) = load.end().await;
            eprintln!("{function} {how}: {served} served, the longest in {longest:?}");
            assert!(served > 0);
            [longest]
        })
        .await;
    }
}

/// Nobody knows whether there is a key: the caller is told so, and the list tells the operator.
pub(crate) async fn a_crash_while_a_key_is_made_is_no_answer(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = shim_vault(&shim);
    for (calls, whole, half) in [(0, 0, 0), (1, 0, 1)] {
        let id = Uuid::new_v4();
        shim.order(&format!("crash C_GenerateKey segv once after={calls}"));
        let made = vault.create_version(id).await;
        assert!(matches!(made, Err(VaultError::Unavailable { .. })), "{made:?}");
        assert_eq!(vault.versions().await.unwrap().len(), whole);
        assert_eq!(vault.incomplete().await.unwrap().len(), half);
    }
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    shim.order("crash C_DestroyObject segv once");
    let gone = vault.destroy_version(id).await;
    assert!(matches!(gone, Err(VaultError::Unavailable { .. })), "{gone:?}");
}

pub(crate) async fn a_call_that_hangs_holds_nobody_else(token: TestToken) {
    let shim = Shim::before(&token);
    // What does not hang is well within it on any machine.
    let deadline = Duration::from_secs(2);
    let vault = with_deadline(&shim, deadline);
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    shim.order("hang C_Encrypt times=1");
    let (answer, took) = timed(wrap_and_unwrap(&vault, id)).await;
    assert_eq!(answer, Err(VaultError::TimedOut));
    assert!(took <= 2 * deadline, "{took:?}");
    // Two of the three sessions are left.
    for _ in 0..100 {
        assert_eq!(wrap_and_unwrap(&vault, id).await, Ok(()));
    }
    shim.order("");
    eventually("it has returned", async || vault.probe().await.is_ok()).await;
}

pub(crate) async fn calls_that_all_hang_end_and_the_worker_is_replaced(token: TestToken) {
    let shim = Shim::before(&token);
    let deadline = Duration::from_millis(500);
    let vault = with_deadline(&shim, deadline);
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    shim.order("hang C_Encrypt");
    take_at_most([deadline * 2], "the longest refusal", async || {
        let (before, start) = (workers(), tokio::time::Instant::now());
        let (mut longest, mut replaced) = (Duration::ZERO, false);
        while start.elapsed() < Duration::from_secs(6) || !replaced {
            let (answer, took) = timed(wrap_and_unwrap(&vault, id)).await;
            assert!(
                matches!(answer, Err(VaultError::TimedOut | VaultError::Unavailable { .. })),
                "{answer:?}"
            );
            longest = longest.max(took);
            replaced |= workers().is_disjoint(&before);
            let patience = Duration::from_secs(60);
            assert!(start.elapsed() < patience, "nobody has replaced a worker that stands still");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        [longest]
    })
    .await;
    shim.order("");
    eventually("it works again", async || wrap_and_unwrap(&vault, id).await.is_ok()).await;
}

pub(crate) async fn a_library_that_hangs_at_the_start_is_waited_for(token: TestToken) {
    let shim = Shim::before(&token);
    shim.order("hang C_Initialize");
    let deadline = Duration::from_millis(500);
    take_at_most([2 * deadline], "to be told", async || {
        let vault = with_deadline(&shim, deadline);
        let (answer, took) = timed(vault.probe()).await;
        assert!(answer.is_err());
        [took]
    })
    .await;
    let vault = with_deadline(&shim, deadline);
    assert!(vault.probe().await.is_err());
    shim.order("");
    eventually("it has started", async || vault.probe().await.is_ok()).await;
}

pub(crate) async fn a_worker_that_is_killed_or_stopped_is_replaced(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = Arc::new(with_deadline(&shim, Duration::from_secs(20)));
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    // One that is stopped is missed after five seconds of silence.
    for (signal, patience) in [(Signal::KILL, 2), (Signal::STOP, 10)] {
        let told = format!("the longest beside {signal:?}");
        take_at_most([Duration::from_secs(patience)], &told, async || {
            let before = workers();
            let load = Load::on(&vault, id);
            before.iter().for_each(|worker| kill_process(*worker, signal).unwrap());
            eventually("there is another worker", async || {
                let now = workers();
                now.len() == 1 && now != before
            })
            .await;
            [load.end().await.1]
        })
        .await;
    }
}

pub(crate) async fn no_worker_outlives_its_service(_token: TestToken) {
    let mut service = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", SERVICE, "--nocapture"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pid = Pid::from_child(&service);
    eventually("it has a worker", async || children(pid).len() == 1).await;
    let worker = children(pid);
    service.kill().unwrap();
    service.wait().unwrap();
    eventually("the worker has followed", async || worker.iter().all(|pid| is_gone(*pid))).await;
}

pub(crate) async fn a_library_that_crashes_at_every_start_is_tried_with_pauses(token: TestToken) {
    let shim = Shim::before(&token);
    shim.order("crash C_Login segv");
    let vault = with_deadline(&shim, Duration::from_secs(10));
    eventually("it is down", async || vault.probe().await.is_err()).await;
    take_at_most([Duration::from_millis(250)], "the longest refusal", async || {
        let (before, start) = (shim.logins(), tokio::time::Instant::now());
        let (mut longest, mut tried) = (Duration::ZERO, 0);
        while start.elapsed() < Duration::from_secs(3) || tried < 2 {
            let (answer, took) = timed(vault.probe()).await;
            let Err(VaultError::Unavailable { cause }) = answer else { panic!("{answer:?}") };
            assert!(cause.contains("signal 11"), "{cause}");
            longest = longest.max(took);
            tokio::time::sleep(Duration::from_millis(5)).await;
            tried = shim.logins() - before;
            assert!(start.elapsed() < Duration::from_secs(60), "{tried} starts");
        }
        // The first pause is none.
        let most = 1 + attempts_within(start.elapsed());
        assert!(tried <= most, "{tried} starts in {:?}", start.elapsed());
        [longest]
    })
    .await;
    shim.order("");
    eventually("it has started", async || vault.probe().await.is_ok()).await;
}

pub(crate) async fn crashes_leave_no_process_and_no_file_open(token: TestToken) {
    let shim = Shim::before(&token);
    let vault = shim_vault(&shim);
    let id = Uuid::new_v4();
    vault.create_version(id).await.unwrap();
    wrap_and_unwrap(&vault, id).await.unwrap();
    let (before, files) = (workers(), open_files());
    let rounds = if long_run() { 50 } else { 8 };
    for _ in 0..rounds {
        shim.order("crash C_Sign segv once");
        assert_eq!(wrap_and_unwrap(&vault, id).await, Ok(()));
    }
    eventually("one worker is left", async || workers().len() == 1).await;
    assert!(workers().is_disjoint(&before));
    eventually("as many files are open as before", async || open_files() == files).await;
    let last = workers();
    drop(vault);
    eventually("the last worker has gone", async || last.iter().all(|pid| is_gone(*pid))).await;
    assert_eq!(shim.counts.open_sessions(), 0, "it has not logged out");
}

pub(crate) async fn a_refused_pin_is_tried_by_one_worker_only(token: TestToken) {
    let shim = Shim::before(&token);
    let wrong = Settings { pin: Pin::new(secret("not the pin")), ..shim.settings.clone() };
    let refused = open(wrong).probe().await;
    assert!(matches!(refused, Err(VaultError::Credential(_))), "{refused:?}");
    assert_eq!(shim.logins(), 1);
    let pin = Pin::new(secret(PIN));
    let vault = open(Settings { pin: pin.clone(), ..shim.settings.clone() });
    shim.order("sessions die\nfail C_Login CKR_PIN_INCORRECT");
    for _ in 0..100 {
        let refused = vault.probe().await;
        assert!(matches!(refused, Err(VaultError::Credential(_))), "{refused:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(shim.logins(), 3, "one wrong, one right, one refused");
    eventually("a worker without a PIN is of no use", async || workers().is_empty()).await;
    shim.order("");
    pin.replace(secret("still not the pin"));
    eventually("it has tried the second", async || shim.logins() == 4).await;
    pin.replace(secret(PIN));
    eventually("it has tried the third", async || vault.probe().await.is_ok()).await;
    assert_eq!(shim.logins(), 5);
}

pub(crate) async fn another_token_is_refused_by_the_next_worker_too(token: TestToken) {
    let vault = open(token.settings());
    eventually("it knows its token", async || vault.token().is_some()).await;
    assert_eq!(vault.token().unwrap().serial, token.identity.serial);
    token.remove();
    let library = token.library.clone();
    init_token(&library, LABEL, &secret(SO_PIN), &secret(PIN)).unwrap();
    workers().iter().for_each(|worker| kill_process(*worker, Signal::KILL).unwrap());
    eventually("the other token is seen", async || {
        let answer = vault.probe().await;
        assert!(answer.is_err(), "another token was taken for ours");
        matches!(answer, Err(VaultError::Unavailable { cause }) if cause.contains("in the place of"))
    })
    .await;
}

pub(crate) async fn a_creation_that_nobody_waits_for_leaves_no_key(token: TestToken) {
    let vault = open(Settings { sessions: 1, ..token.settings() });
    let mut made = Vec::new();
    for millis in 0..20 {
        let id = Uuid::new_v4();
        let creation = vault.create_version(id);
        if tokio::time::timeout(Duration::from_millis(millis), creation).await.is_ok() {
            made.push(id);
        }
    }
    made.sort();
    eventually("only those are left that were waited for", async || {
        vault.versions().await == Ok(made.clone()) && vault.incomplete().await == Ok(vec![])
    })
    .await;
}

/// More names than one packet holds.
pub(crate) async fn a_long_list_arrives_whole(token: TestToken) {
    use cryptoki::object::{Attribute, KeyType, ObjectClass};
    // The login of the vault that is tested is in another process.
    let inside = token.open();
    let session = token.back_door().session();
    let wanted: BTreeSet<Uuid> = (0..4500).map(|_| Uuid::new_v4()).collect();
    for id in &wanted {
        let half = [
            Attribute::Token(true),
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::GENERIC_SECRET),
            Attribute::Id(id.as_bytes().to_vec()),
            Attribute::Value(vec![1; 16]),
        ];
        session.create_object(&half).unwrap();
    }
    let vault = open(token.settings());
    let told = vault.incomplete().await.unwrap();
    assert_eq!(told.len(), wanted.len());
    drop(inside);
    assert_eq!(told.into_iter().collect::<BTreeSet<_>>(), wanted);
}

/// What the other process costs: rates and times of both vaults in one run, for `--release -- --nocapture`.
pub(crate) async fn the_price_is_told_and_bounded(token: TestToken) {
    let inside: Arc<dyn Vault> = Arc::new(token.open());
    let outside: Arc<dyn Vault> = Arc::new(open(token.settings()));
    let id = Uuid::new_v4();
    inside.create_version(id).await.unwrap();
    let time = Duration::from_secs(if long_run() { 10 } else { 1 });
    for callers in [1, 32] {
        let mut bearable = false;
        // A machine that stood still for a moment is measured again.
        for _ in 0..5 {
            let here = rate(&inside, id, callers, time).await;
            let there = rate(&outside, id, callers, time).await;
            eprintln!("{callers} callers: here {here}; in another process {there}");
            // A tenth would be a mistake, not a price.
            bearable = there.times.len() * 10 >= here.times.len();
            if bearable {
                break;
            }
        }
        assert!(bearable, "{callers} callers");
    }
    let memory = |pid: Pid| {
        let status = format!("/proc/{}/status", pid.as_raw_nonzero());
        let status = std::fs::read_to_string(status).unwrap();
        status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default().to_owned()
    };
    eprintln!("memory of the worker: {:?}", workers().into_iter().map(memory).collect::<Vec<_>>());
}

struct Rate {
    times: Vec<Duration>,
    within: Duration,
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = |permille: usize| self.times[(self.times.len() - 1) * permille / 1000];
        let rate = self.times.len() as f64 / self.within.as_secs_f64();
        write!(f, "{rate:.0}/s, p50 {:?}, p99 {:?}, p99.9 {:?}", at(500), at(990), at(999))
    }
}

/// Wraps for `within`, by so many callers without a pause; their times, sorted.
async fn rate(vault: &Arc<dyn Vault>, id: Uuid, callers: usize, within: Duration) -> Rate {
    let mut tasks = JoinSet::new();
    let end = tokio::time::Instant::now() + within;
    for _ in 0..callers {
        let vault = vault.clone();
        tasks.spawn(async move {
            let mut times = Vec::new();
            while tokio::time::Instant::now() < end {
                let (wrapped, took) = timed(vault.wrap(id, b"c", pattern(32))).await;
                wrapped.unwrap();
                times.push(took);
            }
            times
        });
    }
    let mut times = tasks.join_all().await.concat();
    times.sort();
    Rate { times, within }
}

fn shim_vault(shim: &Shim) -> Isolated {
    with_deadline(shim, Duration::from_secs(10))
}

fn workers() -> HashSet<Pid> {
    children(rustix::process::getpid())
}

/// The living children of a process.
fn children(pid: Pid) -> HashSet<Pid> {
    let all = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| Pid::from_raw(entry.ok()?.file_name().to_str()?.parse().ok()?));
    let own = |(_, parent): &(u8, i32)| *parent == pid.as_raw_nonzero().get();
    all.filter(|child| !is_gone(*child) && stat(*child).as_ref().is_some_and(own)).collect()
}

/// A zombie is gone: who has to bury it is another's affair.
fn is_gone(pid: Pid) -> bool {
    stat(pid).is_none_or(|(state, _)| state == b'Z')
}

/// State and parent.
fn stat(pid: Pid) -> Option<(u8, i32)> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // A name may hold anything.
    let mut words = stat.rsplit(')').next()?.split_whitespace();
    Some((*words.next()?.as_bytes().first()?, words.next()?.parse().ok()?))
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
