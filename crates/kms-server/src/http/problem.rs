//! The one place where a failure becomes a status and a text, in the two dialects that clients read: the key API's
//! envelope, in which the reason code stands in the text too, and the token service's error object.
//!
//! What the operator must act on is told to the operator's log; the caller hears only that it is not their fault.

use super::Answer;
use crate::limits::{TOO_OFTEN, TooMuch};
use crate::ops::Error;
use crate::policy::Action;
use crate::token::NotValid;
use http::header::{HeaderValue, RETRY_AFTER};
use http::{HeaderMap, StatusCode};
use kms_api::rest::{
    Collection, ERROR_TYPE, ErrorBody, Reason, Refusal, Target, TokenError, TokenErrorContext,
};
use kms_hsm::VaultError;
use zeroize::Zeroizing;

/// The media type of error bodies, and of everything the token service says.
const JSON: &str = "application/json";
/// Seconds after which a client may try again.
const RETRY: HeaderValue = HeaderValue::from_static("2");

/// Why a request gets no answer of its own.
#[derive(Debug, thiserror::Error)]
pub(super) enum Problem {
    #[error("no such path")]
    NoSuchPath,
    #[error("not built into this server: this request")]
    NotBuilt,
    #[error("another method is needed here")]
    WrongMethod,
    #[error("a bearer token is required")]
    NoToken,
    #[error("the token is not valid, has expired, or its API key was revoked")]
    BadToken(NotValid),
    #[error("the request body is larger than 64 KiB")]
    TooLarge,
    #[error("the request body ended too early")]
    Cut,
    #[error("the request body took longer than 10 s")]
    Slow,
    #[error("{0}")]
    BadBody(String),
    #[error("the request has no body")]
    NoBody,
    #[error("{0} is missing or empty")]
    MissingProperty(&'static str),
    #[error(
        "grants other than an API key or a token of a trusted issuer are not built into this server"
    )]
    UnknownGrant,
    #[error(transparent)]
    TooMuch(#[from] TooMuch),
    #[error(transparent)]
    Op(Error),
}

impl From<Error> for Problem {
    fn from(error: Error) -> Problem {
        match error {
            Error::TooMuch(why) => Problem::TooMuch(why),
            other => Problem::Op(other),
        }
    }
}

/// How the peer reads errors.
#[derive(Debug, Clone, Copy)]
pub(super) enum Dialect {
    KeyProtect(Option<Action>),
    Iam,
}

impl Dialect {
    pub(super) fn name(self) -> &'static str {
        match self {
            Dialect::KeyProtect(Some(action)) => action.name(),
            Dialect::KeyProtect(None) => "unknown",
            Dialect::Iam => "token_service",
        }
    }
}

