//! Changes of the file while it runs. SIGHUP brings forward what the watch would find a few seconds later.

use rustix::process::Signal;

use crate::plugin::{Plugin, Setup};
use crate::service::Service;

fn reload(plugin: &Plugin, setup: &Setup) {
    setup.write_config();
    plugin.signal(Signal::HUP);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_api_key_is_used_without_a_restart() {
    let service = Service::start("second-key").await;
    let setup = Setup::for_service(&service);
    let plugin = setup.serving();
    plugin.line("BXNIM0415E");
    let setup = setup.with("API_KEY", "second-key");
    reload(&plugin, &setup);
    plugin.line("The key service wraps and unwraps: ready.");
    plugin.encrypt_v1(b"ping").await.unwrap();
    assert_eq!(plugin.health("/healthz/readiness").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_is_found_without_a_signal() {
    let service = Service::start("second-key").await;
    let setup = Setup::for_service(&service);
    let plugin = setup.serving();
    plugin.line("BXNIM0415E");
    setup.with("API_KEY", "second-key").write_config();
    plugin.line("The configuration was read again and is in use.");
    plugin.line("The key service wraps and unwraps: ready.");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_api_key_ends_sealing_and_a_new_one_brings_it_back() {
    let service = Service::start("canary-api-key-93ab").await;
    let setup = Setup::for_service(&service).with("CACHE_TIMEOUT_IN_HOURS", "0");
    let plugin = setup.ready();
    let sealed = plugin.encrypt_v2(&[1; 32]).await.unwrap();
    service.accept_api_key("second-key");
    let setup = setup.with("API_KEY", "second-key");
    reload(&plugin, &setup);
    plugin.line("The configuration was read again and is in use.");
    assert_eq!(plugin.decrypt_v2(&sealed).await.unwrap(), [1; 32]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_in_hand_outlives_a_change_of_something_else() {
    let service = Service::start("canary-api-key-93ab").await;
    let setup = Setup::for_service(&service).with("NEW_DEK", "true");
    let plugin = setup.ready();
    let logins = || service.correlation_ids("/oidc/token").len();
    assert_eq!(logins(), 1);
    let setup = setup.with("LOG_LEVEL", "debug");
    reload(&plugin, &setup);
    plugin.line("The configuration was read again and is in use.");
    plugin.encrypt_v2(&[1; 32]).await.unwrap();
    assert_eq!(logins(), 1);

    service.accept_api_key("second-key");
    let setup = setup.with("API_KEY", "second-key");
    reload(&plugin, &setup);
    while logins() < 2 {
        plugin.encrypt_v2(&[1; 32]).await.unwrap();
    }
    // The same key, which must be read at its new place from now on.
    let file = setup.config().with_file_name("api.key");
    std::fs::write(&file, "second-key").unwrap();
    let setup = setup.without("API_KEY").with("API_KEY_FILE", file.to_str().unwrap());
    reload(&plugin, &setup);
    while logins() < 3 {
        plugin.encrypt_v2(&[1; 32]).await.unwrap();
    }
}

#[tokio::test]
async fn the_log_level_changes_while_it_runs() {
    let setup = Setup::new();
    let plugin = setup.serving();
    assert!(plugin.encrypt_v1(b"ping").await.is_err());
    assert!(!plugin.lines().iter().any(|line| line.contains(r#""level":"debug""#)));
    let setup = setup.with("LOG_LEVEL", "debug");
    reload(&plugin, &setup);
    plugin.line("The configuration was read again and is in use.");
    assert!(plugin.encrypt_v1(b"ping").await.is_err());
    plugin.line(r#""level":"debug""#);
}

#[tokio::test]
async fn a_bad_file_is_refused_and_everything_goes_on() {
    let setup = Setup::new();
    let plugin = setup.serving();
    let setup = setup.with("NEW_DEK", "maybe");
    reload(&plugin, &setup);
    plugin.line("Configuration: SERVER_CONFIG.NEW_DEK must be true or false");
    plugin.line("The changed configuration is refused, the old one keeps running.");
    assert_eq!(plugin.health("/healthz/liveness").await.0, 200);
    let (_, metrics) = plugin.health("/metrics").await;
    assert!(
        metrics.contains(r#"kmsplugin_config_reloads_total{outcome="refused"} 1"#),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crk_is_not_changed_while_what_it_has_sealed_could_not_be_opened() {
    let service = Service::start("canary-api-key-93ab").await;
    let setup = Setup::for_service(&service);
    let plugin = setup.ready();
    let sealed = plugin.encrypt_v2(&[1; 32]).await.unwrap();
    let setup = setup.with("CRK_ID", "another-crk");
    reload(&plugin, &setup);
    plugin.line("Configuration: no entry is VERSION 1 of CRK");
    plugin.line("The changed configuration is refused, the old one keeps running.");
    assert_eq!(plugin.decrypt_v2(&sealed).await.unwrap(), [1; 32]);
    assert_eq!(plugin.encrypt_v2(&[1; 32]).await.unwrap().key_id, sealed.key_id);
}

#[tokio::test]
async fn what_waits_for_a_restart_is_said() {
    let setup = Setup::new();
    let plugin = setup.serving();
    let setup = setup.with("REGION", "elsewhere").with("HEALTHZ_PATH", "/other");
    reload(&plugin, &setup);
    let line = plugin.line("in effect only after a restart");
    assert!(line.contains("REGION, HEALTHZ_PATH"), "{line}");
    assert_eq!(plugin.health("/healthz/liveness").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn case_08_the_status_version_outlives_reload_rotation_and_upgrade() {
    let service = Service::start("canary-api-key-93ab").await;
    let setup = Setup::for_service(&service).with("PROBE_INTERVAL_IN_SECONDS", "1");
    let mut plugin = setup.ready();
    let before = plugin.status().await.unwrap();
    assert_eq!(before.version, "v2");

    // kube-apiserver would call a changed version unhealthy until it is restarted itself.
    let another = setup.with("KMS_V2_STATUS_VERSION", "v2beta1");
    reload(&plugin, &another);
    plugin.line("in effect only after a restart: KMS_V2_STATUS_VERSION");
    assert_eq!(plugin.status().await.unwrap(), before);

    let setup = another.with("KMS_V2_STATUS_VERSION", "v2");
    service.rotate();
    plugin.line("crk/v2");
    let rotated = plugin.status().await.unwrap();
    assert_eq!(rotated.version, "v2");
    assert_ne!(rotated.key_id, before.key_id);

    plugin.terminate();
    assert_eq!(setup.ready().status().await.unwrap(), rotated);
}
