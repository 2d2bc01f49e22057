//! The key pairs that sign tokens and anchors, when the HSM has lost a half of them: whoever looks makes nothing and
//! destroys nothing, and says what to do.

use crate::harness::Server;
use crate::harness::faulty_store::{Fault, Step};
use crate::harness::rig::{Rig, stderr};
use kms_hsm::Vault;
use kms_hsm::memory::MemoryVault;
use kms_server::audit::Audit;
use kms_server::audit::anchors::Anchors;
use kms_server::guard::Guarded;
use kms_server::reconcile::{Pair, pair};
use kms_server::renew_key::{RenewError, Signs, renew};
use kms_server::store::{SigningKey, Store, Trail};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Public,
    Private,
}

/// The files of SoftHSM2, one for each object.
fn objects(rig: &Rig) -> BTreeSet<PathBuf> {
    let token = fs::read_dir(rig.path("tokens")).unwrap().next().unwrap().unwrap().path();
    let files = fs::read_dir(token).unwrap().map(|entry| entry.unwrap().path());
    let objects = files.filter(|file| {
        file.extension().is_some_and(|it| it == "object") && !file.ends_with("token.object")
    });
    objects.collect()
}

/// Public objects show their label, and no secret key is as long as half an RSA key.
fn remove(rig: &Rig, half: Half) {
    let label = b"keelson signing key";
    let halves = objects(rig).into_iter().filter(|file| {
        let bytes = fs::read(file).unwrap();
        let public = bytes.windows(label.len()).any(|part| part == label);
        let is = if public { Half::Public } else { Half::Private };
        is == half && (public || bytes.len() > 1500)
    });
    let halves: Vec<_> = halves.collect();
    assert_eq!(halves.len(), 2, "one for tokens and one for anchors");
    halves.iter().for_each(|file| fs::remove_file(file).unwrap());
}

fn states(found: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let keys = found["signing_keys"].as_array().unwrap().iter();
    keys.map(|key| (text(&key["signs"]), text(&key["state"]))).collect()
}

fn both(state: &str) -> Vec<(String, String)> {
    ["tokens", "audit anchors"].map(|signs| (signs.to_owned(), state.to_owned())).to_vec()
}