impl Problem {
    /// The reason code of the key API; what audit records call the outcome.
    pub(super) fn code(&self) -> &'static str {
        self.status_and_code().1
    }

    pub(super) fn answer(&self, dialect: Dialect) -> Answer {
        let (status, code) = self.status_and_code();
        let mut answer = match dialect {
            Dialect::KeyProtect(action) => {
                Answer::json(status, JSON, &self.key_protect(action, status, code))
            }
            Dialect::Iam => Answer::json(self.iam_status(status), JSON, &self.iam(code)),
        };
        if matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            answer.headers.insert(RETRY_AFTER, RETRY);
        }
        answer
    }

    /// True for what the caller can do nothing about.
    pub(super) fn is_for_the_operator(&self) -> bool {
        let (status, _) = self.status_and_code();
        status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED
    }

    fn status_and_code(&self) -> (StatusCode, &'static str) {
        match self {
            Problem::NoSuchPath => (StatusCode::NOT_FOUND, "NOT_FOUND"),
            Problem::NotBuilt => (StatusCode::NOT_IMPLEMENTED, "NOT_IMPLEMENTED"),
            Problem::WrongMethod => (StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED"),
            Problem::NoToken | Problem::BadToken(_) => {
                (StatusCode::UNAUTHORIZED, "UNAUTHORIZED_ERR")
            }
            Problem::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "BAD_BODY_ERR"),
            Problem::Slow => (StatusCode::REQUEST_TIMEOUT, "BAD_BODY_ERR"),
            Problem::Cut | Problem::BadBody(_) => (StatusCode::BAD_REQUEST, "BAD_BODY_ERR"),
            Problem::NoBody => (StatusCode::BAD_REQUEST, "NO_BODY_ERR"),
            Problem::MissingProperty(_) | Problem::UnknownGrant => {
                (StatusCode::BAD_REQUEST, "INVALID_FIELD_ERR")
            }
            Problem::TooMuch(why) => too_much(*why),
            Problem::Op(error) => operation(error),
        }
    }

    fn key_protect(&self, action: Option<Action>, status: StatusCode, code: &str) -> ErrorBody {
        let name = status.canonical_reason().unwrap_or("Error");
        let plain = |text: String| Refusal { error_msg: text, reasons: Vec::new() };
        let refusal = match self {
            // These three are texts that operators search for, and come without a code.
            Problem::Op(Error::NoInstance) => plain(
                "Bad Request: Request requires valid Instance Header containing a valid UUID"
                    .into(),
            ),
            Problem::Op(Error::Denied(_)) => plain(
                "Unauthorized: The user does not have access to the specified resource".into(),
            ),
            // The text that operators search for, and behind it which part of this server to look at.
            _ if status == StatusCode::SERVICE_UNAVAILABLE => plain(format!(
                "Unavailable: Experiencing delays. Please try again in few minutes. ({code})"
            )),
            Problem::NoToken | Problem::BadToken(_) => plain(format!("{name}: {self}")),
            // One of IBM's clients shows this text only, so it must say what is missing.
            _ if status == StatusCode::NOT_IMPLEMENTED => Refusal {
                error_msg: format!("{name}: {self} ({code})"),
                reasons: vec![self.reason(status, code)],
            },
            _ => Refusal {
                error_msg: format!(
                    "{name}: {}: Please see `reasons` for more details ({code})",
                    action.map_or("Request could not be processed", phrase)
                ),
                reasons: vec![self.reason(status, code)],
            },
        };
        Collection::new(ERROR_TYPE, vec![refusal])
    }

    fn reason(&self, status: StatusCode, code: &str) -> Reason {
        let (kind, name) = match self {
            Problem::Op(Error::Field { name, .. }) => ("field", *name),
            Problem::Op(Error::Query { name, .. }) => ("query_param", *name),
            _ => ("", ""),
        };
        let target = (!kind.is_empty()).then(|| Target { kind: kind.into(), name: name.into() });
        // What the operator has to look into is no business of the caller's.
        let message = if status == StatusCode::INTERNAL_SERVER_ERROR {
            "the service could not complete the request".to_owned()
        } else {
            self.to_string()
        };
        Reason { code: code.into(), message, status: status.as_u16(), more_info: None, target }
    }

    /// The two services disagree about one status: somebody known who has no right.
    fn iam_status(&self, status: StatusCode) -> StatusCode {
        let known = matches!(self, Problem::Op(Error::Denied(_) | Error::NoProfile));
        if known { StatusCode::FORBIDDEN } else { status }
    }

    fn iam(&self, code: &'static str) -> TokenError {
        let (error_code, error_message) = match self {
            Problem::Op(Error::UnknownApiKey) => {
                ("BXNIM0415E", "Provided API key could not be found.")
            }
            Problem::MissingProperty(_) => ("BXNIM0109E", "Property missing or empty."),
            Problem::NoToken => ("BXNIM0308E", "No authorization header was found."),
            Problem::BadToken(_) | Problem::Op(Error::NotTrusted) => {
                ("BXNIM0407E", "Provided token is invalid.")
            }
            Problem::Op(Error::Denied(_) | Error::NoProfile) => {
                ("BXNIM0513E", "You are not authorized to use this API.")
            }
            Problem::WrongMethod => ("BXNIM0060E", "Method not allowed."),
            Problem::Op(
                Error::Vault(_) | Error::Store(_) | Error::Audit(_) | Error::IssuerAway(_),
            ) => (code, "The service is not available. Please try again in few minutes."),
            _ => (code, ""),
        };
        let own = error_message.is_empty();
        TokenError {
            error_code: error_code.into(),
            error_message: if own { self.to_string() } else { error_message.into() },
            error_details: self.iam_details(),
            context: Some(TokenErrorContext {
                request_type: Some("incoming.Identity_Token".into()),
                ..TokenErrorContext::default()
            }),
        }
    }

    fn iam_details(&self) -> Option<String> {
        match self {
            Problem::MissingProperty(_) | Problem::Op(Error::Denied(_)) => Some(self.to_string()),
            _ => None,
        }
    }
}

