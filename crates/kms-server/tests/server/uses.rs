//! How often a version is used with AES-GCM: counted over all servers, never too low, and not burnt by restarts.

use crate::harness::Server;
use crate::harness::faulty_store::{Fault, Step};
use crate::harness::rig::Rig;
use kms_core::wdek::WdekVersion;
use kms_hsm::VaultError;
use kms_hsm::memory;
use kms_server::app::Settings;
use kms_server::ops::Error;
use kms_server::store::{Custody, SqliteStore, Store};
use kms_server::uses::{FIRST_BLOCK, LIMIT, Uses};
use std::fs;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

/// One that writes AES-GCM.
async fn start() -> Server {
    let wdek_version = WdekVersion::V4_0_0;
    Server::start_with(Settings { wdek_version, ..Server::settings() }).await
}

#[tokio::test]
async fn a_version_that_was_used_up_wraps_no_more_and_unwraps_still() {
    let server = start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (wdek, version) = server.wrap(&token, &id, PLAINTEXT).await;
    // What other servers on this database have used since; this one still has its block.
    let version = version.parse().unwrap();
    assert_eq!(server.store.reserve_gcm_uses(version, LIMIT, LIMIT).await.unwrap().total, LIMIT);
    server.wrap(&token, &id, PLAINTEXT).await;
    // A server that starts now has none, and gets none.
    let late = Uses::default();
    let refused = late.take(&*server.app.store, version).await;
    assert!(matches!(refused, Err(Error::UsedUp)), "{refused:?}");
    // It knows that for good, and does not ask the database again.
    server.store.set_fault(Some(Fault::Away));
    let refused = late.take(&*server.app.store, version).await;
    assert!(matches!(refused, Err(Error::UsedUp)), "{refused:?}");
    server.store.set_fault(None);
    assert_eq!(server.unwrap(&token, &id, &wdek).await.status, 200);
    assert_eq!(server.rotate(&token, &id).await.status, 204);
    let (_, next) = server.wrap(&token, &id, PLAINTEXT).await;
    assert!(late.take(&*server.app.store, next.parse().unwrap()).await.is_ok());
}

#[tokio::test]
async fn servers_on_one_database_share_the_uses_of_a_version_to_the_last() {
    let (server, version) = with_version().await;
    let (one, two) = (Uses::default(), Uses::default());
    for _ in 0..3 {
        one.take(&*server.app.store, version).await.unwrap();
        two.take(&*server.app.store, version).await.unwrap();
    }
    // Each has reserved one block before its first use, and none since.
    assert_eq!(total(&server, version).await, 2 * FIRST_BLOCK);
    assert!(server.store.reserve_gcm_uses(Uuid::nil(), 1, LIMIT).await.is_err());
    // Five are left, which is less than a block.
    let others = LIMIT - 2 * FIRST_BLOCK - 5;
    server.store.reserve_gcm_uses(version, others, LIMIT).await.unwrap();
    let last = Uses::default();
    for _ in 0..5 {
        last.take(&*server.app.store, version).await.unwrap();
    }
    assert!(matches!(last.take(&*server.app.store, version).await, Err(Error::UsedUp)));
    assert_eq!(total(&server, version).await, LIMIT, "a refused use is not counted");
}

#[tokio::test]
async fn a_crash_loses_less_than_was_used_and_an_orderly_end_nothing() {
    let (server, version) = with_version().await;
    let mut before = 0;
    for used in [1, 1000, 5000, 50_000] {
        let uses = Uses::default();
        for _ in 0..used {
            uses.take(&*server.app.store, version).await.unwrap();
        }
        let counted = total(&server, version).await - before;
        assert!((used..used * 2 + 1025).contains(&counted), "{counted} for {used}");
        uses.give_back(&*server.app.store).await;
        assert_eq!(total(&server, version).await - before, used);
        // Whoever comes behind the end is counted as well.
        uses.take(&*server.app.store, version).await.unwrap();
        before = total(&server, version).await;
    }
}

#[tokio::test]
async fn a_server_gives_back_what_it_has_not_used_and_counts_what_was_repeated() {
    let server = start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (_, version) = server.wrap(&token, &id, PLAINTEXT).await;
    // The sessions are lost once: nobody knows whether the key was used.
    let error = VaultError::Unavailable { cause: "lost".into() };
    server.vault.set_fault(Some(memory::Fault::FailNext { calls: 1, error }));
    server.wrap(&token, &id, PLAINTEXT).await;
    let version = version.parse().unwrap();
    assert_eq!(total(&server, version).await, FIRST_BLOCK);
    let server = server.restart().await;
    assert_eq!(total(&server, version).await, 3);
}

