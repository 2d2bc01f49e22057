//! KMS v1: the calls that kube-apiserver makes, and values that it would never have got from this plug-in.

use kms_core::limits::MAX_V1_CIPHER;

use super::report::Verdict;
use super::subject::{Failure, Sealed, Subject, unless_refused};
use super::tamper::each_byte_changed;
use super::v2::within;

/// kube-apiserver's health check: four bytes.
const PING: &[u8] = b"ping";

/// 23
pub(super) async fn version(subject: &Subject) -> Verdict {
    match subject.v1_version().await?.as_str() {
        "v1beta1" => Ok("v1beta1".to_owned()),
        other => Err(format!("version is {other:?}").into()),
    }
}

/// 23: the first KMS v1 call of the run was an Encrypt.
pub(super) async fn encrypt_first(subject: &Subject) -> Verdict {
    match &subject.met().v1_encrypt {
        Some(Ok(_)) => Ok("answered, before any Version".to_owned()),
        Some(Err(failure)) => Err(failure.into()),
        None => Err("it was not asked".into()),
    }
}

/// 24: kube-apiserver does not even compare what comes back.
pub(super) async fn ping(subject: &Subject) -> Verdict {
    comes_back(subject, PING.to_vec()).await
}

/// 24
pub(super) async fn round_trip(subject: &Subject) -> Verdict {
    comes_back(subject, subject.payload(32)).await
}

/// 25, length 0
pub(super) async fn empty(subject: &Subject) -> Verdict {
    let refusal = refused("an empty cipher", subject.v1_decrypt(Vec::new()).await)?;
    let payload = match unless_refused(subject.v1_encrypt(Vec::new()).await)? {
        None => "refused",
        Some(cipher) => match unless_refused(subject.v1_decrypt(cipher).await)? {
            Some(opened) if opened.is_empty() => "comes back",
            Some(_) => return Err("an empty payload comes back as another".into()),
            None => return Err("an empty payload is encrypted, and its cipher refused".into()),
        },
    };
    Ok(format!("empty cipher: {refusal}; empty payload: {payload}"))
}

/// 25, tampering
pub(super) async fn cipher(subject: &Subject) -> Verdict {
    let payload = subject.payload(32);
    let cipher = subject.v1_encrypt(payload.clone()).await?;
    let open = |changed| {
        let subject = subject.clone();
        async move { subject.v1_decrypt(changed).await }
    };
    let refusals = each_byte_changed(&cipher, &payload, open).await?;
    Ok(format!("one bit of each of {} bytes changed: all refused", refusals.len()))
}

/// 25, values of the other version
pub(super) async fn exchanged(subject: &Subject) -> Verdict {
    let sealed = subject.encrypt(subject.payload(32)).await?;
    let cipher = subject.v1_encrypt(subject.payload(32)).await?;
    let by_v1 = subject.v1_decrypt(sealed.ciphertext.clone()).await;
    let by_v1 = refused("a v2 ciphertext in v1", by_v1)?;
    let exchanged = Sealed { ciphertext: cipher, ..sealed };
    let by_v2 = refused("a v1 cipher in v2", subject.decrypt(exchanged).await)?;
    Ok(format!("by v1: {by_v1}; by v2: {by_v2}"))
}

async fn comes_back(subject: &Subject, payload: Vec<u8>) -> Verdict {
    let cipher = subject.v1_encrypt(payload.clone()).await?;
    within("cipher", cipher.len(), MAX_V1_CIPHER)?;
    match subject.v1_decrypt(cipher.clone()).await? == payload {
        true => Ok(format!("{} bytes come back, the cipher has {}", payload.len(), cipher.len())),
        false => Err(format!("{} bytes come back as others", payload.len()).into()),
    }
}

fn refused(what: &str, answer: Result<Vec<u8>, Failure>) -> Result<String, String> {
    match answer {
        Ok(_) => Err(format!("{what} is opened")),
        Err(failure @ Failure::Refused { .. }) => Ok(failure.to_string()),
        Err(failure) => Err(format!("{what}: {failure}")),
    }
}
