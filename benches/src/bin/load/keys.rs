//! Keys without a server: wrapping through kms-hsm's vault alone, a database full of keys that no HSM has, and one whose
//! keys are in the HSM.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kms_core::clock::{Clock, SystemClock};
use kms_core::secret::SecretBytes;
use kms_hsm::Vault as _;
use kms_server::config::Config;
use kms_server::init::open_vault;
use kms_server::store::{Custody as _, NewKey, SqliteStore, Store};
use serde::Deserialize;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::Failure;
use crate::figures::Figures;

/// Wraps with the first key of the token, from as many tasks, each as soon as it has its answer.
#[derive(Deserialize)]
pub(crate) struct Vault {
    /// kms-server's: the same library, token, PIN and sessions.
    config: PathBuf,
    callers: usize,
    seconds: u64,
}

impl Vault {
    pub(crate) async fn run(self) -> Result<Figures, Failure> {
        let config = Config::load(&self.config)?;
        let vault = Arc::new(open_vault(&config.hsm, config.operations.wdek_version)?);
        let key = *vault.versions().await?.first().ok_or("the token holds no key")?;
        let clock = SystemClock::new();
        let end = clock.now() + Duration::from_secs(self.seconds);
        let began = clock.now();
        let mut callers = JoinSet::new();
        for _ in 0..self.callers {
            let vault = vault.clone();
            callers.spawn(async move {
                let mut figures = Figures::default();
                while clock.now() < end {
                    let before = clock.now();
                    let wrapped = vault.wrap(key, b"bench", SecretBytes::new(vec![7; 32])).await;
                    let status = if wrapped.is_ok() { 200 } else { 0 };
                    figures.count(status, 200, clock.now() - before);
                }
                figures
            });
        }
        let mut all = Figures::default();
        for figures in callers.join_all().await {
            all.add(figures);
        }
        all.took(clock.now() - began);
        Ok(all)
    }
}

/// Adds keys to the one instance.
#[derive(Deserialize)]
pub(crate) struct Fill {
    /// kms-server's: the same database.
    config: PathBuf,
    instance: Uuid,
    keys: u32,
}

impl Fill {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let config = Config::load(&self.config)?;
        let store = SqliteStore::open(&config.server.database, false).await?;
        let clock = SystemClock::new();
        for number in 0..self.keys {
            let key =
                new_key(self.instance, format!("of the database only {number}"), clock.wall());
            store.begin_key(&key).await?;
            store.activate_key(key.id, key.version).await?;
        }
        store.close().await;
        Ok(())
    }
}

/// Adds keys to the one instance and to the token, in the order in which kms-server does it.
#[derive(Deserialize)]
pub(crate) struct Make {
    /// kms-server's: the same database, library and token.
    config: PathBuf,
    instance: Uuid,
    keys: u32,
}

impl Make {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let config = Config::load(&self.config)?;
        let store = SqliteStore::open(&config.server.database, false).await?;
        let vault = open_vault(&config.hsm, config.operations.wdek_version)?;
        let clock = SystemClock::new();
        for number in 0..self.keys {
            let key = new_key(self.instance, format!("made for many {number}"), clock.wall());
            store.begin_key(&key).await?;
            vault.create_version(key.version).await?;
            store.keep_check_value(key.version, vault.check_value(key.version).await?).await?;
            store.activate_key(key.id, key.version).await?;
        }
        store.close().await;
        Ok(())
    }
}

fn new_key(instance: Uuid, name: String, at: SystemTime) -> NewKey {
    NewKey {
        id: Uuid::new_v4(),
        instance,
        name,
        description: None,
        tags: Vec::new(),
        imported: false,
        expires_at: None,
        created_at: at.into(),
        created_by: "bench".to_owned(),
        version: Uuid::new_v4(),
    }
}
