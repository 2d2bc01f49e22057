//! `kmsctl bench` against the echo, which answers as a plug-in does.

use serde_json::Value;

use crate::program::{kmsctl, run, stderr, stdout};

/// An echo in this process, until the directory goes.
async fn echo() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kms.sock");
    let server = tokio::spawn({
        let path = path.clone();
        async move { keelson_benches::serve(&path).await }
    });
    while !path.exists() {
        assert!(!server.is_finished(), "the echo ended");
        tokio::task::yield_now().await;
    }
    let socket = path.to_str().unwrap().to_owned();
    (dir, socket)
}

#[tokio::test]
async fn both_interfaces_and_all_operations_are_measured() {
    let (_dir, socket) = echo().await;
    for api in ["v1", "v2"] {
        for op in ["encrypt", "decrypt", "both"] {
            let arguments = [
                "bench",
                "--socket",
                &socket,
                "--api",
                api,
                "--op",
                op,
                "--callers",
                "4",
                "--seconds",
                "1",
                "-o",
                "json",
            ];
            let output = run(kmsctl(&arguments), "").await;
            assert!(output.status.success(), "{}", stderr(&output));
            let report: Value = serde_json::from_str(stdout(&output)).unwrap();
            assert_eq!((&report["api"], &report["op"]), (&api.into(), &op.into()));
            assert_eq!(report["errors"], 0, "{report}");
            assert_eq!(report["pid"], std::process::id());
            for member in [
                "requests",
                "requests_per_second",
                "p50_us",
                "p99_us",
                "cpu_us_per_request",
                "peak_memory_kib",
            ] {
                assert!(
                    report[member].as_f64().is_some_and(|value| value > 0.0),
                    "{member}: {report}"
                );
            }
            assert!(report["p50_us"].as_f64() <= report["p99_us"].as_f64());
        }
    }
}

#[tokio::test]
async fn nobody_on_the_socket_is_told_with_a_remedy() {
    let output = run(kmsctl(&["bench", "--socket", "/nonexistent/kms.sock"]), "").await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("UNIX_SOCKET_PATH"), "{}", stderr(&output));
}
