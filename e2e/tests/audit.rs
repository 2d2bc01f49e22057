//! The audit log of the built kms-server over a real token: killed under load, it has a record for every answer, and
//! `kmsctl audit verify` proves it.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use keelson_e2e::assets::Programs;
use keelson_e2e::chain::{fresh_folder, run_folder};
use keelson_e2e::key_service::KeyService;
use keelson_e2e::kmsctl::Kmsctl;
use keelson_e2e::process::{self, Lifetime};
use keelson_e2e::{Error, Result, http, wait};
use kms_api::client::{self, Ca, Call, ClientSettings, KeyProtect, NewKey, USER_AGENT};
use kms_api::token::{Credential, TokenSettings, TokenSource};
use kms_core::clock::SystemClock;
use kms_core::secret::SecretText;
use rustix::process::Signal;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

#[path = "../../crates/kms-server/tests/server/harness/canary.rs"]
mod canary;

use canary::{Canary, assert_clean};

const CALLERS: usize = 16;
/// How every token begins: the header of a JWT of ours.
const TOKEN: &str = "eyJhbGciOiJSUzI1NiIs";
const CALL: Duration = Duration::from_secs(5);

/// Bar A1: of every use that was answered there is a durable record, whenever the process is killed.
#[test]
fn no_answer_is_without_its_record_however_often_the_server_is_killed() -> Result<()> {
    let long = std::env::var_os("KEELSON_LONG").is_some();
    let rounds = if long { 100 } else { 6 };
    let dir = run_folder("e2e/audit-kill");
    fresh_folder(&dir)?;
    let programs = Programs::find()?;
    let mut service = KeyService::start(&programs.kms_server, &dir, false, Lifetime::WithParent)?;
    let runtime = Runtime::new().map_err(Error::machine("start a runtime"))?;
    let key = client_of(&service)?;
    let key = runtime.block_on(key.create_key(&named("killed"), Call::within(CALL)));
    let key = key.map_err(failed("create a key"))?.id.unwrap_or_default();
    let key: Arc<str> = key.into();
    let mut answered = HashSet::new();
    for round in 0..rounds {
        let (count, client) = (Arc::default(), Arc::new(client_of(&service)?));
        let load = runtime.block_on(async { load(&client, &key, round, &count) });
        // Another moment in each round: the kill meets other steps.
        let enough = 40 + 13 * usize::try_from(round % 10).unwrap_or(0);
        wait::until(
            "answers",
            Duration::from_secs(60),
            &[service.server.running()?],
            || match count.load(Ordering::Relaxed) {
                seen if seen >= enough => Ok(()),
                seen => Err(format!("{seen} of {enough}")),
            },
        )?;
        service.server.kill()?;
        answered.extend(runtime.block_on(load.join_all()).into_iter().flatten());
        service.server.start()?;
        service.wait_until_ready()?;
        let recorded = recorded(&service.audit)?;
        let lost: Vec<_> = answered.difference(&recorded).collect();
        assert!(lost.is_empty(), "round {round}: answered without a record: {lost:?}");
    }
    service.server.stop()?;
    println!("{} answers in {rounds} rounds, none without its record", answered.len());
    let report = verify(&programs.kmsctl, &service)?;
    assert_eq!(report["sound"], true, "{report:#}");
    let chain = &report["chains"][0];
    assert_eq!(chain["first"], 1);
    assert_eq!(chain["anchored"].as_u64(), chain["last"].as_u64().map(|last| last - 1));
    Ok(())
}

