//! The background probe: one wrap and one unwrap every PROBE_INTERVAL_IN_SECONDS. It alone decides readiness,
//! finds a new CRK version before kube-apiserver does, and refreshes DEKs before a caller has to wait for them.
//!
//! No request ever waits for a probe.

use std::sync::Arc;
use std::time::Duration;

use kms_daemon::lifecycle::Shutdown;

use crate::keys::{Asked, Crk, NotAdopted, Wrapped};
use crate::provider::{self, NewDek};
use crate::sealer::{Call, Sealer, SealerError};

/// As long as kube-apiserver would wait.
const DEADLINE: Duration = Duration::from_secs(3);
/// While the key service does not answer it is asked this often, so that recovery is seen soon.
const WHILE_NOT_READY: Duration = Duration::from_secs(5);

/// Probes at once, then every `interval`, sooner while it fails or when a request found out something new.
pub async fn run(sealer: Arc<Sealer>, interval: Duration, shutdown: Shutdown) {
    loop {
        let ready = tokio::select! {
            ready = probe(&sealer) => ready,
            () = shutdown.requested() => return,
        };
        let pause = if ready { interval } else { interval.min(WHILE_NOT_READY) };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = sealer.probe_wanted() => {}
            () = shutdown.requested() => return,
        }
    }
}

/// One round; true if a DEK can be wrapped and unwrapped now.
pub async fn probe(sealer: &Sealer) -> bool {
    let call = Call { uid: probe_uid(sealer), deadline: DEADLINE };
    let asked = sealer.keys().to_probe();
    let proven = prove(&asked.crk, &call).await;
    let proven = sealer.learn(&asked.crk, proven).and_then(|proof| adopt(sealer, &asked, &proof));
    refresh(sealer, &call).await;
    expire(sealer);
    let ready = proven.is_ok();
    sealer.tools().metrics.probe(ready);
    report(sealer, proven);
    ready
}

struct Proof {
    new: NewDek,
    /// Wrapped by a replica that has not heard of a rotation which the unwrapping one knows.
    is_behind: bool,
}

/// Wraps a new DEK and unwraps it again: what comes back must be the same.
async fn prove(crk: &Crk, call: &Call) -> Result<Proof, provider::Error> {
    let new = crk.service.wrap_new(call).await?;
    let again = crk.service.unwrap(&new.wdek, call).await?;
    if again.dek.as_bytes() != new.dek.as_bytes() {
        let text = "the key service unwraps a DEK to something else than it wrapped".into();
        return Err(provider::Error::Unusable { text });
    }
    Ok(Proof { new, is_behind: again.active_version.is_some() })
}

fn adopt(sealer: &Sealer, asked: &Asked, proof: &Proof) -> Result<(), SealerError> {
    if proof.is_behind && sealer.status().is_ok() {
        return Ok(());
    }
    match sealer.adopt(asked, &proof.new) {
        // The key_id changed during this probe: what it found is true, but no news.
        Ok(_) | Err(NotAdopted::Stale) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

async fn refresh(sealer: &Sealer, call: &Call) {
    let (policy, sealing) = {
        let keys = sealer.keys();
        (keys.policy(), keys.to_refresh(sealer.now()))
    };
    if let Some(Wrapped { crk, wdek, .. }) = sealing
        && !refresh_one(sealer, &crk, &wdek, call).await
    {
        return;
    }
    for (id, wdek) in sealer.deks().due(sealer.now(), policy.lifetime) {
        let Some(crk) = sealer.keys().named(&id.crk) else { continue };
        if !refresh_one(sealer, &crk, &wdek, call).await {
            return;
        }
    }
}

/// False if the service is away, so that the rest need not be tried now.
async fn refresh_one(sealer: &Sealer, crk: &Crk, wdek: &Arc<[u8]>, call: &Call) -> bool {
    let answer = crk.service.unwrap(wdek, call).await;
    let away = answer.as_ref().is_err_and(provider::Error::is_outage);
    if let Ok(unwrapped) = sealer.learn(crk, answer) {
        sealer.keys().confirm(wdek, &unwrapped.dek, sealer.now());
        sealer.keep(crk, wdek.clone(), &unwrapped.dek);
    }
    !away
}

fn expire(sealer: &Sealer) {
    let now = sealer.now();
    let mut keys = sealer.keys();
    keys.expire(now);
    sealer.deks().expire(now, keys.policy().lifetime);
}

fn report(sealer: &Sealer, found: Result<(), SealerError>) {
    let cause = found.as_ref().err().cloned();
    if !sealer.keys().set_ready(found) {
        return;
    }
    match cause {
        None => tracing::info!("The key service wraps and unwraps: ready."),
        Some(cause) => {
            tracing::warn!("The key service does not wrap and unwrap: not ready: {cause}")
        }
    }
}

/// Names a probe in the logs of both sides.
fn probe_uid(sealer: &Sealer) -> String {
    let name = sealer.tools().random.bytes().map_or(0, u64::from_be_bytes);
    format!("probe-{name:016x}")
}
