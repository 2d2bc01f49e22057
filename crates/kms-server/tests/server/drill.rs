//! The loss drill: the database and the token's files are copied while the server runs, the host is gone, and another
//! one takes over. `docs/backup.md`, step by step.

use crate::harness::rig::{Rig, copy_folder, stderr};
use kms_core::secret::SecretText;
use kms_hsm::Vault;
use kms_hsm::pkcs11::{Pkcs11Vault, Settings, TokenChoice};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
const DEKS: usize = 1000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s5_a_new_host_opens_every_dek_and_other_tokens_are_refused() {
    let Some(mut old) = Rig::make() else { return };
    old.start().await;
    let client = old.admin().await;
    let mut keys = Vec::new();
    for name in ["key a", "key b", "key c", "key d"] {
        keys.push(client.create(name).await.unwrap());
    }
    let mut wrapped = Vec::new();
    for number in 0..DEKS {
        let key = &keys[number % keys.len()];
        if number % 100 == 99 {
            let path = format!("/{key}/actions/rotate");
            assert_eq!(client.call("POST", &path, "").await.unwrap().status, 204);
        }
        let answer = client.wrap(key, PLAINTEXT).await.unwrap().json();
        wrapped.push((key.clone(), answer["ciphertext"].as_str().unwrap().to_owned()));
    }
    let backup = old.path("backup.db");
    let made = old.run(&["backup", "--to", backup.to_str().unwrap()]);
    assert!(made.status.success(), "{}", stderr(&made));
    assert_eq!(fs::metadata(&backup).unwrap().permissions().mode() & 0o777, 0o600);
    let again = old.run(&["backup", "--to", backup.to_str().unwrap()]);
    assert!(stderr(&again).contains("is there already"), "{}", stderr(&again));
    // What is made after the backup of the database and before that of the token shows as extra.
    client.create("late").await.unwrap();
    old.kill();

    let mut new = host(&old, true);
    let checked = restore(&new, &["--check"]);
    assert_eq!((states(&checked.1), checked.0), ("ok".to_owned(), 3), "{}", checked.1);
    assert_eq!(checked.1["extra"].as_array().unwrap().len(), 1);
    assert!(!new.path("kms.db").exists(), "--check restores nothing");
    assert_eq!(restore(&new, &[]).0, 3);
    assert_eq!(fs::metadata(new.path("kms.db")).unwrap().permissions().mode() & 0o777, 0o600);
    let twice = new.run(&["restore", "--from", new.path("backup.db").to_str().unwrap()]);
    assert!(stderr(&twice).contains("never overwrites"), "{}", stderr(&twice));
    (new.instance, new.api_key) = (old.instance.clone(), old.api_key.clone());
    new.start().await;
    let client = new.admin().await;
    for (key, wdek) in &wrapped {
        let opened = client.unwrap(key, wdek).await.unwrap();
        assert_eq!(opened.json()["plaintext"], PLAINTEXT, "{opened:?}");
    }

    let cause =
        "holds none of the 14 root key versions of this database (14 missing, 0 under another key)";
    let empty = host(&old, false);
    empty.make_empty_token();
    refuses(empty, &old, 0, cause).await;

    let mut wrong = host(&old, false);
    let made = wrong.run(&["init", "-o", "json"]);
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    wrong.instance = made["instance_id"].as_str().unwrap().to_owned();
    wrong.api_key = made["admin"]["api_key"].as_str().unwrap().to_owned();
    wrong.start().await;
    wrong.admin().await.create("somebody else's").await.unwrap();
    wrong.kill();
    refuses(wrong, &old, 1, cause).await;
}

