//! Every return code of PKCS#11, returned once to a real server whose library runs in a process of its own: the caller
//! hears what `docs/hsm-vendors.md` promises and nothing of the HSM, the code is counted under its name, and the next
//! request is served.

use crate::harness::http::Answer;
use crate::harness::new_key;
use crate::harness::rig::{Client, Rig};
use pkcs11_shim::{CODES, Counts, Function};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

/// A look of the server at its HSM may come between an order and the call that it is for.
const ATTEMPTS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verb {
    /// Of a DEK that the HSM makes.
    Wrap,
    Unwrap,
    Create,
    LogIn,
}

impl Verb {
    /// The functions that it calls when the key was used before. The first meets every code in the short run, too.
    fn calls(self) -> &'static [Function] {
        use Function as F;
        match self {
            Verb::Wrap => {
                &[F::C_Encrypt, F::C_EncryptInit, F::C_SignInit, F::C_Sign, F::C_GenerateRandom]
            }
            Verb::Unwrap => &[F::C_Decrypt, F::C_DecryptInit, F::C_SignInit, F::C_Sign],
            Verb::Create => &[
                F::C_GenerateKey,
                F::C_GenerateRandom,
                F::C_FindObjectsInit,
                F::C_FindObjects,
                F::C_FindObjectsFinal,
                F::C_GetSessionInfo,
                F::C_GetAttributeValue,
                F::C_EncryptInit,
                F::C_Encrypt,
                F::C_SignInit,
                F::C_Sign,
            ],
            Verb::LogIn => &[F::C_Sign, F::C_SignInit, F::C_GenerateRandom],
        }
    }

    fn done(self) -> u16 {
        if self == Verb::Create { 201 } else { 200 }
    }
}

/// The rows of the document: which status follows which code.
struct Promises {
    /// Codes, the status of an unwrap, that of everything else. `None`: as if there had been no code.
    rows: Vec<(Vec<String>, Option<u16>, Option<u16>)>,
    others: (Option<u16>, Option<u16>),
}

impl Promises {
    fn read() -> Promises {
        let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/hsm-vendors.md");
        let document = fs::read_to_string(document).unwrap();
        let (_, chapter) = document.split_once("\n## What a return code leads to\n").unwrap();
        let chapter = chapter.split("\n## ").next().unwrap();
        let mut promises = Promises { rows: Vec::new(), others: (None, None) };
        let status = |cell: &str| (cell != "as usual").then(|| cell[..3].parse().unwrap());
        for line in chapter.lines().filter(|line| line.starts_with("| ")).skip(1) {
            let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
            let [_, codes, _, others, unwrap] = cells[..] else { panic!("{line}") };
            let (unwrap, others) = (status(unwrap), status(others));
            match codes {
                "all others" => promises.others = (unwrap, others),
                codes => {
                    let codes = codes.split(' ').map(|code| format!("CKR_{code}")).collect();
                    promises.rows.push((codes, unwrap, others));
                }
            }
        }
        promises
    }

    /// Whose status `verb` may be answered with when `function` has returned `code` once.
    fn of(&self, verb: Verb, function: Function, code: &str) -> Vec<u16> {
        let row = self.rows.iter().find(|(codes, ..)| codes.iter().any(|one| one == code));
        let (unwrap, others) = row.map_or(self.others, |(_, unwrap, others)| (*unwrap, *others));
        let status = if verb == Verb::Unwrap { unwrap } else { others };
        let some_values_are_not_shown =
            ["CKR_BUFFER_TOO_SMALL", "CKR_ATTRIBUTE_SENSITIVE", "CKR_ATTRIBUTE_TYPE_INVALID"];
        match function {
            // A search that was answered is over, whatever its end returns.
            Function::C_FindObjectsFinal => vec![verb.done()],
            Function::C_GetAttributeValue if some_values_are_not_shown.contains(&code) => {
                vec![500, verb.done()]
            }
            _ => vec![status.unwrap_or(verb.done())],
        }
    }

    /// The first and the last of each row, and some that are in none.
    fn examples(&self) -> Vec<&'static str> {
        let ends = self.rows.iter().flat_map(|(codes, ..)| [codes.first(), codes.last()]);
        let named: BTreeSet<&str> = ends.flatten().map(String::as_str).collect();
        let others = ["CKR_FUNCTION_NOT_SUPPORTED", "CKR_MECHANISM_INVALID", "CKR_KEY_EXHAUSTED"];
        names().into_iter().filter(|name| named.contains(name) || others.contains(name)).collect()
    }
}

