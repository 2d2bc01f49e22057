//! A restore on the host that was lost, with all that a killed server and an interrupted restore leave lying about.

use crate::harness::Server;
use crate::harness::faulty_store::{Fault, Step};
use aws_lc_rs::digest::{SHA256, digest};
use kms_hsm::Vault;
use kms_server::adopt::{self, Adopt, AdoptError};
use kms_server::audit::Audit;
use kms_server::backup::{BackupError, backup, manifest_of};
use kms_server::restore::{RestoreError, Restored, restore};
use kms_server::store::{Custody, SqliteStore, Store, StoreError, sides};
use kms_server::uses::RESTORE_MARGIN;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use time::OffsetDateTime;
use uuid::Uuid;

const PLAINTEXT: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

/// A backup, and what its server left when it was killed later: a database whose log is full.
struct Loss {
    server: Server,
    dir: TempDir,
}

impl Loss {
    async fn happens() -> Loss {
        let server = Server::start().await;
        let token = server.admin().await;
        for name in ["one", "two", "three"] {
            server.create(&token, name).await;
        }
        let dir = TempDir::new().unwrap();
        let live = server.dir.path().join("kms.db");
        backup(&live, &dir.path().join("backup.db"), OffsetDateTime::UNIX_EPOCH).await.unwrap();
        for number in 0..20 {
            server.create(&token, &format!("late {number}")).await;
        }
        let lost = dir.path().join("lost.db");
        fs::copy(&live, &lost).unwrap();
        for (side, to) in sides(&live).iter().zip(sides(&lost)).filter(|(side, _)| side.exists()) {
            fs::copy(side, to).unwrap();
        }
        assert!(fs::metadata(&sides(&lost)[0]).unwrap().len() > 0, "the log is full");
        Loss { server, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn restore(&self) -> Result<Restored, RestoreError> {
        let vault: &dyn Vault = &*self.server.vault;
        restore(vault, &self.path("backup.db"), &self.path("kms.db"), false).await
    }

    /// Puts the lost database's log, and what belongs to it, beside `name`.
    fn leave_sides_at(&self, name: &str) {
        for (from, to) in sides(&self.path("lost.db")).iter().zip(sides(&self.path(name))) {
            if from.exists() {
                fs::copy(from, to).unwrap();
            }
        }
    }

    fn files(&self) -> Vec<String> {
        let files = fs::read_dir(self.dir.path()).unwrap().map(|file| file.unwrap().file_name());
        let files = files.map(|name| name.into_string().unwrap());
        let mut files: Vec<_> = files.filter(|name| name.starts_with("kms")).collect();
        files.sort();
        files
    }

    /// What is there is the backup, whole, and nothing beside it.
    async fn is_restored(&self) {
        assert_eq!(self.files(), ["kms.db"]);
        SqliteStore::inspect(&self.path("kms.db")).await.unwrap();
        let store = SqliteStore::open(&self.path("kms.db"), false).await.unwrap();
        assert_eq!(store.counts().await.unwrap().keys, 3);
        assert_eq!(store.most_gcm_uses().await.unwrap(), RESTORE_MARGIN);
        store.close().await;
        fs::remove_file(self.path("kms.db")).unwrap();
    }
}

#[tokio::test]
async fn a_backup_is_not_put_beside_the_log_of_the_lost_database() {
    let loss = Loss::happens().await;
    for side in sides(&loss.path("kms.db")) {
        fs::write(&side, "what was told last").unwrap();
        let refused = loss.restore().await.unwrap_err();
        assert!(matches!(&refused, RestoreError::Side(path) if *path == side), "{refused}");
        assert!(refused.to_string().contains("Move it away together with that database"));
        assert_eq!(fs::read(&side).unwrap(), b"what was told last");
        assert!(!loss.path("kms.db").exists());
        // Nor is a new database begun there.
        let begun = SqliteStore::open(&loss.path("kms.db"), true).await;
        assert!(matches!(begun, Err(StoreError::Unavailable(_))), "{begun:?}");
        assert!(!loss.path("kms.db").exists());
        fs::remove_file(&side).unwrap();
    }
    loss.restore().await.unwrap();
    let twice = loss.restore().await.unwrap_err();
    assert!(twice.to_string().contains("together with its -wal and -shm"), "{twice}");
    loss.is_restored().await;
}

/// The next restore does not care where the one before was killed.
#[tokio::test]
async fn a_restore_that_was_interrupted_anywhere_is_done_again() {
    let loss = Loss::happens().await;
    let whole = fs::read(loss.path("backup.db")).unwrap();
    let half = loss.path("kms.db.half");
    // While it was copied; before a table was changed, with another log than its own; between the log and the file.
    for copied in [0, 1, whole.len() / 2, whole.len()] {
        fs::write(&half, &whole[..copied]).unwrap();
        loss.leave_sides_at("kms.db.half");
        loss.restore().await.unwrap();
        loss.is_restored().await;
    }
    loss.leave_sides_at("kms.db.half");
    loss.restore().await.unwrap();
    loss.is_restored().await;
    // After it got its name: the name that it had before is still there.
    loss.restore().await.unwrap();
    fs::hard_link(loss.path("kms.db"), &half).unwrap();
    let refused = loss.restore().await.unwrap_err();
    assert!(matches!(refused, RestoreError::Exists(_)), "{refused}");
    fs::rename(loss.path("kms.db"), loss.path("moved.db")).unwrap();
    let before = fs::read(loss.path("moved.db")).unwrap();
    loss.restore().await.unwrap();
    assert_eq!(
        fs::read(loss.path("moved.db")).unwrap(),
        before,
        "nobody writes through the old name"
    );
    loss.is_restored().await;
}

#[tokio::test]
async fn a_backup_that_was_interrupted_anywhere_is_made_again() {
    let loss = Loss::happens().await;
    let live = loss.server.dir.path().join("kms.db");
    let to = loss.path("kms-2.db");
    fs::write(loss.path("kms-2.db.half"), "half").unwrap();
    loss.leave_sides_at("kms-2.db.half");
    backup(&live, &to, OffsetDateTime::UNIX_EPOCH).await.unwrap();
    assert_eq!(loss.files(), ["kms-2.db", "kms-2.db.manifest.json"]);
    SqliteStore::inspect(&to).await.unwrap();
}

#[tokio::test]
async fn of_two_backups_to_one_name_one_is_made_and_the_other_refused() {
    let loss = Loss::happens().await;
    let (live, to) = (loss.server.dir.path().join("kms.db"), loss.path("kms-2.db"));
    let make = || backup(&live, &to, OffsetDateTime::UNIX_EPOCH);
    let (one, two) = tokio::join!(make(), make());
    assert!(one.is_ok() && matches!(two, Err(BackupError::Busy(_))), "{one:?} {two:?}");
    assert_eq!(loss.files(), ["kms-2.db", "kms-2.db.manifest.json"]);
    SqliteStore::inspect(&to).await.unwrap();
    // Nor does a restore clear away what another one is making.
    let held = fs::File::create(loss.path("kms.db.half.lock")).unwrap();
    held.lock().unwrap();
    fs::write(loss.path("kms.db.half"), "half").unwrap();
    let refused = loss.restore().await.unwrap_err();
    assert!(refused.to_string().contains("at this moment"), "{refused}");
    assert_eq!(fs::read(loss.path("kms.db.half")).unwrap(), b"half");
    drop(held);
    loss.restore().await.unwrap();
    assert_eq!(loss.files(), ["kms-2.db", "kms-2.db.manifest.json", "kms.db"]);
}

/// The backup may be where nobody writes.
#[tokio::test]
async fn a_comparison_writes_nothing_beside_the_backup() {
    let loss = Loss::happens().await;
    // Whoever wanted to write there would have to remove this first.
    fs::create_dir(loss.path("backup.db.half")).unwrap();
    let (from, database) = (loss.path("backup.db"), loss.path("kms.db"));
    restore(&*loss.server.vault, &from, &database, true).await.unwrap();
    assert_eq!(loss.files(), [""; 0]);
}

/// Its manifest agrees: it was broken before it was copied.
#[tokio::test]
async fn a_backup_that_is_broken_inside_is_not_restored() {
    let loss = Loss::happens().await;
    let good = fs::read(loss.path("backup.db")).unwrap();
    let mut found = 0;
    for page in (1..good.len() / 4096).rev() {
        let mut bad = good.clone();
        bad[page * 4096..page * 4096 + 64].fill(0xff);
        write_with_manifest(&loss.path("backup.db"), &bad);
        let refused = loss.restore().await;
        assert!(refused.is_err(), "page {page}");
        found += usize::from(matches!(refused, Err(RestoreError::Store(StoreError::Corrupt(_)))));
        assert_eq!(loss.files(), [""; 0], "page {page}");
    }
    assert!(found > 0, "the look through the whole finds what nothing else does");
    write_with_manifest(&loss.path("backup.db"), &good);
    loss.restore().await.unwrap();
    loss.is_restored().await;
}

#[tokio::test]
async fn a_backup_without_its_manifest_or_with_anothers_is_refused() {
    let loss = Loss::happens().await;
    let good = fs::read(loss.path("backup.db")).unwrap();
    fs::write(loss.path("backup.db"), [&good[..], b"x"].concat()).unwrap();
    let refused = loss.restore().await.unwrap_err();
    assert!(matches!(refused, RestoreError::Backup(BackupError::Changed { .. })), "{refused}");
    fs::remove_file(manifest_of(&loss.path("backup.db"))).unwrap();
    assert!(matches!(loss.restore().await, Err(RestoreError::Backup(BackupError::File { .. }))));
    assert_eq!(loss.files(), [""; 0]);
}

#[tokio::test]
async fn a_restore_says_what_was_destroyed_and_made_since_its_backup() {
    let loss = Loss::happens().await;
    let backed_up = SqliteStore::open_to_read(&loss.path("backup.db")).await.unwrap();
    let gone = backed_up.known_versions().await.unwrap()[0];
    loss.server.vault.lose_version(gone.version);
    let restored = loss.restore().await.unwrap();
    let notes = restored.notes();
    let lost = format!(
        "Version {} of key {} is in the backup and not in the token",
        gone.version, gone.key
    );
    assert!(notes.contains(&lost), "{notes}");
    assert_eq!(notes.matches("is in the token and not in the backup").count(), 20, "{notes}");
    assert!(notes.contains("--since 1970-01-01T00:00:00Z --action delete_key"), "{notes}");
}

fn write_with_manifest(backup: &Path, bytes: &[u8]) {
    fs::write(backup, bytes).unwrap();
    let sum = digest(&SHA256, bytes);
    let sum: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let manifest = serde_json::json!({ "sha256": sum }).to_string();
    fs::write(manifest_of(backup), manifest).unwrap();
}

/// Nothing but a wrapped DEK proves to which key a version belongs, and an adopted one never wraps.
#[tokio::test]
async fn a_version_made_since_the_backup_is_adopted_by_its_own_key_only() {
    let server = Server::start().await;
    let token = server.admin().await;
    let (id, other) =
        (server.create_id(&token, "crk").await, server.create_id(&token, "other").await);
    let (_, first) = server.wrap(&token, &id, PLAINTEXT).await;
    let (live, dir) = (server.dir.path().join("kms.db"), TempDir::new().unwrap());
    let saved = dir.path().join("backup.db");
    backup(&live, &saved, OffsetDateTime::UNIX_EPOCH).await.unwrap();
    server.rotate(&token, &id).await;
    let (wdek, second) = server.wrap(&token, &id, PLAINTEXT).await;
    for file in sides(&live).iter().chain([&live]).filter(|file| file.exists()) {
        fs::rename(file, dir.path().join(file.file_name().unwrap())).unwrap();
    }
    restore(&*server.vault, &saved, &live, false).await.unwrap();
    let store = SqliteStore::open(&live, false).await.unwrap();
    let log = dir.path().join("adopt.log");
    let audit = Audit::open(&log, "adopt", None, server.clock.clone()).unwrap();
    let (id, other, second) =
        (id.parse().unwrap(), other.parse().unwrap(), second.parse::<Uuid>().unwrap());
    let adopt = async |key: Uuid, version: Uuid, ciphertext: &str, aad: &[&str]| {
        let aad = aad.iter().map(ToString::to_string).collect();
        let asked = Adopt { key, version, ciphertext: ciphertext.to_owned(), aad };
        adopt::adopt(&*server.vault, &store, &audit, asked, OffsetDateTime::UNIX_EPOCH).await
    };
    let nobody = Uuid::from_u128(7);
    assert!(matches!(adopt(nobody, second, &wdek, &[]).await, Err(AdoptError::NoKey(_))));
    assert!(matches!(adopt(other, second, &wdek, &[]).await, Err(AdoptError::Unproven)));
    assert!(matches!(adopt(id, second, &wdek, &["x"]).await, Err(AdoptError::Unproven)));
    assert!(matches!(adopt(id, nobody, &wdek, &[]).await, Err(AdoptError::Unproven)));
    assert!(matches!(adopt(id, second, "no", &[]).await, Err(AdoptError::NoWdek)));
    let first = first.parse().unwrap();
    assert!(matches!(adopt(id, first, &wdek, &[]).await, Err(AdoptError::Known(_))));
    assert!(!fs::read_to_string(&log).unwrap().contains("adopt_version"));
    adopt(id, second, &wdek, &[]).await.unwrap();
    assert!(matches!(adopt(id, second, &wdek, &[]).await, Err(AdoptError::Known(_))));
    store.close().await;
    let told = fs::read_to_string(&log).unwrap();
    assert_eq!(told.matches("adopt_version").count(), 2, "begun and done: {told}");

    let server = server.restart().await;
    let (id, token) = (id.to_string(), server.admin().await);
    let opened = server.unwrap(&token, &id, &wdek).await.json();
    assert_eq!(opened["plaintext"], PLAINTEXT, "{opened}");
    assert_eq!(server.wrap(&token, &id, PLAINTEXT).await.1, first.to_string());
    server.rotate(&token, &id).await;
    let (_, third) = server.wrap(&token, &id, PLAINTEXT).await;
    assert!(third != first.to_string() && third != second.to_string());
}

/// The backup holds the version as one that is being made, and it wraps a moment later.
#[tokio::test]
async fn a_version_that_was_being_made_at_the_time_of_the_backup_is_adopted() {
    let server = Server::start().await;
    let token = server.admin().await;
    let id = server.create_id(&token, "crk").await;
    let dir = TempDir::new().unwrap();
    let saved = dir.path().join("backup.db");
    let rotate = async { assert_eq!(server.rotate(&token, &id).await.status, 204) };
    backup_amid(&server, Step::ActivateVersion, &saved, rotate).await;
    let (wdek, second) = server.wrap(&token, &id, PLAINTEXT).await;
    let (server, notes) = lose_and_restore(server, &dir, &saved).await;
    let told = format!("Version {second} of key {id} was being made at the time of the backup");
    assert!(notes.contains(&told), "{notes}");
    let token = server.admin().await;
    assert_eq!(server.unwrap(&token, &id, &wdek).await.status, 422, "not yet");
    let (key, version) = (id.parse().unwrap(), second.parse().unwrap());
    adopt_in(&server, &dir, key, version, &wdek).await.unwrap();
    let again = adopt_in(&server, &dir, key, version, &wdek).await;
    assert!(matches!(again, Err(AdoptError::Known(_))), "{again:?}");
    assert_eq!(server.unwrap(&token, &id, &wdek).await.json()["plaintext"], PLAINTEXT);
    assert_ne!(server.wrap(&token, &id, PLAINTEXT).await.1, second, "it never wraps");
    assert_eq!(server.rotate(&token, &id).await.status, 204);
}

/// The backup holds the key itself as one that is being made, and nothing of how it was rotated later.
#[tokio::test]
async fn a_key_that_was_being_made_at_the_time_of_the_backup_gets_its_versions_in_any_order() {
    let server = Server::start().await;
    let token = server.admin().await;
    let other = server.create_id(&token, "other").await.parse().unwrap();
    let dir = TempDir::new().unwrap();
    let saved = dir.path().join("backup.db");
    let mut made = None;
    let create = async { made = Some(server.create_id(&token, "crk").await) };
    backup_amid(&server, Step::ActivateKey, &saved, create).await;
    let id = made.unwrap();
    let (first_wdek, first) = server.wrap(&token, &id, PLAINTEXT).await;
    server.rotate(&token, &id).await;
    let (second_wdek, second) = server.wrap(&token, &id, PLAINTEXT).await;
    let (server, _) = lose_and_restore(server, &dir, &saved).await;
    let token = server.admin().await;
    let (key, first, second) =
        (id.parse().unwrap(), first.parse().unwrap(), second.parse().unwrap());
    let strange = adopt_in(&server, &dir, other, first, &first_wdek).await;
    assert!(matches!(strange, Err(AdoptError::Known(_))), "{strange:?}");
    let unproven = adopt_in(&server, &dir, key, first, &second_wdek).await;
    assert!(matches!(unproven, Err(AdoptError::Unproven)), "{unproven:?}");
    adopt_in(&server, &dir, key, second, &second_wdek).await.unwrap();
    adopt_in(&server, &dir, key, first, &first_wdek).await.unwrap();
    for wdek in [&first_wdek, &second_wdek] {
        let opened = server.unwrap(&token, &id, wdek).await.json();
        assert_eq!(opened["plaintext"], PLAINTEXT, "{opened}");
    }
    assert_eq!(server.rotate(&token, &id).await.status, 204);
    let (_, third) = server.wrap(&token, &id, PLAINTEXT).await;
    assert!(third != first.to_string() && third != second.to_string());
}

/// Backs the database up while `work` waits at `step`, and lets it end.
async fn backup_amid(server: &Server, step: Step, saved: &Path, work: impl Future<Output = ()>) {
    server.store.set_fault(Some(Fault::Hold(step)));
    let save = async {
        server.store.holds().await;
        let live = server.dir.path().join("kms.db");
        backup(&live, saved, OffsetDateTime::UNIX_EPOCH).await.unwrap();
        server.store.set_fault(None);
    };
    tokio::join!(work, save);
}

/// The same server, on what was restored; and what the restore says.
async fn lose_and_restore(server: Server, dir: &TempDir, saved: &Path) -> (Server, String) {
    let live = server.dir.path().join("kms.db");
    for file in sides(&live).iter().chain([&live]).filter(|file| file.exists()) {
        fs::rename(file, dir.path().join(file.file_name().unwrap())).unwrap();
    }
    let restored = restore(&*server.vault, saved, &live, false).await.unwrap();
    (server.restart().await, restored.notes())
}

async fn adopt_in(
    server: &Server,
    dir: &TempDir,
    key: Uuid,
    version: Uuid,
    wdek: &str,
) -> Result<(), AdoptError> {
    let log = dir.path().join("adopt.log");
    let audit = Audit::open(&log, "adopt", None, server.clock.clone()).unwrap();
    let asked = Adopt { key, version, ciphertext: wdek.to_owned(), aad: Vec::new() };
    let now = OffsetDateTime::UNIX_EPOCH;
    adopt::adopt(&*server.vault, &*server.store, &audit, asked, now).await
}