/// A copy of a token in which one key is another one, and one is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s5_a_key_that_is_missing_is_named_and_the_others_are_served() {
    let Some(mut rig) = Rig::make() else { return };
    rig.start().await;
    rig.anchored().await;
    let client = rig.admin().await;
    let before = rig.path("before");
    let (old, ()) =
        (client.create("old").await.unwrap(), copy_folder(&rig.path("tokens"), &before));
    let wdek = client.wrap(&old, PLAINTEXT).await.unwrap().json();
    let new = client.create("new").await.unwrap();
    let lost = client.wrap(&new, PLAINTEXT).await.unwrap().json();
    rig.kill();
    fs::remove_dir_all(rig.path("tokens")).unwrap();
    copy_folder(&before, &rig.path("tokens"));

    let (code, found) = rig.check();
    assert_eq!(code, 4);
    assert_eq!(told(&found), [(new.as_str(), "missing"), (old.as_str(), "ok")]);
    rig.start().await;
    let client = rig.admin().await;
    let text = |value: &Value| value["ciphertext"].as_str().unwrap().to_owned();
    assert_eq!(client.unwrap(&old, &text(&wdek)).await.unwrap().json()["plaintext"], PLAINTEXT);
    assert_eq!(client.unwrap(&new, &text(&lost)).await.unwrap().status, 500);
    assert!(rig.log().contains(&new), "the key is named in the log");
    assert_eq!(rig.check(), (code, found), "no row went away");
}

/// The HSM's backup is restored while the server that was refused still runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s5_a_token_that_gets_its_keys_back_is_served_without_a_restart() {
    let Some(mut rig) = Rig::make() else { return };
    let (tokens, empty, full) = (rig.path("tokens"), rig.path("empty"), rig.path("full"));
    rig.start().await;
    rig.anchored().await;
    copy_folder(&tokens, &empty);
    let client = rig.admin().await;
    let key = client.create("key").await.unwrap();
    let wrapped = client.wrap(&key, PLAINTEXT).await.unwrap().json();
    rig.kill();
    fs::rename(&tokens, &full).unwrap();
    copy_folder(&empty, &tokens);

    refused(&mut rig, "holds none of the 1 root key versions of this database").await;
    copy_folder(&full, &tokens);
    rig.becomes("200 OK").await;
    let client = rig.admin().await;
    let opened = client.unwrap(&key, wrapped["ciphertext"].as_str().unwrap()).await.unwrap();
    assert_eq!(opened.json()["plaintext"], PLAINTEXT, "{opened:?}");
}

/// The same token and the same names, but other keys, as after a mistake with a vendor's backup tool.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s5_another_key_under_the_same_id_is_named_and_not_used_in_softhsm() {
    if let Ok(versions) = std::env::var(REPLACE) {
        return replace(&versions).await;
    }
    let name = "drill::s5_another_key_under_the_same_id_is_named_and_not_used_in_softhsm";
    let Some(mut rig) = Rig::make() else { return };
    rig.start().await;
    let client = rig.admin().await;
    let (good, bad) = (client.create("good").await.unwrap(), client.create("bad").await.unwrap());
    let mut wdeks = Vec::new();
    for key in [&good, &bad] {
        let wrapped = client.wrap(key, PLAINTEXT).await.unwrap().json();
        wdeks.push(wrapped["ciphertext"].as_str().unwrap().to_owned());
    }
    let backup = rig.path("backup.db");
    assert!(rig.run(&["backup", "--to", backup.to_str().unwrap()]).status.success());
    rig.kill();
    let of = |found: &Value, wanted: &str| -> Vec<String> {
        let keys = found["keys"].as_array().unwrap().iter();
        let keys = keys.filter(|key| wanted == "all" || key["key"] == wanted);
        keys.map(|key| key["version"].as_str().unwrap().to_owned()).collect()
    };
    let versions = of(&rig.check().1, &bad);
    rig.in_a_process(name, REPLACE, &versions.join(","));

    let (code, found) = rig.check();
    assert_eq!(code, 4);
    assert_eq!(told(&found), [(good.as_str(), "ok"), (bad.as_str(), "wrong key")]);
    let (code, compared) = restore(&rig, &["--check"]);
    assert_eq!((code, told(&compared)), (4, told(&found)));
    let text = String::from_utf8(rig.run(&["check"]).stdout).unwrap();
    let line = format!("wrong key   version {}  key {bad}", versions[0]);
    assert!(text.contains(&line), "{text}");

    rig.start().await;
    let client = rig.admin().await;
    let opened = client.unwrap(&good, &wdeks[0]).await.unwrap();
    assert_eq!(opened.json()["plaintext"], PLAINTEXT, "{opened:?}");
    assert_eq!(client.wrap(&bad, PLAINTEXT).await.unwrap().status, 500);
    assert_eq!(client.unwrap(&bad, &wdeks[1]).await.unwrap().status, 500);
    let named = format!("version {} of key {bad}", versions[0]);
    assert!(rig.log().contains(&named), "{}", rig.log());
    let rotated = client.call("POST", &format!("/{bad}/actions/rotate"), "").await.unwrap();
    assert_eq!(rotated.status, 204, "a new version is the way out: {rotated:?}");
    assert_eq!(client.wrap(&bad, PLAINTEXT).await.unwrap().status, 200);
    assert_eq!(client.unwrap(&bad, &wdeks[1]).await.unwrap().status, 500, "and not the way back");
    rig.kill();

    let all = of(&rig.check().1, "all");
    rig.in_a_process(name, REPLACE, &all.join(","));
    let cause =
        "holds none of the 3 root key versions of this database (0 missing, 3 under another key)";
    assert!(rig.check().1["refused"].as_str().unwrap().contains(cause), "{}", rig.check().1);
    serves_nobody(&mut rig, cause).await;
}

