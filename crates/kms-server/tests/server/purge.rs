//! Purging: the one way in which database and HSM ever lose a key; what it refuses, and what it leaves when it is cut off.

use crate::harness::Server;
use crate::harness::faulty_store::{Fault, Step};
use crate::harness::http::Answer;
use kms_core::clock::Clock;
use kms_hsm::{Vault, VaultError, memory};
use kms_server::app::Settings;
use kms_server::policy::{Grant, Role, Scope};
use kms_server::reconcile::{Standing, compare};
use kms_server::report::{Ending, ending};
use kms_server::store::{Custody, NewKey, Store, StoreError, Version};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use uuid::Uuid;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
const HOUR: Duration = Duration::from_secs(3600);

/// A server with a key that was rotated and destroyed, and with one that lives.
struct Stage {
    server: Server,
    admin: String,
    purger: String,
    key: String,
    wdek: String,
    living: String,
}

impl Stage {
    async fn set() -> Stage {
        Stage::over(Server::settings()).await
    }

    /// Where nobody has to wait.
    async fn ripe() -> Stage {
        Stage::over(Settings { min_purge_wait: Duration::ZERO, ..Server::settings() }).await
    }

    async fn over(settings: Settings) -> Stage {
        let server = Server::start_with(settings).await;
        let admin = server.admin().await;
        let living = server.create_id(&admin, "living").await;
        let key = server.create_id(&admin, "doomed").await;
        let (wdek, _) = server.wrap(&admin, &key, PLAINTEXT).await;
        assert_eq!(server.rotate(&admin, &key).await.status, 204);
        let purger = purger(&server).await;
        Stage { server, admin, purger, key, wdek, living }
    }

    async fn destroyed(self) -> Stage {
        let path = format!("/keys/{}", self.key);
        assert_eq!(self.server.call(&self.admin, "DELETE", &path, "").await.status, 204);
        self
    }

    async fn purge(&self) -> Answer {
        self.server.call(&self.purger, "DELETE", &format!("/keys/{}/purge", self.key), "").await
    }

    async fn restart(self) -> Stage {
        let server = self.server.restart().await;
        let (admin, purger) = (server.admin().await, purger(&server).await);
        Stage { server, admin, purger, ..self }
    }

    /// Of the key that is to go.
    async fn versions(&self) -> BTreeSet<Uuid> {
        let known = self.server.store.known_versions().await.unwrap();
        let mine = known.iter().filter(|one| one.key.to_string() == self.key);
        mine.map(|one| one.version).collect()
    }

    async fn held(&self) -> BTreeSet<Uuid> {
        self.server.vault.versions().await.unwrap().into_iter().collect()
    }

    /// How it is with the key that is to go, and what `check` would end with.
    async fn standings(&self) -> (Vec<Standing>, Ending) {
        let found = compare(&*self.server.vault, &*self.server.store).await.unwrap();
        let mine = found.versions.iter().filter(|(one, _)| one.key.to_string() == self.key);
        (mine.map(|(_, standing)| *standing).collect(), ending(&found))
    }

    async fn is_gone(&self) {
        let server = &self.server;
        for (method, path) in [
            ("GET", format!("/keys/{}", self.key)),
            ("GET", format!("/keys/{}/metadata", self.key)),
            ("DELETE", format!("/keys/{}", self.key)),
            ("POST", format!("/keys/{}/actions/wrap", self.key)),
        ] {
            refused(&server.call(&self.admin, method, &path, "").await, 404, "KEY_NOT_FOUND_ERR");
        }
        let opened = server.unwrap(&self.admin, &self.key, &self.wdek).await;
        refused(&opened, 404, "KEY_NOT_FOUND_ERR");
        refused(&self.purge().await, 404, "KEY_NOT_FOUND_ERR");
        let listed = server.call(&self.admin, "GET", "/keys?state=1,2,3,5", "").await;
        assert!(listed.body.contains(&self.living) && !listed.body.contains(&self.key));
        assert_eq!(self.versions().await, BTreeSet::new());
        assert_eq!(self.standings().await.1, Ending::Same);
        server.wrap(&self.admin, &self.living, PLAINTEXT).await;
    }
}

