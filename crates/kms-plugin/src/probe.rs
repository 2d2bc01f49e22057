//! The background probe: one wrap and one unwrap every PROBE_INTERVAL_IN_SECONDS. It alone decides readiness,
//! finds a new CRK version before kube-apiserver does, and refreshes DEKs before a caller has to wait for them.
//!
//! No request ever waits for a probe.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use kms_daemon::lifecycle::Shutdown;

use crate::dek_cache::{CrkName, refresh_age};
use crate::keys::{Asked, Crk, NotAdopted, Wrapped};
use crate::provider::{self, NewDek};
use crate::restored::Opens;
use crate::sealer::{Call, Sealer, SealerError};

/// As long as kube-apiserver would wait.
const DEADLINE: Duration = Duration::from_secs(3);
/// While the key service does not answer it is asked at least this often, so that recovery is seen soon.
const WHILE_NOT_READY: Duration = Duration::from_secs(5);
/// Between two probes at least half of this passes, however many requests want one.
const BETWEEN_WANTED: Duration = Duration::from_secs(1);
/// So many DEKs are refreshed between two probes: news of the service must not wait for all of them.
const REFRESHED_AT_ONCE: usize = 256;
/// And for so long.
const REFRESHING: Duration = Duration::from_secs(5);

/// Probes at once, then every `interval`, sooner while it fails or when a request found out something new.
pub async fn run(sealer: Arc<Sealer>, interval: Duration, shutdown: Shutdown) {
    loop {
        let ready = tokio::select! {
            ready = probe(&sealer) => ready && !sealer.keys().doubts(),
            () = shutdown.requested() => return,
        };
        let pause = pause(&sealer, ready, interval);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = wanted(&sealer) => {}
            () = shutdown.requested() => return,
        }
    }
}

async fn wanted(sealer: &Sealer) {
    tokio::time::sleep(BETWEEN_WANTED / 2).await;
    sealer.probe_wanted().await;
    let random = &sealer.tools().random;
    tokio::time::sleep(random.between(Duration::ZERO, BETWEEN_WANTED / 2)).await;
}

/// Somewhat less than what is set, and by chance: plug-ins that began together, or met in an outage, drift apart.
fn pause(sealer: &Sealer, ready: bool, interval: Duration) -> Duration {
    let random = &sealer.tools().random;
    if ready {
        random.between(interval - interval / 4, interval)
    } else {
        let longest = interval.min(WHILE_NOT_READY);
        random.between(longest / 2, longest)
    }
}

/// One round; true if a DEK can be wrapped and unwrapped now.
pub async fn probe(sealer: &Sealer) -> bool {
    let call = Call { uid: probe_uid(sealer), trace: None, deadline: DEADLINE };
    let asked = sealer.keys().to_probe();
    let proven = try_out(sealer, &asked, &call).await;
    if proven.is_err() {
        try_fallback(sealer, &call).await;
    }
    let unwraps = proven.is_ok();
    sealer.tools().metrics.probe(unwraps);
    // Before anything is waited for: what was adopted is reported by now.
    report(sealer, proven);
    watch(sealer, unwraps.then_some(&asked.crk.name), &call).await;
    refresh(sealer, &call).await;
    expire(sealer);
    sealer.ready().is_ok()
}

/// The configuration's CRK does not wrap. If the one before still seals, Status depends on that one.
async fn try_fallback(sealer: &Sealer, call: &Call) {
    let asked = {
        let keys = sealer.keys();
        keys.clings().then(|| keys.to_seal())
    };
    if let Some(asked) = asked {
        let proven = try_out(sealer, &asked, call).await;
        sealer.keys().set_fallback(proven);
    }
}

async fn try_out(sealer: &Sealer, asked: &Asked, call: &Call) -> Result<(), SealerError> {
    let proof = prove(&asked.crk, call).await;
    let proof = sealer.learn(&asked.crk, proof)?;
    adopt(sealer, asked, &proof, call).await
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
        let backend = crk.service.backend();
        let text = format!("the {backend} unwraps a DEK to something else than it wrapped");
        return Err(provider::Error::Unusable { text });
    }
    Ok(Proof { new, is_behind: again.active_version.is_some() })
}

