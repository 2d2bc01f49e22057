//! The real binary before an HSM that is away, hangs or crashes while it starts; and before the HSMs whose settings
//! `docs/hsm-vendors.md` shows, each played by the module that injects faults.

use crate::harness::new_key;
use crate::harness::rig::{Client, PATIENCE, Rig};
use kms_core::wdek::{Wdek, WdekVersion};
use std::fs;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

/// Far below the minutes for which a network HSM can hang, far above what a loaded machine needs.
const AT_ONCE: Duration = Duration::from_secs(10);

/// Other work on the machine only ever makes something slower: what takes longer than it may in each attempt is the
/// server's doing.
const ATTEMPTS: usize = 5;

/// After so long without a failure the next crash is the first one again.
const STEADY: Duration = Duration::from_millis(5200);

/// Whatever the HSM does while the server starts: it serves, lives, says that the HSM is what is wrong, and is ready
/// when that is back.
async fn starts_without_its_hsm(isolation: &str, faults: &[(&str, &str)]) {
    let Some(mut rig) = Rig::make_impatient() else { return };
    rig.configure(isolation);
    for (fault, cause) in faults {
        let mut seen = Vec::new();
        loop {
            rig.control.set(fault).unwrap();
            let spawned = Instant::now();
            rig.spawn();
            let said = eventually(&rig, "/readyz", &format!("HSM: {cause}")).await;
            let told = spawned.elapsed();
            assert!(said.starts_with("HTTP/1.0 503") && said.contains("database: ok"), "{said}");
            assert!(rig.health("/livez").await.starts_with("HTTP/1.0 200"), "{fault}");
            // Tokens are signed in the HSM.
            let asked = Instant::now();
            let mut client = rig.client();
            assert_eq!(client.log_in(&rig.api_key).await, Some(503), "{fault}");
            let refused = asked.elapsed();
            if told <= AT_ONCE && refused <= Duration::from_secs(4) {
                break;
            }
            seen.push((told, refused));
            assert!(seen.len() < ATTEMPTS, "{fault}: told, and a login refused, after {seen:?}");
            rig.kill();
        }
        rig.control.clear().unwrap();
        eventually(&rig, "/readyz", "200 OK").await;
        wraps(&rig).await;
        rig.kill();
    }
}

/// A client, and a key that it has made and used. On a machine with other work a call may be told to come again.
async fn wraps(rig: &Rig) -> (Client, String) {
    let mut last = String::new();
    for _ in 0..100 {
        let client = rig.admin().await;
        let made = client.call("POST", "", &new_key("crk")).await.unwrap();
        if made.status == 201 {
            let key = made.json()["resources"][0]["id"].as_str().unwrap().to_owned();
            if client.wrap(&key, PLAINTEXT).await.unwrap().status == 200 {
                return (client, key);
            }
        }
        last = made.body;
    }
    panic!("never: {last}\n{}", rig.log());
}

