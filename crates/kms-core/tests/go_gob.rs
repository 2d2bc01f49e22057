//! Go's encoding/gob as the judge of our codec, in both directions.
//!
//! Needs Go. Without it the test says so and passes on a developer's machine, and fails in CI.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::Write;
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kms_core::cipher::gob::{Secret, decode, encode};
use serde::Deserialize;
use serde_json::json;

/// Values at the edges of gob's number encoding.
fn edge_values() -> Vec<Secret> {
    let numbers = [0, 1, -1, 63, 64, -64, -65, 127, 128, 65_535, i64::MAX, i64::MIN];
    let lengths = [0, 1, 127, 128, 255, 256, 308, 20_000];
    let values = numbers.iter().flat_map(|&kp_version| {
        lengths.map(|len| Secret {
            kp_version,
            wrapped_dek: vec![b'w'; len],
            cipher: "c".repeat((len * 7) % 4001),
        })
    });
    values.collect()
}

#[test]
fn go_reads_what_we_write_and_we_read_what_go_writes() {
    let ours = edge_values();
    let streams: Vec<_> = ours.iter().map(|secret| STANDARD.encode(encode(secret))).collect();
    let Some(answer) = ask_go(&json!({"Decode": streams, "Count": 3000, "Seed": 20_191_211}))
    else {
        return;
    };

    assert_eq!(answer.decoded.len(), ours.len());
    for (read, written) in answer.decoded.iter().zip(&ours) {
        assert_eq!(&read.secret(), written);
    }
    assert_eq!(answer.written.len(), 3000);
    for value in &answer.written {
        let stream = STANDARD.decode(&value.stream).unwrap();
        assert_eq!(decode(&stream).as_ref(), Ok(&value.secret()), "{}", value.stream);
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    decoded: Vec<Value>,
    written: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Value {
    stream: String,
    kp_version: i64,
    #[serde(rename = "WrappedDEK")]
    wrapped_dek: Option<String>,
    cipher: String,
}

impl Value {
    fn secret(&self) -> Secret {
        Secret {
            kp_version: self.kp_version,
            wrapped_dek: STANDARD.decode(self.wrapped_dek.as_deref().unwrap_or_default()).unwrap(),
            cipher: self.cipher.clone(),
        }
    }
}

/// Runs the Go program; `None` where there is no Go and nobody insists.
fn ask_go(request: &serde_json::Value) -> Option<Answer> {
    let started = Command::new("go")
        .args(["run", "."])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/go"))
        .envs([("GOFLAGS", "-mod=mod"), ("GOPROXY", "off"), ("GOTOOLCHAIN", "local")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut go = match started {
        Ok(go) => go,
        Err(error) => {
            let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
            assert!(!ci, "Go is needed in CI: {error}");
            println!("left out, because Go cannot be started: {error}");
            return None;
        }
    };
    let mut stdin = go.stdin.take().unwrap();
    stdin.write_all(request.to_string().as_bytes()).unwrap();
    drop(stdin);
    let output = go.wait_with_output().unwrap();
    assert!(output.status.success(), "the Go program failed: {}", output.status);
    Some(serde_json::from_slice(&output.stdout).unwrap())
}