/// The token lacks what was purged after the database was backed up: for good, so no alarm may stay that hides the next one.
#[tokio::test]
async fn a_destroyed_key_that_the_hsm_does_not_hold_is_no_loss() {
    let stage = Stage::ripe().await;
    for version in stage.versions().await {
        stage.server.vault.lose_version(version);
    }
    assert_eq!(stage.standings().await, (vec![Standing::Lost; 2], Ending::Bad), "it is in use");
    let stage = stage.destroyed().await;
    assert_eq!(stage.standings().await, (vec![Standing::Gone; 2], Ending::Leftovers));
    let answer = stage.purge().await;
    assert!(answer.status == 409 && answer.body.contains("does not hold version"), "{answer:?}");
    // The others alone decide whether this is the right token.
    let found = async || compare(&*stage.server.vault, &*stage.server.store).await.unwrap();
    assert_eq!(found().await.verdict(), Ok(()));
    let held = stage.held().await;
    assert_eq!(held.len(), 1);
    for living in held {
        stage.server.vault.lose_version(living);
    }
    let cause = found().await.verdict().unwrap_err();
    assert!(cause.contains("holds none of the 1 root key versions"), "{cause}");
    let path = format!("/keys/{}", stage.living);
    assert_eq!(stage.server.call(&stage.admin, "DELETE", &path, "").await.status, 204);
    let found = found().await;
    assert_eq!((found.verdict(), ending(&found)), (Ok(()), Ending::Leftovers), "all are gone");
}

async fn purger(server: &Server) -> String {
    server.identity(Role::KeyPurge, Scope::Instance(server.instance())).await.1
}

fn refused(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert!(answer.message().ends_with(&format!("({code})")), "{answer:?}");
}

