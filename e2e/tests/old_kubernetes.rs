//! The oldest supported Kubernetes: it sends the raw socket path as authority and wants `v2beta1` from Status.

use keelson_e2e::Result;
use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough};
use keelson_e2e::driver::Driver;

#[test]
fn kubernetes_1_28_becomes_ready_and_uses_both_apis() -> Result<()> {
    let chain =
        Chain::for_test("old_kubernetes", Some(Kubernetes::V1_28), SecretsThrough::V1, |config| {
            config.more.push(("KMS_V2_STATUS_VERSION", "v2beta1".to_owned()));
        })?;
    let kubectl = chain.kubectl()?;
    let version = kubectl.run(&["version", "-o", "json"], b"")?;
    assert!(version.contains("\"v1.28."), "{version}");

    kubectl.create_secret("secret1", "password", "from 1.28")?;
    kubectl.create_configmap("configmap1", "greeting", "from 1.28")?;
    assert_eq!(kubectl.secret_value("secret1", "password")?, "from 1.28");
    assert_eq!(kubectl.configmap_value("configmap1", "greeting")?, "from 1.28");

    let etcd = &chain.cluster()?.etcd;
    let secret = etcd.value("/registry/secrets/default/secret1")?;
    assert!(secret.starts_with(b"k8s:enc:kms:v1:KmsPlugin:"));
    let configmap = etcd.value("/registry/configmaps/default/configmap1")?;
    assert!(configmap.starts_with(b"k8s:enc:kms:v2:KmsPluginV2:"));
    let status = Driver::connect(&chain.plugin.config.socket)?.v2_status()?;
    assert_eq!(status.version, "v2beta1");
    Ok(())
}