struct Scene {
    rig: Rig,
    client: Client,
    key: String,
    wdek: String,
    promises: Promises,
    counts: Counts,
    /// What the metric is to show: what it did at the start, and each order since.
    counted: BTreeMap<String, u64>,
    /// What each refusal looks like: whatever the code was, it looks the same.
    refusals: BTreeMap<(Verb, u16), String>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r8_every_code_leads_to_what_the_document_promises() {
    let Some(mut rig) = Rig::make() else { return };
    rig.start().await;
    let mut scene = Scene::set(rig).await;
    let worker = scene.counts.of(Function::C_Initialize);
    let (all, examples) = (names(), scene.promises.examples());
    let mut cases = 0;
    for verb in [Verb::Wrap, Verb::Unwrap, Verb::Create, Verb::LogIn] {
        let calls = scene.calls_of(verb).await;
        for (number, function) in verb.calls().iter().enumerate() {
            let codes = if number == 0 || long_run() { &all } else { &examples };
            let times = if long_run() { calls[function] } else { 1 };
            for nth in 0..times {
                let said = scene.rig.log().len();
                for code in codes {
                    scene.one(verb, *function, nth, code).await;
                }
                scene.the_operator_was_told(verb, *function, codes, said);
                cases += codes.len();
            }
            scene.every_code_was_counted().await;
        }
    }
    assert!(cases >= 4 * 104 + 19 * 15, "only {cases} cases");
    assert!(
        scene.counts.of(Function::C_Initialize) > worker,
        "lost devices were initialised again"
    );
    assert!(scene.rig.health("/livez").await.contains("200 OK"));
    assert!(!scene.rig.log().contains("panicked"), "{}", scene.rig.log());
    scene.rig.becomes("200 OK").await;
    scene.rig.kill();
    let (ended, found) = scene.rig.check();
    assert!(ended == 0 || ended == 3, "no key was lost: {found}");
}

impl Scene {
    async fn set(rig: Rig) -> Scene {
        let client = rig.admin().await;
        let key = client.create("crk").await.unwrap();
        let wrapped = client.wrap(&key, PLAINTEXT).await.unwrap().json();
        let wdek = wrapped["ciphertext"].as_str().unwrap().to_owned();
        // The HSM makes nothing more by itself.
        rig.anchored().await;
        let counts = Counts::open(&rig.path("counts")).unwrap();
        let counted = counted(&rig.health("/metrics").await);
        let (promises, refusals) = (Promises::read(), BTreeMap::new());
        Scene { rig, client, key, wdek, promises, counts, counted, refusals }
    }

    /// How often `verb` calls each function. The server's own looks at its HSM are seen, too, but not every time.
    async fn calls_of(&self, verb: Verb) -> BTreeMap<Function, u64> {
        let mut fewest: Option<BTreeMap<Function, u64>> = None;
        for _ in 0..5 {
            let before = self.counts.all();
            assert_eq!(self.ask(verb).await.status, verb.done());
            let mut seen: BTreeMap<_, _> = self.counts.since(&before).into_iter().collect();
            if let Some(known) = fewest {
                seen.retain(|function, _| known.contains_key(function));
                seen.iter_mut().for_each(|(function, calls)| *calls = known[function].min(*calls));
            }
            fewest = Some(seen);
        }
        let calls = fewest.unwrap();
        let wanted: BTreeSet<Function> = verb.calls().iter().copied().collect();
        let called: BTreeSet<Function> = calls.keys().copied().collect();
        // On a machine with other work, each call may meet a canary of the server's.
        let canary = [
            Function::C_EncryptInit,
            Function::C_Encrypt,
            Function::C_DecryptInit,
            Function::C_Decrypt,
        ];
        assert!(wanted.is_subset(&called), "{verb:?}: {called:?}");
        let more = called.difference(&wanted).all(|one| canary.contains(one));
        assert!(more, "{verb:?} calls {called:?}");
        calls
    }

