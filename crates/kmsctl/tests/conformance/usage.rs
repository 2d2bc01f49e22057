//! What is judged, and how it is told.

use crate::double::Fault;
use crate::program::{calm_report, conformance, names};
use crate::server::Server;

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_does_everything_right_passes_every_case() {
    let server = Server::start(Fault::None);
    let (code, report) = calm_report(&server, &["--api", "both"], "2s").await;
    assert_eq!(
        names(&report, "pass").len(),
        report["cases"].as_array().unwrap().len(),
        "{report:#}"
    );
    assert_eq!((&report["failed"], &report["skipped"]), (&0.into(), &0.into()));
    assert_eq!(report["socket"], *server.socket);
    assert_eq!(code, Some(0));
    for case in report["cases"].as_array().unwrap() {
        let told = |member: &str| case[member].as_str().is_some_and(|text| !text.is_empty());
        assert!(case["number"].is_u64() && told("seen") && told("why"), "{case}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_path_is_sent_to_an_abstract_socket() {
    let server = Server::on_an_abstract_socket();
    let (code, report) = calm_report(&server, &[], "2s").await;
    assert_eq!(names(&report, "skip"), ["authority-encoded-path", "authority-raw-path"]);
    assert_eq!((code, &report["failed"]), (Some(0), &0.into()), "{report:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_version_is_enough_unless_both_are_asked_for() {
    let server = Server::start(Fault::NoV1);
    let (code, whatever) = calm_report(&server, &[], "2s").await;
    assert_eq!((code, &whatever["failed"]), (Some(0), &0.into()), "{whatever:#}");
    assert!(names(&whatever, "skip").contains(&"ping"));
    let (code, v2) = calm_report(&server, &["--api", "v2"], "2s").await;
    assert_eq!((code, &v2["skipped"]), (Some(0), &0.into()), "{v2:#}");
    for api in ["v1", "both"] {
        let (code, required) = calm_report(&server, &["--api", api], "2s").await;
        assert_eq!((code, names(&required, "fail")), (Some(1), vec!["services"]), "{api}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn people_get_a_table_the_reasons_and_a_summary() {
    let server = Server::start(Fault::OtherV1Version);
    let output = conformance(&["--socket", &server.socket, "--api", "v1"]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("CASE  NAME "), "{text}");
    assert!(text.contains("\nFAIL 23 version: version is \"v1\"\n  Why it matters: "), "{text}");
    assert!(text.trim_end().ends_with(" passed, 1 failed, 0 skipped"), "{text}");
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.starts_with("kmsctl: 1 of "), "{errors}");
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test]
async fn nobody_on_the_socket_is_told_with_a_remedy() {
    let output = conformance(&["--socket", "/nonexistent/kms.sock"]).await;
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("No such file") && errors.contains("UNIX_SOCKET_PATH"), "{errors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_stays_silent_is_not_asked_any_further() {
    let server = Server::start(Fault::StatusHangs);
    let arguments = ["--socket", &server.socket, "--api", "v2", "--timeout", "100ms"];
    let output = conformance(&arguments).await;
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("no answer within 100ms"), "{errors}");
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b""[..]));
}

#[tokio::test]
async fn a_wrong_command_line_exits_with_2() {
    let wrong: [&[&str]; 4] = [
        &[],
        &["--socket", "/s", "--api", "v3"],
        &["--socket", "/s", "--timeout", "0s"],
        &["--socket", "/s", "--timeout", "soon"],
    ];
    for arguments in wrong {
        assert_eq!(conformance(arguments).await.status.code(), Some(2), "{arguments:?}");
    }
}
