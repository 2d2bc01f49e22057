//! From a cluster with KMS v1 alone to one with KMS v2 alone, led by `kmsctl verify`: every secret is readable at
//! every step, to a kube-apiserver that has just started and remembers nothing.

use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough, V1_PROVIDER, V2_PROVIDER};
use keelson_e2e::driver::Driver;
use keelson_e2e::{Error, Result, pki};
use serde_json::{Value, json};

#[test]
fn kmsctl_leads_a_cluster_from_kms_v1_to_v2_with_every_secret_readable() -> Result<()> {
    let chain =
        Chain::for_test("migration", Some(Kubernetes::V1_37), SecretsThrough::Nothing, |_| ())?;
    let mut migration = Migration { chain, secrets: Vec::new() };

    // Before any plug-in: nobody advises, but nobody calls it good either.
    migration.create("ancient")?;
    let (code, report) = migration.verify()?;
    assert_eq!((code, &report["objects"], &report["left"]), (1, &json!(1), &json!(1)), "{report}");
    assert_eq!(report["migration"], json!([]));

    migration.load(&[V1, IDENTITY])?;
    migration.create("by-v1-a")?;
    migration.create("by-v1-b")?;
    let report = migration.at(1, "add-v2", 1)?;
    let v1 = row(&report, "kms v1 KmsPlugin")?;
    assert_eq!((&v1["objects"], &v1["state"]), (&json!(2), &json!("current")));
    // Nobody unwrapped anything for it: the version of the root key stands in what the plug-in wrote.
    let key_id = migration.current_key_id()?;
    assert!(key_id.ends_with(text(v1, "key")?), "{v1} {key_id}");

    migration.load(&[V1, V2, IDENTITY])?;
    migration.create("by-v1-c")?;
    migration.at(1, "write-through-v2", 1)?;

    migration.load(&[V2, V1, IDENTITY])?;
    migration.create("by-v2")?;
    let report = migration.at(1, "rewrite", 4)?;
    assert_eq!(row(&report, "kms v1 KmsPlugin")?["objects"], 3);
    assert_eq!(row(&report, "identity")?["objects"], 1);
    let v2 = row(&report, "kms v2 KmsPluginV2")?;
    assert_eq!(
        (&v2["objects"], &v2["key"], &v2["state"]),
        (&json!(1), &json!(key_id), &json!("current"))
    );

    // A file that goes too far is found out before kube-apiserver is given it.
    migration.write(&[V2])?;
    migration.at(1, "repair", 4)?;
    migration.write(&[V2, V1, IDENTITY])?;

    migration.follow("kubectl get secrets --all-namespaces -o json | kubectl replace -f -")?;
    let report = migration.at(0, "remove-old", 0)?;
    assert_eq!(row(&report, "kms v2 KmsPluginV2")?["objects"], 5);

    // KMS v2 alone, without the feature gate that only v1 needs, and with empty memories on the whole way.
    migration.chain.cluster_mut()?.apiserver.server.change(|spec| {
        spec.args.retain(|arg| arg != "--feature-gates=KMSv1=true");
    });
    migration.chain.plugin.server.stop()?;
    migration.chain.plugin.start()?;
    migration.load(&[V2])?;
    migration.create("after")?;
    let report = migration.at(0, "done", 0)?;
    assert_eq!(report["rows"].as_array().map(Vec::len), Some(1), "{report}");
    migration.cannot_tell_without_the_plugin()
}

const IDENTITY: &str = "identity: {}";
const V1: &str = "kms: {name: KmsPlugin, endpoint: 'unix://SOCKET'}";
const V2: &str = "kms: {apiVersion: v2, name: KmsPluginV2, endpoint: 'unix://SOCKET'}";

struct Migration {
    chain: Chain,
    secrets: Vec<&'static str>,
}