const AWAY: (&str, &str) = ("token gone", "the HSM is not available: no token with label \"rig\"");
const HANGS: [(&str, &str); 2] = [
    ("hang C_Initialize", "the HSM did not answer in time"),
    ("hang C_Login", "the HSM did not answer in time"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r7_it_starts_without_its_hsm_in_another_process() {
    let crash = ("crash C_Login segv", "the HSM is not available: it ended at the start");
    starts_without_its_hsm("process", &[AWAY, HANGS[0], HANGS[1], crash]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r7_it_starts_without_its_hsm_in_its_own_process() {
    starts_without_its_hsm("none", &[AWAY, HANGS[0], HANGS[1]]).await;
}

/// Each example of the document, with another library, PIN and label in it: session count, IV mode and the way in
/// which the token is named are the vendor's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn v1_every_documented_vendor_wraps_as_its_iv_mode_says() {
    let Some(mut rig) = Rig::make() else { return };
    let mut all = Vec::new();
    // What the vendor's token does with the IV, and how long that is.
    for (vendor, token, iv) in [
        ("Luna", "iv appended strict", 16),
        ("nShield", "iv filled", 12),
        ("CloudHSM", "iv filled\ntoken serial 1234567890abcdef", 12),
        ("SoftHSM2", "", 12),
    ] {
        rig.configure("process");
        let sessions = configure_as(&rig, vendor);
        rig.control.set(token).unwrap();
        // The database remembers the serial number that the token had before.
        rig.start().await;
        let metrics = eventually(&rig, "/metrics", "kms_server_hsm_sessions_open ").await;
        let open = format!("kms_server_hsm_sessions_open {sessions}\n");
        assert!(metrics.contains(&open), "{vendor}: {open} is not in {metrics}");
        let client = rig.admin().await;
        let key = client.create(vendor).await.unwrap();
        let wrapped = client.wrap(&key, PLAINTEXT).await.unwrap();
        assert_eq!(wrapped.status, 200, "{vendor}: {wrapped:?}\n{}", rig.log());
        let text = wrapped.json()["ciphertext"].as_str().unwrap().to_owned();
        let wdek = Wdek::decode(&text).unwrap();
        assert_eq!((wdek.version, wdek.iv.len()), (WdekVersion::V4_0_0, iv), "{vendor}");
        let opened = client.unwrap(&key, &text).await.unwrap();
        assert_eq!(opened.json()["plaintext"], PLAINTEXT, "{vendor}");
        all.push((key, text));
        rig.kill();
    }
    // A server that writes another format reads what these have written.
    rig.configure("process");
    rig.control.clear().unwrap();
    rig.start().await;
    let client = rig.admin().await;
    for (key, text) in &all {
        assert_eq!(client.unwrap(key, text).await.unwrap().json()["plaintext"], PLAINTEXT);
        let wrapped = client.wrap(key, PLAINTEXT).await.unwrap().json();
        let wdek = Wdek::decode(wrapped["ciphertext"].as_str().unwrap()).unwrap();
        assert_eq!(wdek.version, WdekVersion::V2_1_0);
    }
    rig.kill();
    // A token of another kind than the settings say is found out before it has wrapped anything.
    rig.configure("process");
    configure_as(&rig, "Luna");
    rig.control.clear().unwrap();
    rig.start().await;
    let client = rig.admin().await;
    let key = client.create("no Luna").await.unwrap();
    assert_eq!(client.wrap(&key, PLAINTEXT).await.unwrap().status, 500);
    assert!(rig.log().contains("AES-GCM has no IV mode that is safe"), "{}", rig.log());
}

/// Puts the settings that the document shows for `vendor` into the configuration; returns the number of sessions.
fn configure_as(rig: &Rig, vendor: &str) -> u64 {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/hsm-vendors.md");
    let document = fs::read_to_string(document).unwrap();
    let (_, chapter) = document.split_once(&format!("\n## {vendor}\n")).unwrap();
    let (_, example) = chapter.split_once("```yaml\nHSM:\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    let value =
        |line: &str| line.split_once(": ").unwrap().1.split(" #").next().unwrap().trim().to_owned();
    let pin = rig.path("pin");
    fs::write(&pin, "582910\n").unwrap();
    let (mut sessions, mut settings) = (0, format!("  DEADLINE_IN_MILLISECONDS: {PATIENCE}\n"));
    for line in example.lines() {
        let name = line.trim().split(':').next().unwrap();
        settings += &match name {
            "PKCS11_LIBRARY" => {
                format!("  {name}: \"{}\"\n", pkcs11_shim::library().unwrap().display())
            }
            "PIN_FILE" => format!("  {name}: \"{}\"\n", pin.display()),
            "TOKEN_LABEL" => format!("  {name}: \"rig\"\n"),
            // The machine of a test may do other work too.
            "DEADLINE_IN_MILLISECONDS" => String::new(),
            _ => format!("{line}\n"),
        };
        if name == "SESSIONS" {
            sessions = value(line).parse().unwrap();
        }
    }
    let file = rig.path("kms-server.yaml");
    let config = fs::read_to_string(&file).unwrap();
    let (before, _) = config.split_once("HSM:\n").unwrap();
    let before = before.replace("SERVER_CONFIG:\n", "SERVER_CONFIG:\n  WDEK_VERSION: \"4.0.0\"\n");
    fs::write(&file, format!("{before}HSM:\n{settings}")).unwrap();
    sessions
}

/// The answer of the health port that has `wanted` in it, within a minute.
async fn eventually(rig: &Rig, path: &str, wanted: &str) -> String {
    let mut last = String::new();
    for _ in 0..3000 {
        last = rig.health(path).await;
        if last.contains(wanted) {
            return last;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{wanted:?} never was in {path}: {last}\n{}", rig.log());
}

/// The library crashes under load, at one call after the other. The service lives, no wrap and no unwrap fails, and the
/// longest takes no longer than a second (twice that, for machines that do other work too).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r4_a_crash_of_the_library_loses_no_wrap_and_no_unwrap() {
    let Some(mut rig) = Rig::make() else { return };
    rig.start().await;
    let client = rig.admin().await;
    let key = client.create("crk").await.unwrap();
    let pid = rig.pid();
    let use_of_key = move |client: Client| {
        let key = key.clone();
        async move {
            let wrapped = client.wrap(&key, PLAINTEXT).await.unwrap();
            assert_eq!(wrapped.status, 200, "{wrapped:?}");
            let text = wrapped.json()["ciphertext"].as_str().unwrap().to_owned();
            let opened = client.unwrap(&key, &text).await.unwrap();
            assert_eq!(opened.status, 200, "{opened:?}");
        }
    };
    let calls =
        ["C_EncryptInit", "C_Encrypt", "C_SignInit", "C_Sign", "C_DecryptInit", "C_Decrypt"];
    let (crashes, apart) = if long_run() { (50, STEADY) } else { (3, Duration::ZERO) };
    let mut seen = Vec::new();
    loop {
        let load = Load::of(4, &client, use_of_key.clone());
        for number in 0..crashes {
            let how = if number % 2 == 0 { "segv" } else { "abort" };
            let order = format!("crash {} {how} once after=20", calls[number % calls.len()]);
            rig.control.set(&order).unwrap();
            // The one who crashes takes the order away.
            let crashed = async {
                while rig.path("control").exists() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let patience = Duration::from_secs(60);
            tokio::time::timeout(patience, crashed).await.expect("nobody has crashed");
            eventually(&rig, "/readyz", "200 OK").await;
            tokio::time::sleep(apart).await;
        }
        let times = load.end().await;
        let longest = times[times.len() - 1];
        eprintln!(
            "{crashes} crashes: {} wrapped and unwrapped, the longest in {longest:?}",
            times.len()
        );
        if longest <= Duration::from_secs(2) {
            break;
        }
        seen.push(longest);
        assert!(seen.len() < ATTEMPTS, "{seen:?}");
        tokio::time::sleep(STEADY).await;
    }
    assert_eq!(rig.pid(), pid, "the same service");
    assert!(rig.health("/livez").await.contains("200 OK"));
}

/// The library hangs in every session. What needs it ends within two seconds, what does not is as fast as before, and
/// the same service wraps again once the library does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r3_a_library_that_hangs_holds_up_nothing_else() {
    let Some(mut rig) = Rig::make_impatient() else { return };
    rig.start().await;
    let (client, key) = wraps(&rig).await;
    let read = {
        let path = format!("/{key}/metadata");
        move |client: Client| {
            let path = path.clone();
            async move { assert_eq!(client.call("GET", &path, "").await.unwrap().status, 200) }
        }
    };
    let window = Duration::from_secs(if long_run() { 300 } else { 10 });
    let mut seen = Vec::new();
    loop {
        let before = Load::of(2, &client, read.clone());
        tokio::time::sleep(window.min(Duration::from_secs(20))).await;
        let before = p99(&before.end().await);

        rig.control.set("hang C_Encrypt").unwrap();
        let (meanwhile, began) = (Load::of(2, &client, read.clone()), Instant::now());
        let mut longest = Duration::ZERO;
        while began.elapsed() < window {
            let asked = Instant::now();
            let refused = client.wrap(&key, PLAINTEXT).await.unwrap();
            assert_eq!(refused.status, 503, "{refused:?}");
            assert!(refused.header("retry-after").is_some(), "{refused:?}");
            longest = longest.max(asked.elapsed());
        }
        let meanwhile = p99(&meanwhile.end().await);
        rig.control.clear().unwrap();
        let (returned, pid) = (Instant::now(), rig.pid());
        while client.wrap(&key, PLAINTEXT).await.unwrap().status != 200 {
            assert!(returned.elapsed() <= Duration::from_secs(60), "{}", rig.log());
        }
        eprintln!(
            "{window:?} of hanging: longest refusal {longest:?}; p99 of metadata {before:?} before, {meanwhile:?} \
             meanwhile; wraps again after {:?}",
            returned.elapsed()
        );
        assert_eq!(rig.pid(), pid, "the same service");
        // And what a connection takes on a machine that does other work too.
        if longest <= Duration::from_secs(2) + 2 * before
            && meanwhile <= 2 * before + Duration::from_millis(50)
        {
            break;
        }
        seen.push((before, meanwhile, longest));
        assert!(seen.len() < ATTEMPTS, "{seen:?}");
    }
}

/// Callers without a pause, until they are told to stop.
struct Load {
    callers: JoinSet<Vec<Duration>>,
    stop: watch::Sender<bool>,
}

impl Load {
    fn of<F: Future<Output = ()> + Send + 'static>(
        callers: usize,
        client: &Client,
        ask: impl Fn(Client) -> F + Clone + Send + 'static,
    ) -> Load {
        let (stop, stopped) = watch::channel(false);
        let mut all = JoinSet::new();
        for _ in 0..callers {
            let (client, ask, stopped) = (client.clone(), ask.clone(), stopped.clone());
            all.spawn(async move {
                let mut times = Vec::new();
                while !*stopped.borrow() {
                    let asked = Instant::now();
                    ask(client.clone()).await;
                    times.push(asked.elapsed());
                }
                times
            });
        }
        Load { callers: all, stop }
    }

    /// How long each took, sorted.
    async fn end(self) -> Vec<Duration> {
        self.stop.send(true).unwrap();
        let mut times = self.callers.join_all().await.concat();
        times.sort();
        times
    }
}

fn p99(times: &[Duration]) -> Duration {
    times[(times.len() - 1) * 99 / 100]
}

/// Whether the long run was asked for; else the same test runs with fewer rounds.
fn long_run() -> bool {
    std::env::var_os("KEELSON_LONG").is_some()
}
