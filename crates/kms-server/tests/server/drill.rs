//! The loss drill: the database and the token's files are copied while the server runs, the host is gone, and another
//! one takes over. `docs/backup.md`, step by step.

use crate::harness::rig::{Rig, copy_folder, stderr};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;

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
    let mut told: Vec<(&str, &str)> = found["keys"]
        .as_array()
        .unwrap()
        .iter()
        .map(|key| (key["key"].as_str().unwrap(), key["state"].as_str().unwrap()))
        .collect();
    told.sort_by_key(|(_, state)| *state);
    assert_eq!(told, [(new.as_str(), "missing"), (old.as_str(), "ok")]);
    rig.start().await;
    let client = rig.admin().await;
    let text = |value: &Value| value["ciphertext"].as_str().unwrap().to_owned();
    assert_eq!(client.unwrap(&old, &text(&wdek)).await.unwrap().json()["plaintext"], PLAINTEXT);
    assert_eq!(client.unwrap(&new, &text(&lost)).await.unwrap().status, 500);
    assert!(rig.log().contains(&new), "the key is named in the log");
    assert_eq!(rig.check(), (code, found), "no row went away");
}

/// A backup that was changed or cut is not restored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_not_what_its_manifest_says_is_refused() {
    let Some(rig) = Rig::make() else { return };
    let backup = rig.path("backup.db");
    assert!(rig.run(&["backup", "--to", backup.to_str().unwrap()]).status.success());
    let whole = fs::read(&backup).unwrap();
    fs::remove_file(rig.path("kms.db")).unwrap();
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
    let done = rig.run(&["restore", "--from", backup.to_str().unwrap()]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
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
    rig.spawn();
    let mut answer = String::new();
    for _ in 0..1000 {
        answer = rig.readiness().await;
        if answer.contains(cause) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(answer.contains("503") && answer.contains(cause), "{answer}\n{}", rig.log());
    assert_eq!(rig.client().log_in(&rig.api_key).await, Some(503), "it serves nobody");
    rig.kill();
    let (code, found) = rig.check();
    assert_eq!((states(&found).as_str(), code), ("missing", 4), "no row went away: {found}");
    assert_eq!(found["keys"].as_array().unwrap().len(), 14);
}