/// What was proven need not be what seals: a replica lags, or the service was restored from a backup.
async fn adopt(
    sealer: &Sealer,
    asked: &Asked,
    proof: &Proof,
    call: &Call,
) -> Result<(), SealerError> {
    if proof.is_behind
        && sealer.status().is_ok()
        && sealer.opens_what_seals(call).await? == Opens::Yes
    {
        return Ok(());
    }
    match sealer.take_over(asked, &proof.new, call).await {
        // The key_id changed during this probe: what it found is true, but no news.
        Ok(_) | Err(NotAdopted::Stale) => Ok(()),
        Err(replaced @ NotAdopted::Replaced { .. }) => {
            let opens = matches!(sealer.opens_what_seals(call).await?, Opens::Yes | Opens::NotYet);
            sealer.keys().outlast(replaced.into(), opens, sealer.now())
        }
        Err(error @ NotAdopted::KeyId(_)) => Err(error.into()),
    }
}

/// Asks those whose DEKs are held and of which this round has not shown that they unwrap: previous CRKs, and one that no
/// longer wraps. Else a DEK would outlive the access to it until it is due to be refreshed, most of an hour.
async fn watch(sealer: &Sealer, proven: Option<&CrkName>, call: &Call) {
    for (name, wdek) in sealer.deks().latest_of_each() {
        if proven == Some(&name) {
            continue;
        }
        let Some(crk) = sealer.keys().named(&name) else { continue };
        let answer = crk.service.unwrap(&wdek, call).await;
        // What it answers is not kept: a DEK that nobody uses is to end.
        let _only_whether_it_is_refused = sealer.learn(&crk, answer);
    }
}

async fn refresh(sealer: &Sealer, call: &Call) {
    let (age, sealing) = {
        let keys = sealer.keys();
        let age = refresh_age(keys.policy().lifetime, &sealer.tools().random);
        (age, keys.to_refresh(sealer.now(), age))
    };
    let mut round = Round {
        sealer,
        call,
        age,
        end: sealer.now() + REFRESHING,
        left: REFRESHED_AT_ONCE,
        refreshed: 0,
        away: HashSet::new(),
    };
    if let Some(Wrapped { crk, wdek, .. }) = sealing {
        match sealer.ask_again(&crk, &wdek, call).await {
            Err(provider::Error::NotAuthentic) => doubt(sealer, &wdek),
            Err(error) if error.is_outage() => drop(round.away.insert(crk.name.clone())),
            _ => {}
        }
    }
    while round.meets_one_that_is_away().await {}
    if round.is_over() && round.refreshed > 0 {
        sealer.want_probe();
    }
}

/// The DEKs that are refreshed between two probes.
struct Round<'a> {
    sealer: &'a Sealer,
    call: &'a Call,
    age: Duration,
    end: Duration,
    left: usize,
    refreshed: usize,
    /// Each CRK may have a service of its own. The turns of the DEKs of one that is away are others'.
    away: HashSet<CrkName>,
}

impl Round<'_> {
    fn is_over(&self) -> bool {
        self.left == 0 || self.sealer.now() >= self.end
    }

    /// True if there may be more of other services.
    async fn meets_one_that_is_away(&mut self) -> bool {
        let is_asked = |crk: &CrkName| !self.away.contains(crk);
        let due = self.sealer.deks().due(self.sealer.now(), self.age, self.left, is_asked);
        for (id, wdek) in due {
            if self.is_over() {
                return false;
            }
            let Some(crk) = self.sealer.keys().named(&id.crk) else {
                return self.away.insert(id.crk);
            };
            self.left -= 1;
            self.sealer.deks().asked(&id, self.sealer.now());
            match self.sealer.ask_again(&crk, &wdek, self.call).await {
                Ok(()) => self.refreshed += 1,
                Err(error) if error.is_outage() => return self.away.insert(id.crk),
                Err(_) => {}
            }
        }
        false
    }
}

/// What seals was not opened, and the service wraps as it should.
fn doubt(sealer: &Sealer, wdek: &[u8]) {
    if sealer.keys().doubt(wdek, sealer.now()) {
        tracing::warn!("What seals was not opened once; it is asked for again.");
    }
}

fn expire(sealer: &Sealer) {
    let now = sealer.now();
    let mut keys = sealer.keys();
    keys.expire(now);
    sealer.deks().expire(now, keys.policy().lifetime);
}

fn report(sealer: &Sealer, found: Result<(), SealerError>) {
    let cause = found.as_ref().err().cloned();
    let backend = {
        let mut keys = sealer.keys();
        if !keys.set_ready(found) {
            return;
        }
        keys.backend()
    };
    match cause {
        None => tracing::info!("The {backend} wraps and unwraps: ready."),
        Some(cause) => {
            tracing::warn!("The {backend} does not wrap and unwrap: not ready: {cause}")
        }
    }
}

/// Names a probe in the logs of both sides.
fn probe_uid(sealer: &Sealer) -> String {
    let name = sealer.tools().random.bytes().map_or(0, u64::from_be_bytes);
    format!("probe-{name:016x}")
}
