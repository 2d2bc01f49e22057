//! The real binary on a SoftHSM2 token, from the command that makes a CRK version to the loss of the token.

use std::time::Duration;

use kms_api::grpc::v2::EncryptResponse;

use crate::plugin::{Plugin, output};
use crate::token::{CRK, OTHER_CRK, PIN, TestToken};

const PAYLOAD: &[u8; 32] = b"canary-payload-of-32-bytes-here!";
/// No DEK outlives its call, so every call shows whether the token answers.
const NOTHING_IS_KEPT: &str = "  CACHE_TIMEOUT_IN_HOURS: 0\n  PROBE_INTERVAL_IN_SECONDS: 1\n";

async fn sealed(plugin: &Plugin) -> (Vec<u8>, EncryptResponse) {
    let v1 = plugin.encrypt_v1(PAYLOAD).await.unwrap();
    (v1, plugin.encrypt_v2(PAYLOAD).await.unwrap())
}

async fn opens(plugin: &Plugin, (v1, v2): &(Vec<u8>, EncryptResponse)) {
    assert_eq!(plugin.decrypt_v1(v1).await.unwrap(), PAYLOAD);
    assert_eq!(plugin.decrypt_v2(v2).await.unwrap(), PAYLOAD);
}

/// The third part of the key_id.
fn version(sealed: &(Vec<u8>, EncryptResponse)) -> &str {
    sealed.1.key_id.split('/').nth(3).unwrap()
}