/// A server that has served, with a key for its anchors, killed; a token that it has issued; a key and what it wrapped.
async fn served(rig: &mut Rig) -> (crate::harness::rig::Client, String, String) {
    rig.start().await;
    let client = rig.admin().await;
    let key = client.create("key").await.unwrap();
    let wrapped = client.wrap(&key, PLAINTEXT).await.unwrap().json();
    rig.anchored().await;
    rig.kill();
    assert_eq!(rig.check().0, 0);
    (client, key, wrapped["ciphertext"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_public_half_that_is_gone_is_told_and_harms_nobody() {
    let Some(mut rig) = Rig::make() else { return };
    let (client, key, wdek) = served(&mut rig).await;
    let backup = rig.path("backup.db");
    assert!(rig.run(&["backup", "--to", backup.to_str().unwrap()]).status.success());
    remove(&rig, Half::Public);
    let left = objects(&rig);

    for _ in 0..2 {
        let (code, found) = rig.check();
        assert_eq!((code, states(&found)), (3, both("no public half")), "{found}");
    }
    let text = String::from_utf8(rig.run(&["check"]).stdout).unwrap();
    assert!(text.contains("does not show the public half of the key"), "{text}");
    let restored = rig.run(&["restore", "--check", "--from", backup.to_str().unwrap()]);
    assert_eq!(restored.status.code(), Some(3), "{}", stderr(&restored));
    assert_eq!(objects(&rig), left, "whoever looks changes nothing");

    fs::remove_file(rig.path("audit.anchor")).unwrap();
    rig.start().await;
    rig.control.set("token gone").unwrap();
    rig.becomes("503").await;
    rig.control.clear().unwrap();
    rig.becomes("200 OK").await;
    let of_before = client.unwrap(&key, &wdek).await.unwrap();
    assert_eq!(of_before.json()["plaintext"], PLAINTEXT, "the token of before: {of_before:?}");
    let new = rig.admin().await.unwrap(&key, &wdek).await.unwrap();
    assert_eq!(new.json()["plaintext"], PLAINTEXT, "a new token: {new:?}");
    rig.anchored().await;
    assert_eq!(objects(&rig), left);
    assert!(rig.log().contains("does not show the public half"), "{}", rig.log());
    let renewed = rig.run(&["renew-key", "tokens"]);
    assert!(!renewed.status.success(), "the server runs");
    rig.kill();
    let renewed = rig.run(&["renew-key", "tokens"]);
    assert!(stderr(&renewed).contains("which is good"), "{}", stderr(&renewed));
    assert_eq!(objects(&rig), left);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_private_half_that_is_gone_is_made_anew_by_the_operator_alone() {
    let Some(mut rig) = Rig::make() else { return };
    let (client, key, wdek) = served(&mut rig).await;
    remove(&rig, Half::Private);
    let left = objects(&rig);

    let (code, found) = rig.check();
    assert_eq!((code, states(&found)), (4, both("missing")), "{found}");
    rig.spawn();
    let said = rig.becomes("does not hold the private key").await;
    assert!(said.starts_with("HTTP/1.0 503"), "{said}");
    assert!(said.contains("kms-server renew-key tokens"), "{said}");
    let of_before = client.unwrap(&key, &wdek).await.unwrap();
    assert_eq!(of_before.json()["plaintext"], PLAINTEXT, "keys are used all the same");
    let refused = rig.client().ask_token(&rig.api_key).await.unwrap();
    assert_eq!(refused.status, 503, "nothing signs a token: {refused:?}");
    assert!(!rig.readiness().await.contains("200 OK"));
    rig.kill();
    assert_eq!(objects(&rig), left, "nothing was made anew");

    let old = fs::read_to_string(rig.path("audit.pem")).unwrap();
    let ids: Vec<_> =
        found["signing_keys"].as_array().unwrap().iter().map(|it| &it["id"]).collect();
    for signs in ["tokens", "anchors"] {
        let renewed = rig.run(&["renew-key", signs]);
        assert!(renewed.status.success(), "{}", stderr(&renewed));
        let again = rig.run(&["renew-key", signs]);
        assert!(stderr(&again).contains("which is good"), "{}", stderr(&again));
    }
    let kept = format!("audit.{}.pem", ids[1].as_str().unwrap());
    assert_eq!(fs::read_to_string(rig.path(&kept)).unwrap(), old, "what the old anchors need");
    assert!(left.is_subset(&objects(&rig)));
    assert_eq!(objects(&rig).len(), left.len() + 4, "two pairs");
    let (code, found) = rig.check();
    assert_eq!((code, states(&found)), (0, both("ok")), "{found}");
    rig.start().await;
    let opened = rig.admin().await.unwrap(&key, &wdek).await.unwrap();
    assert_eq!(opened.json()["plaintext"], PLAINTEXT);
    assert_eq!(client.unwrap(&key, &wdek).await.unwrap().status, 401, "signed by the lost key");
    let log = fs::read_to_string(rig.path("audit.log")).unwrap();
    assert_eq!(log.matches("\"action\":\"renew_key\"").count(), 4, "begun and done, twice");
}

/// While the server serves: it finds out by itself, and is ready again when the key is back.
#[tokio::test]
async fn a_key_that_is_lost_while_the_server_runs_is_found_within_half_a_minute() {
    let server = Server::start().await;
    let key = server.store.signing_key().await.unwrap().unwrap();
    let guarded = Guarded::new(server.vault.clone(), server.store.clone());
    guarded.compare().await.unwrap();
    assert_eq!(guarded.probe().await, Ok(()));
    server.vault.lose_signing_key(key.id);
    tokio::time::pause();
    let wait = async |seconds| tokio::time::sleep(Duration::from_secs(seconds)).await;
    // The task that waits runs before the one that looks.
    wait(31).await;
    tokio::time::resume();
    let lost = guarded.probe().await.unwrap_err().to_string();
    assert!(lost.contains(&format!("the private key {} that signs tokens", key.id)), "{lost}");
    assert_eq!(server.vault.public_half(key.id).await.ok(), None, "nothing was made");
    // Somebody who makes one under the same name has made another one.
    server.vault.make_signing_key(key.id).await.unwrap();
    tokio::time::pause();
    wait(3).await;
    tokio::time::resume();
    let other = guarded.probe().await.unwrap_err().to_string();
    assert!(other.contains("another key in the place of"), "{other}");
}

/// Nobody waits for the next proof: a login that cannot be signed is told to come again, and the operator why.
#[tokio::test]
async fn a_login_without_the_key_that_signs_is_told_to_come_again() {
    let server = Server::start().await;
    let key = server.store.signing_key().await.unwrap().unwrap();
    let (vault, api_key) = (&server.app.vault, server.made.admin.api_key.expose());
    server.create_id(&server.admin().await, "one that is there").await;
    assert_eq!(vault.probe().await, Ok(()));
    let told_to_come_again = async || {
        let refused = server.ask_token(api_key).await;
        assert_eq!(refused.status, 503, "{refused:?}");
        assert!(refused.header("retry-after").is_some(), "{refused:?}");
        assert_eq!(refused.json()["errorCode"], "HSM_UNAVAILABLE_ERR");
        let text = format!("{refused:?}");
        assert!(!text.contains(&key.id.to_string()) && !text.contains("private"), "{text}");
    };
    server.vault.lose_signing_key(key.id);
    told_to_come_again().await;
    let cause = vault.probe().await.unwrap_err().to_string();
    let wanted = format!("does not hold the private key {} that signs tokens", key.id);
    assert!(cause.contains(&wanted) && cause.contains("kms-server renew-key tokens"), "{cause}");
    told_to_come_again().await;
    let cause = vault.sign(key.id, b"token").await.unwrap_err().to_string();
    assert!(cause.contains(&wanted), "{cause}");
    // Another key under its name would sign tokens that nobody takes.
    server.vault.make_signing_key(key.id).await.unwrap();
    let guarded = Guarded::new(server.vault.clone(), server.store.clone());
    guarded.compare().await.unwrap();
    let cause = guarded.sign(key.id, b"token").await.unwrap_err().to_string();
    assert!(cause.contains("another key in the place of"), "{cause}");
}

#[tokio::test]
async fn the_key_of_the_anchors_is_made_once_however_often_the_database_refuses_it() {
    let server = Server::start().await;
    let known = async || server.store.audit_key().await.unwrap();
    while known().await.is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let file = format!("sqlite://{}/kms.db", server.dir.path().display());
    let database = sqlx::SqlitePool::connect(&file).await.unwrap();
    sqlx::query("DELETE FROM audit_keys").execute(&database).await.unwrap();
    server.store.set_fault(Some(Fault::Before(Step::KeepAuditKey)));
    let before = server.vault.signing_keys();
    let mut writer = Anchors::new(&server.app);
    for _ in 0..10 {
        server.admin().await;
        writer.anchor().await;
    }
    assert_eq!(known().await, None);
    assert_eq!(server.vault.signing_keys(), before + 1);
    server.store.set_fault(None);
    writer.anchor().await;
    let key = known().await.unwrap();
    assert_eq!(pair(&*server.vault, &key).await, Ok(Pair::Good));
    assert_eq!(server.vault.signing_keys(), before + 1, "it was found by its id");
}

#[tokio::test]
async fn a_look_tells_the_very_pair_from_every_other() {
    let vault = Arc::new(MemoryVault::new());
    let [ours, others] = [Uuid::from_u128(1), Uuid::from_u128(2)];
    let created_at = time::OffsetDateTime::UNIX_EPOCH;
    let public = vault.make_signing_key(ours).await.unwrap();
    let key = SigningKey { id: ours, public, created_at };
    assert_eq!(pair(&*vault, &key).await, Ok(Pair::Good));
    let public = vault.make_signing_key(others).await.unwrap();
    let mixed = SigningKey { id: ours, public, created_at };
    assert_eq!(pair(&*vault, &mixed).await, Ok(Pair::OtherKey));
    vault.lose_signing_key(ours);
    assert_eq!(pair(&*vault, &key).await, Ok(Pair::Lost));
}

/// Else no clock that is right would be believed beside it, and no server ready again.
#[tokio::test]
async fn a_key_made_under_a_clock_that_was_ahead_is_made_anew_and_one_of_now_is_not() {
    let server = Server::start().await;
    let old = server.store.signing_key().await.unwrap().unwrap();
    let audit =
        Audit::open(&server.dir.path().join("renew.log"), "renew", None, server.clock.clone());
    let audit = audit.unwrap();
    let renew = async |now| renew(&*server.vault, &*server.store, &audit, Signs::Tokens, now).await;
    let good = renew(old.created_at - time::Duration::seconds(4)).await;
    assert!(matches!(good, Err(RenewError::Good { .. })), "{good:?}");
    let now = old.created_at - time::Duration::days(400);
    let made = renew(now).await.unwrap();
    let new = server.store.signing_key().await.unwrap().unwrap();
    assert_eq!((made.old, new.id, new.created_at), (old.id, made.new, now));
    let good = renew(now).await;
    assert!(matches!(good, Err(RenewError::Good { .. })), "{good:?}");
}
