//! Exit codes, and what is said when something is missing or wrong.

use crate::program::{kmsctl, run, stderr, stdout};
use crate::server::{Reply, Server};

#[tokio::test]
async fn what_is_missing_is_named_with_the_option_that_gives_it() {
    let output = run(kmsctl(&["keys", "list"]), "").await;
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        stderr(&output),
        "kmsctl: the key service is not known\n        \
         Give it with --url URL or the environment variable KMS_URL.\n"
    );
}

#[tokio::test]
async fn a_wrong_command_line_exits_with_2() {
    let wrong: [&[&str]; 7] = [
        &["keys", "bogus"],
        &["keys", "import", "name-without-material"],
        &["service-ids", "create", "x", "--role", "Viewer"],
        &["keys", "list", "--api-key", "secret"],
        &["bench", "--socket", "/s", "--callers", "0"],
        &["verify", "--etcd-cert", "/c"],
        &["verify", "--socket", "/s", "--key-id", "k"],
    ];
    for arguments in wrong {
        assert_eq!(run(kmsctl(arguments), "").await.status.code(), Some(2), "{arguments:?}");
    }
}

#[tokio::test]
async fn each_shell_gets_a_completion_script() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(kmsctl(&["completion", shell]), "").await;
        assert!(output.status.success() && stdout(&output).contains("service-ids"), "{shell}");
        assert!(stdout(&output).contains("encryption-config"), "{shell}");
    }
}

#[tokio::test]
async fn an_unknown_api_key_is_told_with_a_remedy() {
    let refusal =
        r#"{"errorCode":"BXNIM0415E","errorMessage":"Provided API key could not be found."}"#;
    let server = Server::start(move |_, _| Reply::Json(400, refusal.to_owned())).await;
    let output = crate::program::managing(&server, &["keys", "list"], "").await;
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.starts_with("kmsctl: BXNIM0415E:Provided API key could not be found\n"), "{said}");
    assert!(said.contains("kmsctl api-keys create"), "{said}");
}

#[tokio::test]
async fn a_service_that_does_not_answer_is_told_in_time() {
    let server = Server::start(|_, _| Reply::Hang).await;
    let output =
        crate::program::managing(&server, &["instances", "list", "--timeout", "1"], "").await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("did not answer in time"), "{}", stderr(&output));
}
