//! The main job with the current Kubernetes: secrets through KMS v1, configmaps through KMS v2, one socket.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough, Shared};
use keelson_e2e::driver::Driver;
use keelson_e2e::{Result, hexdump};
use serde_json::json;

static CHAIN: Shared = Shared::new(|| {
    Chain::for_test("main_job", Some(Kubernetes::V1_37), SecretsThrough::V1, |_| ())
});

const PLAIN: &str = "correct-horse-battery-staple";

#[test]
fn a_secret_is_stored_sealed_under_the_original_s_provider_name() -> Result<()> {
    CHAIN.with(|chain| {
        let key = "/registry/secrets/default/secret1";
        chain.kubectl()?.create_secret("secret1", "password", PLAIN)?;
        assert_eq!(chain.kubectl()?.secret_value("secret1", "password")?, PLAIN);
        let stored = chain.cluster()?.etcd.value(key)?;
        assert!(
            stored.starts_with(b"k8s:enc:kms:v1:KmsPlugin:"),
            "{}",
            hexdump::canonical(&stored)
        );
        assert!(!holds_plain_text(&stored), "{}", hexdump::canonical(&stored));

        let explained = chain.kmsctl.inspect(&chain.cluster()?.etcd.printed(key)?)?;
        assert_eq!(explained["key"], key);
        assert_eq!(explained["api"], "v1");
        assert_eq!(explained["provider"], "KmsPlugin");
        assert_eq!(explained["kp_version"], 1);
        assert_eq!(explained["cipher_bytes"], 64, "as in the original: {explained}");
        let wdek = &explained["wdek"];
        let sizes = [&wdek["ciphertext_bytes"], &wdek["hash_bytes"], &wdek["iv_bytes"]];
        assert_eq!(sizes, [&json!(48), &json!(64), &json!(16)], "as in the original: {explained}");
        assert_eq!(wdek["version"], "2.1.0");
        assert!(wdek["handle"].is_string(), "{explained}");
        Ok(())
    })
}

#[test]
fn inspect_recognises_each_form_in_which_a_stored_value_comes() -> Result<()> {
    CHAIN.with(|chain| {
        let key = "/registry/secrets/default/forms";
        chain.kubectl()?.create_secret("forms", "password", PLAIN)?;
        let etcd = &chain.cluster()?.etcd;
        let (value, printed) = (etcd.value(key)?, etcd.printed(key)?);
        let raw = chain.kmsctl.inspect(&printed)?;
        assert_eq!(raw["key"], key);
        let dump = hexdump::canonical(&printed);
        assert_eq!(chain.kmsctl.inspect(dump.as_bytes())?, raw, "hex dump");
        let json = json!({"kvs": [{"key": BASE64.encode(key), "value": BASE64.encode(&value)}]});
        assert_eq!(chain.kmsctl.inspect(json.to_string().as_bytes())?, raw, "etcdctl get -w json");
        let base64 = chain.kmsctl.inspect(BASE64.encode(&value).as_bytes())?;
        assert_eq!(base64["wdek"], raw["wdek"], "base64");
        assert_eq!(base64["body_bytes"], raw["body_bytes"], "base64");
        Ok(())
    })
}

#[test]
fn a_configmap_is_stored_sealed_through_v2_under_the_key_id_of_status() -> Result<()> {
    CHAIN.with(|chain| {
        let key = "/registry/configmaps/default/configmap1";
        chain.kubectl()?.create_configmap("configmap1", "greeting", PLAIN)?;
        assert_eq!(chain.kubectl()?.configmap_value("configmap1", "greeting")?, PLAIN);
        let stored = chain.cluster()?.etcd.value(key)?;
        assert!(
            stored.starts_with(b"k8s:enc:kms:v2:KmsPluginV2:"),
            "{}",
            hexdump::canonical(&stored)
        );
        assert!(!holds_plain_text(&stored), "{}", hexdump::canonical(&stored));

        let status = Driver::connect(&chain.plugin.config.socket)?.v2_status()?;
        assert_eq!((status.version.as_str(), status.healthz.as_str()), ("v2", "ok"));
        let explained = chain.kmsctl.inspect(&stored)?;
        assert_eq!(explained["api"], "v2");
        assert_eq!(explained["key_id"], status.key_id.as_str());
        assert!(status.key_id.contains(&chain.crk_id), "{}", status.key_id);
        Ok(())
    })
}

#[test]
fn everything_stays_readable_when_every_process_starts_anew() -> Result<()> {
    CHAIN.with(|chain| {
        chain.kubectl()?.create_secret("before", "password", PLAIN)?;
        chain.kubectl()?.create_configmap("before", "greeting", PLAIN)?;
        chain.plugin.server.stop()?;
        chain.key_service.server.stop()?;
        chain.key_service.server.start()?;
        chain.key_service.wait_until_ready()?;
        chain.plugin.start()?;
        chain.cluster_mut()?.apiserver.restart()?;
        assert_eq!(chain.kubectl()?.secret_value("before", "password")?, PLAIN);
        assert_eq!(chain.kubectl()?.configmap_value("before", "greeting")?, PLAIN);
        Ok(())
    })
}

fn holds_plain_text(stored: &[u8]) -> bool {
    stored.windows(PLAIN.len()).any(|window| window == PLAIN.as_bytes())
}
