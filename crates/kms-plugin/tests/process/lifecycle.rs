//! How it starts, shows its health and ends, all without a key service.

use std::os::unix::net::UnixListener;

use rustix::process::Signal;

use crate::plugin::Setup;
use crate::service::Service;

#[test]
fn it_starts_with_the_original_s_lines_and_ends_on_sigterm() {
    let mut plugin = Setup::new().serving();
    assert_eq!(plugin.terminate().code(), Some(0));
    let mut lines = plugin.all_lines();
    // Of this machine and this build, not of the original.
    let ours = ["memory cannot be locked", "Cryptography is done by"];
    lines.retain(|line| !ours.iter().any(|text| line.contains(text)));
    for (line, file, text) in [
        (
            &lines[0],
            "lifecycle.rs",
            "SIGTERM signal handler started.  Watching for SIGTERM signals.",
        ),
        (&lines[1], "serve.rs", "The Provider server is started."),
    ] {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(value["level"], "info");
        assert_eq!(value["ts"].as_str().unwrap().len(), "Oct 29 22:55:01.615".len());
        let parts: Vec<_> = value["msg"].as_str().unwrap().splitn(3, ':').collect();
        assert_eq!((parts[0], parts[2]), (file, &*format!(" {text}")));
        assert!(parts[1].parse::<u32>().is_ok(), "{line}");
        assert!(line.starts_with(r#"{"level":"info","ts":""#), "{line}");
    }
    assert!(lines.iter().any(|line| line.contains("SIGTERM received")), "{lines:?}");
    assert!(lines.last().unwrap().contains("The Provider server is stopped."), "{lines:?}");
}

#[test]
fn its_memory_is_locked_or_the_log_says_why_not() {
    let plugin = Setup::new().serving();
    let told =
        plugin.lines().iter().any(|line| line.contains("memory cannot be locked: RLIMIT_MEMLOCK"));
    assert_ne!(plugin.memory("VmLck") > 0, told, "{:?}", plugin.lines());
}

#[test]
fn sigint_ends_it_too() {
    let mut plugin = Setup::new().serving();
    plugin.signal(Signal::INT);
    assert_eq!(plugin.wait().code(), Some(0));
}

#[tokio::test]
async fn health_shows_life_and_readiness_apart() {
    let plugin = Setup::new().serving();
    plugin.line("not ready");
    assert_eq!(plugin.health("/healthz").await, (200, "ok\n".into()));
    assert_eq!(plugin.health("/healthz/liveness").await, (200, "ok\n".into()));
    let (status, cause) = plugin.health("/healthz/readiness").await;
    assert_eq!(status, 503);
    assert!(cause.starts_with("Unavailable: the key service cannot be reached"), "{cause}");
    assert_eq!(plugin.health("/healthz/other").await.0, 404);
    let (status, metrics) = plugin.health("/metrics").await;
    assert_eq!(status, 200);
    assert!(metrics.contains("kmsplugin_ready 0"), "{metrics}");
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
}

#[tokio::test]
async fn health_path_is_a_setting_and_an_abstract_socket_is_alive_too() {
    let name = format!("@keelson-test-{}", std::process::id());
    let setup = Setup::new().with("HEALTHZ_PATH", "/health/kms").with("UNIX_SOCKET_PATH", &name);
    let plugin = setup.serving();
    assert_eq!(plugin.health("/health/kms/liveness").await, (200, "ok\n".into()));
    assert_eq!(plugin.health("/healthz/liveness").await.0, 404);
}

#[tokio::test]
async fn liveness_fails_when_nobody_serves_the_socket() {
    let setup = Setup::new().with("RESTART_DELAY_IN_SECONDS", "3600");
    let plugin = setup.serving();
    std::fs::remove_file(setup.socket()).unwrap();
    plugin.line("The Provider server failed");
    let (status, cause) = plugin.health("/healthz/liveness").await;
    assert_eq!(status, 503);
    assert!(cause.contains("cannot be connected to"), "{cause}");
}

#[test]
fn a_server_that_failed_is_started_again_after_restart_delay() {
    let setup = Setup::new().with("RESTART_DELAY_IN_SECONDS", "1");
    let other = UnixListener::bind(setup.socket()).unwrap();
    let plugin = setup.start();
    let line = plugin.line("The Provider server failed");
    assert!(line.contains("started again in 1 s"), "{line}");
    assert!(!plugin.lines().iter().any(|line| line.contains("The Provider server is started.")));
    drop(other);
    plugin.line("The Provider server is started.");
}

#[test]
fn sigterm_ends_it_also_while_it_waits_for_a_restart() {
    let setup = Setup::new().with("RESTART_DELAY_IN_SECONDS", "3600");
    let _other = UnixListener::bind(setup.socket()).unwrap();
    let mut plugin = setup.start();
    plugin.line("The Provider server failed");
    assert_eq!(plugin.terminate().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn case_26_sigterm_lets_running_requests_finish() {
    let service = Service::start("canary-api-key-93ab").await;
    let setup = Setup::for_service(&service).with("NEW_DEK", "true");
    let mut plugin = setup.ready();
    service.answers(false);
    let before = service.asked();
    let channel = plugin.channel().await;
    let request = tokio::spawn(async move {
        let request = kms_api::grpc::v2::EncryptRequest { plaintext: vec![7; 32], uid: "u".into() };
        kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient::new(channel)
            .encrypt(request)
            .await
    });
    service.was_asked(before + 1).await;
    plugin.signal(Signal::TERM);
    plugin.line("SIGTERM received");
    service.answers(true);
    assert!(request.await.unwrap().is_ok());
    assert_eq!(plugin.wait().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn case_26_after_a_kill_it_starts_over_its_stale_socket_and_reads_what_it_wrote() {
    let service = Service::start("canary-api-key-93ab").await;
    let setup = Setup::for_service(&service);
    let mut plugin = setup.ready();
    let (v1, v2) =
        (plugin.encrypt_v1(b"ping").await.unwrap(), plugin.encrypt_v2(&[9; 32]).await.unwrap());
    plugin.kill();
    assert!(std::path::Path::new(&setup.socket()).exists());
    let plugin = setup.serving();
    assert_eq!(plugin.decrypt_v1(&v1).await.unwrap(), b"ping");
    assert_eq!(plugin.decrypt_v2(&v2).await.unwrap(), [9; 32]);
}

#[tokio::test(flavor = "multi_thread")]
async fn case_18_what_one_node_sealed_another_opens() {
    let service = Service::start("canary-api-key-93ab").await;
    let (here, there) = (Setup::for_service(&service), Setup::for_service(&service));
    let (mut here, there) = (here.ready(), there.ready());
    let (v1, v2) =
        (here.encrypt_v1(b"ping").await.unwrap(), here.encrypt_v2(&[9; 32]).await.unwrap());
    here.kill();
    assert_eq!(there.decrypt_v1(&v1).await.unwrap(), b"ping");
    assert_eq!(there.decrypt_v2(&v2).await.unwrap(), [9; 32]);
    assert_eq!(there.status().await.unwrap().key_id, v2.key_id);
}
