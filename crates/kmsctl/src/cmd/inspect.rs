//! `kmsctl inspect`: explains one stored value without any key.
//!
//! Nothing is decrypted and nothing is fetched. What is not ours is said, not treated as an error:
//! the operator asked what it is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_core::cipher::{v1, v2};
use kms_core::etcd::object::{V1Body, V2Object};
use kms_core::etcd::prefix::{StoredValue, classify};
use kms_core::limits::MAX_ETCD_VALUE;
use kms_core::wdek::Look;
use serde::Serialize;

use crate::error::Error;
use crate::output::{Format, Output, printable};
use crate::source::input::{Stored, decoded_base64, recognise};

pub(crate) const EXAMPLES: &str = "\
Examples:
  etcdctl get /registry/secrets/default/secret1 | kmsctl inspect
  etcdctl get /registry/secrets/default/secret1 -w json | kmsctl inspect -o json
  kmsctl inspect dump.txt             what hexdump -C printed
  kmsctl inspect --cipher cipher.b64";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A hex dump, the output of etcdctl (also with -w json), a bare value, or base64 of it;
    /// - is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    input: PathBuf,
    /// Read from FILE only what the plug-in returned from Encrypt, in base64
    #[arg(long, value_name = "FILE", conflicts_with = "input")]
    cipher: Option<PathBuf>,
}

/// A dump takes five bytes for one.
const MAX_INPUT: u64 = 5 * MAX_ETCD_VALUE as u64;

/// Reads the input, explains it, prints the explanation. A value that is not ours is an answer.
pub(crate) fn run(args: &Args, output: &mut Output<'_>) -> Result<(), Error> {
    let report = match &args.cipher {
        Some(path) => explain_cipher(&read(path)?),
        None => {
            let stored = recognise(&read(&args.input)?).map_err(|error| Error::Input {
                what: name(&args.input),
                cause: error.to_string(),
            })?;
            explain(stored)
        }
    };
    match output.format() {
        Format::Table => output.raw(tree(&report).as_bytes()),
        Format::Json => output.json(&report),
    }
}

/// What is known of a value. The members are the command's JSON, in this order.
#[derive(Debug, Default, Serialize)]
struct Report {
    key: Option<String>,
    api: Option<&'static str>,
    provider: Option<String>,
    encrypted_dek_bytes: Option<usize>,
    kp_version: Option<i64>,
    wdek_bytes: Option<usize>,
    cipher_bytes: Option<usize>,
    body_bytes: Option<usize>,
    wdek: Option<WdekReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<String>,
    /// Values in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_type: Option<&'static str>,
    /// Why something above is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

#[derive(Debug, Serialize)]
struct WdekReport {
    version: Option<String>,
    ciphertext_bytes: usize,
    hash_bytes: Option<usize>,
    iv_bytes: Option<usize>,
    handle: Option<String>,
}

impl From<Look> for WdekReport {
    fn from(look: Look) -> Self {
        Self {
            version: look.version,
            ciphertext_bytes: look.ciphertext_bytes,
            hash_bytes: look.hash_bytes,
            iv_bytes: look.iv_bytes,
            handle: look.handle,
        }
    }
}

/// Explains a stored value from the outside in, as far as it is known.
fn explain(stored: Stored) -> Report {
    let mut report = Report { key: stored.key, ..Report::default() };
    match classify(&stored.value) {
        Ok(StoredValue::Identity(body)) => {
            report.named("identity", body);
            report.note = Some(plain_note(body));
        }
        Ok(StoredValue::AesCbc { key_name, body }) => report.local("aescbc", key_name, body),
        Ok(StoredValue::AesGcm { key_name, body }) => report.local("aesgcm", key_name, body),
        Ok(StoredValue::Secretbox { key_name, body }) => report.local("secretbox", key_name, body),
        Ok(StoredValue::KmsV1 { provider, body }) => report.kms_v1(provider, body),
        Ok(StoredValue::KmsV2 { provider, body }) => report.kms_v2(provider, body),
        Err(error) => report.note = Some(error.to_string()),
    }
    report
}

/// Explains what the plug-in returned: as it is, or in base64 as gRPC tools print it.
fn explain_cipher(input: &[u8]) -> Report {
    let mut report = Report::default();
    let raw = input.to_vec();
    let text = input.trim_ascii().to_vec();
    for cipher in [Some(text), Some(raw), decoded_base64(input)].into_iter().flatten() {
        report.encrypted_dek_bytes = Some(cipher.len());
        if let Ok(envelope) = v1::Envelope::decode(&cipher) {
            report.api = Some("v1");
            report.envelope(envelope.kp_version(), envelope.wdek(), envelope.cipher_len());
            return report;
        }
        if let Ok(envelope) = v2::Envelope::decode(&cipher) {
            report.api = Some("v2");
            report.envelope(envelope.kp_version(), envelope.wdek(), envelope.cipher_len());
            return report;
        }
    }
    report.encrypted_dek_bytes = Some(input.len());
    report.note = Some("this is nothing that the Keelson plug-in returns from Encrypt".into());
    report
}

impl Report {
    fn named(&mut self, provider: &str, body: &[u8]) {
        self.provider = Some(provider.to_owned());
        self.body_bytes = Some(body.len());
    }