impl Migration {
    /// Writes the configuration for secrets with these providers.
    fn write(&self, providers: &[&str]) -> Result<()> {
        assert_eq!((V1_PROVIDER, V2_PROVIDER), ("KmsPlugin", "KmsPluginV2"));
        let list: String = providers.iter().map(|entry| format!("      - {entry}\n")).collect();
        let socket = self.chain.plugin.config.socket.display().to_string();
        let text = format!(
            "kind: EncryptionConfiguration\napiVersion: apiserver.config.k8s.io/v1\nresources:\n  \
             - resources: [secrets]\n    providers:\n{}",
            list.replace("SOCKET", &socket)
        );
        pki::write_file(&self.chain.cluster()?.encryption_config, &text)
    }

    /// Gives kube-apiserver a configuration with a restart, after which everything must be readable.
    fn load(&mut self, providers: &[&str]) -> Result<()> {
        self.write(providers)?;
        self.chain.cluster_mut()?.apiserver.restart()?;
        self.all_readable()
    }

    fn create(&mut self, name: &'static str) -> Result<()> {
        self.chain.kubectl()?.create_secret(name, "password", name)?;
        self.secrets.push(name);
        Ok(())
    }

    fn all_readable(&self) -> Result<()> {
        let template = "go-template={{range .items}}{{.metadata.name}}={{.data.password | base64decode}} {{end}}";
        let read = self.chain.kubectl()?.run(&["get", "secrets", "-A", "-o", template], b"")?;
        let mut written: Vec<String> =
            self.secrets.iter().map(|name| format!("{name}={name}")).collect();
        written.sort();
        assert_eq!(read.split_whitespace().collect::<Vec<_>>(), written);
        Ok(())
    }

    fn verify(&self) -> Result<(i32, Value)> {
        let cluster = self.chain.cluster()?;
        let config = cluster.encryption_config.display().to_string();
        self.chain.kmsctl.verify(&cluster.etcd, &["--encryption-config", &config])
    }

    /// What verify says must be this exit code, this step, and so many objects left; every object is counted.
    fn at(&self, code: i32, step: &str, left: u64) -> Result<Value> {
        self.all_readable()?;
        let (seen, report) = self.verify()?;
        let advice = &report["migration"][0];
        assert_eq!(
            (seen, &advice["step"], &advice["left"]),
            (code, &json!(step), &json!(left)),
            "{report}"
        );
        assert_eq!(advice["resources"], json!(["secrets"]));
        assert_eq!(report["objects"], json!(self.secrets.len()), "{report}");
        Ok(report)
    }

    /// Does what verify says, which must be `command`.
    fn follow(&self, command: &str) -> Result<()> {
        let (_, report) = self.verify()?;
        assert_eq!(report["migration"][0]["command"], command, "{report}");
        let kubectl = self.chain.kubectl()?;
        let objects = kubectl.run(&["get", "secrets", "--all-namespaces", "-o", "json"], b"")?;
        kubectl.run(&["replace", "-f", "-"], objects.as_bytes())?;
        self.all_readable()
    }

    fn current_key_id(&self) -> Result<String> {
        Ok(Driver::connect(&self.chain.plugin.config.socket)?.v2_status()?.key_id)
    }

    /// Where the current key_id is not known, "everything is current" must not be said.
    fn cannot_tell_without_the_plugin(mut self) -> Result<()> {
        let key_id = self.current_key_id()?;
        self.chain.plugin.server.stop()?;
        let refused = self.verify().map(|(code, _)| code);
        assert!(
            refused.is_err_and(|error| error.to_string().contains("nobody answers on the socket"))
        );
        let etcd = &self.chain.cluster()?.etcd;
        let verify = |key_id: &str| self.chain.kmsctl.verify(etcd, &["--key-id", key_id]);
        assert_eq!(verify(&key_id)?.0, 0);
        assert_eq!(verify("keelson/another")?.0, 1);
        Ok(())
    }
}

fn row<'a>(report: &'a Value, provider: &str) -> Result<&'a Value> {
    let rows = report["rows"].as_array().into_iter().flatten();
    rows.into_iter()
        .find(|row| row["provider"] == provider)
        .ok_or_else(|| Error::answer("kmsctl verify", format!("no {provider:?}: {report}")))
}

fn text<'a>(row: &'a Value, member: &str) -> Result<&'a str> {
    row[member].as_str().ok_or_else(|| Error::answer("kmsctl verify", row.to_string()))
}
