//! What the database is asked with every request, kept in memory for as long as nothing was committed.
//!
//! SQLite numbers its transactions in the header of the WAL index, a file that all processes on one database share
//! (sqlite.org/walformat.html, section 2.1), and throws away what it has in memory itself when that header has changed.
//! The same comparison here is one read of a file's first bytes, where a query goes to another thread and back. So a
//! revocation counts with the next request, on this server and on every other: nothing that is returned from here is
//! older than the last commit before the question.
//!
//! Where there is no such file, or it looks otherwise, everything is asked of the database.

use crate::store::StoreError;
use sqlx::sqlite::SqlitePool;
use std::collections::HashMap;
use std::fs::File;
use std::hash::Hash;
use std::mem::ManuallyDrop;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// More than this is forgotten together: a cache of the hot ones needs no order among them.
const MOST: usize = 8192;
const HEADER: usize = 48;
/// The only version of the WAL index that SQLite has ever written.
const VERSION: [u8; 4] = 3_007_000_u32.to_ne_bytes();
/// Where the header says that it is filled in.
const IS_FILLED: usize = 12;

/// What the WAL index says of the last commit.
type Header = [u8; HEADER];

/// The WAL index of a database, if it has one.
///
/// Never closed: to close a descriptor ends all POSIX locks that this process has on the file, and SQLite's are among
/// them.
#[derive(Debug)]
pub(super) struct WalIndex(Option<ManuallyDrop<File>>);

/// Rows by what they were asked for with.
#[derive(Debug)]
pub(super) struct Recent<K, V>(Mutex<Kept<K, V>>);

#[derive(Debug)]
struct Kept<K, V> {
    /// All of it was read while this was the last commit, or a later one.
    at: Option<Header>,
    rows: HashMap<K, V>,
}

impl WalIndex {
    /// That of `database`, which is open, and is no link: the file beside it, whoever left it there.
    fn of(database: &Path) -> WalIndex {
        let mut path = database.as_os_str().to_owned();
        path.push("-shm");
        WalIndex(File::open(path).ok().map(ManuallyDrop::new))
    }

    /// The same, where a commit of our own shows in it. One that something else left there under that name never changes,
    /// and no revocation would ever be heard of again.
    ///
    /// # Errors
    /// Nothing can be written to the database behind `pool`.
    pub(super) async fn proven(
        pool: &SqlitePool,
        database: &Path,
    ) -> Result<WalIndex, sqlx::Error> {
        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
        let index = WalIndex::of(database);
        let before = index.header();
        // The number that is there: it is written again, and nothing changes.
        sqlx::query("PRAGMA user_version = 0").execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(if index.header() == before { WalIndex::none() } else { index })
    }

    pub(super) fn none() -> WalIndex {
        WalIndex(None)
    }

    /// The header, written twice so that a reader knows whether it is whole. `None`: nobody can say what was last.
    fn header(&self) -> Option<Header> {
        let file = self.0.as_ref()?;
        // One that was unlinked is not that of the database any more, and never changes again.
        if file.metadata().ok()?.nlink() == 0 {
            return None;
        }
        let mut bytes = [0; 2 * HEADER];
        file.read_exact_at(&mut bytes, 0).ok()?;
        let (one, two) = bytes.split_first_chunk::<HEADER>()?;
        let whole = one == two && one.starts_with(&VERSION) && one.get(IS_FILLED) == Some(&1);
        whole.then_some(*one)
    }
}

impl<K: Eq + Hash, V: Clone> Recent<K, V> {
    pub(super) fn new() -> Self {
        Recent(Mutex::new(Kept { at: None, rows: HashMap::new() }))
    }

    /// What `ask` would say now.
    ///
    /// # Errors
    /// Those of `ask`.
    pub(super) async fn get(
        &self,
        index: &WalIndex,
        key: K,
        ask: impl Future<Output = Result<Option<V>, StoreError>>,
    ) -> Result<Option<V>, StoreError> {
        // Looked at before the question: what is committed in between may be in the answer, and is never missed.
        let Some(now) = index.header() else { return ask.await };
        if let Some(row) = self.at(now).rows.get(&key) {
            return Ok(Some(row.clone()));
        }
        let found = ask.await?;
        if let Some(row) = &found {
            let mut kept = self.at(now);
            if kept.rows.len() >= MOST {
                kept.rows.clear();
            }
            kept.rows.insert(key, row.clone());
        }
        Ok(found)
    }

