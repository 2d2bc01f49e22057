//! Why a call to the key service or the token service failed, told apart by who must act: the network's keeper, the
//! keeper of the service, or whoever grants access. No secret and nothing unbounded gets into a text.

use std::fmt::Write as _;

use http::StatusCode;
use kms_core::crypto_module::NotFips;
use thiserror::Error;

use crate::rest::{ErrorBody, TokenError};

/// Longest text taken over from a service; more than any real message, less than a log line that hurts.
const MAX_TEXT: usize = 512;

/// A client that cannot be made from its settings: for whoever wrote the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SetupError {
    #[error("{url:?} is not a URL for this service: {cause}")]
    Url { url: String, cause: String },
    #[error(
        "no CA file is given for {url}; name the PEM file of the CA that signed its certificate \
         (for a public CA the system's bundle, such as /etc/ssl/certs/ca-certificates.crt)"
    )]
    NoCa { url: String },
    #[error("the CA file {path} cannot be used: {cause}")]
    Ca { path: String, cause: String },
    #[error("{name} {value:?} cannot be sent in an HTTP header")]
    Header { name: &'static str, value: String },
    #[error("TLS cannot be set up: {cause}")]
    Tls { cause: String },
    #[error(transparent)]
    NotFips(#[from] NotFips),
}

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// No connection, no TLS session, or the connection was lost before an answer came.
    #[error("{what} cannot be reached: {cause}")]
    Unreachable { what: String, cause: String },
    /// The caller's deadline passed first.
    #[error("{what} did not answer in time")]
    TimedOut { what: String },
    /// The token service gives no token for this credential.
    #[error("{code}:{message}")]
    Iam { status: u16, code: String, message: String },
    /// The key service understood and refused. The text is the service's own.
    #[error("{message}")]
    Refused {
        status: u16,
        code: Option<String>,
        /// The first of its reasons in words, which the text only refers to.
        reason: Option<String>,
        message: String,
    },
    /// Something answered, but not a key service: a proxy, a wrong port, a broken reply.
    #[error("{what} gave an answer that makes no sense: {cause}")]
    BadAnswer { what: String, cause: String },
    /// The API key file of this machine cannot be used.
    #[error("the API key file {path} cannot be used: {cause}")]
    ApiKeyFile { path: String, cause: String },
    /// The file in which a service account's token should be has none, or one that has ended: whoever keeps it fresh is
    /// away, and nothing was withdrawn.
    #[error("the service account's token in {path} cannot be used: {cause}")]
    CrTokenFile { path: String, cause: String },
}

impl Error {
    /// Access was withdrawn or the key is gone: whoever holds a DEK of that key must drop it.
    pub fn is_refusal(&self) -> bool {
        match self {
            Error::Refused { status, .. } => matches!(status, 401 | 403 | 404 | 409 | 410),
            Error::Iam { status, .. } => is_final(*status),
            _ => false,
        }
    }

    /// The service could not be asked, so nothing is known to have been withdrawn: a held DEK may live on until it
    /// expires. A senseless answer counts, because a proxy's error page says nothing about a key.
    pub fn is_outage(&self) -> bool {
        match self {
            Error::Refused { status, .. } => *status >= 500 && *status != 501 || *status == 429,
            Error::Iam { status, .. } => !is_final(*status),
            _ => true,
        }
    }

    /// What the key service says with an error status. Anything but its own error body is a [`Error::BadAnswer`]: a
    /// proxy's 404 page must never look like a deleted key.
    pub fn from_key_service(what: &str, status: StatusCode, body: &[u8]) -> Error {
        let refusal = serde_json::from_slice::<ErrorBody>(body)
            .ok()
            .and_then(|body| body.resources.into_iter().next())
            .filter(|refusal| !refusal.error_msg.is_empty());
        match refusal {
            Some(refusal) => {
                let message = printable(&refusal.error_msg);
                let first = refusal.reasons.into_iter().next().unwrap_or_default();
                let said = |text: &str| Some(printable(text)).filter(|text| !text.is_empty());
                let code = said(&first.code).or_else(|| code_in(&message));
                Error::Refused {
                    status: status.as_u16(),
                    code,
                    reason: said(&first.message),
                    message,
                }
            }
            None => without_reason(what, status),
        }
    }

    /// What the token service says with an error status.
    pub fn from_token_service(what: &str, status: StatusCode, body: &[u8]) -> Error {
        match serde_json::from_slice::<TokenError>(body) {
            Ok(error) => Error::Iam {
                status: status.as_u16(),
                code: printable(&error.error_code),
                message: printable(error.error_message.trim_end().trim_end_matches('.')),
            },
            Err(_) => without_reason(what, status),
        }
    }

    /// The status of the answer, where there was one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Error::Iam { status, .. } | Error::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// The cloud service says of an old token that it is a bad request, not that it is unauthorized.
    pub(crate) fn tells_of_an_old_token(&self) -> bool {
        matches!(self, Error::Refused { status: 400, message, .. } if message.contains("Token is expired"))
    }
}

/// A status with which the token service refuses this credential for good. Two client errors only say "later".
fn is_final(status: u16) -> bool {
    (400..500).contains(&status) && status != 408 && status != 429
}

