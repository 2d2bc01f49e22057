//! Values that somebody changed in etcd: every change is refused, and no refusal tells which check it was.

use std::future::Future;

use super::load::at_once;
use super::report::{Unmet, Verdict};
use super::subject::{Failure, Sealed, Subject};

/// How many changed values are on their way at a time.
const WIDTH: usize = 8;
/// Of a longer value, this many bytes are changed, evenly spread. KMS v2 has none that is longer.
const MOST_PLACES: usize = 1024;
const NO_SUCH_KEY: &str = "kmsctl-conformance-no-such-key";
/// A valid name that no plug-in writes.
const ANNOTATION: &str = "kmsctl-conformance.example.com";

/// 14, key_id. It may be refused as an unknown key: key_ids are public, and looked up before anything is opened.
pub(super) async fn key_id(subject: &Subject) -> Verdict {
    let sealed = sealed(subject).await?;
    let mut changed = sealed.clone();
    changed.key_id = another(&sealed.key_id);
    let unknown = Sealed { key_id: NO_SUCH_KEY.to_owned(), ..sealed };
    let text = refused("a changed key_id", subject, changed).await?;
    let as_unknown =
        refused("an unknown key_id", subject, unknown).await.is_ok_and(|unknown| unknown == text);
    if !as_unknown {
        subject.note_refusal(text.clone(), "key_id".to_owned());
    }
    Ok(format!("its last character changed: {text}"))
}

/// 14, annotations
pub(super) async fn annotations(subject: &Subject) -> Verdict {
    let sealed = sealed(subject).await?;
    let mut changes = vec![("an added annotation".to_owned(), {
        let mut added = sealed.clone();
        added.annotations.insert(ANNOTATION.to_owned(), b"x".to_vec());
        added
    })];
    for key in sealed.annotations.keys() {
        let mut removed = sealed.clone();
        let mut value = removed.annotations.remove(key).unwrap_or_default();
        let mut changed = removed.clone();
        match value.first_mut() {
            Some(first) => *first ^= 1,
            None => value.push(0),
        }
        changed.annotations.insert(key.clone(), value);
        changes.push((format!("annotation {key} changed"), changed));
        changes.push((format!("annotation {key} removed"), removed));
    }
    let count = changes.len();
    for (what, changed) in changes {
        let text = refused(&what, subject, changed).await?;
        subject.note_refusal(text, what);
    }
    Ok(format!("all {count} changes refused"))
}

/// 14, ciphertext
pub(super) async fn ciphertext(subject: &Subject) -> Verdict {
    let payload = subject.payload(32);
    let sealed = subject.encrypt(payload.clone()).await?;
    // With one uid for all, texts that name it stay alike.
    let uid = subject.uid();
    let open = |ciphertext| {
        let (subject, uid) = (subject.clone(), uid.clone());
        let changed = Sealed { ciphertext, ..sealed.clone() };
        async move { subject.decrypt_as(changed, uid).await }
    };
    let refusals = each_byte_changed(&sealed.ciphertext, &payload, open).await?;
    let count = refusals.len();
    for (place, failure) in refusals.into_iter().filter(|(_, failure)| !failure.is_outage()) {
        subject.note_refusal(masked(&failure, &[&uid, &sealed.key_id]), format!("byte {place}"));
    }
    Ok(format!("one bit of each of {count} bytes changed: all refused"))
}

/// 14, after all of the above
pub(super) async fn alike(subject: &Subject) -> Verdict {
    let refusals = subject.refusals();
    let mut texts = refusals.iter();
    match (texts.next(), texts.next()) {
        (None, _) => Err(Unmet::Skipped("no changed value was refused".to_owned())),
        (Some((text, _)), None) => Ok(format!("always: {text}")),
        (Some((one, first)), Some((other, second))) => Err(format!(
            "{} different texts, such as {one:?} ({first}) and {other:?} ({second})",
            refusals.len()
        )
        .into()),
    }
}

/// 16
pub(super) async fn unknown_key_id(subject: &Subject) -> Verdict {
    let sealed = sealed(subject).await?;
    let mut seen = Vec::new();
    for (what, key_id) in [("unknown", NO_SUCH_KEY), ("empty", "")] {
        let unknown = Sealed { key_id: key_id.to_owned(), ..sealed.clone() };
        let text = refused(&format!("an {what} key_id"), subject, unknown).await?;
        seen.push(format!("{what}: {text}"));
    }
    Ok(seen.join("; "))
}