    async fn one(&mut self, verb: Verb, function: Function, nth: u64, code: &str) {
        let wanted = self.promises.of(verb, function, code);
        let what = format!("{verb:?}: {code} at {} {nth}", function.name());
        let order = format!("fail {} {code} after={nth} times=1", function.name());
        let mut seen = Vec::new();
        let answer = loop {
            self.rig.control.set(&order).unwrap();
            let answer = self.ask(verb).await;
            self.rig.control.clear().unwrap();
            // What the end of a search returns is nobody's to see: cryptoki drops it.
            if function != Function::C_FindObjectsFinal {
                *self.counted.entry(label(code)).or_default() += 1;
            }
            if wanted.contains(&answer.status) {
                break answer;
            }
            seen.push(answer);
            assert!(seen.len() < ATTEMPTS, "{what}: not {wanted:?}: {seen:?}\n{}", self.rig.log());
        };
        if answer.status != verb.done() {
            self.looks_like_the_others(verb, &answer, &what);
        }
        let after = self.ask(Verb::Wrap).await;
        assert_eq!(after.status, 200, "after {what}: {after:?}");
    }

    async fn ask(&self, verb: Verb) -> Answer {
        let Scene { client, key, .. } = self;
        let answer = match verb {
            Verb::Wrap => client.call("POST", &format!("/{key}/actions/wrap"), "{}").await,
            Verb::Unwrap => client.unwrap(key, &self.wdek).await,
            Verb::Create => client.call("POST", "", &new_key("more")).await,
            Verb::LogIn => client.ask_token(&self.rig.api_key).await,
        };
        let answer = answer.unwrap();
        if verb == Verb::Unwrap && answer.status == 200 {
            assert_eq!(answer.json()["plaintext"], PLAINTEXT);
        }
        answer
    }

    /// A refusal says what to do, and nothing of the HSM.
    fn looks_like_the_others(&mut self, verb: Verb, answer: &Answer, what: &str) {
        let mut headers = answer.headers.clone();
        headers.retain(|(name, _)| name != "date");
        let text = format!("{headers:?} {}", answer.body);
        let told = match answer.status {
            503 => "HSM_UNAVAILABLE_ERR",
            500 => "INTERNAL_ERR",
            _ => "UNPROCESSABLE_CIPHERTEXT_ERR",
        };
        assert!(text.contains(told), "{what}: {text}");
        assert_eq!(answer.header("retry-after").is_some(), answer.status == 503, "{what}: {text}");
        for secret in ["CKR", "C_", "PKCS", "return code", "canary", "session", "PIN", "token "] {
            assert!(!text.contains(secret), "{what}: {secret} in {text}");
        }
        let known = self.refusals.entry((verb, answer.status)).or_insert_with(|| text.clone());
        assert_eq!(*known, text, "{what}");
    }

    /// Function and code of each request that failed are in the log since `said`.
    fn the_operator_was_told(&self, verb: Verb, function: Function, codes: &[&str], said: usize) {
        let log = self.rig.log();
        for code in codes {
            let wanted = self.promises.of(verb, function, code);
            let line = format!("{}: {}", function.name(), label(code));
            if wanted.iter().all(|status| *status >= 500) {
                assert!(log[said..].contains(&line), "{verb:?}: {line} is not in {}", &log[said..]);
            }
        }
    }

    async fn every_code_was_counted(&self) {
        let mut shown = BTreeMap::new();
        for _ in 0..1200 {
            shown = counted(&self.rig.health("/metrics").await);
            if shown == self.counted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(shown, self.counted);
    }
}

fn names() -> Vec<&'static str> {
    CODES.iter().map(|(name, _)| *name).collect()
}

/// What the metric calls it. Vendors' numbers have no names.
fn label(code: &str) -> String {
    if code == "CKR_VENDOR_DEFINED" { "return code 0x80000000".to_owned() } else { code.to_owned() }
}

fn counted(metrics: &str) -> BTreeMap<String, u64> {
    let lines = metrics.lines().filter_map(|line| {
        line.strip_prefix("kms_server_hsm_codes_total{code=\"")?.split_once("\"} ")
    });
    lines.map(|(code, count)| (code.to_owned(), count.parse().unwrap())).collect()
}

/// Whether every code was asked for at every call; else it is at one call of each verb, and examples at the others.
fn long_run() -> bool {
    std::env::var_os("KEELSON_LONG").is_some()
}
