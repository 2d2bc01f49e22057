//! A comparison of HSM and database in words, key by key: for the log, for people, for programs.

use crate::reconcile::{Comparison, Pair, SignerFound, Standing, TOKENS};
use crate::store::KnownVersion;
use kms_hsm::CheckValue;
use serde_json::{Value, json};
use std::fmt::Write;

/// What came of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// HSM and database hold the same keys.
    Same,
    /// There is something that nothing uses, or misses. Nothing is lost.
    Leftovers,
    /// Something is missing, or is another key: restore the HSM's backup.
    Bad,
}

impl Ending {
    /// The exit code.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Ending::Same => 0,
            Ending::Leftovers => 3,
            Ending::Bad => 4,
        }
    }
}

/// With what a command ends that has found this.
#[must_use]
pub fn ending(found: &Comparison) -> Ending {
    match (found.is_bad(), found.has_leftovers()) {
        (true, _) => Ending::Bad,
        (false, true) => Ending::Leftovers,
        (false, false) => Ending::Same,
    }
}

/// Says into the log what is not as it should be.
pub fn log(found: &Comparison) {
    for (at, standing) in &found.versions {
        let what = format!("version {} of key {} in instance {}", at.version, at.key, at.instance);
        match standing {
            Standing::Good | Standing::Unproven(_) => {}
            Standing::Lost | Standing::OtherKey => {
                tracing::error!("{what}: {}", meaning(*standing));
            }
            Standing::Gone | Standing::Unfinished | Standing::NeverMade | Standing::Purging => {
                tracing::warn!("{what}: {}", meaning(*standing));
            }
        }
    }
    log_signers(&found.signing_keys);
    for id in &found.incomplete {
        tracing::warn!("version {id}: {INCOMPLETE}");
    }
    for id in &found.unknown {
        tracing::warn!("version {id}: {UNKNOWN}");
    }
    match ending(found) {
        Ending::Same => tracing::info!("HSM and database hold the same keys."),
        Ending::Leftovers | Ending::Bad => {
            tracing::warn!("`kms-server check` shows HSM and database key by key.");
        }
    }
}

/// The same of key pairs alone.
pub fn log_signers(found: &[SignerFound]) {
    for one in found {
        match one.pair {
            Pair::Good => {}
            Pair::NoPublicHalf => tracing::warn!("{}", signer_meaning(one)),
            Pair::OtherKey | Pair::Lost => tracing::error!("{}", signer_meaning(one)),
        }
    }
}

/// How it is with a key pair that is not as it should be, and what to do.
#[must_use]
pub fn signer_meaning(one: &SignerFound) -> String {
    let SignerFound { id, signs, pair } = one;
    let command = if *signs == TOKENS { "tokens" } else { "anchors" };
    let renew = format!(
        "{RESTORE} Where no backup has it, `kms-server renew-key {command}` makes a new one."
    );
    match pair {
        Pair::Good => format!("The HSM holds the key {id} that signs {signs}."),
        Pair::NoPublicHalf => format!(
            "The HSM does not show the public half of the key {id} that signs {signs}. Nothing needs it, its numbers \
             are in the database: what was signed and will be stays good. Find out who or what has removed it; it is \
             in the HSM's backup."
        ),
        Pair::OtherKey => {
            format!("The HSM holds another key in the place of {id}, which signs {signs}. {renew}")
        }
        Pair::Lost => {
            format!("The HSM does not hold the private key {id} that signs {signs}. {renew}")
        }
    }
}

/// For people: a line for each key, then what it means.
#[must_use]
pub fn text(found: &Comparison) -> String {
    let mut text = String::new();
    for (state, line) in lines(found) {
        let _ = writeln!(text, "{state:11} {line}");
    }
    let token = found.serial.as_deref().unwrap_or("unknown");
    let _ = writeln!(text, "\nToken {token}: {}.", summary(found));
    if let Err(cause) = found.verdict() {
        let _ = writeln!(text, "REFUSED: {cause}.");
    } else if found.is_bad() {
        let _ = writeln!(text, "{RESTORE}");
    }
    for one in found.signing_keys.iter().filter(|one| one.pair != Pair::Good) {
        let _ = writeln!(text, "{}", signer_meaning(one));
    }
    if found.has_leftovers() {
        let _ = writeln!(
            text,
            "What nothing uses is left where it is; nothing but a purge ever deletes."
        );
    }
    text
}

