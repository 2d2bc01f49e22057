//! The provider that speaks Key Protect REST: kms-server, IBM's on-premises product, the cloud service.
//!
//! Hosts and paths of the service go to the log, never into the text that kube-apiserver shows its users.

use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_api::client::{self, KeyProtect};
use kms_api::rest::KeyVersion;
use kms_core::secret::{Dek, SecretText};
use kms_daemon::telemetry::VALUES;
use zeroize::Zeroizing;

use super::{Backend, Error, KeyService, NewDek, Unwrapped};
use crate::sealer::{Call, Refusal};

/// What the on-premises product of 2019 calls its key versions: nothing. They need some name in a key_id.
const UNNAMED_VERSION: &str = "0";

/// One CRK of one instance.
#[derive(Debug)]
pub struct KeyProtectCrk {
    client: KeyProtect,
    crk_id: String,
}

impl KeyProtectCrk {
    pub fn new(client: KeyProtect, crk_id: String) -> KeyProtectCrk {
        KeyProtectCrk { client, crk_id }
    }
}

#[async_trait]
impl KeyService for KeyProtectCrk {
    async fn wrap_new(&self, call: &Call) -> Result<NewDek, Error> {
        let answer = self.client.wrap(&self.crk_id, None, &[], to_client(call)).await;
        let answer = answer.map_err(|error| failed(&error, call, Operation::Wrap))?;
        tracing::info!(target: VALUES, uid = call.uid, trace_id = call.trace_id(), crk = self.crk_id, wdek = answer.ciphertext, "wrapped");
        let plaintext = answer.plaintext.ok_or_else(no_dek)?;
        Ok(NewDek {
            dek: decoded(&plaintext)?,
            wdek: answer.ciphertext.into_bytes().into(),
            version: answer.key_version.map_or_else(|| UNNAMED_VERSION.to_owned(), named),
        })
    }

    async fn unwrap(&self, wdek: &[u8], call: &Call) -> Result<Unwrapped, Error> {
        // Key Protect's WDEKs are base64 text; anything else cannot be one.
        let wdek = std::str::from_utf8(wdek).map_err(|_| Error::NotAuthentic)?;
        tracing::info!(target: VALUES, uid = call.uid, trace_id = call.trace_id(), crk = self.crk_id, wdek, "unwrapping");
        let answer = self.client.unwrap(&self.crk_id, wdek, &[], to_client(call)).await;
        let answer = answer.map_err(|error| failed(&error, call, Operation::Unwrap))?;
        Ok(Unwrapped {
            dek: decoded(&answer.plaintext)?,
            active_version: answer.rewrapped_key_version.map(named),
        })
    }

    fn token_life_left(&self) -> Option<Duration> {
        self.client.token_life_left()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Wrap,
    Unwrap,
}

fn to_client(call: &Call) -> client::Call<'_> {
    let Call { uid, trace, deadline } = call;
    client::Call { deadline: *deadline, correlation_id: Some(uid), trace: *trace }
}

fn named(version: KeyVersion) -> String {
    version.id
}

fn decoded(plaintext: &SecretText) -> Result<Dek, Error> {
    let bytes = STANDARD.decode(plaintext.expose()).map(Zeroizing::new).map_err(|_| no_dek())?;
    Dek::from_slice(&bytes).ok_or_else(no_dek)
}

fn no_dek() -> Error {
    Error::Unusable { text: "the key service answered without a 32-byte DEK".into() }
}

fn failed(error: &client::Error, call: &Call, operation: Operation) -> Error {
    tracing::debug!(uid = call.uid, trace_id = call.trace_id(), "{error}");
    match error {
        client::Error::Refused { status, message, .. } => refused(*status, message, operation),
        client::Error::Iam { .. } if error.is_outage() => {
            Error::Unusable { text: format!("Unavailable: the token service says: {error}") }
        }
        client::Error::Iam { .. } => refusal(Refusal::Access, &error.to_string()),
        client::Error::ApiKeyFile { cause, .. } => {
            Error::Unusable { text: format!("the plug-in's API_KEY_FILE cannot be used: {cause}") }
        }
        client::Error::CrTokenFile { cause, .. } => {
            Error::Unusable { text: format!("the plug-in's CR_TOKEN_FILE cannot be used: {cause}") }
        }
        client::Error::Unreachable { cause, .. } => Error::Unreachable {
            text: format!("Unavailable: the key service cannot be reached: {cause}"),
        },
        client::Error::TimedOut { .. } => Error::TimedOut(Backend::KeyService),
        client::Error::BadAnswer { cause, .. } => Error::Unusable {
            text: format!("Unavailable: the key service gave no usable answer: {cause}"),
        },
    }
}