/// Bar A4, where there is a PIN: nothing secret in anything that the server or kmsctl writes or says, with all that can
/// be logged being logged, also where they are told nonsense, given a wrong PIN, and crash.
#[test]
fn no_secret_is_in_anything_the_server_writes_or_says() -> Result<()> {
    let dir = run_folder("e2e/audit-secrets");
    fresh_folder(&dir)?;
    let programs = Programs::find()?;
    let mut service = KeyService::start(&programs.kms_server, &dir, false, Lifetime::WithParent)?;
    service.server.stop()?;
    let text = fs::read_to_string(&service.config).map_err(Error::machine("read a file"))?;
    let loud = text
        .replace("LOG_LEVEL: \"info\"", "LOG_LEVEL: \"debug\"")
        .replace("LOG_ALL_VALUES: false", "LOG_ALL_VALUES: true");
    assert_ne!(loud, text);
    fs::write(&service.config, loud).map_err(Error::machine("write the configuration"))?;
    service.server.start()?;
    service.wait_until_ready()?;

    let (dek, mut said) = (b"canary-canary-canary-canary-cana", String::new());
    use_everything(&service, dek, &mut said)?;
    say_everything(&programs.kmsctl, &service, &mut said)?;
    crash(&mut service, Signal::ABORT, &mut said)?;
    crash(&mut service, Signal::ILL, &mut said)?;
    let pin = fs::read(dir.join("pin")).map_err(Error::machine("read the PIN"))?;
    let wrong = b"wrong-pin-582910-of-the-token";
    refuse_the_pin(&mut service, &dir, wrong, &mut said)?;

    let canaries = [
        Canary::new("the DEK", dek),
        Canary::new("the PIN", &pin),
        Canary::new("a wrong PIN", wrong),
        Canary::new("the PIN of the security officer", b"so-pin-31415926-of-it"),
        Canary::new("the API key", service.admin_api_key.as_bytes()),
        Canary::new("a wrong API key", WRONG_API_KEY.as_bytes()),
        Canary::new("a token", TOKEN.as_bytes()),
    ];
    let mut looked_at = said.len();
    assert_clean(&canaries, "what was said", said.as_bytes());
    for file in sinks(&dir)? {
        let bytes = fs::read(&file).map_err(Error::machine("read a sink"))?;
        looked_at += bytes.len();
        assert_clean(&canaries, &file.display().to_string(), &bytes);
    }
    assert!(looked_at > 10_000, "{looked_at} bytes are not all that");
    Ok(())
}

const WRONG_API_KEY: &str = "canary-of-a-wrong-api-key";

/// Uses keys well and badly; what the client is told goes into `said`.
fn use_everything(service: &KeyService, dek: &[u8], said: &mut String) -> Result<()> {
    let runtime = Runtime::new().map_err(Error::machine("start a runtime"))?;
    let client = client_of(service)?;
    let made = runtime.block_on(async {
        let key = client.create_key(&named("loud"), Call::within(CALL)).await?;
        let key = key.id.unwrap_or_default();
        let wrapped = client.wrap(&key, Some(dek), &[], Call::within(CALL)).await?;
        client.unwrap(&key, &wrapped.ciphertext, &[], Call::within(CALL)).await?;
        let mut errors = Vec::new();
        for (key, nonsense) in [(&*key, "bm90aGluZw=="), ("none", "eA==")] {
            errors.extend(client.unwrap(key, nonsense, &[], Call::within(CALL)).await.err());
        }
        Ok::<_, client::Error>(errors)
    });
    let refused = made.map_err(failed("use a key"))?;
    assert_eq!(refused.len(), 2);
    refused.iter().for_each(|error| said.push_str(&format!("{error}\n{error:?}\n")));
    Ok(())
}

