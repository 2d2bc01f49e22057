//! A store that fails when told to: before it has done something, or after it has but before anybody hears of it.

use async_trait::async_trait;
use kms_core::audit::Link;
use kms_hsm::CheckValue;
use kms_server::policy::{ApiKeySecret, Caller};
use kms_server::store::{
    Access, Adopted, ApiKey, ApiKeyHash, Custody, FirstContent, Instance, Key, KnownVersion,
    NewKey, NewSecret, Page, Policy, Profile, Reserved, ServiceId, SigningKey, SqliteStore, Store,
    StoreError, Trail, Version, Wanted,
};
use time::OffsetDateTime;
use tokio::sync::watch;
use uuid::Uuid;

/// The steps at which a crash is worth a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Probe,
    BeginKey,
    KeepCheckValue,
    ActivateKey,
    BeginVersion,
    ActivateVersion,
    SuspendKey,
    DeleteKey,
    BeginPurge,
    FinishPurge,
    RotateApiKey,
    RevokeApiKey,
    ReserveUses,
    KeepAuditKey,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Before(Step),
    After(Step),
    /// Waits until another fault or none is set.
    Hold(Step),
    /// Nothing can be read or written.
    Away,
}

#[derive(Debug)]
pub(crate) struct FaultyStore {
    store: SqliteStore,
    fault: watch::Sender<Option<Fault>>,
    held: watch::Sender<bool>,
}

impl FaultyStore {
    pub(crate) fn new(store: SqliteStore) -> Self {
        FaultyStore { store, fault: watch::Sender::new(None), held: watch::Sender::new(false) }
    }

    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        self.fault.send_replace(fault);
    }

    /// Returns once somebody waits at the step that is held.
    pub(crate) async fn holds(&self) {
        self.held.subscribe().wait_for(|held| *held).await.unwrap();
    }

    fn reach(&self, fault: Fault) -> Result<(), StoreError> {
        let now = *self.fault.borrow();
        if now == Some(fault) || now == Some(Fault::Away) {
            return Err(StoreError::Unavailable(format!("switched off: {fault:?}")));
        }
        Ok(())
    }

    fn read(&self) -> Result<&SqliteStore, StoreError> {
        self.reach(Fault::Away)?;
        Ok(&self.store)
    }

    async fn step<T>(
        &self,
        step: Step,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        self.reach(Fault::Before(step))?;
        if *self.fault.borrow() == Some(Fault::Hold(step)) {
            self.held.send_replace(true);
            let _ =
                self.fault.subscribe().wait_for(|fault| *fault != Some(Fault::Hold(step))).await;
        }
        let done = work.await?;
        self.reach(Fault::After(step))?;
        Ok(done)
    }
}

#[async_trait]
impl Access for FaultyStore {
    async fn add_service_id(&self, service_id: &ServiceId) -> Result<(), StoreError> {
        self.read()?.add_service_id(service_id).await
    }

    async fn service_ids(&self) -> Result<Vec<ServiceId>, StoreError> {
        self.read()?.service_ids().await
    }

    async fn service_id(&self, id: Uuid) -> Result<Option<ServiceId>, StoreError> {
        self.read()?.service_id(id).await
    }

    async fn remove_service_id(&self, id: Uuid) -> Result<bool, StoreError> {
        self.read()?.remove_service_id(id).await
    }

    async fn add_policy(&self, policy: &Policy) -> Result<(), StoreError> {
        self.read()?.add_policy(policy).await
    }

    async fn remove_policy(&self, id: Uuid) -> Result<bool, StoreError> {
        self.read()?.remove_policy(id).await
    }

    async fn add_api_key(&self, key: &ApiKey, hash: &ApiKeyHash) -> Result<(), StoreError> {
        self.read()?.add_api_key(key, hash).await
    }

    async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        self.read()?.api_keys().await
    }

    async fn lock_api_key(&self, id: Uuid, at: Option<OffsetDateTime>) -> Result<bool, StoreError> {
        self.read()?.lock_api_key(id, at).await
    }

    async fn rotate_api_key(&self, id: Uuid, new: &NewSecret) -> Result<bool, StoreError> {
        self.step(Step::RotateApiKey, self.store.rotate_api_key(id, new)).await
    }

    async fn revoke_api_key(&self, id: Uuid, at: OffsetDateTime) -> Result<bool, StoreError> {
        self.step(Step::RevokeApiKey, self.store.revoke_api_key(id, at)).await
    }

    async fn add_profile(&self, profile: &Profile) -> Result<(), StoreError> {
        self.read()?.add_profile(profile).await
    }

    async fn profiles(&self) -> Result<Vec<Profile>, StoreError> {
        self.read()?.profiles().await
    }

    async fn remove_profile(&self, id: Uuid) -> Result<bool, StoreError> {
        self.read()?.remove_profile(id).await
    }

    async fn caller_by_hash(
        &self,
        hash: &ApiKeyHash,
        now: OffsetDateTime,
    ) -> Result<Option<Caller>, StoreError> {
        self.read()?.caller_by_hash(hash, now).await
    }

    async fn caller(
        &self,
        service_id: Uuid,
        secret: &ApiKeySecret,
        now: OffsetDateTime,
    ) -> Result<Option<Caller>, StoreError> {
        self.read()?.caller(service_id, secret, now).await
    }

    async fn caller_by_profile(&self, id: Uuid) -> Result<Option<Caller>, StoreError> {
        self.read()?.caller_by_profile(id).await
    }
}

#[async_trait]
impl Trail for FaultyStore {
    async fn audit_head(&self, node: &str) -> Result<Option<Link>, StoreError> {
        self.read()?.audit_head(node).await
    }

    async fn keep_audit_head(&self, node: &str, head: Link) -> Result<(), StoreError> {
        self.read()?.keep_audit_head(node, head).await
    }