    fn local(&mut self, provider: &str, key_name: &str, body: &[u8]) {
        self.named(provider, body);
        self.note = Some(format!(
            "encrypted with key {key_name:?} of kube-apiserver's encryption configuration: there \
             is no wrapped DEK inside"
        ));
    }

    fn kms_v1(&mut self, provider: &str, body: &[u8]) {
        self.api = Some("v1");
        self.named(provider, body);
        let body = match V1Body::decode(body) {
            Ok(body) => body,
            Err(error) => return self.note = Some(error.to_string()),
        };
        self.encrypted_dek_bytes = Some(body.encrypted_dek.len());
        self.body_bytes = Some(body.body.len());
        match v1::Envelope::decode(body.encrypted_dek) {
            Ok(envelope) => {
                self.envelope(envelope.kp_version(), envelope.wdek(), envelope.cipher_len());
            }
            Err(error) => self.note = Some(foreign_note(&error.to_string())),
        }
    }

    fn kms_v2(&mut self, provider: &str, body: &[u8]) {
        self.api = Some("v2");
        self.named(provider, body);
        let object = match V2Object::decode(body) {
            Ok(object) => object,
            Err(error) => return self.note = Some(error.to_string()),
        };
        self.encrypted_dek_bytes = Some(object.encrypted_dek_source.len());
        self.body_bytes = Some(object.encrypted_data.len());
        self.key_id = Some(object.key_id);
        self.source_type = Some(object.source_type.as_str());
        let annotations = object.annotations.into_iter();
        self.annotations =
            Some(annotations.map(|(key, value)| (key, STANDARD.encode(value))).collect());
        match v2::Envelope::decode(&object.encrypted_dek_source) {
            Ok(envelope) => {
                self.envelope(envelope.kp_version(), envelope.wdek(), envelope.cipher_len());
            }
            Err(error) => self.note = Some(foreign_note(&error.to_string())),
        }
    }