    /// What is known since that commit: nothing, where another one was the last.
    fn at(&self, header: Header) -> MutexGuard<'_, Kept<K, V>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.at != Some(header) {
            kept.at = Some(header);
            kept.rows.clear();
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::SqliteStore;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A database's WAL index, and how often the database is asked.
    struct Double {
        dir: tempfile::TempDir,
        index: WalIndex,
        recent: Recent<u8, u32>,
        asked: AtomicU32,
    }

    impl Double {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let double = Double {
                index: WalIndex::none(),
                recent: Recent::new(),
                asked: AtomicU32::new(0),
                dir,
            };
            double.commit(1);
            let index = WalIndex::of(&double.dir.path().join("kms.db"));
            Double { index, ..double }
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join("kms.db-shm")
        }

        fn commit(&self, number: u8) {
            let header = header(number);
            std::fs::write(self.path(), [header, header].concat()).unwrap();
        }

        /// Each answer is another one.
        async fn get(&self, key: u8) -> Option<u32> {
            let ask = async { Ok(Some(self.asked.fetch_add(1, Ordering::Relaxed))) };
            self.recent.get(&self.index, key, ask).await.unwrap()
        }
    }

    fn header(number: u8) -> Header {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&VERSION);
        header[8] = number;
        header[IS_FILLED] = 1;
        header
    }

    #[tokio::test]
    async fn it_is_asked_once_after_each_commit() {
        let double = Double::new();
        assert_eq!([double.get(1).await, double.get(1).await], [Some(0), Some(0)]);
        assert_eq!([double.get(2).await, double.get(1).await], [Some(1), Some(0)]);
        double.commit(2);
        assert_eq!([double.get(1).await, double.get(2).await], [Some(2), Some(3)]);
        assert_eq!([double.get(1).await, double.get(2).await], [Some(2), Some(3)]);
    }

    #[tokio::test]
    async fn an_answer_that_a_commit_overtakes_is_not_kept_beyond_it() {
        let double = Double::new();
        let ask = async {
            double.commit(2);
            Ok(Some(100))
        };
        assert_eq!(double.recent.get(&double.index, 1, ask).await.unwrap(), Some(100));
        assert_eq!(double.get(1).await, Some(0), "read before the commit");
    }

    #[tokio::test]
    async fn what_is_not_there_is_looked_for_each_time() {
        let double = Double::new();
        let nothing = async { Ok(None) };
        assert_eq!(double.recent.get(&double.index, 1, nothing).await.unwrap(), None);
        assert_eq!(double.get(1).await, Some(0));
    }

    #[tokio::test]
    async fn without_a_header_that_is_whole_nothing_is_kept() {
        let double = Double::new();
        let [good, mut other, mut empty] = [header(3); 3];
        other[0] ^= 1;
        empty[IS_FILLED] = 0;
        for bytes in [
            [good, header(4)].concat(),
            [other, other].concat(),
            [empty, empty].concat(),
            good.to_vec(),
            Vec::new(),
        ] {
            std::fs::write(double.path(), bytes).unwrap();
            assert_ne!(double.get(1).await, double.get(1).await);
        }
        double.commit(5);
        assert_eq!(double.get(1).await, double.get(1).await);
        std::fs::remove_file(double.path()).unwrap();
        double.commit(5);
        assert_ne!(double.get(1).await, double.get(1).await, "it is another file");
    }

    #[tokio::test]
    async fn a_wal_index_that_no_commit_shows_in_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("kms.db");
        let store = SqliteStore::open(&file, true).await.unwrap();
        assert!(store.wal_index.header().is_some(), "its own is");
        std::fs::copy(dir.path().join("kms.db-shm"), dir.path().join("other.db-shm")).unwrap();
        let other = dir.path().join("other.db");
        assert!(WalIndex::of(&other).header().is_some(), "it looks well");
        assert!(WalIndex::proven(&store.pool, &other).await.unwrap().header().is_none());
    }

    #[tokio::test]
    async fn it_does_not_grow_for_ever() {
        let double = Double::new();
        let recent = Recent::new();
        for key in 0..3 * MOST {
            recent.get(&double.index, key, async { Ok(Some(())) }).await.unwrap();
        }
        assert!(recent.0.lock().unwrap().rows.len() <= MOST);
    }
}