impl Answer {
    /// An answer with nothing in it but headers.
    pub(super) fn with(status: StatusCode, headers: HeaderMap) -> Answer {
        Answer { status, media_type: "", headers, body: Zeroizing::default() }
    }
}

fn too_much(why: TooMuch) -> (StatusCode, &'static str) {
    if why.is_rate() {
        (StatusCode::TOO_MANY_REQUESTS, TOO_OFTEN)
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "OVERLOADED_ERR")
    }
}

fn operation(error: &Error) -> (StatusCode, &'static str) {
    match error {
        Error::Field { .. } => (StatusCode::BAD_REQUEST, "INVALID_FIELD_ERR"),
        Error::Query { .. } | Error::PayloadUnwanted => {
            (StatusCode::BAD_REQUEST, "INVALID_QUERY_PARAM_ERR")
        }
        Error::PayloadRequired => (StatusCode::BAD_REQUEST, "KEY_PAYLOAD_REQ_ERR"),
        Error::NotAuthentic => (StatusCode::UNPROCESSABLE_ENTITY, "UNPROCESSABLE_CIPHERTEXT_ERR"),
        Error::NotBuilt(_) => (StatusCode::NOT_IMPLEMENTED, "NOT_IMPLEMENTED"),
        Error::Denied(_) => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED_ERR"),
        Error::NoInstance => (StatusCode::BAD_REQUEST, "INVALID_INSTANCE"),
        Error::KeyNotFound => (StatusCode::NOT_FOUND, "KEY_NOT_FOUND_ERR"),
        Error::KeyDeleted => (StatusCode::GONE, "KEY_DELETED_ERR"),
        Error::KeyState => (StatusCode::CONFLICT, "KEY_ACTION_INVALID_STATE_ERR"),
        Error::UsedUp => (StatusCode::CONFLICT, "KEY_VERSION_USED_UP_ERR"),
        Error::PurgedTooSoon { .. } => (StatusCode::CONFLICT, "REQ_TOO_EARLY_ERR"),
        Error::RotatedTooSoon { .. } => (StatusCode::CONFLICT, "KEY_ROTATION_NOT_PERMITTED"),
        Error::NotFound(_) => (StatusCode::NOT_FOUND, "NOT_FOUND"),
        Error::Conflict(_) => (StatusCode::CONFLICT, "CONFLICT"),
        Error::TooMuch(why) => too_much(*why),
        Error::UnknownApiKey => (StatusCode::BAD_REQUEST, "UNKNOWN_API_KEY"),
        Error::NotTrusted => (StatusCode::BAD_REQUEST, "UNTRUSTED_TOKEN"),
        Error::NoProfile => (StatusCode::BAD_REQUEST, "NO_PROFILE"),
        Error::Vault(
            VaultError::Unavailable { .. }
            | VaultError::TimedOut
            | VaultError::Busy
            | VaultError::Capacity(_)
            | VaultError::Credential(_),
        ) => (StatusCode::SERVICE_UNAVAILABLE, "HSM_UNAVAILABLE_ERR"),
        Error::Store(_) => (StatusCode::SERVICE_UNAVAILABLE, "DATABASE_UNAVAILABLE_ERR"),
        Error::Audit(_) => (StatusCode::SERVICE_UNAVAILABLE, "AUDIT_UNAVAILABLE_ERR"),
        Error::IssuerAway(_) => (StatusCode::SERVICE_UNAVAILABLE, "ISSUER_UNAVAILABLE_ERR"),
        Error::Vault(
            VaultError::NotFound
            | VaultError::NotAuthentic
            | VaultError::BadInput(_)
            | VaultError::Exists
            | VaultError::Policy(_),
        ) => (StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL_ERR"),
    }
}

/// What could not be done, in the words of the service whose API this is.
fn phrase(action: Action) -> &'static str {
    match action {
        Action::CreateKey | Action::ImportKey => "Key could not be created",
        Action::CountKeys | Action::ListKeys => "Keys could not be retrieved",
        Action::ReadKey => "Key could not be retrieved",
        Action::ReadMetadata => "Key metadata could not be retrieved",
        Action::ListVersions => "Key versions could not be retrieved",
        Action::Wrap => "Wrap with key could not be performed",
        Action::Unwrap => "Unwrap with key could not be performed",
        Action::RotateKey => "Key could not be rotated",
        Action::DisableKey => "Key could not be disabled",
        Action::EnableKey => "Key could not be enabled",
        Action::DeleteKey => "Key could not be deleted",
        Action::PurgeKey => "Key could not be purged",
        Action::ListInstances
        | Action::CreateInstance
        | Action::ListServiceIds
        | Action::CreateServiceId
        | Action::DeleteServiceId
        | Action::ListPolicies
        | Action::CreatePolicy
        | Action::DeletePolicy
        | Action::ListProfiles
        | Action::CreateProfile
        | Action::DeleteProfile
        | Action::ListApiKeys
        | Action::CreateApiKey
        | Action::LockApiKey
        | Action::UnlockApiKey
        | Action::RotateApiKey
        | Action::DeleteApiKey => "Request could not be processed",
    }
}