    async fn audit_key(&self) -> Result<Option<SigningKey>, StoreError> {
        self.read()?.audit_key().await
    }

    async fn keep_audit_key(&self, key: &SigningKey) -> Result<SigningKey, StoreError> {
        self.step(Step::KeepAuditKey, self.read()?.keep_audit_key(key)).await
    }

    async fn replace_audit_key(&self, key: &SigningKey) -> Result<(), StoreError> {
        self.read()?.replace_audit_key(key).await
    }
}

#[async_trait]
impl Store for FaultyStore {
    async fn probe(&self) -> Result<(), StoreError> {
        self.step(Step::Probe, self.read()?.probe()).await
    }

    async fn close(&self) {
        self.store.close().await;
    }

    async fn initialise(&self, first: &FirstContent) -> Result<(), StoreError> {
        self.read()?.initialise(first).await
    }

    async fn signing_key(&self) -> Result<Option<SigningKey>, StoreError> {
        self.read()?.signing_key().await
    }

    async fn add_signing_key(&self, key: &SigningKey) -> Result<(), StoreError> {
        self.read()?.add_signing_key(key).await
    }

    async fn add_instance(&self, instance: &Instance) -> Result<(), StoreError> {
        self.read()?.add_instance(instance).await
    }

    async fn instances(&self) -> Result<Vec<Instance>, StoreError> {
        self.read()?.instances().await
    }

    async fn instance_exists(&self, id: Uuid) -> Result<bool, StoreError> {
        self.read()?.instance_exists(id).await
    }

    async fn begin_key(&self, key: &NewKey) -> Result<(), StoreError> {
        self.step(Step::BeginKey, self.store.begin_key(key)).await
    }

    async fn activate_key(&self, key: Uuid, version: Uuid) -> Result<(), StoreError> {
        self.step(Step::ActivateKey, self.store.activate_key(key, version)).await
    }

    async fn begin_version(&self, key: Uuid, version: &Version) -> Result<(), StoreError> {
        self.step(Step::BeginVersion, self.store.begin_version(key, version)).await
    }

    async fn reserve_gcm_uses(
        &self,
        version: Uuid,
        uses: u64,
        limit: u64,
    ) -> Result<Reserved, StoreError> {
        let reserve = self.read()?.reserve_gcm_uses(version, uses, limit);
        self.step(Step::ReserveUses, reserve).await
    }

    async fn return_gcm_uses(&self, uses: &[(Uuid, u64)]) -> Result<(), StoreError> {
        self.read()?.return_gcm_uses(uses).await
    }

    async fn activate_version(
        &self,
        key: Uuid,
        version: Uuid,
        at: OffsetDateTime,
        unless_since: Option<OffsetDateTime>,
    ) -> Result<(), StoreError> {
        let activate = self.store.activate_version(key, version, at, unless_since);
        self.step(Step::ActivateVersion, activate).await
    }

    async fn key(&self, instance: Uuid, id: Uuid) -> Result<Option<Key>, StoreError> {
        self.read()?.key(instance, id).await
    }

    async fn keys(
        &self,
        instance: Uuid,
        wanted: &Wanted,
        page: Page,
    ) -> Result<Vec<Key>, StoreError> {
        self.read()?.keys(instance, wanted, page).await
    }

    async fn count_keys(&self, instance: Uuid, wanted: &Wanted) -> Result<u64, StoreError> {
        self.read()?.count_keys(instance, wanted).await
    }

    async fn versions(&self, instance: Uuid, key: Uuid) -> Result<Vec<Version>, StoreError> {
        self.read()?.versions(instance, key).await
    }

    async fn suspend_key(
        &self,
        instance: Uuid,
        id: Uuid,
        suspended: bool,
    ) -> Result<bool, StoreError> {
        self.step(Step::SuspendKey, self.store.suspend_key(instance, id, suspended)).await
    }

    async fn delete_key(
        &self,
        instance: Uuid,
        id: Uuid,
        at: OffsetDateTime,
        by: &str,
    ) -> Result<bool, StoreError> {
        self.step(Step::DeleteKey, self.store.delete_key(instance, id, at, by)).await
    }

    async fn begin_purge(
        &self,
        instance: Uuid,
        id: Uuid,
        at: OffsetDateTime,
    ) -> Result<(), StoreError> {
        self.step(Step::BeginPurge, self.store.begin_purge(instance, id, at)).await
    }

    async fn finish_purge(
        &self,
        id: Uuid,
        versions: &[Uuid],
        at: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        self.step(Step::FinishPurge, self.store.finish_purge(id, versions, at)).await
    }
}

#[async_trait]
impl Custody for FaultyStore {
    async fn known_versions(&self) -> Result<Vec<KnownVersion>, StoreError> {
        self.read()?.known_versions().await
    }

    async fn most_gcm_uses(&self) -> Result<u64, StoreError> {
        self.read()?.most_gcm_uses().await
    }

    async fn next_expiry(&self, now: OffsetDateTime) -> Result<Option<OffsetDateTime>, StoreError> {
        self.read()?.next_expiry(now).await
    }

    async fn keep_check_value(&self, version: Uuid, value: CheckValue) -> Result<(), StoreError> {
        self.step(Step::KeepCheckValue, self.store.keep_check_value(version, value)).await
    }

    async fn adopt_version(&self, adopted: &Adopted) -> Result<(), StoreError> {
        self.read()?.adopt_version(adopted).await
    }

    async fn token_serial(&self) -> Result<Option<String>, StoreError> {
        self.read()?.token_serial().await
    }

    async fn keep_token_serial(&self, serial: &str) -> Result<(), StoreError> {
        self.read()?.keep_token_serial(serial).await
    }
}