/// What kmsctl prints of the audit log, of keys and of refusals, and what the health port answers.
fn say_everything(kmsctl: &Path, service: &KeyService, said: &mut String) -> Result<()> {
    let program = Kmsctl::new(kmsctl, service);
    let audit = service.audit.display().to_string();
    for arguments in [
        &["keys", "list"][..],
        &["api-keys", "list"],
        &["audit", "tail", "-n", "1000", &audit],
        &["audit", "query", &audit, "-o", "json"],
        &["audit", "verify", &audit],
    ] {
        said.push_str(&program.run(arguments, b"")?);
    }
    for (name, value) in
        [("KMS_API_KEY", WRONG_API_KEY), ("KMS_TOKEN_URL", "https://127.0.0.1:1/oidc/token")]
    {
        let mut command = Command::new(kmsctl);
        command.args(["keys", "list"]).env_clear();
        command.envs(program.envs().iter().map(|(name, value)| (name, value))).env(name, value);
        let output = process::output(command, b"")?;
        assert!(!output.status.success());
        said.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    for path in ["/metrics", "/readyz", "/livez", "/nothing"] {
        let (_, body) = http::get(service.health_port, path)
            .map_err(|error| Error::answer("the health port", error))?;
        said.push_str(&body);
    }
    Ok(())
}

/// The process ends by `signal`, as by a fault of its own, and is started again.
fn crash(service: &mut KeyService, signal: Signal, said: &mut String) -> Result<()> {
    let running = service.server.running()?;
    running.signal(signal)?;
    let status = wait::until("the end of the process", CALL, &[], || {
        running.ended().ok_or_else(|| "it runs".to_owned())
    })?;
    said.push_str(&process::describe(status));
    service.server.start()?;
    service.wait_until_ready()
}

/// The server refuses to start, or is never ready, and says why.
fn refuse_the_pin(
    service: &mut KeyService,
    dir: &Path,
    wrong: &[u8],
    said: &mut String,
) -> Result<()> {
    service.server.stop()?;
    fs::write(dir.join("pin"), wrong).map_err(Error::machine("write the PIN"))?;
    service.server.start()?;
    let running = service.server.running()?;
    wait::until("the word that the PIN is wrong", Duration::from_secs(30), &[], || {
        let log = running.log_tail(100);
        if log.contains("PIN") { Ok(()) } else { Err(log) }
    })?;
    said.push_str(&running.log_tail(1000));
    Ok(())
}

/// Everything that is in the server's folder but what is there for the secrets' own sake.
fn sinks(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).map_err(Error::machine("list the folder"))?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file());
    let own = ["pin", "so-pin"].map(|name| dir.join(name));
    Ok(files.filter(|path| !own.contains(path)).collect())
}

/// Callers that wrap until the server is gone; each returns the uids of the calls that were answered.
fn load(
    client: &Arc<KeyProtect>,
    key: &Arc<str>,
    round: u64,
    count: &Arc<AtomicUsize>,
) -> JoinSet<Vec<String>> {
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        let (client, key, count) = (client.clone(), key.clone(), count.clone());
        callers.spawn(async move {
            let mut answered = Vec::new();
            for number in 0.. {
                let uid = format!("round-{round}-caller-{caller}-call-{number}");
                let call = Call { correlation_id: Some(&uid), ..Call::within(CALL) };
                if client.wrap(&key, None, &[], call).await.is_err() {
                    break;
                }
                answered.push(uid);
                count.fetch_add(1, Ordering::Relaxed);
            }
            answered
        });
    }
    callers
}

fn recorded(audit: &Path) -> Result<HashSet<String>> {
    let text = fs::read_to_string(audit).map_err(Error::machine("read the audit log"))?;
    let mut uids = HashSet::new();
    for line in text.lines() {
        let record: Value = serde_json::from_str(line)
            .map_err(|error| Error::answer("the audit log", error.to_string()))?;
        if record["action"] == "wrap" && record["outcome"] == "done" {
            uids.extend(record["correlation"].as_str().map(str::to_owned));
        }
    }
    Ok(uids)
}

fn verify(program: &Path, service: &KeyService) -> Result<Value> {
    let beside = |extension| service.audit.with_extension(extension).display().to_string();
    let (log, key, anchor) = (beside("log"), beside("pem"), beside("anchor"));
    let arguments = ["audit", "verify", &log, "--key", &key, "--anchor", &anchor, "--first", "1"];
    Kmsctl::new(program, service).json(&arguments, b"")
}

fn client_of(service: &KeyService) -> Result<KeyProtect> {
    let ca = Some(Ca::File(service.ca.clone()));
    let tokens = TokenSource::new(
        &TokenSettings { url: service.token_url.clone(), ca: ca.clone() },
        Credential::ApiKey(SecretText::new(service.admin_api_key.clone())),
        Arc::new(SystemClock::new()),
    );
    let settings = ClientSettings {
        url: service.url.clone(),
        instance_id: service.instance_id.clone(),
        ca,
        max_connections: CALLERS,
        user_agent: USER_AGENT.to_owned(),
    };
    KeyProtect::new(&settings, tokens.map_err(failed("make a client"))?)
        .map_err(failed("make a client"))
}

fn named(name: &str) -> NewKey {
    NewKey { name: name.to_owned(), ..NewKey::default() }
}

fn failed<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> Error {
    move |error| Error::answer(what, error.to_string())
}