#[cfg(test)]
mod tests {
    use super::super::auth::Names;
    use super::*;
    use crate::audit::AuditError;
    use crate::issuers::LoginError;
    use crate::ops::Origin;
    use crate::policy::{Caller, Credential, Scope, allow};
    use crate::store::StoreError;
    use kms_daemon::telemetry::{Log, LogLevel, Settings};
    use std::collections::BTreeSet;
    use std::io;
    use std::net::SocketAddr;
    use std::path::PathBuf;
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, SystemTime};
    use uuid::Uuid;

    fn said(problem: Problem, dialect: Dialect) -> (u16, serde_json::Value) {
        let answer = problem.answer(dialect);
        (answer.status.as_u16(), serde_json::from_slice(&answer.body).unwrap())
    }

    #[test]
    fn the_reason_code_stands_in_the_text_and_in_the_reasons() {
        let wrap = Dialect::KeyProtect(Some(Action::Wrap));
        let (status, body) = said(Error::KeyNotFound.into(), wrap);
        assert_eq!(status, 404);
        assert_eq!(body["metadata"]["collectionType"], ERROR_TYPE);
        assert_eq!(body["metadata"]["collectionTotal"], 1);
        assert_eq!(
            body["resources"][0]["errorMsg"],
            "Not Found: Wrap with key could not be performed: Please see `reasons` for more details (KEY_NOT_FOUND_ERR)"
        );
        let reason = &body["resources"][0]["reasons"][0];
        assert_eq!(reason["code"], "KEY_NOT_FOUND_ERR");
        assert_eq!(reason["message"], "key does not exist");
        assert_eq!(reason["status"], 404);
    }

    #[test]
    fn texts_that_operators_search_for_stay_as_they_are() {
        let list = Dialect::KeyProtect(Some(Action::ListKeys));
        let (status, body) = said(Error::NoInstance.into(), list);
        assert_eq!(status, 400);
        assert_eq!(
            body["resources"][0]["errorMsg"],
            "Bad Request: Request requires valid Instance Header containing a valid UUID"
        );
        let (status, body) = said(Error::UnknownApiKey.into(), Dialect::Iam);
        assert_eq!(status, 400);
        assert_eq!(body["errorCode"], "BXNIM0415E");
        assert_eq!(body["errorMessage"], "Provided API key could not be found.");
        let away = VaultError::Unavailable { cause: "slot 7 has no token".into() };
        let (status, body) = said(Error::Vault(away).into(), list);
        assert_eq!(status, 503);
        assert_eq!(
            body["resources"][0]["errorMsg"],
            "Unavailable: Experiencing delays. Please try again in few minutes. (HSM_UNAVAILABLE_ERR)"
        );
    }

    #[test]
    fn an_outage_names_the_part_that_is_away_in_both_dialects() {
        let audit = || AuditError::TimedOut { path: "/secret/path".into() }.into();
        let hsm = || VaultError::Unavailable { cause: "slot 7 has no token".into() }.into();
        let database = || crate::store::StoreError::Unavailable("/secret/path".into()).into();
        for (error, code) in [
            (&audit as &dyn Fn() -> Error, "AUDIT_UNAVAILABLE_ERR"),
            (&hsm, "HSM_UNAVAILABLE_ERR"),
            (&database, "DATABASE_UNAVAILABLE_ERR"),
        ] {
            let (status, body) = said(error().into(), Dialect::KeyProtect(Some(Action::Wrap)));
            assert_eq!((status, body["resources"][0]["reasons"].is_null()), (503, true));
            let text = body["resources"][0]["errorMsg"].as_str().unwrap();
            assert!(text.ends_with(&format!("({code})")), "{text}");
            let (status, iam) = said(error().into(), Dialect::Iam);
            assert_eq!((status, &iam["errorCode"]), (503, &serde_json::json!(code)));
            for body in [body, iam] {
                let text = body.to_string();
                assert!(!text.contains("secret") && !text.contains("slot"), "{text}");
            }
        }
    }

    #[test]
    fn what_the_operator_must_act_on_is_not_told_to_the_caller() {
        for error in [
            Error::Vault(VaultError::Policy("secret detail".into())),
            Error::Vault(VaultError::Credential("secret detail".into())),
            Error::Store(crate::store::StoreError::Corrupt("secret detail".into())),
        ] {
            let text = error.to_string();
            for dialect in [Dialect::KeyProtect(Some(Action::Unwrap)), Dialect::Iam] {
                let problem = Problem::BadBody(text.clone());
                assert!(said(problem, dialect).1.to_string().contains("secret detail"));
            }
            let (status, body) = said(error.into(), Dialect::KeyProtect(Some(Action::Unwrap)));
            assert!(status >= 500);
            assert!(!body.to_string().contains("secret detail"), "{body}");
        }
    }

    /// What an attacker would like to read: a path, a query, a code, a host.
    const CAUSE: &str =
        "/var/lib/kms.db: SELECT hash FROM api_keys: CKR_DEVICE_ERROR at hsm-1.internal";

    /// At least one error of each kind; those that come from outside with everything in them.
    fn every_error() -> Vec<Error> {
        let (text, path) = (|| CAUSE.to_owned(), || PathBuf::from(CAUSE));
        let io = || Arc::new(io::Error::other(CAUSE));
        let vault = [
            VaultError::NotFound,
            VaultError::NotAuthentic,
            VaultError::BadInput(text()),
            VaultError::Exists,
            VaultError::Capacity(text()),
            VaultError::Credential(text()),
            VaultError::Policy(text()),
            VaultError::Unavailable { cause: text() },
            VaultError::TimedOut,
            VaultError::Busy,
        ];
        let audit = [
            AuditError::Open { path: path(), cause: io() },
            AuditError::InUse { path: path() },
            AuditError::Broken { path: path(), what: text() },
            AuditError::OtherNode { path: path(), found: text(), own: text() },
            AuditError::Write { path: path(), cause: io() },
            AuditError::TimedOut { path: path() },
        ];
        let credential = Credential::Profile(Uuid::nil());
        let nobody = Caller { service_id: Uuid::nil(), credential, grants: Vec::new() };
        let ours = [
            Error::Field { name: "name", why: "is too long".into() },
            Error::Query { name: "limit", why: "is no number".into() },
            Error::PayloadRequired,
            Error::PayloadUnwanted,
            Error::NotAuthentic,
            Error::NotBuilt("key rings"),
            Error::Denied(allow(&nobody, Action::Wrap, Scope::Everywhere).unwrap_err()),
            Error::NoInstance,
            Error::KeyNotFound,
            Error::KeyDeleted,
            Error::KeyState,
            Error::RotatedTooSoon { minimum: 60 },
            Error::PurgedTooSoon { wait: Duration::from_secs(60) },
            Error::UsedUp,
            Error::NotFound("policy"),
            Error::Conflict("the name is taken".into()),
            Error::UnknownApiKey,
            Error::NotTrusted,
            Error::NoProfile,
            Error::TooMuch(TooMuch::ManagementRate),
            Error::IssuerAway(LoginError::Unavailable { issuer: text(), cause: text() }),
            Error::Store(StoreError::Corrupt(text())),
            Error::Store(StoreError::Unavailable(text())),
            Error::Store(StoreError::Conflict(text())),
        ];
        let all = vault.map(Error::Vault).into_iter().chain(audit.map(Error::Audit)).chain(ours);
        all.collect()
    }

    /// A number for each kind: who adds one is told here, by the compiler, to put it above.
    fn kind(error: &Error) -> usize {
        match error {
            Error::Field { .. } => 0,
            Error::Query { .. } => 1,
            Error::PayloadRequired => 2,
            Error::PayloadUnwanted => 3,
            Error::NotAuthentic => 4,
            Error::NotBuilt(_) => 5,
            Error::Denied(_) => 6,
            Error::NoInstance => 7,
            Error::KeyNotFound => 8,
            Error::KeyDeleted => 9,
            Error::KeyState => 10,
            Error::RotatedTooSoon { .. } => 11,
            Error::UsedUp => 12,
            Error::NotFound(_) => 13,
            Error::Conflict(_) => 14,
            Error::UnknownApiKey => 15,
            Error::NotTrusted => 16,
            Error::Vault(_) => 17,
            Error::Store(_) => 18,
            Error::Audit(_) => 19,
            Error::IssuerAway(_) => 20,
            Error::PurgedTooSoon { .. } => 21,
            Error::TooMuch(_) => 22,
            Error::NoProfile => 23,
        }
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_cause_is_in_the_log_with_the_request_s_id_and_none_is_in_an_answer() {
        let lines = Lines::default();
        let wall = Arc::new(|| SystemTime::UNIX_EPOCH);
        let settings = Settings { level: LogLevel::Info, log_all_values: false };
        let (log, _handle) = Log::new(settings, wall, Box::new(lines.clone()));
        let mut kinds = BTreeSet::new();
        tracing::subscriber::with_default(log, || {
            for (number, error) in every_error().into_iter().enumerate() {
                kinds.insert(kind(&error));
                // A line is JSON.
                let cause = error.to_string().replace('"', "\\\"");
                let id = format!("id-{number}-");
                let peer = SocketAddr::from(([192, 0, 2, 1], 1));
                let origin = Origin { peer, correlation: Some(id.clone()) };
                let names = Names { origin, trace: None };
                let problem = Problem::Op(error);
                for dialect in [Dialect::KeyProtect(Some(Action::Wrap)), Dialect::Iam] {
                    let body = problem.answer(dialect).body;
                    let body = String::from_utf8_lossy(&body);
                    for word in ["/var", "SELECT", "api_keys", "CKR_", "internal"] {
                        assert!(!body.contains(word), "{cause}: {body}");
                    }
                }
                super::super::log(Dialect::Iam, &Err(problem), &names);
                let said =
                    String::from_utf8(std::mem::take(&mut *lines.0.lock().unwrap())).unwrap();
                assert!(said.contains(&id) && said.contains(&cause), "{cause} is not in: {said}");
            }
        });
        assert_eq!(kinds, (0..=23).collect());
    }
}