/// 25, KMS v2
pub(super) async fn empty_ciphertext(subject: &Subject) -> Verdict {
    let empty = Sealed { ciphertext: Vec::new(), ..sealed(subject).await? };
    refused("an empty ciphertext", subject, empty).await
}

/// Changes one bit of each byte, another one from byte to byte, and gives the places and how `open` refused them.
///
/// # Errors
/// A changed value was opened; or the plug-in did not answer in words.
pub(super) async fn each_byte_changed<F>(
    bytes: &[u8],
    payload: &[u8],
    open: impl Fn(Vec<u8>) -> F,
) -> Result<Vec<(usize, Failure)>, String>
where
    F: Future<Output = Result<Vec<u8>, Failure>> + Send + 'static,
{
    let work = |place: usize| {
        let mut changed = bytes.to_vec();
        if let Some(byte) = changed.get_mut(place) {
            *byte ^= 1 << (place % 8);
        }
        let opened = open(changed);
        async move { (place, opened.await) }
    };
    let mut refusals = Vec::new();
    // In portions: a plug-in that goes silent is asked no further.
    let step = bytes.len().div_ceil(MOST_PLACES).max(1);
    let places: Vec<usize> = (0..bytes.len()).step_by(step).collect();
    for portion in places.chunks(WIDTH * WIDTH) {
        for (place, opened) in at_once(portion.to_vec(), WIDTH, work).await {
            match opened {
                Err(failure @ Failure::Refused { .. }) => refusals.push((place, failure)),
                Err(failure) => return Err(format!("byte {place} changed: {failure}")),
                Ok(opened) if opened == payload => {
                    return Err(format!("byte {place} changed: opened as if it were not"));
                }
                Ok(_) => return Err(format!("byte {place} changed: opened, to another payload")),
            }
        }
    }
    refusals.sort_unstable_by_key(|(place, _)| *place);
    Ok(refusals)
}

async fn sealed(subject: &Subject) -> Result<Sealed, Failure> {
    subject.encrypt(subject.payload(32)).await
}

/// How a changed value is refused, without what differs from call to call.
async fn refused(what: &str, subject: &Subject, changed: Sealed) -> Verdict {
    let (uid, key_id) = (subject.uid(), changed.key_id.clone());
    match subject.decrypt_as(changed, uid.clone()).await {
        Ok(_) => Err(format!("{what} is opened").into()),
        Err(failure @ Failure::Refused { .. }) => Ok(masked(&failure, &[&uid, &key_id])),
        Err(failure) => Err(format!("{what}: {failure}").into()),
    }
}

/// The text without `given`, and without what looks like the number of a request.
fn masked(failure: &Failure, given: &[&str]) -> String {
    let mut text = failure.to_string();
    for given in given.iter().filter(|given| !given.is_empty()) {
        text = text.replace(given, "…");
    }
    let is_id = |char: char| char.is_ascii_hexdigit() || char == '-';
    let mut masked = String::new();
    for part in text.split_inclusive(|char: char| !is_id(char)) {
        let (word, end) = part.split_at(part.trim_end_matches(|char: char| !is_id(char)).len());
        let id = word.len() >= 8 && word.bytes().any(|byte| byte.is_ascii_digit());
        masked.push_str(if id { "…" } else { word });
        masked.push_str(end);
    }
    masked
}

/// A key_id of the same length and kind.
fn another(key_id: &str) -> String {
    let mut chars: Vec<char> = key_id.chars().collect();
    match chars.last_mut() {
        Some(last) => *last = if *last == '0' { '1' } else { '0' },
        None => chars.push('0'),
    }
    chars.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(text: &str) -> Failure {
        Failure::Refused { code: 3, name: "InvalidArgument".to_owned(), text: text.to_owned() }
    }

    #[test]
    fn what_differs_from_call_to_call_is_masked() {
        let text = failure("key k-7: RequestID: 0b1c2d3e-aaaa-bbbb-cccc-ddddeeeeffff, bad tag");
        assert_eq!(masked(&text, &["k-7", ""]), "InvalidArgument: key …: RequestID: …, bad tag");
    }

    #[test]
    fn words_and_short_numbers_stay() {
        let text = "a feedbeef cafe at byte 17";
        assert_eq!(masked(&failure(text), &[]), format!("InvalidArgument: {text}"));
    }

    #[test]
    fn another_key_id_is_never_the_same() {
        for key_id in ["", "0", "k/0", "schlüssel-ü"] {
            assert_ne!(another(key_id), key_id);
        }
    }
}