/// For programs.
#[must_use]
pub fn json(found: &Comparison) -> String {
    let keys = found.versions.iter().map(|(at, standing)| {
        json!({
            "instance": at.instance.to_string(),
            "key": at.key.to_string(),
            "version": at.version.to_string(),
            "check_value": at.check_value.map(hex),
            "state": name(*standing),
        })
    });
    let ids = |ids: &[uuid::Uuid]| -> Vec<String> { ids.iter().map(ToString::to_string).collect() };
    let signers = found.signing_keys.iter().map(
        |one| json!({"id": one.id.to_string(), "signs": one.signs, "state": signer(one.pair)}),
    );
    json!({
        "token": {"serial": found.serial, "seen_in": found.seen_in},
        "refused": found.verdict().err(),
        "keys": keys.collect::<Vec<Value>>(),
        "signing_keys": signers.collect::<Vec<Value>>(),
        "incomplete": ids(&found.incomplete),
        "extra": ids(&found.unknown),
    })
    .to_string()
}

/// Lower case, two digits a byte.
#[must_use]
pub fn hex(value: CheckValue) -> String {
    format!("{:032x}", u128::from_be_bytes(value))
}

const RESTORE: &str = "Restore the HSM's backup.";
const INCOMPLETE: &str =
    "the HSM holds a part of it only. It cannot be used; it is left where it is.";
const UNKNOWN: &str = "this database does not know it. If the database was restored from a backup, it may be needed; \
                       it is left where it is.";

fn lines(found: &Comparison) -> Vec<(&'static str, String)> {
    let known = |at: &KnownVersion| {
        format!("version {}  key {}  instance {}", at.version, at.key, at.instance)
    };
    let versions = found.versions.iter().map(|(at, is)| (name(*is), known(at)));
    let signers = found.signing_keys.iter();
    versions
        .chain(signers.map(|one| (signer(one.pair), format!("key {} for {}", one.id, one.signs))))
        .chain(found.incomplete.iter().map(|id| ("incomplete", format!("version {id}"))))
        .chain(found.unknown.iter().map(|id| ("extra", format!("version {id}"))))
        .collect()
}

fn summary(found: &Comparison) -> String {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for (state, _) in lines(found) {
        match counts.iter_mut().find(|(name, _)| *name == state) {
            Some((_, count)) => *count += 1,
            None => counts.push((state, 1)),
        }
    }
    let counts: Vec<String> =
        counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
    if counts.is_empty() { "no keys".to_owned() } else { counts.join(", ") }
}

fn name(standing: Standing) -> &'static str {
    match standing {
        Standing::Good => "ok",
        Standing::Unproven(_) => "unproven",
        Standing::OtherKey => "wrong key",
        Standing::Lost => "missing",
        Standing::Unfinished => "unfinished",
        Standing::NeverMade => "never made",
        Standing::Gone => "gone",
        Standing::Purging => "purging",
    }
}

fn signer(pair: Pair) -> &'static str {
    match pair {
        Pair::Good => "ok",
        Pair::NoPublicHalf => "no public half",
        Pair::OtherKey => "wrong key",
        Pair::Lost => "missing",
    }
}

fn meaning(standing: Standing) -> &'static str {
    match standing {
        Standing::Good => "the HSM holds it",
        Standing::Unproven(_) => "the HSM holds a key of this name",
        Standing::OtherKey => {
            "the HSM holds another key under this name, which is not used. What this version wrapped cannot be \
             unwrapped. Restore the HSM's backup."
        }
        Standing::Lost => {
            "the HSM does not hold it: what it wrapped cannot be unwrapped. Restore the HSM's backup."
        }
        Standing::Unfinished => {
            "the HSM holds it, but its making was interrupted. Nothing was wrapped with it, unless this database is a \
             backup of that very moment: where the audit log has `done` for it, give it back with `kms-server adopt`. It \
             is left where it is."
        }
        Standing::NeverMade => {
            "its making was interrupted before the HSM made anything, or has just begun. Nothing was wrapped with it, \
             unless this database is a backup of that very moment and the HSM has lost it since."
        }
        Standing::Gone => {
            "its key is destroyed, and the HSM does not hold it: nobody misses it. Either the key was purged after this \
             database was backed up, or the token's own backup is older; what another token holds of it lives on there."
        }
        Standing::Purging => {
            "the purge of its key has begun and is not done. Purge the key again: what is left of it goes, too."
        }
    }
}
