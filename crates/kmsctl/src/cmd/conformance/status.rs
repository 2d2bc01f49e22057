//! KMS v2's Status: what it says, that it says so always, and that it never waits for anything.

use std::collections::BTreeSet;
use std::time::Duration;

use super::load::{self, Load, at_once};
use super::report::Verdict;
use super::subject::{Failure, Sealed, Subject};
use super::v2::within;

/// kube-apiserver holds a mutex while it asks, and its /readyz waits for that.
const PROMPT: Duration = Duration::from_millis(100);
/// How often Status is asked to judge how fast it is.
const SAMPLES: usize = 20;
const DECRYPTS: usize = 200;
const AT_ONCE: usize = 100;
const ROUNDS: usize = 20;
/// How often anything is timed until it is fast enough. The best one counts: what is slow in each of them is the plug-in's
/// doing, what is slow in some may be the machine's.
const TRIALS: usize = 5;
const MAX_KEY_ID: usize = kms_core::limits::MAX_KEY_ID;

/// 6
pub(super) async fn healthy(subject: &Subject) -> Verdict {
    let status = subject.status().await?;
    if status.healthz != "ok" {
        let text =
            format!("healthz is {:?}, with a key_id; an error would stop writes", status.healthz);
        return Err(text.into());
    }
    within("key_id", status.key_id.len(), MAX_KEY_ID)?;
    let payload = subject.payload(32);
    let sealed = subject.encrypt(payload.clone()).await;
    let sealed = sealed.map_err(|failure| format!("Status says ok, but Encrypt: {failure}"))?;
    let opened = subject.decrypt(sealed).await;
    let opened = opened.map_err(|failure| format!("Status says ok, but Decrypt: {failure}"))?;
    if opened != payload {
        return Err("Status says ok, but Decrypt gives another payload".into());
    }
    Ok(format!("healthz ok, key_id of {} bytes, and it can seal", status.key_id.len()))
}

/// 8; last of all, so that the whole run lies between the two answers.
pub(super) async fn constant(subject: &Subject) -> Verdict {
    let now = subject.status().await?;
    if !["v2", "v2beta1"].contains(&&*now.version) {
        return Err(format!("version is {:?}, neither v2 nor v2beta1", now.version).into());
    }
    let Some(Ok(first)) = &subject.met().v2_status else {
        return Err("the first Status of the run failed, the last did not".into());
    };
    if first.version != now.version {
        let text = format!("version was {:?} and is {:?}", first.version, now.version);
        return Err(text.into());
    }
    if first.key_id != now.key_id {
        return Err(
            "key_id changed during the run (if a key was rotated just now, run again)".into()
        );
    }
    Ok(format!("version {}, the same key_id from first to last", now.version))
}

/// 9
pub(super) async fn prompt(subject: &Subject) -> Verdict {
    let idle = latency(subject).await?;
    let sealed = load::sealed(subject, DECRYPTS).await?;
    let load = Load::start(subject, sealed).await?;
    let busy = latency(subject).await;
    let decrypts = load.stop();
    let busy = busy?;
    let seen =
        format!("{idle:.1?}, and {busy:.1?} during {decrypts} Decrypts, {DECRYPTS} at a time");
    if idle.max(busy) < PROMPT { Ok(seen) } else { Err(seen.into()) }
}

/// 10
pub(super) async fn shared(subject: &Subject) -> Verdict {
    let ask = |subject: Subject| async move { subject.timed(subject.status()).await };
    let mut key_ids = BTreeSet::new();
    let mut best = Duration::MAX;
    for _ in 0..TRIALS {
        let mut times = Vec::new();
        for (status, took) in at_once(vec![subject.clone(); AT_ONCE], AT_ONCE, ask).await {
            key_ids.insert(status?.key_id);
            times.push(took);
        }
        best = best.min(most(times));
        if best < PROMPT {
            break;
        }
    }
    if key_ids.len() > 1 {
        return Err("they name different key_ids".into());
    }
    let seen = format!("{AT_ONCE} at once are answered alike, within {best:.1?}");
    if best < PROMPT { Ok(seen) } else { Err(seen.into()) }
}

/// 19
pub(super) async fn agrees(subject: &Subject) -> Verdict {
    for _ in 0..ROUNDS {
        let status = subject.status().await?;
        let Sealed { key_id, .. } = subject.encrypt(subject.payload(32)).await?;
        if status.key_id != key_id {
            let text = format!("Status says {:?}, Encrypt then {key_id:?}", status.key_id);
            return Err(text.into());
        }
    }
    Ok(format!("{ROUNDS} times the same key_id"))
}

async fn latency(subject: &Subject) -> Result<Duration, Failure> {
    let mut best = Duration::MAX;
    for _ in 0..TRIALS {
        let mut times = Vec::new();
        for _ in 0..SAMPLES {
            let (status, took) = subject.timed(subject.status()).await;
            status?;
            times.push(took);
            // Enough to know, and a plug-in this slow keeps the operator waiting long enough.
            if times.iter().filter(|took| **took >= PROMPT).count() > SAMPLES / 10 {
                break;
            }
        }
        best = best.min(most(times));
        if best < PROMPT {
            break;
        }
    }
    Ok(best)
}

/// What nine of ten stay below.
fn most(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() * 9 / 10).copied().unwrap_or_default()
}
