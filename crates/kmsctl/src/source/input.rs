//! Recognises a stored value in whatever form an operator has it at hand.
//!
//! A hex dump, what `etcdctl get` prints with or without `-w json`, the bare bytes, or any of the
//! last three in base64. Bytes in, a key and a value out; no file is opened here.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_core::etcd::object::V2Object;
use kms_core::etcd::prefix::{StoredValue, classify};
use serde::Deserialize;
use serde::de::IgnoredAny;
use thiserror::Error;

/// One value of etcd, and the key under which it stands if the input tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub key: Option<String>,
    pub value: Vec<u8>,
}

/// The input is broken; the operator gives another.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InputError {
    #[error("the input is empty: does the key exist in etcd?")]
    Empty,
    #[error("line {line} of the hex dump {what}; give the whole output of `hexdump -C`")]
    Dump { line: usize, what: &'static str },
    #[error("etcdctl found no such key")]
    NoKey,
    #[error("etcdctl found {0} keys; ask for one of them")]
    ManyKeys(usize),
    #[error("the {0} in etcdctl's JSON is not base64")]
    Json(&'static str),
}

/// Finds out what the input is and takes the stored value from it.
///
/// # Errors
/// It is empty, or begins as a form that is known but does not keep to it.
pub fn recognise(input: &[u8]) -> Result<Stored, InputError> {
    if input.trim_ascii().is_empty() {
        return Err(InputError::Empty);
    }
    let Ok(text) = std::str::from_utf8(input) else { return Ok(from_bytes(input)) };
    if text.trim_start().starts_with("00000000 ") {
        return dumped_bytes(text).map(|bytes| from_bytes(&bytes));
    }
    if let Some(reply) = EtcdctlReply::parse(text) {
        return reply.single();
    }
    match decoded_base64(input) {
        Some(bytes) if looks_stored(&bytes) => Ok(from_bytes(&bytes)),
        _ => Ok(from_bytes(input)),
    }
}

/// Base64 in one line or several.
pub(crate) fn decoded_base64(text: &[u8]) -> Option<Vec<u8>> {
    let text: Vec<u8> = text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    STANDARD.decode(text).ok()
}

/// The bytes, or what etcdctl prints: key, newline, value, newline.
fn from_bytes(bytes: &[u8]) -> Stored {
    let (key, value) = match split_key_line(bytes) {
        Some((key, value)) => (Some(key.to_owned()), value),
        None => (None, bytes),
    };
    Stored { key, value: without_last_newline(value).to_vec() }
}

/// A first line of text is a key if it is a path, or if a value of Kubernetes follows it.
fn split_key_line(bytes: &[u8]) -> Option<(&str, &[u8])> {
    if begins_as_value(bytes) {
        return None;
    }
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let key = std::str::from_utf8(&bytes[..end]).ok()?;
    let value = &bytes[end + 1..];
    let is_key = !key.is_empty() && !key.chars().any(char::is_control);
    (is_key && (key.starts_with('/') || begins_as_value(value))).then_some((key, value))
}

/// Encrypted by kube-apiserver, or protobuf as it stores it.
fn begins_as_value(bytes: &[u8]) -> bool {
    bytes.starts_with(b"k8s:enc:") || bytes.starts_with(b"k8s\0")
}

fn looks_stored(bytes: &[u8]) -> bool {
    begins_as_value(bytes) || split_key_line(bytes).is_some()
}

/// etcdctl ends a value with a newline of its own. Only in a KMS v2 value can that be told from
/// the value's last byte: protobuf never ends there.
fn without_last_newline(value: &[u8]) -> &[u8] {
    let Some(shorter) = value.strip_suffix(b"\n") else { return value };
    match classify(value) {
        Ok(StoredValue::KmsV2 { body, .. }) if V2Object::decode(body).is_ok() => value,
        _ => shorter,
    }
}

/// The bytes of `hexdump -C`: offset, up to 16 bytes, the same as text between bars. A line `*`
/// stands for lines like the one before.
fn dumped_bytes(text: &str) -> Result<Vec<u8>, InputError> {
    let mut bytes = Vec::with_capacity(text.len() / 4);
    let mut repeats = false;
    for (number, line) in text.lines().enumerate() {
        let fail = |what| InputError::Dump { line: number + 1, what };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        if line == "*" {
            repeats = true;
            continue;
        }
        let (offset, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let offset =
            usize::from_str_radix(offset, 16).map_err(|_| fail("does not begin with an offset"))?;
        if repeats {
            repeat_last_row(&mut bytes, offset).ok_or(fail("has an impossible offset"))?;
            repeats = false;
        }
        if offset != bytes.len() {
            return Err(fail("does not continue where the line before ends"));
        }
        let hex = rest.split_once('|').map_or(rest, |(hex, _)| hex);
        let before = bytes.len();
        for byte in hex.split_whitespace() {
            bytes.push(hex_byte(byte).ok_or(fail("holds something other than bytes"))?);
        }
        if bytes.len() - before > ROW {
            return Err(fail("holds more than 16 bytes"));
        }
    }
    Ok(bytes)
}

const ROW: usize = 16;

/// Fills up to `offset` with copies of the last row. The dump of a stored value repeats little:
/// what it claims is bounded, so that one short line cannot ask for gigabytes.
fn repeat_last_row(bytes: &mut Vec<u8>, offset: usize) -> Option<()> {
    let start = bytes.len().checked_sub(ROW)?;
    let missing = offset.checked_sub(bytes.len())?;
    if missing % ROW != 0 || offset > kms_core::limits::MAX_ETCD_VALUE {
        return None;
    }
    let row = bytes[start..].repeat(missing / ROW);
    bytes.extend_from_slice(&row);
    Some(())
}

fn hex_byte(text: &str) -> Option<u8> {
    let is_hex = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(text, 16).ok()).flatten()
}

/// What `etcdctl get -w json` prints. Without a match it holds a header only.
#[derive(Deserialize)]
struct EtcdctlReply {
    header: Option<IgnoredAny>,
    kvs: Option<Vec<KeyValue>>,
}

#[derive(Deserialize)]
struct KeyValue {
    key: String,
    #[serde(default)]
    value: String,
}

impl EtcdctlReply {
    /// `None` for any other JSON, such as a custom resource that is stored as it is.
    fn parse(text: &str) -> Option<Self> {
        let reply: Self = serde_json::from_str(text).ok()?;
        (reply.header.is_some() || reply.kvs.is_some()).then_some(reply)
    }

    fn single(self) -> Result<Stored, InputError> {
        let pairs = self.kvs.unwrap_or_default();
        let [pair] = pairs.as_slice() else {
            return Err(match pairs.len() {
                0 => InputError::NoKey,
                many => InputError::ManyKeys(many),
            });
        };
        let key = STANDARD.decode(&pair.key).map_err(|_| InputError::Json("key"))?;
        let value = STANDARD.decode(&pair.value).map_err(|_| InputError::Json("value"))?;
        Ok(Stored { key: Some(String::from_utf8_lossy(&key).into_owned()), value })
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "/registry/secrets/default/secret1";

    fn value() -> Vec<u8> {
        let body: Vec<u8> = (0..=255).chain([b'\n']).collect();
        [b"k8s:enc:kms:v1:KmsPlugin:".as_slice(), &body].concat()
    }

    fn printed(value: &[u8]) -> Vec<u8> {
        [KEY.as_bytes(), b"\n", value, b"\n"].concat()
    }

    /// `hexdump -C`, with `*` for repeated rows.
    fn hexdump(bytes: &[u8]) -> String {
        let mut text = String::new();
        let (mut last, mut starred) = (None, false);
        for (number, row) in bytes.chunks(ROW).enumerate() {
            if last == Some(row) {
                text.push_str(if starred { "" } else { "*\n" });
                starred = true;
                continue;
            }
            (last, starred) = (Some(row), false);
            let hex: String = row.iter().map(|byte| format!("{byte:02x} ")).collect();
            writeln!(text, "{:08x}  {hex:48} |{}|", number * ROW, ".".repeat(row.len())).unwrap();
        }
        writeln!(text, "{:08x}", bytes.len()).unwrap();
        text
    }

    fn with_key(value: Vec<u8>) -> Result<Stored, InputError> {
        Ok(Stored { key: Some(KEY.into()), value })
    }

    #[test]
    fn every_form_gives_the_same_value() {
        let pair = [STANDARD.encode(KEY), STANDARD.encode(value())];
        let json = format!(
            r#"{{"header":{{"revision":7}},"kvs":[{{"key":"{}","value":"{}"}}],"count":1}}"#,
            pair[0], pair[1]
        );
        for input in [
            printed(&value()),
            hexdump(&printed(&value())).into_bytes(),
            json.into_bytes(),
            STANDARD.encode(printed(&value())).into_bytes(),
        ] {
            assert_eq!(recognise(&input), with_key(value()));
        }
        let no_key = Ok(Stored { key: None, value: value() });
        for input in [
            [value(), b"\n".to_vec()].concat(),
            hexdump(&[value(), b"\n".to_vec()].concat()).into_bytes(),
        ] {
            assert_eq!(recognise(&input), no_key);
        }
    }

    #[test]
    fn base64_may_stand_in_several_lines() {
        let text = STANDARD.encode(printed(&value()));
        let lines: Vec<&str> =
            text.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect();
        assert_eq!(recognise(format!("{}\n", lines.join("\r\n")).as_bytes()), with_key(value()));
    }

    #[test]
    fn a_dump_copied_from_a_page_is_indented() {
        let page = hexdump(&printed(&value())).replace('\n', "\n  ");
        assert_eq!(recognise(format!("\n  {page}").as_bytes()), with_key(value()));
    }

    #[test]
    fn repeated_rows_of_a_dump_come_back() {
        let long = [b"k8s:enc:".as_slice(), &[7; 100]].concat();
        let dump = hexdump(&printed(&long));
        assert!(dump.contains("\n*\n"));
        assert_eq!(recognise(dump.as_bytes()), with_key(long));
    }

    #[test]
    fn a_broken_dump_names_the_line() {
        let is = |text: &str, line, what| {
            let error = InputError::Dump { line, what };
            assert_eq!(recognise(text.as_bytes()), Err(error), "{text:?}");
        };
        let row =
            "00000000  2f 72 65 67 69 73 74 72  79 2f 73 65 63 72 65 74  |/registry/secret|\n";
        let gap = "does not continue where the line before ends";
        is(&format!("{row}00000020  73"), 2, gap);
        is(&format!("{row}{row}"), 2, gap);
        is(&format!("{row}00000010  7z"), 2, "holds something other than bytes");
        is(&format!("{row}00000010  +7"), 2, "holds something other than bytes");
        is(&format!("{row}root@node"), 2, "does not begin with an offset");
        is(&format!("{row}*\n00000018"), 3, "has an impossible offset");
        is(&format!("{row}*\nffffffffff"), 3, "has an impossible offset");
        is(&format!("00000000 {}", " 00".repeat(17)), 1, "holds more than 16 bytes");
    }

    #[test]
    fn etcdctl_must_have_found_one_key() {
        assert_eq!(recognise(b" \n"), Err(InputError::Empty));
        assert_eq!(recognise(br#"{"header":{"revision":7}}"#), Err(InputError::NoKey));
        let two = br#"{"kvs":[{"key":"YQ==","value":"YQ=="},{"key":"YQ==","value":"YQ=="}]}"#;
        assert_eq!(recognise(two), Err(InputError::ManyKeys(2)));
        let broken = br#"{"kvs":[{"key":"YQ==","value":"!"}]}"#;
        assert_eq!(recognise(broken), Err(InputError::Json("value")));
    }

    #[test]
    fn plain_objects_are_taken_as_they_are() {
        let json = br#"{"apiVersion":"example.com/v1","kind":"Thing"}"#;
        assert_eq!(recognise(json), Ok(Stored { key: None, value: json.to_vec() }));
        assert_eq!(recognise(&printed(json)), with_key(json.to_vec()));
        let protobuf = b"k8s\0\n\x0c\n\x02v1\x12\x06Secret\n";
        assert_eq!(recognise(&printed(protobuf)), with_key(protobuf.to_vec()));
    }

    proptest! {
        #[test]
        fn what_etcdctl_prints_is_recognised_in_every_form(
            body in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let value = [b"k8s:enc:kms:v1:KmsPlugin:".as_slice(), &body].concat();
            let printed = printed(&value);
            prop_assert_eq!(recognise(&printed), with_key(value.clone()));
            prop_assert_eq!(recognise(hexdump(&printed).as_bytes()), with_key(value.clone()));
            prop_assert_eq!(recognise(STANDARD.encode(&printed).as_bytes()), with_key(value));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = recognise(&bytes);
        }

        #[test]
        fn anything_like_a_dump_never_panics(text in "00000000 ([ 0-9a-f*|\n]{0,80})") {
            let _ = recognise(text.as_bytes());
        }
    }
}