const REPLACE: &str = "KEELSON_TEST_REPLACE";

/// In a process of its own: destroys what these versions are, and makes others of the same CKA_ID.
async fn replace(versions: &str) {
    let library = std::env::var_os(pkcs11_shim::MODULE).unwrap();
    let settings = Settings {
        library: library.into(),
        token: TokenChoice::Label("rig".to_owned()),
        pin: SecretText::new("582910".to_owned()).into(),
        sessions: 1,
        queue: 1,
        deadline: Duration::from_secs(10),
        gcm: None,
    };
    let vault = Pkcs11Vault::open(settings).unwrap();
    for version in versions.split(',') {
        let version = version.parse().unwrap();
        vault.destroy_version(version).await.unwrap();
        vault.create_version(version).await.unwrap();
    }
}

/// A backup that was changed or cut is not restored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_not_what_its_manifest_says_is_refused() {
    let Some(rig) = Rig::make() else { return };
    let backup = rig.path("backup.db");
    assert!(rig.run(&["backup", "--to", backup.to_str().unwrap()]).status.success());
    let whole = fs::read(&backup).unwrap();
    move_away(&rig);
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    for bad in [&whole[..whole.len() - 1], &changed, &[]] {
        fs::write(&backup, bad).unwrap();
        let refused = rig.run(&["restore", "--from", backup.to_str().unwrap()]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(stderr(&refused).contains("changed or cut short"), "{}", stderr(&refused));
        assert!(!rig.path("kms.db").exists());
    }
    fs::write(&backup, &whole).unwrap();
    let (log, aside) = (rig.path("audit.log"), rig.path("audit.aside"));
    fs::rename(&log, &aside).unwrap();
    fs::create_dir(&log).unwrap();
    let silent = rig.run(&["restore", "--from", backup.to_str().unwrap()]);
    assert_eq!(silent.status.code(), Some(1));
    let said = stderr(&silent);
    assert!(said.contains("the restore is done but not in the audit log"), "{said}");
    fs::remove_dir(&log).unwrap();
    fs::rename(&aside, &log).unwrap();
    move_away(&rig);
    let done = rig.run(&["restore", "--from", backup.to_str().unwrap()]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    let restored = r#""action":"restore","outcome":"done","correlation":"backup of 20"#;
    assert_eq!(fs::read_to_string(&log).unwrap().matches(restored).count(), 1);
}

/// The same host: a server that was killed leaves a log, which SQLite would read into the backup.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s5_a_lost_database_is_moved_away_with_its_log_before_a_restore() {
    let Some(mut rig) = Rig::make() else { return };
    rig.start().await;
    let client = rig.admin().await;
    let key = client.create("key").await.unwrap();
    let wdek = client.wrap(&key, PLAINTEXT).await.unwrap().json();
    let backup = rig.path("backup.db");
    assert!(rig.run(&["backup", "--to", backup.to_str().unwrap()]).status.success());
    for name in 0..20 {
        client.create(&format!("late {name}")).await.unwrap();
    }
    rig.kill();
    fs::rename(rig.path("kms.db"), rig.path("moved.db")).unwrap();
    let refused = rig.run(&["restore", "--from", backup.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("kms.db-wal is there"), "{}", stderr(&refused));
    assert!(!rig.path("kms.db").exists());
    move_away(&rig);
    let done = rig.run(&["restore", "--from", backup.to_str().unwrap()]);
    assert_eq!(done.status.code(), Some(3), "{}", stderr(&done));
    assert!(stderr(&done).contains("is restored."), "{}", stderr(&done));
    rig.start().await;
    let client = rig.admin().await;
    let opened = client.unwrap(&key, wdek["ciphertext"].as_str().unwrap()).await.unwrap();
    assert_eq!(opened.json()["plaintext"], PLAINTEXT, "{opened:?}");
}

/// The database, and what SQLite keeps beside it.
fn move_away(rig: &Rig) {
    for side in ["", "-wal", "-shm"] {
        let _ =
            fs::rename(rig.path(&format!("kms.db{side}")), rig.path(&format!("moved.db{side}")));
    }
}

/// Another host with the backup, and with the token or without.
fn host(old: &Rig, token: bool) -> Rig {
    let new = Rig::bare().unwrap();
    if token {
        copy_folder(&old.path("tokens"), &new.path("tokens"));
    }
    for name in ["backup.db", "backup.db.manifest.json"] {
        fs::copy(old.path(name), new.path(name)).unwrap();
    }
    new
}

fn restore(rig: &Rig, more: &[&str]) -> (i32, Value) {
    let backup = rig.path("backup.db");
    let arguments = [&["restore", "-o", "json", "--from", backup.to_str().unwrap()], more].concat();
    let done = rig.run(&arguments);
    let found =
        serde_json::from_slice(&done.stdout).unwrap_or_else(|_| panic!("{}", stderr(&done)));
    (done.status.code().unwrap(), found)
}

/// Each key and how it is, by state.
fn told(found: &Value) -> Vec<(&str, &str)> {
    let keys = found["keys"].as_array().unwrap().iter();
    let mut told: Vec<_> =
        keys.map(|key| (key["key"].as_str().unwrap(), key["state"].as_str().unwrap())).collect();
    told.sort_by_key(|(_, state)| *state);
    told
}

/// All the states in a report, each once.
fn states(found: &Value) -> String {
    let keys = found["keys"].as_array().unwrap().iter();
    let mut all: Vec<&str> = keys.map(|key| key["state"].as_str().unwrap()).collect();
    all.dedup();
    all.join(",")
}

/// A host whose token holds other keys than the backup: it is not restored there, and a database that somebody puts
/// there by hand is not served.
async fn refuses(mut rig: Rig, old: &Rig, extra: usize, cause: &str) {
    for name in ["kms.db", "kms.db-wal", "kms.db-shm", "audit.log"] {
        let _ = fs::remove_file(rig.path(name));
    }
    for arguments in [&["--check"][..], &[]] {
        let (code, found) = restore(&rig, arguments);
        assert_eq!((states(&found).as_str(), code), ("missing", 4), "{found}");
        assert_eq!(found["extra"].as_array().unwrap().len(), extra);
        assert!(found["refused"].as_str().unwrap().contains(cause), "{found}");
        assert!(!rig.path("kms.db").exists(), "nothing is restored");
    }
    fs::copy(rig.path("backup.db"), rig.path("kms.db")).unwrap();
    (rig.instance, rig.api_key) = (old.instance.clone(), old.api_key.clone());
    serves_nobody(&mut rig, cause).await;
    let (code, found) = rig.check();
    assert_eq!((states(&found).as_str(), code), ("missing", 4), "no row went away: {found}");
    assert_eq!(found["keys"].as_array().unwrap().len(), 14);
}

/// Starts it and stops it: it serves nobody, for this cause.
async fn serves_nobody(rig: &mut Rig, cause: &str) {
    refused(rig, cause).await;
    rig.kill();
}

/// Starts it: it is not ready, for this cause, and nobody gets in.
async fn refused(rig: &mut Rig, cause: &str) {
    rig.spawn();
    let answer = rig.becomes(cause).await;
    assert!(answer.contains("503"), "{answer}");
    assert_eq!(rig.client().log_in(&rig.api_key).await, Some(503), "it serves nobody");
}
