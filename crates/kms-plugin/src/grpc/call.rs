//! What surrounds each request: who it is and how long it may take, and afterwards what is counted and logged of it.

use std::time::Duration;

use kms_api::trace::{TRACEPARENT, TraceParent};
use tonic::metadata::MetadataMap;
use tonic::{Response, Status};

use super::status;
use crate::metrics::Requests;
use crate::sealer::{Call, Sealer};

/// kube-apiserver's own default `timeout`, for callers that name none.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(3);
/// Nobody waits longer, whatever is asked. The longest timeout that is known in the field is 35 s (HyperShift).
const LONGEST_DEADLINE: Duration = Duration::from_secs(60);
/// kube-apiserver's uids are UUIDs.
const MAX_UID: usize = 64;

/// Names a method in logs, and counts its answers.
#[derive(Debug)]
pub(super) struct Method {
    api: &'static str,
    name: &'static str,
    requests: Requests,
}

impl Method {
    pub(super) fn new(api: &'static str, name: &'static str, sealer: &Sealer) -> Method {
        Method { api, name, requests: sealer.tools().metrics.requests(api, name) }
    }
}

/// What the sealer must know of a request. The uid comes from outside and goes into log lines: cut and cleaned. So does
/// `traceparent`, of which only what follows its standard is taken.
pub(super) fn call(uid: &str, metadata: &MetadataMap) -> Call {
    let uid = printable(uid);
    let text = |name: &str| metadata.get(name).and_then(|value| value.to_str().ok());
    let deadline = text("grpc-timeout").and_then(timeout).unwrap_or(DEFAULT_DEADLINE);
    let trace = text(TRACEPARENT).and_then(TraceParent::parse);
    Call { uid, trace, deadline: deadline.min(LONGEST_DEADLINE) }
}

/// Runs one request: afterwards it is in the metrics, and in the log. A request without a uid has an empty one.
pub(super) async fn answer<T>(
    sealer: &Sealer,
    method: &Method,
    call: &Call,
    work: impl Future<Output = Result<T, Status>>,
) -> Result<Response<T>, Status> {
    let Method { api, name, requests } = method;
    let uid = Some(&*call.uid).filter(|uid| !uid.is_empty());
    let started = sealer.now();
    let result = work.await;
    let took = sealer.now().saturating_sub(started);
    let code = result.as_ref().map_or_else(Status::code, |_| tonic::Code::Ok);
    requests.answered(status::name(code), took);
    match &result {
        Ok(_) => {
            tracing::debug!(uid, trace_id = call.trace_id(), "{api} {name} answered in {took:?}.")
        }
        Err(status) => tracing::error!(
            uid,
            trace_id = call.trace_id(),
            "{api} {name} failed: {}",
            status.message()
        ),
    }
    result.map(Response::new)
}

fn printable(uid: &str) -> String {
    if uid.len() <= MAX_UID && uid.bytes().all(|byte| byte.is_ascii_graphic()) {
        return uid.to_owned();
    }
    let cleaned = |char: char| if char.is_ascii_graphic() { char } else { '_' };
    uid.chars().take(MAX_UID).map(cleaned).collect()
}

/// At most eight digits and a unit (gRPC over HTTP/2, "Timeout").
fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        for (text, expected) in [
            ("2999876u", Some(Duration::from_micros(2_999_876))),
            ("3S", Some(Duration::from_secs(3))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("1M", Some(Duration::from_secs(60))),
            ("250m", Some(Duration::from_millis(250))),
            ("0n", Some(Duration::ZERO)),
            ("", None),
            ("S", None),
            ("100000000S", None),
            ("+1S", None),
            ("1s", None),
            ("1€", None),
        ] {
            assert_eq!(timeout(text), expected, "{text}");
        }
    }

    #[test]
    fn a_missing_or_endless_deadline_becomes_a_sane_one() {
        let mut metadata = MetadataMap::new();
        assert_eq!(call("", &metadata).deadline, Duration::from_secs(3));
        metadata.insert("grpc-timeout", "soon".parse().unwrap());
        assert_eq!(call("", &metadata).deadline, Duration::from_secs(3));
        metadata.insert("grpc-timeout", "10H".parse().unwrap());
        assert_eq!(call("", &metadata).deadline, Duration::from_secs(60));
        metadata.insert("grpc-timeout", "20m".parse().unwrap());
        assert_eq!(call("", &metadata).deadline, Duration::from_millis(20));
    }

    proptest! {
        #[test]
        fn no_uid_breaks_a_log_line(uid in any::<String>()) {
            let uid = call(&uid, &MetadataMap::new()).uid;
            prop_assert!(uid.len() <= MAX_UID && uid.bytes().all(|byte| byte.is_ascii_graphic()));
        }

        #[test]
        fn any_text_is_a_timeout_or_none(text in any::<String>()) {
            let known = timeout(&text).is_some();
            prop_assert!(!known || text.is_ascii());
        }
    }
}