    fn envelope(&mut self, kp_version: i64, wdek: &[u8], cipher_len: usize) {
        self.kp_version = Some(kp_version);
        self.wdek_bytes = Some(wdek.len());
        self.cipher_bytes = Some(cipher_len);
        let look = std::str::from_utf8(wdek).ok().and_then(|text| Look::of(text).ok());
        match look {
            Some(look) => self.wdek = Some(look.into()),
            None => self.note = Some("the wrapped DEK is not in a form that is known".into()),
        }
    }
}

fn plain_note(body: &[u8]) -> String {
    if v1::Envelope::decode(body.trim_ascii()).is_ok() {
        return "this is not a stored value but what the plug-in returned: give it with --cipher"
            .into();
    }
    "not encrypted by kube-apiserver: whoever reads etcd reads this".into()
}

fn foreign_note(error: &str) -> String {
    format!("the encrypted DEK was not written by the Keelson plug-in: {error}")
}

/// One line per fact, indented by what it lies in.
fn tree(report: &Report) -> String {
    let title = match (&report.key, &report.provider) {
        (Some(key), _) => key,
        (None, Some(_)) => "a stored value",
        (None, None) => "a cipher",
    };
    let mut root = Node::new(title.to_owned());
    if let Some(api) = report.api {
        root.add(format!("encrypted by      a KMS plug-in, API {api}"));
    }
    root.add_some("provider          ", report.provider.as_ref());
    root.add_some("key_id            ", report.key_id.as_ref());
    root.add_some("source type       ", report.source_type.as_ref());
    for (key, value) in report.annotations.iter().flatten() {
        root.add(format!("annotation        {key} = {value} (base64)"));
    }
    if let Some(len) = report.encrypted_dek_bytes {
        let dek = root.add(format!("encrypted DEK     {len} bytes, what the plug-in returned"));
        dek.add_some("KpVersion      ", report.kp_version.as_ref());
        if let Some(len) = report.wdek_bytes {
            let wdek = dek.add(format!("wrapped DEK    {len} bytes, from the key service"));
            if let Some(look) = &report.wdek {
                add_wdek(wdek, look);
            }
        }
        if let Some(len) = report.cipher_bytes {
            let what = if report.api == Some("v2") { "nonce included" } else { "IV included" };
            dek.add(format!("cipher         {len} bytes, the payload under the DEK, {what}"));
        }
    }
    if let Some(len) = report.body_bytes {
        root.add(format!("body              {len} bytes, the object"));
    }
    root.add_some("note              ", report.note.as_ref());
    root.render()
}

fn add_wdek(wdek: &mut Node, look: &WdekReport) {
    wdek.add_some("version     ", look.version.as_ref());
    wdek.add(format!("ciphertext  {} bytes", look.ciphertext_bytes));
    for (name, len) in [("hash        ", look.hash_bytes), ("iv          ", look.iv_bytes)] {
        wdek.add_some(name, len.map(|len| format!("{len} bytes")).as_ref());
    }
    let handle = look.handle.as_deref().unwrap_or("none: does not say which CRK version");
    wdek.add(format!("handle      {handle}"));
}

/// A line with the lines that belong to it.
struct Node {
    line: String,
    children: Vec<Node>,
}

impl Node {
    fn new(line: String) -> Self {
        Self { line, children: Vec::new() }
    }

    fn add(&mut self, line: String) -> &mut Self {
        self.children.push(Self::new(line));
        let last = self.children.len() - 1;
        &mut self.children[last]
    }

    fn add_some(&mut self, name: &str, value: Option<&impl ToString>) {
        if let Some(value) = value {
            self.add(format!("{name}{}", value.to_string()));
        }
    }

    fn render(&self) -> String {
        let mut text = format!("{}\n", printable(&self.line));
        self.render_children("", &mut text);
        text
    }

    fn render_children(&self, indent: &str, text: &mut String) {
        for (number, child) in self.children.iter().enumerate() {
            let last = number + 1 == self.children.len();
            let (branch, below) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            text.push_str(&format!("{indent}{branch}{}\n", printable(&child.line)));
            child.render_children(&format!("{indent}{below}"), text);
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let fail = |cause| Error::File { path: name(path), cause };
    let source: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(path).map_err(fail)?)
    };
    let mut bytes = Vec::new();
    source.take(MAX_INPUT + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > MAX_INPUT {
        return Err(fail(io::Error::other("this is larger than any value of etcd in any form")));
    }
    Ok(bytes)
}

fn name(path: &Path) -> String {
    if path == Path::new("-") { "standard input".into() } else { path.display().to_string() }
}

#[cfg(test)]
mod tests {
    use kms_core::key_id::KeyId;
    use kms_core::secret::Dek;
    use proptest::prelude::*;

    use super::*;

    fn explained(value: &[u8]) -> Report {
        explain(Stored { key: None, value: value.to_vec() })
    }

    fn v2_cipher() -> Vec<u8> {
        let key_id = KeyId::new("i", "c", "v").unwrap();
        v2::seal(&Dek::from_bytes([1; 32]), &key_id, 3, b"wdek", Some([2; 12]), &[4; 32]).unwrap()
    }

    /// A protobuf field of bytes.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let len = u8::try_from(bytes.len()).unwrap();
        assert!(len < 128);
        [&[number << 3 | 2, len], bytes].concat()
    }

    fn v2_value(cipher: &[u8]) -> Vec<u8> {
        let annotation = [field(1, b"a.b"), field(2, b"\x01\x02")].concat();
        [
            b"k8s:enc:kms:v2:plug-in:".to_vec(),
            field(1, &[9; 70]),
            field(2, b"keelson/i/c/v"),
            field(3, cipher),
            field(4, &annotation),
            vec![5 << 3, 1],
        ]
        .concat()
    }

