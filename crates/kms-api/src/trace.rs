//! W3C Trace Context: which trace a call belongs to, as the header `traceparent` says it from process to process.
//!
//! Only read, renamed and handed on: nothing here is exported, and nothing is decided by it. What does not follow the
//! standard counts as absent (Trace Context, 3.2.2), so that no caller fails because of a tracing system.

use std::fmt;

/// The name of the header, in HTTP and in gRPC's metadata.
pub const TRACEPARENT: &str = "traceparent";

/// Longest header that is looked at. Later versions of the standard may append fields; a caller may not send a book.
const MAX_LEN: usize = 256;
/// `00-<32 digits>-<16 digits>-<2 digits>`
const LEN: usize = 55;
/// The only flag that says something about the caller and not about how the trace id was made.
const SAMPLED: u8 = 1;

/// The trace and the span of whoever calls. Neither id is a secret, and neither is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    trace_id: TraceId,
    span_id: [u8; 8],
    sampled: bool,
}

/// What all spans of one trace have in common; 32 hexadecimal digits in a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceId([u8; 16]);

impl TraceParent {
    /// `None` for whatever is not a `traceparent`: another form, upper case, ids of zeros, the version `ff`.
    #[must_use]
    pub fn parse(header: &str) -> Option<TraceParent> {
        let bytes = header.as_bytes();
        let (known, more) = bytes.split_at_checked(LEN).filter(|_| bytes.len() <= MAX_LEN)?;
        let [version] = hex(known.get(..2)?)?;
        let trace_id: [u8; 16] = hex(known.get(3..35)?)?;
        let span_id: [u8; 8] = hex(known.get(36..52)?)?;
        let [flags] = hex(known.get(53..)?)?;
        let dashes = [2, 35, 52].iter().all(|at| known.get(*at) == Some(&b'-'));
        // Version 0 ends here; a later one goes on behind another dash, or ends here, too.
        let ends = more.is_empty() || version > 0 && more.starts_with(b"-");
        let named = trace_id != [0; 16] && span_id != [0; 8];
        let sampled = flags & SAMPLED != 0;
        (dashes && ends && named && version != 0xff).then_some(TraceParent {
            trace_id: TraceId(trace_id),
            span_id,
            sampled,
        })
    }

    #[must_use]
    pub fn trace_id(self) -> TraceId {
        self.trace_id
    }

    /// The same trace, seen from the next process: what is called there was called by `span_id`. One of zeros would be
    /// refused there, so the caller's own stays then.
    #[must_use]
    pub fn child(self, span_id: [u8; 8]) -> TraceParent {
        let span_id = if span_id == [0; 8] { self.span_id } else { span_id };
        TraceParent { span_id, ..self }
    }
}

/// The header's text, in version 0.
impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-", self.trace_id)?;
        self.span_id.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        write!(f, "-{:02x}", u8::from(self.sampled))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Lower-case digits, exactly as many as `N` bytes have.
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let (pairs, rest) = digits.as_chunks::<2>();
    if pairs.len() != N || !rest.is_empty() {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

fn digit(char: u8) -> Option<u8> {
    match char {
        b'0'..=b'9' => Some(char - b'0'),
        b'a'..=b'f' => Some(char - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SENT: &str = "00-0123456789abcdef0123456789abcdef-fedcba9876543210-01";

    #[test]
    fn a_header_of_the_standard_is_understood_and_handed_on_under_another_span() {
        let caller = TraceParent::parse(SENT).unwrap();
        assert_eq!(caller.to_string(), SENT);
        assert_eq!(caller.trace_id().to_string(), "0123456789abcdef0123456789abcdef");
        let ours = caller.child([0xaa; 8]).to_string();
        assert_eq!(ours, "00-0123456789abcdef0123456789abcdef-aaaaaaaaaaaaaaaa-01");
        assert_eq!(caller.child([0; 8]), caller);
    }

    #[test]
    fn a_later_version_is_read_as_far_as_it_is_known() {
        for later in [
            SENT.replacen("00-", "01-", 1),
            SENT.replacen("00-", "fe-", 1) + "-more",
            SENT[..LEN - 2].to_owned() + "03",
        ] {
            let read = TraceParent::parse(&later).unwrap_or_else(|| panic!("{later}"));
            assert_eq!(read.to_string(), SENT, "{later}");
        }
        let unsampled = SENT[..LEN - 2].to_owned() + "00";
        assert_eq!(TraceParent::parse(&unsampled).unwrap().to_string(), unsampled);
    }

    #[test]
    fn whatever_breaks_the_standard_counts_as_absent() {
        let long = SENT.replacen("00-", "01-", 1) + "-" + &"x".repeat(MAX_LEN);
        for wrong in [
            "",
            "00",
            &SENT[1..],
            &SENT[..LEN - 1],
            &format!("{SENT}-more"),
            &format!("{SENT} "),
            &SENT.replacen("00-", "ff-", 1),
            &(SENT.replacen("00-", "01-", 1) + "more"),
            &SENT.to_ascii_uppercase(),
            &SENT.replace('-', "_"),
            &SENT.replace("fedcba9876543210", "0000000000000000"),
            &SENT.replace("0123456789abcdef0123456789abcdef", &"0".repeat(32)),
            &SENT.replacen('3', "ü", 1)[..LEN + 1],
            &long,
        ] {
            assert_eq!(TraceParent::parse(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn every_pair_of_ids_survives_the_header(
            trace in any::<[u8; 16]>().prop_filter("no zeros", |id| *id != [0; 16]),
            span in any::<[u8; 8]>().prop_filter("no zeros", |id| *id != [0; 8]),
            sampled in any::<bool>(),
        ) {
            let made = TraceParent { trace_id: TraceId(trace), span_id: span, sampled };
            prop_assert_eq!(TraceParent::parse(&made.to_string()), Some(made));
        }

        #[test]
        fn any_text_is_refused_or_read_as_one_that_is_read_again(text in any::<String>()) {
            check(&text)?;
        }

        #[test]
        fn so_is_any_text_that_looks_like_one(
            text in "[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-fF]{16}-[0-9a-f]{2}(-?[ -~]{0,8})",
        ) {
            check(&text)?;
        }
    }

    fn check(text: &str) -> Result<(), TestCaseError> {
        if let Some(read) = TraceParent::parse(text) {
            prop_assert_eq!(TraceParent::parse(&read.to_string()), Some(read));
            prop_assert!(text.contains(&read.trace_id().to_string()));
        }
        Ok(())
    }
}