fn without_reason(what: &str, status: StatusCode) -> Error {
    let cause = format!("HTTP status {} and no reason that can be read", status.as_u16());
    Error::BadAnswer { what: what.to_owned(), cause }
}

/// `... (KEY_NOT_FOUND_ERR)` at the end of a message.
fn code_in(message: &str) -> Option<String> {
    let inner = message.trim_end().strip_suffix(')')?.rsplit_once('(')?.1;
    let is_code = !inner.is_empty()
        && inner.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_');
    is_code.then(|| inner.to_owned())
}

/// Text of a foreign service, fit for a log line and a terminal: bounded, control characters escaped.
fn printable(text: &str) -> String {
    let mut clean = String::with_capacity(text.len().min(MAX_TEXT));
    for c in text.chars() {
        if clean.len() >= MAX_TEXT {
            clean.push('…');
            break;
        }
        if c.is_control() {
            // Writing to a String cannot fail.
            let _ = write!(clean, "{}", c.escape_default());
        } else {
            clean.push(c);
        }
    }
    clean
}

/// A chain of causes in one line, outermost first, without the repetitions that wrapped errors like.
pub fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    printable(&text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BAD: StatusCode = StatusCode::BAD_REQUEST;

    #[test]
    fn unknown_api_key_reads_as_operators_search_for_it() {
        let body =
            br#"{"errorCode":"BXNIM0415E","errorMessage":"Provided API key could not be found.",
            "context":{"requestId":"r","requestType":"incoming.Identity_Token"}}"#;
        let error = Error::from_token_service("t", BAD, body);
        assert_eq!(error.to_string(), "BXNIM0415E:Provided API key could not be found");
        assert!(error.is_refusal() && !error.is_outage());
    }

    #[test]
    fn wrong_instance_keeps_the_text_of_the_service() {
        let text = "Bad Request: Request requires valid Instance Header containing a valid UUID";
        let body = format!(r#"{{"metadata":{{}},"resources":[{{"errorMsg":"{text}"}}]}}"#);
        let error = Error::from_key_service("k", BAD, body.as_bytes());
        assert_eq!(error.to_string(), text);
        assert!(!error.is_refusal() && !error.is_outage());
    }

    #[test]
    fn code_comes_from_the_reason_or_from_the_parentheses() {
        let with = br#"{"metadata":{},"resources":[{"errorMsg":"Not Found: x (OTHER_ERR)",
            "reasons":[{"code":"KEY_NOT_FOUND_ERR","message":"key does not exist","status":404}]}]}"#;
        let without = br#"{"metadata":{},"resources":[{"errorMsg":"Gone: y (KEY_DELETED_ERR)"}]}"#;
        let told = |body: &[u8]| match Error::from_key_service("k", StatusCode::GONE, body) {
            Error::Refused { code, reason, .. } => (code, reason),
            other => panic!("{other:?}"),
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(told(with), (some("KEY_NOT_FOUND_ERR"), some("key does not exist")));
        assert_eq!(told(without), (some("KEY_DELETED_ERR"), None));
        let bare = br#"{"metadata":{},"resources":[{"errorMsg":"z (see below)"}]}"#;
        assert_eq!(told(bare), (None, None));
    }

    #[test]
    fn a_page_of_a_proxy_is_not_a_deleted_key() {
        let error = Error::from_key_service("k", StatusCode::NOT_FOUND, b"<html>404</html>");
        assert!(matches!(error, Error::BadAnswer { .. }), "{error:?}");
        assert!(error.is_outage() && !error.is_refusal());
    }

    #[test]
    fn later_is_not_a_refusal() {
        let body = br#"{"errorCode":"BXNIM0429E","errorMessage":"Too many requests"}"#;
        let error = Error::from_token_service("t", StatusCode::TOO_MANY_REQUESTS, body);
        assert!(error.is_outage() && !error.is_refusal());
    }

    proptest! {
        #[test]
        fn any_body_gives_a_bounded_clean_text(status in 400u16..600, body: Vec<u8>) {
            let status = StatusCode::from_u16(status).unwrap();
            for error in [Error::from_key_service("k", status, &body), Error::from_token_service("t", status, &body)] {
                prop_assert!(!(error.is_refusal() && error.is_outage()));
                prop_assert!(error.to_string().len() < 3 * MAX_TEXT);
            }
        }

        #[test]
        fn any_message_stays_bounded_and_on_one_line(text: String, code: String) {
            let body = serde_json::json!({
                "metadata": {},
                "resources": [{"errorMsg": text, "reasons": [{"code": code}]}],
            });
            let error = Error::from_key_service("k", BAD, body.to_string().as_bytes());
            let shown = error.to_string();
            prop_assert!(shown.len() <= MAX_TEXT + 16);
            prop_assert!(!shown.chars().any(char::is_control));
        }

        #[test]
        fn any_token_refusal_keeps_code_and_message(code in "[A-Z0-9]{1,12}", text in "[a-zA-Z ]{0,40}[a-z]") {
            let body = serde_json::json!({"errorCode": code, "errorMessage": format!("{text}.")});
            let error = Error::from_token_service("t", BAD, body.to_string().as_bytes());
            prop_assert_eq!(error.to_string(), format!("{code}:{text}"));
        }
    }
}