    #[test]
    fn a_v2_value_is_explained_down_to_its_wrapped_dek() {
        let report = explained(&v2_value(&v2_cipher()));
        assert_eq!((report.api, report.provider.as_deref()), (Some("v2"), Some("plug-in")));
        assert_eq!(report.key_id.as_deref(), Some("keelson/i/c/v"));
        assert_eq!(report.source_type, Some("HKDF_SHA256_XNONCE_AES_GCM_SEED"));
        assert_eq!(report.annotations.as_ref().unwrap()["a.b"], "AQI=");
        assert_eq!((report.kp_version, report.wdek_bytes), (Some(3), Some(4)));
        assert_eq!((report.cipher_bytes, report.body_bytes), (Some(60), Some(70)));
        assert!(report.wdek.is_none() && report.note.unwrap().contains("wrapped DEK is not"));
    }

    #[test]
    fn another_plug_ins_cipher_is_said_to_be_one() {
        let report = explained(&v2_value(b"\x01foreign"));
        assert_eq!((report.encrypted_dek_bytes, report.body_bytes), (Some(8), Some(70)));
        assert!(report.note.unwrap().contains("not written by the Keelson plug-in"));

        let v1 = [b"k8s:enc:kms:v1:other:\0\x03abc".as_slice(), &[0; 32]].concat();
        let report = explained(&v1);
        assert_eq!((report.api, report.encrypted_dek_bytes), (Some("v1"), Some(3)));
        assert!(report.note.unwrap().contains("not written by the Keelson plug-in"));
    }

    #[test]
    fn values_without_a_plug_in_are_said_to_be_without() {
        let plain = explained(b"k8s\0secret");
        assert_eq!((plain.provider.as_deref(), plain.api), (Some("identity"), None));
        assert!(plain.note.unwrap().contains("not encrypted"));
        for provider in ["aescbc", "aesgcm", "secretbox"] {
            let report = explained(format!("k8s:enc:{provider}:v1:key1:body").as_bytes());
            assert_eq!(report.provider.as_deref(), Some(provider));
            assert_eq!(report.body_bytes, Some(4));
            assert!(report.note.unwrap().contains("\"key1\""));
        }
        let broken = explained(b"k8s:enc:kms:v1:KmsPlugin:\x02\x74short");
        assert_eq!(broken.encrypted_dek_bytes, None);
        assert!(broken.note.unwrap().contains("ends within its encrypted DEK"));
        assert!(explained(b"k8s:enc:rot13:").note.unwrap().contains("no provider that is known"));
    }

    #[test]
    fn a_cipher_is_known_in_base64_and_as_it_is() {
        let text = format!("{}\n", STANDARD.encode(v2_cipher()));
        for input in [v2_cipher(), text.into_bytes()] {
            let report = explain_cipher(&input);
            assert_eq!((report.api, report.kp_version), (Some("v2"), Some(3)));
            assert_eq!(report.encrypted_dek_bytes, Some(v2_cipher().len()));
        }
        let report = explain_cipher(b"dmF1bHQ6djE6");
        assert_eq!((report.api, report.encrypted_dek_bytes), (None, Some(12)));
        assert!(report.note.is_some());
    }

    #[test]
    fn the_tree_shows_no_control_characters_of_etcd() {
        let stored = Stored { key: Some("/a\u{1b}[2J".into()), value: b"{}".to_vec() };
        assert_eq!(
            tree(&explain(stored)),
            "/a\u{fffd}[2J\n\
             ├─ provider          identity\n\
             ├─ body              2 bytes, the object\n\
             └─ note              not encrypted by kube-apiserver: whoever reads etcd reads this\n"
        );
    }

    proptest! {
        #[test]
        fn any_value_is_explained(
            prefix in "(k8s:enc:(kms:v1:p:|kms:v2:p:|aescbc:v1:k:)?)?", body: Vec<u8>,
        ) {
            let report = explained(&[prefix.as_bytes(), &body].concat());
            prop_assert!(tree(&report).ends_with('\n'));
            explain_cipher(&body);
        }
    }
}