/// Asks until the answer is yes. For what happens in the plug-in's own time.
async fn eventually(what: &str, ask: impl AsyncFn() -> bool) {
    let asking = async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let patience = Duration::from_secs(60);
    assert!(tokio::time::timeout(patience, asking).await.is_ok(), "never: {what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn both_apis_seal_and_open_and_a_restart_reads_what_was_written() {
    let Some(token) = TestToken::new() else { return };
    let mut plugin = token.ready();
    let values = sealed(&plugin).await;
    opens(&plugin, &values).await;
    assert_eq!(version(&values), token.settings.crk_version);
    let status = plugin.status().await.unwrap();
    assert_eq!((&*status.healthz, &status.key_id), ("ok", &values.1.key_id));
    assert_eq!(plugin.terminate().code(), Some(0));
    opens(&token.serving(), &values).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newly_named_version_seals_at_once_and_every_old_one_is_read() {
    let Some(mut token) = TestToken::new() else { return };
    let mut plugin = token.ready();
    let mut all = vec![sealed(&plugin).await];
    let first = token.settings.crk_version.clone();
    // Back to the first at the end, as an entry of its own, so that no key_id comes back.
    for (next, previous) in
        [(token.new_version(), None), (token.new_version(), None), (first, Some(CRK))]
    {
        token.settings.crk_version = next.clone();
        token.settings.previous = previous;
        token.reload(&plugin);
        eventually("the named version is reported", async || {
            plugin.status().await.is_ok_and(|status| status.key_id.contains(&next))
        })
        .await;
        let values = sealed(&plugin).await;
        assert_eq!(version(&values), next);
        assert!(all.iter().all(|old| old.1.key_id != values.1.key_id), "{}", values.1.key_id);
        all.push(values);
    }
    plugin.kill();
    let plugin = token.serving();
    for values in &all {
        opens(&plugin, values).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_crk_takes_over_and_the_previous_one_still_opens() {
    let Some(mut token) = TestToken::new() else { return };
    let plugin = token.ready();
    let old = sealed(&plugin).await;
    assert!(old.1.key_id.contains(CRK));
    token.settings.crk_version = token.new_version();
    (token.settings.crk, token.settings.previous) = (OTHER_CRK, Some(CRK));
    token.reload(&plugin);
    eventually("the other CRK is reported", async || {
        plugin.status().await.is_ok_and(|status| status.key_id.contains(OTHER_CRK))
    })
    .await;
    opens(&plugin, &sealed(&plugin).await).await;
    opens(&plugin, &old).await;
    drop(plugin);
    opens(&token.serving(), &old).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn case_07_a_token_that_goes_and_returns_is_used_again_without_a_restart() {
    let Some(mut token) = TestToken::new() else { return };
    token.settings.server = NOTHING_IS_KEPT;
    let plugin = token.ready();
    let values = sealed(&plugin).await;
    token.unplug();
    for error in [
        plugin.encrypt_v1(PAYLOAD).await.unwrap_err(),
        plugin.decrypt_v2(&values.1).await.unwrap_err(),
    ] {
        assert_eq!(i32::from(error.code()), 14, "Unavailable: {error:?}");
        let text = error.message();
        assert!(text.starts_with("Unavailable: the HSM is not available: "), "{text}");
    }
    eventually("not ready", async || plugin.health("/healthz/readiness").await.0 == 503).await;
    assert_eq!(plugin.health("/healthz/liveness").await.0, 200);
    token.plug_in();
    eventually("ready again", async || plugin.health("/healthz/readiness").await.0 == 200).await;
    opens(&plugin, &values).await;
    opens(&plugin, &sealed(&plugin).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_are_sealed_and_opened_from_memory_while_the_token_is_away() {
    let Some(mut token) = TestToken::new() else { return };
    token.settings.server = "  PROBE_INTERVAL_IN_SECONDS: 1\n";
    let plugin = token.ready();
    let values = sealed(&plugin).await;
    token.unplug();
    eventually("not ready", async || plugin.health("/healthz/readiness").await.0 == 503).await;
    opens(&plugin, &values).await;
    opens(&plugin, &sealed(&plugin).await).await;
    assert_eq!(plugin.status().await.unwrap().key_id, values.1.key_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_starts_without_the_token_and_uses_it_when_it_comes() {
    let Some(token) = TestToken::new() else { return };
    token.unplug();
    let plugin = token.serving();
    plugin.line("not ready: Unavailable: the HSM is not available: no token with label");
    token.plug_in();
    plugin.line("The HSM wraps and unwraps: ready.");
    opens(&plugin, &sealed(&plugin).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn case_07_a_wrong_pin_is_tried_once_and_another_one_without_a_restart() {
    let Some(mut token) = TestToken::new() else { return };
    (token.settings.pin, token.settings.server) = ("not-the-pin", NOTHING_IS_KEPT);
    let plugin = token.serving();
    plugin.line("not ready: the HSM refuses the PIN");
    for _ in 0..5 {
        let error = plugin.encrypt_v2(PAYLOAD).await.unwrap_err();
        assert_eq!(i32::from(error.code()), 14, "{error:?}");
        assert!(error.message().starts_with("the HSM refuses the PIN"), "{error:?}");
    }
    // Each attempt to log in that is refused ends with this line; the requests above and the probes made none.
    let logins = |plugin: &Plugin| {
        plugin.lines().iter().filter(|line| line.contains("nothing more is tried")).count()
    };
    assert_eq!(logins(&plugin), 1);
    token.reload(&plugin);
    assert!(plugin.encrypt_v2(PAYLOAD).await.is_err());
    assert_eq!(logins(&plugin), 1, "the same PIN again is no reason");
    token.settings.pin = PIN;
    token.reload(&plugin);
    plugin.line("The HSM wraps and unwraps: ready.");
    opens(&plugin, &sealed(&plugin).await).await;
    assert_eq!(logins(&plugin), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_pin_is_tried_once_over_many_starts() {
    let Some(mut token) = TestToken::new() else { return };
    token.settings.pin = "not-the-pin";
    token.settings.refused_pin_file = true;
    let tried = "the HSM refuses the PIN: C_Login: CKR_PIN_INCORRECT";
    token.serving().line(tried);
    for _ in 0..2 {
        let plugin = token.serving();
        plugin.line("the HSM refuses the PIN: it was refused before, and is not tried again");
        assert!(!plugin.lines().iter().any(|line| line.contains(tried)));
    }
    let refused = token.refused_pin_file();
    std::fs::remove_file(&refused).unwrap();
    let plugin = token.serving();
    plugin.line(tried);
    token.settings.pin = PIN;
    token.reload(&plugin);
    plugin.line("The HSM wraps and unwraps: ready.");
    assert!(!refused.exists(), "what was refused is forgotten");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_pin_file_is_noticed_and_tried_without_a_signal() {
    let Some(mut token) = TestToken::new() else { return };
    (token.settings.pin, token.settings.pin_in_file) = ("not-the-pin", true);
    let plugin = token.serving();
    plugin.line("not ready: the HSM refuses the PIN");
    token.settings.pin = PIN;
    token.write_config();
    plugin.line("The HSM's PIN is another one");
    plugin.line("The HSM wraps and unwraps: ready.");
    opens(&plugin, &sealed(&plugin).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn case_28_neither_pin_nor_payload_is_logged_whatever_is_set() {
    let Some(mut token) = TestToken::new() else { return };
    token.settings.logger = "LOGGER:\n  LOG_LEVEL: debug\n  LOG_ALL_VALUES: true\n";
    token.settings.server = NOTHING_IS_KEPT;
    let mut plugin = token.ready();
    let values = sealed(&plugin).await;
    opens(&plugin, &values).await;
    plugin.terminate();
    let log = plugin.all_lines().join("\n");
    assert!(log.contains("wdek="), "LOG_ALL_VALUES shows WDEKs: {log}");
    for secret in [PIN, std::str::from_utf8(PAYLOAD).unwrap()] {
        assert!(!log.contains(secret), "{secret} was logged:\n{log}");
    }
}

#[test]
fn a_first_version_is_asked_for_and_made_by_command() {
    let Some(mut token) = TestToken::new() else { return };
    token.settings.crk_version = String::new();
    token.write_config();
    let (code, _, err) = output(token.command().arg("--check-config"));
    assert_eq!(code, Some(64));
    assert!(
        err.starts_with("PKCS11.CRK_VERSION is missing: `kmsplugin --new-crk-version`"),
        "{err}"
    );
    token.settings.pin = "not-the-pin";
    token.write_config();
    let (code, out, err) = output(token.command().arg("--new-crk-version"));
    assert_eq!((code, &*out), (Some(1), ""));
    assert!(err.starts_with("the HSM refuses the PIN: "), "{err}");
    token.settings.pin = PIN;
    token.settings.crk_version = token.new_version();
    token.write_config();
    assert_eq!(output(token.command().arg("--check-config")).0, Some(0));
    token.unplug();
    let (code, out, err) = output(token.command().arg("--new-crk-version"));
    assert_eq!((code, &*out), (Some(1), ""));
    assert!(err.contains("the HSM is not available: no token with label"), "{err}");
}
