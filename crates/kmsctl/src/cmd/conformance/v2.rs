//! KMS v2's Encrypt and Decrypt with values that nobody changed: limits, sizes, and that no two are alike.

use std::collections::{BTreeMap, HashSet};

use kms_core::limits::{MAX_ANNOTATIONS, MAX_KEY_ID, MAX_V2_CIPHERTEXT};

use super::load;
use super::report::Verdict;
use super::subject::{Sealed, Subject, unless_refused};

const SIZES: [usize; 6] = [0, 1, 4, 33, 1024, 4097];
const DISTINCT: usize = 200;

/// 11: what kube-apiserver does with each seed.
pub(super) async fn round_trip(subject: &Subject) -> Verdict {
    let payload = subject.payload(32);
    let sealed = subject.encrypt(payload.clone()).await?;
    match subject.decrypt(sealed).await? == payload {
        true => Ok("32 bytes come back".to_owned()),
        false => Err("32 bytes come back as others".into()),
    }
}

/// 11: what kube-apiserver does not send today.
pub(super) async fn sizes(subject: &Subject) -> Verdict {
    let (mut handled, mut refused) = (Vec::new(), Vec::new());
    for size in SIZES {
        let payload = subject.payload(size);
        let sealed = unless_refused(subject.encrypt(payload.clone()).await);
        let Some(sealed) = sealed.map_err(|failure| format!("{size} bytes: {failure}"))? else {
            refused.push(size);
            continue;
        };
        match subject.decrypt(sealed).await {
            Ok(opened) if opened == payload => handled.push(size),
            Ok(_) => return Err(format!("{size} bytes come back as others").into()),
            Err(failure) => {
                return Err(format!("{size} bytes are encrypted, but Decrypt: {failure}").into());
            }
        }
    }
    round_trip(subject).await.map_err(|_| "after that, 32 bytes do not come back")?;
    Ok(format!("bytes handled: {handled:?}, refused: {refused:?}"))
}

/// 11: the uid only helps to find a call in a log.
pub(super) async fn uids(subject: &Subject) -> Verdict {
    let (long, odd) = ("u".repeat(300), "\u{1b}[31m\"ü\"\r\n".to_owned());
    let mut refused = Vec::new();
    for (name, uid) in [("no uid", String::new()), ("a long uid", long), ("an odd uid", odd)] {
        let payload = subject.payload(32);
        let opened = match subject.encrypt_as(payload.clone(), uid.clone()).await {
            Ok(sealed) => subject.decrypt_as(sealed, uid).await,
            Err(failure) => Err(failure),
        };
        match unless_refused(opened).map_err(|failure| format!("{name}: {failure}"))? {
            Some(opened) if opened == payload => {}
            Some(_) => return Err(format!("{name}: the payload comes back as another").into()),
            None => refused.push(name),
        }
    }
    // Each call has a uid of its own: Decrypt's is never the one of its Encrypt.
    round_trip(subject).await.map_err(|_| "a new UUID for each call is not taken")?;
    match refused.as_slice() {
        [] => Ok("any uid, another one for each call".to_owned()),
        _ => Ok(format!("UUIDs, another one for each call; refused: {}", refused.join(", "))),
    }
}

/// 12
pub(super) async fn limits(subject: &Subject) -> Verdict {
    let Sealed { ciphertext, key_id, .. } = subject.encrypt(subject.payload(32)).await?;
    within("ciphertext", ciphertext.len(), MAX_V2_CIPHERTEXT)?;
    within("key_id", key_id.len(), MAX_KEY_ID)?;
    Ok(format!("ciphertext of {} bytes, key_id of {}", ciphertext.len(), key_id.len()))
}

/// 13
pub(super) async fn annotations(subject: &Subject) -> Verdict {
    let payload = subject.payload(32);
    let annotations = subject.encrypt(payload.clone()).await?.annotations;
    if let Some(key) = annotations.keys().find(|key| !is_annotation_key(key)) {
        return Err(format!("{key:?} is no lowercase domain name of two labels or more").into());
    }
    let bytes: usize = annotations.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAX_ANNOTATIONS {
        return Err(format!("{bytes} bytes in all, {MAX_ANNOTATIONS} at most").into());
    }
    if annotations.values().any(|value| value.windows(payload.len()).any(|part| part == payload)) {
        return Err("the payload itself is in an annotation, which etcd holds as plain text".into());
    }
    Ok(format!("{} of them, {bytes} bytes", annotations.len()))
}

/// 17
pub(super) async fn never_twice(subject: &Subject) -> Verdict {
    let payload = subject.payload(32);
    let first = subject.encrypt(payload.clone()).await?;
    if first == subject.encrypt(payload).await? {
        return Err("the same payload twice gives the same bytes".into());
    }
    let sealed = load::sealed(subject, DISTINCT).await?;
    let different: HashSet<_> = sealed.into_iter().map(cache_key).collect();
    if different.len() < DISTINCT {
        return Err(format!("{DISTINCT} payloads give {} different values", different.len()).into());
    }
    Ok(format!("the same payload twice differs, and so do {DISTINCT} payloads"))
}

/// What kube-apiserver finds a seed by.
fn cache_key(sealed: Sealed) -> (Vec<u8>, String, BTreeMap<String, Vec<u8>>) {
    (sealed.ciphertext, sealed.key_id, sealed.annotations.into_iter().collect())
}

/// One byte to `most`, as kube-apiserver checks it.
pub(super) fn within(what: &str, bytes: usize, most: usize) -> Result<(), String> {
    match bytes {
        0 => Err(format!("{what} is empty")),
        _ if bytes > most => Err(format!("{what} has {bytes} bytes, {most} at most")),
        _ => Ok(()),
    }
}

/// RFC 1123 as kube-apiserver reads it: labels of letters, digits and inner hyphens; one dot may end it.
fn is_annotation_key(key: &str) -> bool {
    let name = key.strip_suffix('.').unwrap_or(key);
    name.len() <= 253 && name.contains('.') && name.split('.').all(is_label)
}

fn is_label(label: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&label.len())
        && label.bytes().all(inner)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_13_annotation_keys_are_domain_names() {
        let label = "a".repeat(63);
        let longest = format!("{label}.{label}.{label}.{}", "a".repeat(61));
        for key in ["a.b", "version.kms.example.com", "0.1", "a-b.c", "a.b.", &longest] {
            assert!(is_annotation_key(key), "{key}");
        }
        let label = format!("{label}a.b");
        let longer = format!("{longest}a");
        for key in [
            "",
            ".",
            "a",
            "a.",
            "a..b",
            ".a.b",
            "a.b..",
            "A.b",
            "a_b.c",
            "a b.c",
            "-a.b",
            "a-.b",
            "kms.example.io/id",
            "ü.b",
            &label,
            &longer,
        ] {
            assert!(!is_annotation_key(key), "{key}");
        }
    }

    #[test]
    fn limits_are_inclusive() {
        assert!(within("x", 1, 1024).is_ok() && within("x", 1024, 1024).is_ok());
        assert!(within("x", 0, 1024).is_err() && within("x", 1025, 1024).is_err());
    }
}
