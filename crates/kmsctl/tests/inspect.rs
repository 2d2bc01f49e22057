//! `kmsctl inspect` as an operator runs it, on the original's dump in each form it may come in.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

const DUMP: &str = include_str!("../../kms-core/tests/data/golden-secret1.hexdump");
const KEY: &str = "/registry/secrets/default/secret1";

/// What etcdctl printed into the dump: key, newline, value, newline.
fn printed() -> Vec<u8> {
    let hex = DUMP.lines().flat_map(|line| line[10..58].split_whitespace());
    hex.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

fn value() -> Vec<u8> {
    let printed = printed();
    printed[KEY.len() + 1..printed.len() - 1].to_vec()
}

/// The 628 bytes between length field and body.
fn cipher() -> Vec<u8> {
    let start = "k8s:enc:kms:v1:KmsPlugin:".len() + 2;
    value()[start..start + 628].to_vec()
}

fn inspect(args: &[&str], stdin: &[u8]) -> Output {
    let mut kmsctl = Command::new(env!("CARGO_BIN_EXE_kmsctl"))
        .arg("inspect")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    kmsctl.stdin.take().unwrap().write_all(stdin).unwrap();
    kmsctl.wait_with_output().unwrap()
}

fn inspect_json(args: &[&str], stdin: &[u8]) -> Value {
    let output = inspect(&[args, &["-o", "json"]].concat(), stdin);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What is expected of the original's value, under this key.
fn report(key: Option<&str>) -> Value {
    json!({
        "key": key, "api": "v1", "provider": "KmsPlugin", "encrypted_dek_bytes": 628,
        "kp_version": 1, "wdek_bytes": 308, "cipher_bytes": 64, "body_bytes": 144,
        "wdek": {
            "version": "2.0.0", "ciphertext_bytes": 48, "hash_bytes": 64, "iv_bytes": 16,
            "handle": null,
        },
    })
}

#[test]
fn every_form_of_the_seeds_value_is_explained_alike() {
    let base64 = [STANDARD.encode(KEY), STANDARD.encode(value())];
    let etcdctl = json!({
        "header": {"cluster_id": 1, "revision": 7},
        "kvs": [{"key": base64[0], "mod_revision": 7, "value": base64[1]}],
        "count": 1,
    });
    for input in [
        DUMP.as_bytes(),
        &printed(),
        etcdctl.to_string().as_bytes(),
        STANDARD.encode(printed()).as_bytes(),
    ] {
        assert_eq!(inspect_json(&[], input), report(Some(KEY)));
    }
    for input in [&value(), STANDARD.encode(value()).as_bytes()] {
        assert_eq!(inspect_json(&["-"], input), report(None));
    }
}

#[test]
fn the_tree_says_the_same_for_reading() {
    let output = inspect(&[], DUMP.as_bytes());
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with(&format!("{KEY}\n├─ encrypted by      a KMS plug-in, API v1\n")));
    for line in [
        "├─ provider          KmsPlugin\n",
        "├─ encrypted DEK     628 bytes, what the plug-in returned\n",
        "│  ├─ KpVersion      1\n",
        "│  ├─ wrapped DEK    308 bytes, from the key service\n",
        "│  │  ├─ version     2.0.0\n",
        "│  │  ├─ ciphertext  48 bytes\n",
        "│  │  ├─ hash        64 bytes\n",
        "│  │  ├─ iv          16 bytes\n",
        "│  └─ cipher         64 bytes, the payload under the DEK, IV included\n",
        "└─ body              144 bytes, the object\n",
    ] {
        assert!(text.contains(line), "no line {line:?} in\n{text}");
    }
}

#[test]
fn a_file_is_read_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("dump"), DUMP).unwrap();
    assert_eq!(inspect_json(&[&path("dump")], b""), report(Some(KEY)));

    std::fs::write(path("cipher"), [cipher(), b"\n".to_vec()].concat()).unwrap();
    let report = inspect_json(&["--cipher", &path("cipher")], b"");
    assert_eq!(
        (&report["encrypted_dek_bytes"], &report["body_bytes"]),
        (&json!(628), &json!(null))
    );
    assert_eq!((&report["api"], &report["wdek"]["version"]), (&json!("v1"), &json!("2.0.0")));
    assert_eq!((&report["wdek_bytes"], &report["cipher_bytes"]), (&json!(308), &json!(64)));

    let missing = inspect(&[&path("missing")], b"");
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("missing: No such file"));
}

#[test]
fn what_is_not_ours_is_said_and_is_no_error() {
    let foreign =
        [b"/registry/x\nk8s:enc:kms:v1:vault:\0\x08vault:v1".as_slice(), &[7; 40]].concat();
    let report = inspect_json(&[], &foreign);
    assert_eq!((&report["provider"], &report["wdek"]), (&json!("vault"), &json!(null)));
    assert!(report["note"].as_str().unwrap().contains("not written by the Keelson plug-in"));

    let report = inspect_json(&[], b"/registry/x\nk8s\0\n\x0c\n\x02v1\x12\x06Secret\n");
    assert_eq!((&report["provider"], &report["api"]), (&json!("identity"), &json!(null)));
    let report = inspect_json(&[], &cipher());
    assert!(report["note"].as_str().unwrap().contains("--cipher"));
}

#[test]
fn input_that_is_broken_is_an_error_that_says_where() {
    let holed: Vec<&str> =
        DUMP.lines().enumerate().filter_map(|(at, line)| (at != 7).then_some(line)).collect();
    let output = inspect(&[], holed.join("\n").as_bytes());
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("standard input: line 8 of the hex dump"), "{error}");

    let output = inspect(&[], br#"{"header":{"revision":7}}"#);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("found no such key"));
}
