//! The container that OpenShift HyperShift starts beside kube-apiserver in IBM's cloud, with the API key of the customer
//! (`Unmanaged`): no configuration file, the key in KP_DATA_JSON, KMS v2 under the name `ibmv2`.
//!
//! Names and values are HyperShift's. Different is only what a test must have on its own machine: the pod's volume is a
//! folder of the run, and the key and token services are not those of the cloud, so TOKEN_URL and the two CA files,
//! which have the cloud's as defaults, are given.

use std::fs::{self, DirBuilder, Permissions};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use keelson_e2e::apiserver::ApiServer;
use keelson_e2e::assets::{Assets, Kubernetes, Programs};
use keelson_e2e::chain::{Chain, SecretsThrough, run_folder};
use keelson_e2e::etcd::Etcd;
use keelson_e2e::process::{Lifetime, Process, Spec};
use keelson_e2e::{Error, Result, http, pki, wait};
use serde_json::{Value, json};

const NAME: &str = "hypershift";
const HEALTH_PORT: u16 = 8081;

#[test]
fn hypershift_s_environment_serves_kube_apiserver_and_a_second_key_version_follows() -> Result<()> {
    port_is_free()?;
    let dir = run_folder(&format!("e2e/{NAME}"));
    let mut chain = Chain::for_test(NAME, None, SecretsThrough::V2, |_| ())?;
    chain.plugin.server.stop()?;
    let volume = empty_dir(&dir)?;
    let pod = Pod { chain: &chain, dir: &dir, volume: &volume };

    let first = pod.start(&json!({"1": pod.key(&chain.crk_id)}))?;
    let assets = Assets::find(Kubernetes::V1_37)?;
    let etcd = Etcd::start(&assets.etcd, &dir, Lifetime::WithParent)?;
    let encryption = pod.encryption_config()?;
    let mut apiserver = ApiServer::start(&assets, &etcd, &encryption, &dir, Lifetime::WithParent)?;
    apiserver.kubectl.create_secret("old", "password", "under the first version")?;
    assert!(key_id(&chain, &etcd, "old")?.contains(&chain.crk_id));

    // A new version of the key is a changed KP_DATA_JSON: the pod is rolled out anew, kube-apiserver with it.
    let second_crk = chain.kmsctl.create_key("second")?;
    first.stop(Duration::from_secs(20))?;
    let data = json!({"1": pod.key(&chain.crk_id), "2": pod.key(&second_crk)});
    let second = pod.start(&data)?;
    apiserver.restart()?;
    assert_eq!(apiserver.kubectl.secret_value("old", "password")?, "under the first version");
    apiserver.kubectl.create_secret("new", "password", "under the second version")?;
    assert!(key_id(&chain, &etcd, "new")?.contains(&second_crk));
    apiserver.kubectl.run(&["get", "--raw", "/readyz"], b"")?;
    assert!(second.ended().is_none(), "{}", second.log_tail(20));
    Ok(())
}

#[test]
fn managed_authentication_is_refused_with_a_word_on_what_is_supported() -> Result<()> {
    let dir = tempfile::tempdir().map_err(Error::machine("make a folder"))?;
    let entry = json!({"crkID": "c", "instanceID": "i", "correlationID": "r",
        "url": "https://127.0.0.1:1", "serviceToService": true});
    let spec =
        Spec::new("kmsplugin", &Programs::find()?.kmsplugin, dir.path(), Lifetime::WithParent);
    let managed = spec.env("KP_DATA_JSON", json!({"1": entry}).to_string());
    let container = Process::start(&managed)?;
    wait::until("its end", Duration::from_secs(20), &[], || {
        container.ended().ok_or_else(|| "it still runs".to_owned())
    })?;
    let log = container.log_tail(20);
    assert!(log.contains("only an API key is supported"), "{log}");
    Ok(())
}

struct Pod<'a> {
    chain: &'a Chain,
    dir: &'a Path,
    volume: &'a Path,
}