fn outcomes(server: &Server) -> Vec<String> {
    let audit = server.audit();
    let records = audit.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let purges = records.filter(|record| record["action"] == "purge_key");
    purges.map(|record| record["outcome"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_purged_key_is_gone_from_hsm_and_database_and_the_log_says_so() {
    let stage = Stage::ripe().await.destroyed().await;
    let versions = stage.versions().await;
    assert_eq!((versions.len(), versions.is_subset(&stage.held().await)), (2, true));
    let purged = stage.purge().await;
    assert_eq!((purged.status, purged.body.as_str()), (204, ""));
    assert!(versions.is_disjoint(&stage.held().await), "the HSM has destroyed it");
    assert_eq!(stage.held().await.len(), 1, "and nothing else");
    assert_eq!(outcomes(&stage.server), ["begun", "done"]);
    stage.is_gone().await;
    let stage = stage.restart().await;
    stage.is_gone().await;
}

#[tokio::test]
async fn a_key_is_purged_four_hours_after_it_was_destroyed_and_not_before() {
    let stage = Stage::set().await;
    refused(&stage.purge().await, 409, "KEY_ACTION_INVALID_STATE_ERR");
    let stage = stage.destroyed().await;
    refused(&stage.purge().await, 409, "REQ_TOO_EARLY_ERR");
    let shown = stage.server.call(&stage.admin, "GET", &format!("/keys/{}", stage.key), "").await;
    let shown = &shown.json()["resources"][0];
    assert_eq!(shown["purgeAllowed"], false);
    let (from, deleted) = (&shown["purgeAllowedFrom"], &shown["deletionDate"]);
    assert_eq!((deleted, from), (&json!("2027-01-15T08:00:00Z"), &json!("2027-01-15T12:00:00Z")));
    stage.server.clock.advance(4 * HOUR - Duration::from_secs(1));
    let stage = Stage { purger: purger(&stage.server).await, ..stage };
    refused(&stage.purge().await, 409, "REQ_TOO_EARLY_ERR");
    assert_eq!(stage.held().await.len(), 3, "nothing was destroyed");
    stage.server.clock.advance(Duration::from_secs(1));
    let headers = [
        ("authorization", format!("Bearer {}", stage.purger)),
        ("icp-instance", stage.server.instance().to_string()),
        ("prefer", "return=representation".to_owned()),
    ];
    let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
    let path = format!("/api/v2/keys/{}/purge", stage.key);
    let (address, ca) = (stage.server.keys, stage.server.ca());
    let purged = crate::harness::http::ask(address, &ca, "DELETE", &path, &headers, "").await;
    assert_eq!((purged.status, &purged.json()["resources"][0]["state"]), (200, &json!(5)));
}

#[tokio::test]
async fn a_key_that_is_not_destroyed_is_never_purged() {
    for change in ["", "disable"] {
        let stage = Stage::ripe().await;
        if !change.is_empty() {
            let path = format!("/keys/{}/actions/{change}", stage.key);
            assert_eq!(stage.server.call(&stage.admin, "POST", &path, "").await.status, 204);
        }
        refused(&stage.purge().await, 409, "KEY_ACTION_INVALID_STATE_ERR");
        assert_eq!((stage.held().await.len(), stage.versions().await.len()), (3, 2));
        assert_eq!(stage.standings().await, (vec![Standing::Good; 2], Ending::Same));
        // Nor by whoever asks the store itself.
        let (id, now) = (stage.key.parse().unwrap(), stage.server.clock.wall().into());
        let begun = stage.server.store.begin_purge(stage.server.instance(), id, now).await;
        assert!(matches!(begun, Err(StoreError::Conflict(_))));
        assert!(!stage.server.store.finish_purge(id, &[], now).await.unwrap());
    }
}

#[tokio::test]
async fn a_purge_that_is_cut_off_leaves_a_destroyed_key_or_none_and_goes_on_when_asked_again() {
    for (fault, gone) in [
        (Fault::Before(Step::BeginPurge), false),
        (Fault::After(Step::BeginPurge), false),
        (Fault::Before(Step::FinishPurge), false),
        (Fault::After(Step::FinishPurge), true),
    ] {
        let stage = Stage::ripe().await.destroyed().await;
        stage.server.store.set_fault(Some(fault));
        assert_eq!(stage.purge().await.status, 503, "{fault:?}");
        let stage = stage.restart().await;
        if !gone {
            let path = format!("/keys/{}", stage.key);
            let shown = stage.server.call(&stage.admin, "GET", &path, "").await.json();
            assert_eq!(shown["resources"][0]["state"], 5, "{fault:?}");
            let opened = stage.server.unwrap(&stage.admin, &stage.key, &stage.wdek).await;
            refused(&opened, 410, "KEY_DELETED_ERR");
            let told = match fault {
                Fault::Before(Step::BeginPurge) => (vec![Standing::Good; 2], Ending::Same),
                _ => (vec![Standing::Purging; 2], Ending::Leftovers),
            };
            assert_eq!(stage.standings().await, told, "{fault:?}");
            assert_eq!(stage.purge().await.status, 204, "{fault:?}");
        }
        stage.is_gone().await;
        assert_eq!(stage.held().await.len(), 1, "{fault:?}");
    }
}

#[tokio::test]
async fn a_purge_that_had_destroyed_half_of_the_versions_goes_on() {
    let stage = Stage::ripe().await.destroyed().await;
    stage.server.store.set_fault(Some(Fault::After(Step::BeginPurge)));
    assert_eq!(stage.purge().await.status, 503);
    let first = *stage.versions().await.first().unwrap();
    stage.server.vault.destroy_version(first).await.unwrap();
    let stage = stage.restart().await;
    assert_eq!(stage.purge().await.status, 204);
    stage.is_gone().await;
}

#[tokio::test]
async fn while_the_hsm_is_away_nothing_is_removed() {
    let stage = Stage::ripe().await.destroyed().await;
    let away = VaultError::Unavailable { cause: "pulled out".into() };
    stage.server.vault.set_fault(Some(memory::Fault::Fail(away)));
    assert_eq!(stage.purge().await.status, 503);
    stage.server.vault.set_fault(None);
    assert_eq!((stage.held().await.len(), stage.versions().await.len()), (3, 2));
    assert_eq!(stage.purge().await.status, 204);
    stage.is_gone().await;
}

/// The metadata is all that names it: in another token, or a backup of the HSM, it would live on.
#[tokio::test]
async fn s8_what_the_hsm_lacks_or_holds_under_another_key_is_not_purged() {
    for other in [false, true] {
        let stage = Stage::ripe().await.destroyed().await;
        let first = *stage.versions().await.first().unwrap();
        if other {
            stage.server.vault.replace_version(first).unwrap();
        } else {
            stage.server.vault.lose_version(first);
        }
        let before = stage.held().await;
        let answer = stage.purge().await;
        refused(&answer, 409, "CONFLICT");
        assert!(answer.body.contains(&first.to_string()) && answer.body.contains("backup"));
        assert_eq!((stage.held().await, stage.versions().await.len()), (before, 2));
        assert_eq!(outcomes(&stage.server), ["CONFLICT"]);
    }
}

#[tokio::test]
async fn a_purge_that_cannot_be_recorded_does_nothing() {
    let stage = Stage::ripe().await.destroyed().await;
    let log = stage.server.dir.path().join("audit.log");
    std::fs::rename(&log, log.with_extension("kept")).unwrap();
    std::fs::create_dir(&log).unwrap();
    assert_eq!(stage.purge().await.status, 503);
    assert_eq!(stage.held().await.len(), 3);
    assert_eq!(stage.standings().await.0, vec![Standing::Good; 2], "not even begun");
}

/// What a crash in the middle of a rotation left goes with its key.
#[tokio::test]
async fn versions_that_were_never_completed_go_too() {
    let stage = Stage::ripe().await;
    for fault in [Fault::After(Step::BeginVersion), Fault::Before(Step::ActivateVersion)] {
        stage.server.store.set_fault(Some(fault));
        assert_eq!(stage.server.rotate(&stage.admin, &stage.key).await.status, 503);
        stage.server.store.set_fault(None);
    }
    let stage = stage.destroyed().await;
    let half = *stage.versions().await.difference(&stage.held().await).next().unwrap();
    stage.server.vault.leave_incomplete(half);
    assert_eq!((stage.versions().await.len(), stage.held().await.len()), (4, 4));
    assert_eq!(stage.purge().await.status, 204);
    assert_eq!(stage.held().await.len(), 1);
    assert_eq!(stage.server.vault.incomplete().await.unwrap(), Vec::<Uuid>::new());
    stage.is_gone().await;
}

/// Else a WDEK or a role for the old key would come to life, and uses with AES-GCM would be counted from 0 again.
#[tokio::test]
async fn no_id_comes_back_and_with_it_no_count_of_uses() {
    let stage = Stage::ripe().await.destroyed().await;
    let (store, instance) = (&stage.server.store, stage.server.instance());
    let now = stage.server.clock.wall().into();
    let id: Uuid = stage.key.parse().unwrap();
    let versions = stage.versions().await;
    let version = *versions.first().unwrap();
    store.reserve_gcm_uses(version, 100, 1000).await.unwrap();
    assert_eq!(stage.purge().await.status, 204);
    let new = |id, version| NewKey {
        id,
        instance,
        name: "again".into(),
        description: None,
        tags: Vec::new(),
        imported: false,
        expires_at: None,
        created_at: now,
        created_by: "me".into(),
        version,
    };
    let fresh = Uuid::from_u128(7);
    for (id, version) in [(id, fresh), (fresh, version)] {
        let begun = store.begin_key(&new(id, version)).await;
        assert!(matches!(&begun, Err(StoreError::Conflict(why)) if why.contains("purged")));
    }
    let living = stage.living.parse().unwrap();
    let version = Version { id: version, created_at: now };
    let begun = store.begin_version(living, &version).await;
    assert!(matches!(&begun, Err(StoreError::Conflict(why)) if why.contains("purged")));
    let reserved = store.reserve_gcm_uses(version.id, 1, 1000).await;
    assert!(matches!(reserved, Err(StoreError::Conflict(_))));
    store.return_gcm_uses(&[(version.id, 100)]).await.unwrap();
    store.begin_key(&new(fresh, Uuid::from_u128(8))).await.unwrap();
}

#[tokio::test]
async fn a_role_for_the_key_goes_with_it_and_its_holder_keeps_the_others() {
    let stage = Stage::ripe().await.destroyed().await;
    let instance = stage.server.instance();
    let on = |key: &str| {
        let scope = Scope::Key { instance, key: key.parse().unwrap() };
        Grant { role: Role::Reader, scope }
    };
    let grants = [on(&stage.key), on(&stage.living)];
    let (owner, token) = stage.server.identity_with(&grants).await;
    assert_eq!(stage.purge().await.status, 204);
    let listed = stage.server.manage(&stage.admin, "GET", "/v1/policies", "").await.json();
    let policies = listed["policies"].as_array().unwrap().iter();
    let owner = format!("ServiceId-{}", owner.service_id);
    let left: Vec<_> = policies.filter(|one| one["service_id"] == *owner).collect();
    assert_eq!((left.len(), &left[0]["key_id"]), (1, &json!(stage.living)));
    stage.server.wrap(&token, &stage.living, PLAINTEXT).await;
}

#[tokio::test]
async fn of_two_purges_at_once_on_two_servers_one_has_done_it() {
    let settings = Settings { min_purge_wait: Duration::ZERO, ..Server::settings() };
    let (one, two) = Server::start_pair_with(settings).await;
    let admin = one.admin().await;
    let token = purger(&one).await;
    for _ in 0..10 {
        let key = one.create_id(&admin, "doomed").await;
        assert_eq!(one.call(&admin, "DELETE", &format!("/keys/{key}"), "").await.status, 204);
        let path = format!("/keys/{key}/purge");
        let asked = tokio::join!(
            one.call(&token, "DELETE", &path, ""),
            two.call(&token, "DELETE", &path, "")
        );
        let mut statuses = [asked.0.status, asked.1.status];
        statuses.sort_unstable();
        assert_eq!(statuses[0], 204);
        // The other has found it purged, or destroyed by the first one and not yet noted as begun when it looked.
        assert!([404, 409].contains(&statuses[1]), "{asked:?}");
    }
    assert_eq!(one.vault.versions().await.unwrap(), Vec::<Uuid>::new());
    let found = compare(&*one.vault, &*one.store).await.unwrap();
    assert_eq!((found.versions.len(), ending(&found)), (0, Ending::Same));
}