fn refused(status: u16, text: &str, operation: Operation) -> Error {
    match status {
        401 | 403 => refusal(Refusal::Access, text),
        404 => refusal(Refusal::NoSuchKey, text),
        409 if operation == Operation::Wrap => refusal(Refusal::NoWrap, text),
        409 | 410 => refusal(Refusal::KeyState, text),
        429 => Error::Overloaded { backend: Backend::KeyService, text: text.to_owned() },
        422 if operation == Operation::Unwrap => Error::NotAuthentic,
        // The instance header is checked before the body: a complaint about it is none about the WDEK.
        400 if operation == Operation::Unwrap && !text.contains("Instance Header") => {
            Error::NotAuthentic
        }
        400..500 => refusal(Refusal::Request, text),
        _ => Error::Unusable { text: text.to_owned() },
    }
}

fn refusal(refusal: Refusal, text: &str) -> Error {
    Error::Refused { refusal, text: text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Withdrawn;

    fn call() -> Call {
        Call { uid: "u".into(), trace: None, deadline: Duration::from_secs(3) }
    }

    fn refused_with(status: u16, message: &str) -> client::Error {
        client::Error::Refused { status, code: None, reason: None, message: message.into() }
    }

    #[test]
    fn the_service_s_own_text_comes_first() {
        let iam = client::Error::Iam {
            status: 400,
            code: "BXNIM0415E".into(),
            message: "Provided API key could not be found".into(),
        };
        assert_eq!(
            failed(&iam, &call(), Operation::Wrap),
            Error::Refused {
                refusal: Refusal::Access,
                text: "BXNIM0415E:Provided API key could not be found".into()
            }
        );
        let instance =
            "Bad Request: Request requires valid Instance Header containing a valid UUID";
        for operation in [Operation::Wrap, Operation::Unwrap] {
            assert_eq!(
                failed(&refused_with(400, instance), &call(), operation),
                Error::Refused { refusal: Refusal::Request, text: instance.into() }
            );
        }
    }

    #[test]
    fn each_answer_says_what_becomes_of_the_deks() {
        let kinds = |status, operation| {
            let error = failed(&refused_with(status, "x"), &call(), operation);
            (error.withdrawn(), error.is_outage(), error.outcome())
        };
        let both = Some(Withdrawn::Both);
        for status in [401, 403, 404, 409, 410] {
            assert_eq!(kinds(status, Operation::Unwrap), (both, false, "refused"), "{status}");
        }
        for status in [401, 403, 404, 410] {
            assert_eq!(kinds(status, Operation::Wrap), (both, false, "refused"), "{status}");
        }
        assert_eq!(kinds(409, Operation::Wrap), (Some(Withdrawn::Sealing), false, "refused"));
        assert_eq!(kinds(400, Operation::Unwrap), (None, false, "not_authentic"));
        assert_eq!(kinds(422, Operation::Unwrap), (None, false, "not_authentic"));
        assert_eq!(kinds(422, Operation::Wrap), (None, false, "refused"));
        assert_eq!(kinds(429, Operation::Wrap), (None, true, "overloaded"));
        assert_eq!(kinds(503, Operation::Wrap), (None, true, "unusable"));
    }

    #[test]
    fn a_request_that_is_wrong_says_nothing_about_the_crk() {
        let about_crk = |status, operation| {
            failed(&refused_with(status, "x"), &call(), operation).is_about_crk()
        };
        assert!(!about_crk(400, Operation::Unwrap) && !about_crk(400, Operation::Wrap));
        assert!(!about_crk(422, Operation::Unwrap));
        for status in [401, 404, 409, 410, 429, 503] {
            assert!(about_crk(status, Operation::Unwrap), "{status}");
        }
    }

    #[test]
    fn no_host_reaches_kube_apiserver() {
        let what = || "the key service at kms.internal:28674".to_owned();
        for error in [
            client::Error::Unreachable { what: what(), cause: "Connection refused".into() },
            client::Error::TimedOut { what: what() },
            client::Error::BadAnswer { what: what(), cause: "no JSON".into() },
        ] {
            let text = failed(&error, &call(), Operation::Wrap).to_string();
            assert!(!text.contains("internal"), "{text}");
        }
    }

    #[test]
    fn only_32_bytes_in_base64_are_a_dek() {
        let text = |bytes: &[u8]| SecretText::new(STANDARD.encode(bytes));
        assert!(decoded(&text(&[7; 32])).is_ok());
        assert!(decoded(&text(&[7; 31])).is_err());
        assert!(decoded(&SecretText::new("?".into())).is_err());
    }
}
