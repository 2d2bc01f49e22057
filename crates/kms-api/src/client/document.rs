//! A document that anybody may read from somebody else's HTTPS server: no token, no redirect, and an end to its size
//! and to the wait for it.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, HeaderValue};
use http::{Method, StatusCode};

use super::https::{Exchange, Https, headers, until};
use super::{Ca, Error, SetupError, USER_AGENT};

/// JSON, and key sets by their own name (RFC 7517, 8.5.2): kube-apiserver gives them out under no other and answers 406
/// to whoever does not name it.
const WANTED: &str = "application/json, application/jwk-set+json";

#[derive(Debug)]
pub struct Document {
    https: Https,
}

impl Document {
    /// `kind` is what messages call it. Connects to nothing yet.
    ///
    /// # Errors
    /// A URL that is not `https://`, or has a query; a CA file without certificates.
    pub fn new(kind: &str, url: &str, ca: &Ca) -> Result<Self, SetupError> {
        Ok(Document { https: Https::new(kind, url, Some(ca), 1, USER_AGENT)? })
    }

    /// Its bytes, a megabyte at most.
    ///
    /// # Errors
    /// `Unreachable`, `TimedOut`, or `BadAnswer` for every status but 200.
    pub async fn fetch(&self, deadline: Duration) -> Result<Vec<u8>, Error> {
        let headers = headers([(ACCEPT, HeaderValue::from_static(WANTED))]);
        let (method, path, body) = (Method::GET, String::new(), Bytes::new());
        let exchange = Exchange { method, path, headers, body, replay: true };
        let mut answer = self.https.exchange(&exchange, until(deadline)).await?;
        if answer.status != StatusCode::OK {
            let status = answer.status.as_u16();
            return Err(self.https.bad_answer(format_args!("HTTP status {status}")));
        }
        Ok(std::mem::take(&mut *answer.body))
    }
}
