//! The body of a request: bounded in size and time, wiped after use (the buffers it came through are the TLS and HTTP
//! libraries' own, and are not), and read as leniently as IBM's clients need.
//!
//! They send no content type or any, nothing, `null` or `{}` where nothing is to be said, and member names in a case
//! of their own. What none of them does is refused: unknown members, members given twice, anything after the end.

use super::problem::Problem;
use http_body_util::{BodyExt, Limited};
use hyper::body::Body as _;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::time::timeout;
use zeroize::Zeroizing;

/// More than any request needs: the largest is an import or a wrap of 4096 bytes with 126 strings of 255.
const MAX_BODY: usize = 64 * 1024;
/// How long a body may take behind its head. It is read before the request's turn, so who sends a byte a second holds a
/// connection and no more.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The bytes as they came. A DEK may be among them.
pub(super) struct Body(Zeroizing<Vec<u8>>);

/// Reads the whole body, whatever its media type is said to be.
///
/// # Errors
/// `TooLarge`, `Slow`, or `Cut` when the connection ends first.
pub(super) async fn read(body: Incoming) -> Result<Body, Problem> {
    timeout(BODY_TIMEOUT, read_whole(body)).await.unwrap_or(Err(Problem::Slow))
}

async fn read_whole(body: Incoming) -> Result<Body, Problem> {
    let expected = body.size_hint().lower();
    // Reserved at once: a growing vector would leave copies of itself behind.
    let size = usize::try_from(expected).unwrap_or(MAX_BODY).min(MAX_BODY);
    let mut bytes = Zeroizing::new(Vec::with_capacity(size));
    let mut body = Limited::new(body, MAX_BODY);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| {
            if e.is::<http_body_util::LengthLimitError>() {
                Problem::TooLarge
            } else {
                Problem::Cut
            }
        })?;
        if let Some(data) = frame.data_ref() {
            bytes.extend_from_slice(data);
        }
    }
    Ok(Body(bytes))
}

impl Body {
    /// The JSON in it, member names taken in lower case; `None` when nothing is said.
    ///
    /// # Errors
    /// `BadBody`.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<Option<T>, Problem> {
        let mut text = self.0.clone();
        lower_names(&mut text);
        let said = text.trim_ascii();
        if said.is_empty() || said == b"null" {
            return Ok(None);
        }
        serde_json::from_slice(said).map(Some).map_err(|e| Problem::BadBody(reason(&e)))
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Body({} bytes)", self.0.len())
    }
}

/// What is wrong, without the values that the body held.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.strip_prefix("unknown field `").and_then(|rest| rest.split_once('`')) {
        Some((name, _)) => format!("json: unknown field \"{name}\""),
        None if error.is_data() => {
            let shape = text.split([',', ':']).next().unwrap_or_default();
            format!("json: {shape} at line {} column {}", error.line(), error.column())
        }
        None => format!("json: not valid at line {} column {}", error.line(), error.column()),
    }
}

/// Turns ASCII letters in member names, and nowhere else, into lower case. The service whose API this is matches names
/// in any case. A name is a string that a colon follows; whether the text is JSON at all is for the parser to say.
pub fn lower_names(text: &mut [u8]) {
    let mut at = 0;
    while at < text.len() {
        if text[at] != b'"' {
            at += 1;
            continue;
        }
        let start = at + 1;
        let end = string_end(text, start);
        at = end + 1;
        let next = text.get(at..).and_then(|rest| rest.iter().find(|b| !b.is_ascii_whitespace()));
        if next == Some(&b':') {
            text[start..end].make_ascii_lowercase();
        }
    }
}

/// Where the string that begins at `start` ends: its closing quote, or the end of the text.
fn string_end(text: &[u8], start: usize) -> usize {
    let mut at = start;
    while at < text.len() && text[at] != b'"' {
        at += if text[at] == b'\\' { 2 } else { 1 };
    }
    at.min(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        keyringid: Option<String>,
        tags: Option<Vec<String>>,
    }

    fn parse(text: &str) -> Result<Option<Sample>, Problem> {
        Body(Zeroizing::new(text.as_bytes().to_vec())).json()
    }

    #[test]
    fn member_names_are_read_in_any_case_and_values_are_left_alone() {
        let read = parse(r#"{"KeyRingID" : "My:\"Ring\\", "Tags":["A:b","C"]}"#).unwrap().unwrap();
        assert_eq!(read.keyringid.as_deref(), Some(r#"My:"Ring\"#));
        assert_eq!(read.tags.unwrap(), ["A:b", "C"]);
    }

    #[test]
    fn nothing_can_be_said_in_four_ways() {
        for text in ["", "  ", "null", "\n null "] {
            assert_eq!(parse(text).unwrap(), None);
        }
        assert_eq!(parse("{}").unwrap(), Some(Sample { keyringid: None, tags: None }));
    }

    #[test]
    fn what_no_client_does_is_refused_and_no_value_is_repeated() {
        for bad in [
            r#"{"tags":["a"],"Tags":["b"]}"#,
            r#"{"colour":"SECRET"}"#,
            r#"{"tags":"SECRET"}"#,
            r#"{"tags":["SECRET"]"#,
            r#"{"keyRingID":"a"} {"keyRingID":"SECRET"}"#,
            "[",
        ] {
            let problem = parse(bad).unwrap_err();
            assert!(matches!(problem, Problem::BadBody(_)), "{bad}");
            assert!(!format!("{problem:?}").contains("SECRET"), "{problem:?}");
        }
    }

    #[test]
    fn unknown_members_are_named() {
        let Problem::BadBody(text) = parse(r#"{"colour":1}"#).unwrap_err() else { panic!() };
        assert_eq!(text, "json: unknown field \"colour\"");
    }

    proptest! {
        #[test]
        fn json_stays_the_same_json(name in "[a-z]{1,8}", value: String) {
            let text = serde_json::json!({ (name.clone()): value.clone() }).to_string();
            let mut shouted = text.replace(&format!("\"{name}\":"), &format!("\"{}\":", name.to_uppercase()));
            prop_assume!(shouted.len() == text.len());
            // SAFETY of the comparison: only the one name differs.
            let mut bytes = std::mem::take(&mut shouted).into_bytes();
            lower_names(&mut bytes);
            let read: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            prop_assert_eq!(&read[&name], &serde_json::Value::String(value));
        }

        #[test]
        fn any_bytes_keep_their_length_and_never_panic(mut bytes: Vec<u8>) {
            let before = bytes.clone();
            lower_names(&mut bytes);
            prop_assert!(bytes.eq_ignore_ascii_case(&before));
        }
    }
}
