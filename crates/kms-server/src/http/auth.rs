//! Who asks, where and in what form: the headers of a request.

use super::problem::Problem;
use crate::app::App;
use crate::ops::{Error, Origin, refused};
use crate::policy::Caller;
use crate::token::{Bearer, NotValid};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use kms_api::trace::{TRACEPARENT, TraceParent};
use std::net::SocketAddr;
use uuid::Uuid;

/// The on-premises product calls it `icp-instance`, the cloud service `Bluemix-Instance`.
const INSTANCE_HEADERS: [&str; 2] = ["icp-instance", "bluemix-instance"];
const MAX_CORRELATION: usize = 128;

/// Checks the token, and asks the store whether what it was got with is still good: a revoked or locked API key ends
/// with the next call.
///
/// A token that is refused is recorded before it is answered.
pub(super) async fn caller(
    app: &App,
    headers: &HeaderMap,
    origin: &Origin,
) -> Result<Caller, Problem> {
    let found = identify(app, headers).await;
    if let Err(Problem::BadToken(why)) = &found {
        refused::token(app, *why, origin.clone()).await?;
    }
    found
}

async fn identify(app: &App, headers: &HeaderMap) -> Result<Caller, Problem> {
    let token = bearer(headers).ok_or(Problem::NoToken)?;
    let known = match app.issuer.verify(token).map_err(Problem::BadToken)? {
        Bearer::ServiceId { service_id, secret } => {
            app.store.caller(service_id, &secret, app.now()).await
        }
        Bearer::Profile(profile) => app.store.caller_by_profile(profile).await,
    };
    known.map_err(Error::from)?.ok_or(Problem::BadToken(NotValid::Revoked))
}

/// The instance that the request is about, if it names one.
pub(super) fn instance(headers: &HeaderMap) -> Option<Uuid> {
    let values = INSTANCE_HEADERS.iter().flat_map(|name| headers.get_all(*name));
    let mut named = values.map(|value| in_any_case(value.to_str().ok()?));
    let first = named.next()??;
    // Two different ones: whoever checked the one must not be overruled by the other.
    named.all(|other| other == Some(first)).then_some(first)
}

/// Key rings are not built; all keys are in the one that always exists.
pub(super) fn key_ring(headers: &HeaderMap) -> Result<(), Problem> {
    match headers.get("x-kms-key-ring") {
        Some(ring) if !ring.is_empty() && ring != "default" => {
            Err(Error::NotBuilt("key rings").into())
        }
        _ => Ok(()),
    }
}

pub(super) fn prefers_representation(headers: &HeaderMap) -> bool {
    headers
        .get_all("prefer")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.split([',', ';']).any(|one| one.trim() == "return=representation"))
}

/// Whose request this is, and what the caller calls it. Of the headers that speak of others (`X-Forwarded-For`) none is
/// believed: anybody can send them.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) origin: Origin,
    pub(super) trace: Option<TraceParent>,
}

impl Names {
    pub(super) fn of(peer: SocketAddr, headers: &HeaderMap) -> Names {
        let trace = headers.get(TRACEPARENT).and_then(|value| value.to_str().ok());
        let origin = Origin { peer, correlation: correlation(headers) };
        Names { origin, trace: trace.and_then(TraceParent::parse) }
    }
}

/// The caller's own id, if it can be repeated in a header, a log and an audit record.
fn correlation(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("correlation-id")?.to_str().ok()?;
    let fits = (1..=MAX_CORRELATION).contains(&text.len());
    (fits && text.bytes().all(|b| b.is_ascii_graphic())).then(|| text.to_owned())
}

/// A UUID in the one form in which answers write it: 32 small hexadecimal digits and four hyphens. In a path another form
/// would give one thing two names, of which somebody's filter knows one (OpenBao, CVE-2026-3605).
pub(super) fn uuid(text: &str) -> Option<Uuid> {
    let id = in_any_case(text)?;
    let mut canonical = Uuid::encode_buffer();
    (id.hyphenated().encode_lower(&mut canonical) == text).then_some(id)
}

/// In a header nothing is found by its text, so RFC 9562 holds: whoever reads it takes capitals, too.
fn in_any_case(text: &str) -> Option<Uuid> {
    if text.len() == 36 { Uuid::try_parse(text).ok() } else { None }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut all = headers.get_all(AUTHORIZATION).iter();
    let value = all.next()?.to_str().ok()?;
    if all.next().is_some() {
        return None;
    }
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0f0c1a52-7a33-4c6e-9d5e-0123456789ab";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().unwrap());
        }
        map
    }

    #[test]
    fn either_header_names_the_instance_and_both_must_agree() {
        let wanted: Uuid = ID.parse().unwrap();
        let other = "0f0c1a52-7a33-4c6e-9d5e-000000000000";
        for good in [
            &[("icp-instance", ID)][..],
            &[("bluemix-instance", ID)],
            &[("icp-instance", ID), ("bluemix-instance", ID)],
        ] {
            assert_eq!(instance(&headers(good)).unwrap(), wanted);
        }
        let braced = format!("{{{ID}}}");
        for bad in [
            &[][..],
            &[("icp-instance", "")],
            &[("icp-instance", "<INSTANCE_ID>")],
            &[("icp-instance", &braced)],
            &[("icp-instance", ID), ("bluemix-instance", other)],
            &[("icp-instance", ID), ("icp-instance", other)],
        ] {
            assert_eq!(instance(&headers(bad)), None, "{bad:?}");
        }
    }

    #[test]
    fn one_bearer_token_is_read_and_nothing_else() {
        assert_eq!(bearer(&headers(&[("authorization", "bearer a.b.c")])), Some("a.b.c"));
        for bad in [
            &[][..],
            &[("authorization", "a.b.c")],
            &[("authorization", "Basic a.b.c")],
            &[("authorization", "Bearer a"), ("authorization", "Bearer b")],
        ] {
            assert_eq!(bearer(&headers(bad)), None, "{bad:?}");
        }
    }

    #[test]
    fn a_correlation_id_is_short_and_printable() {
        let read = |text: &str| correlation(&headers(&[("correlation-id", text)]));
        assert_eq!(read("abc-1").as_deref(), Some("abc-1"));
        assert_eq!(read("a b"), None);
        assert_eq!(read(&"x".repeat(200)), None);
    }

    #[test]
    fn a_representation_is_preferred_only_when_said() {
        let asks = |text: &str| prefers_representation(&headers(&[("prefer", text)]));
        assert!(asks("return=representation"));
        assert!(asks("wait=10, return=representation"));
        assert!(!asks("return=minimal"));
    }
}