impl Pod<'_> {
    /// One member of KP_DATA_JSON.
    fn key(&self, crk: &str) -> Value {
        let service = &self.chain.key_service;
        json!({"crkID": crk, "instanceID": service.instance_id, "url": service.url,
            "correlationID": "5e1c0f0e-9d4e-4b8e-8f59-6f2a4f0c7a11", "serviceToService": false})
    }

    /// Starts the container and waits for the probe that HyperShift gives it.
    fn start(&self, data: &Value) -> Result<Process> {
        let config = &self.chain.plugin.config;
        let in_volume = |name: &str| self.volume.join(name);
        let program = Programs::find()?.kmsplugin;
        let spec = Spec::new("kms", &program, self.dir, Lifetime::WithParent)
            .env("LOG_LEVEL", "info")
            .env("NUM_LEN_BYTES", "4")
            .env("CACHE_TIMEOUT_IN_HOURS", "1")
            .env("RESTART_DELAY_IN_SECONDS", "0")
            .env("UNIX_SOCKET_PATH", in_volume("keyprotectprovider.sock"))
            .env("KP_TIMEOUT", "10")
            .env("KP_WDEK_PATH", in_volume("kp/wdek"))
            .env("KP_STATE_PATH", in_volume("kp/state"))
            .env("HEALTHZ_PATH", "/healthz")
            .env("HEALTHZ_PORT", format!(":{HEALTH_PORT}"))
            .env("KP_DATA_JSON", data.to_string())
            .env("REGION", "eu-de")
            .env("API_KEY", &config.api_key)
            .env("TOKEN_URL", &config.token_url)
            .env("TOKEN_URL_CA_FILE", &config.ca)
            .env("KP_CA_FILE", &config.ca);
        let container = Process::start(&spec)?;
        wait::until("the liveness probe", Duration::from_secs(60), &[&container], || {
            match http::get(HEALTH_PORT, "/healthz/liveness")? {
                (200, _) => Ok(()),
                (status, body) => Err(format!("{status} {body}")),
            }
        })?;
        Ok(container)
    }

    /// As HyperShift writes it.
    fn encryption_config(&self) -> Result<std::path::PathBuf> {
        let file = self.dir.join("encryption-config.yaml");
        let socket = self.volume.join("keyprotectprovider.sock");
        let text = format!(
            "kind: EncryptionConfiguration
apiVersion: apiserver.config.k8s.io/v1
resources:
- resources:
  - secrets
  providers:
  - kms:
      apiVersion: v2
      name: ibmv2
      endpoint: unix://{}
      timeout: 35s
  - identity: {{}}
",
            socket.display()
        );
        pki::write_file(&file, &text)?;
        Ok(file)
    }
}

/// As kubelet makes an emptyDir: anybody in the pod may write to it.
fn empty_dir(dir: &Path) -> Result<std::path::PathBuf> {
    let volume = dir.join("volume");
    DirBuilder::new()
        .mode(0o777)
        .create(&volume)
        .and_then(|()| fs::set_permissions(&volume, Permissions::from_mode(0o777)))
        .map_err(Error::machine(format!("make {}", volume.display())))?;
    Ok(volume)
}

/// HyperShift's probes know one port, so the test has no other.
fn port_is_free() -> Result<()> {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, HEALTH_PORT)).map(drop).map_err(Error::machine(
        format!(
            "listen on port {HEALTH_PORT}, which HyperShift's probes use: free it for this test"
        ),
    ))
}

/// Under which key_id a secret is stored.
fn key_id(chain: &Chain, etcd: &Etcd, name: &str) -> Result<String> {
    let stored = etcd.value(&format!("/registry/secrets/default/{name}"))?;
    assert!(stored.starts_with(b"k8s:enc:kms:v2:ibmv2:"), "{}", String::from_utf8_lossy(&stored));
    let explained = chain.kmsctl.inspect(&stored)?;
    explained["key_id"]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::answer("kmsctl inspect", explained.to_string()))
}