#[tokio::test]
async fn a_database_that_hangs_for_one_version_does_not_hold_up_another() {
    let server = start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (_, version) = server.wrap(&token, &id, PLAINTEXT).await;
    let (uses, version) = (Arc::new(Uses::default()), version.parse().unwrap());
    uses.take(&*server.app.store, version).await.unwrap();
    let other = server.create_id(&token, "other").await;
    let (_, other) = server.wrap(&token, &other, PLAINTEXT).await;
    server.store.set_fault(Some(Fault::Hold(Step::ReserveUses)));
    let hangs = {
        let (uses, store, other) = (uses.clone(), server.app.store.clone(), other.parse().unwrap());
        tokio::spawn(async move { uses.take(&*store, other).await })
    };
    server.store.holds().await;
    let took = uses.take(&*server.app.store, version);
    tokio::time::timeout(Duration::from_secs(60), took).await.unwrap().unwrap();
    assert!(!hangs.is_finished());
    server.store.set_fault(None);
    hangs.await.unwrap().unwrap();
}

/// The vault does not ask again, and the service does, which counts it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_library_that_crashes_fails_no_wrap_with_aes_gcm() {
    let Some(mut rig) = Rig::make() else { return };
    let config = rig.path("kms-server.yaml");
    let text = fs::read_to_string(&config).unwrap();
    let head = "SERVER_CONFIG:\n";
    let format = format!("{head}  WDEK_VERSION: \"4.0.0\"\n");
    fs::write(&config, text.replace(head, &format)).unwrap();
    rig.start().await;
    let client = rig.admin().await;
    let key = client.create("key").await.unwrap();
    for how in ["segv", "abort"] {
        rig.control.set(&format!("crash C_Encrypt {how} once")).unwrap();
        for _ in 0..20 {
            let wrapped = client.wrap(&key, PLAINTEXT).await.unwrap();
            assert_eq!(wrapped.status, 200, "{wrapped:?}\n{}", rig.log());
        }
        assert!(rig.log().contains("The process of the HSM's library is lost"), "{}", rig.log());
    }
    rig.kill();
    let store = SqliteStore::open(&rig.path("kms.db"), false).await.unwrap();
    assert_eq!(store.most_gcm_uses().await.unwrap(), FIRST_BLOCK, "a few of one block");
}

/// Old data opens, and the key can be changed, whatever the database does about the uses of the version that wraps.
#[tokio::test]
async fn an_unwrap_does_not_wait_for_the_database_to_wrap_anew() {
    let server = start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (wdek, _) = server.wrap(&token, &id, PLAINTEXT).await;
    server.rotate(&token, &id).await;
    server.store.set_fault(Some(Fault::Hold(Step::ReserveUses)));
    let opened = async {
        for _ in 0..3 {
            let opened = server.unwrap(&token, &id, &wdek).await.json();
            assert_eq!(opened["plaintext"], PLAINTEXT, "{opened}");
            assert!(opened.get("rewrappedKeyVersion").is_none(), "{opened}");
        }
        for action in ["disable", "enable"] {
            let path = format!("/keys/{id}/actions/{action}");
            assert_eq!(server.call(&token, "POST", &path, "").await.status, 204);
        }
    };
    tokio::time::timeout(Duration::from_secs(60), opened).await.unwrap();
    server.store.holds().await;
    server.store.set_fault(None);
    let (_, second) = server.wrap(&token, &id, PLAINTEXT).await;
    let opened = server.unwrap(&token, &id, &wdek).await.json();
    assert_eq!(opened["rewrappedKeyVersion"]["id"], second);
    let version = second.parse().unwrap();
    assert_eq!(total(&server, version).await, FIRST_BLOCK, "reserved once, for all");
}

/// An unwrap of older data uses two versions.
#[tokio::test]
async fn each_use_of_a_version_is_in_the_audit_log() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (old, first) = server.wrap(&token, &id, PLAINTEXT).await;
    server.rotate(&token, &id).await;
    let (new, second) = server.wrap(&token, &id, PLAINTEXT).await;
    for wdek in [&old, &new] {
        assert_eq!(server.unwrap(&token, &id, wdek).await.status, 200);
    }
    let log = fs::read_to_string(server.dir.path().join("audit.log")).unwrap();
    let of_unwraps = log.lines().map(serde_json::from_str::<serde_json::Value>);
    let of_unwraps = of_unwraps.map(Result::unwrap).filter(|record| record["action"] == "unwrap");
    let uses: Vec<_> =
        of_unwraps.map(|one| (one["version"].clone(), one["rewrapped"].clone())).collect();
    let none = serde_json::Value::Null;
    assert_eq!(uses, [(first.into(), second.clone().into()), (second.into(), none)]);
}

/// One that nothing was wrapped with.
async fn with_version() -> (Server, Uuid) {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let (_, version) = server.wrap(&token, &id, PLAINTEXT).await;
    (server, version.parse().unwrap())
}

async fn total(server: &Server, version: Uuid) -> u64 {
    server.store.reserve_gcm_uses(version, 0, LIMIT).await.unwrap().total
}
