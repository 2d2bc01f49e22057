//! The whole chain, assembled: kube-apiserver and etcd, kmsplugin, kms-server, SoftHSM2.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::apiserver::{ApiServer, Kubectl};
use crate::assets::{Assets, Kubernetes, Programs, target_folder};
use crate::error::{Error, Result};
use crate::etcd::Etcd;
use crate::key_service::KeyService;
use crate::kmsctl::Kmsctl;
use crate::plugin::{self, Plugin};
use crate::process::Lifetime;
use crate::{pki, ports};

/// The original's name for the plug-in; part of every stored secret.
pub const V1_PROVIDER: &str = "KmsPlugin";
/// The same plug-in through KMS v2; kube-apiserver wants another name.
pub const V2_PROVIDER: &str = "KmsPluginV2";

/// Which API kube-apiserver encrypts secrets through. Configmaps go through v2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretsThrough {
    /// No plug-in yet: secrets and configmaps are stored as they are.
    Nothing,
    V1,
    V2,
}

/// How to assemble a chain.
#[derive(Debug)]
pub struct Options<'a> {
    pub dir: &'a Path,
    pub programs: Programs,
    /// None: the chain ends at the plug-in's socket.
    pub assets: Option<Assets>,
    pub secrets: SecretsThrough,
    /// Take the original's ports where they are free.
    pub usual_ports: bool,
    pub lifetime: Lifetime,
    /// Changes to the original's plug-in configuration.
    pub configure: fn(&mut plugin::Config),
}

/// A running chain. Dropping it ends everything.
#[derive(Debug)]
pub struct Chain {
    pub cluster: Option<Cluster>,
    pub plugin: Plugin,
    pub key_service: KeyService,
    pub kmsctl: Kmsctl,
    pub crk_id: String,
}

/// The Kubernetes half.
#[derive(Debug)]
pub struct Cluster {
    pub apiserver: ApiServer,
    pub etcd: Etcd,
    /// kube-apiserver reads it when it starts.
    pub encryption_config: PathBuf,
}

impl Chain {
    /// Starts every part in order and waits for each; `say` is told what is being done.
    ///
    /// # Errors
    /// When a part does not start. What runs by then is ended.
    pub fn start(options: Options<'_>, say: &mut dyn FnMut(&str)) -> Result<Self> {
        let Options { dir, programs, assets, secrets, usual_ports, lifetime, configure } = options;
        say("initialise a SoftHSM2 token and start kms-server");
        let key_service = KeyService::start(&programs.kms_server, dir, usual_ports, lifetime)?;
        say("create the customer root key and the plug-in's service ID and API key");
        let kmsctl = Kmsctl::new(&programs.kmsctl, &key_service);
        let crk_id = kmsctl.create_key("kubernetes-secrets")?;
        let credential = kmsctl.create_credential("kmsplugin", "Viewer")?;
        say("write kmsplugin-config.yaml and start kmsplugin");
        let health_port = if usual_ports { ports::prefer(HEALTHZ_PORT)? } else { ports::free()? };
        let mut config = plugin::Config {
            socket: dir.join(SOCKET),
            token_url: key_service.token_url.clone(),
            url: key_service.url.clone(),
            ca: key_service.ca.clone(),
            api_key: credential.api_key,
            instance_id: key_service.instance_id.clone(),
            crk_id: crk_id.clone(),
            kp_version: 1,
            previous: Vec::new(),
            api_key_file: None,
            service_account: None,
            health_port,
            new_dek: false,
            more: Vec::new(),
        };
        configure(&mut config);
        let mut plugin = Plugin::prepare(&programs.kmsplugin, dir, config, lifetime)?;
        plugin.start()?;
        let cluster = match assets {
            Some(assets) => {
                Some(Cluster::start(&assets, dir, &plugin.config.socket, secrets, lifetime, say)?)
            }
            None => None,
        };
        Ok(Self { cluster, plugin, key_service, kmsctl, crk_id })
    }

    /// A chain for the test file `name`: free ports, a folder below `target/e2e/` that keeps its logs, the original's
    /// configuration as `configure` changes it.
    ///
    /// # Errors
    /// When a part is missing or does not start.
    pub fn for_test(
        name: &str,
        kubernetes: Option<Kubernetes>,
        secrets: SecretsThrough,
        configure: fn(&mut plugin::Config),
    ) -> Result<Self> {
        let dir = run_folder(&format!("e2e/{name}"));
        fresh_folder(&dir)?;
        let options = Options {
            dir: &dir,
            programs: Programs::find()?,
            assets: kubernetes.map(Assets::find).transpose()?,
            secrets,
            usual_ports: false,
            lifetime: Lifetime::WithParent,
            configure,
        };
        Self::start(options, &mut |_| ())
    }

    /// The Kubernetes half.
    ///
    /// # Errors
    /// When the chain was started without it.
    pub fn cluster(&self) -> Result<&Cluster> {
        self.cluster.as_ref().ok_or_else(|| Error::answer("the chain", "it has no kube-apiserver"))
    }

    /// The Kubernetes half, to restart its parts.
    ///
    /// # Errors
    /// When the chain was started without it.
    pub fn cluster_mut(&mut self) -> Result<&mut Cluster> {
        self.cluster.as_mut().ok_or_else(|| Error::answer("the chain", "it has no kube-apiserver"))
    }

    /// kubectl against the chain's kube-apiserver.
    ///
    /// # Errors
    /// When the chain was started without it.
    pub fn kubectl(&self) -> Result<&Kubectl> {
        Ok(&self.cluster()?.apiserver.kubectl)
    }
}

/// Another control-plane node of the same cluster: a plug-in and a kube-apiserver of its own, the same etcd.
#[derive(Debug)]
pub struct Node {
    pub plugin: Plugin,
    pub apiserver: ApiServer,
}

impl Node {
    /// Starts a node whose plug-in has the chain's configuration as `configure` changes it, in `dir`.
    ///
    /// # Errors
    /// When a part does not start.
    pub fn join(
        chain: &Chain,
        dir: &Path,
        secrets: SecretsThrough,
        configure: impl FnOnce(&mut plugin::Config),
    ) -> Result<Self> {
        fresh_folder(dir)?;
        let lifetime = Lifetime::WithParent;
        let mut config = chain.plugin.config.clone();
        config.socket = dir.join(SOCKET);
        config.health_port = ports::free()?;
        configure(&mut config);
        let mut plugin = Plugin::prepare(&Programs::find()?.kmsplugin, dir, config, lifetime)?;
        plugin.start()?;
        let encryption_config = dir.join("encryption-config.yaml");
        pki::write_file(&encryption_config, &encryption_yaml(&plugin.config.socket, secrets))?;
        let assets = Assets::find(Kubernetes::V1_37)?;
        let etcd = &chain.cluster()?.etcd;
        let apiserver = ApiServer::start(&assets, etcd, &encryption_config, dir, lifetime)?;
        Ok(Self { plugin, apiserver })
    }
}

impl Cluster {
    pub(crate) fn start(
        assets: &Assets,
        dir: &Path,
        socket: &Path,
        secrets: SecretsThrough,
        lifetime: Lifetime,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self> {
        say("start etcd");
        let etcd = Etcd::start(&assets.etcd, dir, lifetime)?;
        say("write encryption-config.yaml and start kube-apiserver");
        let encryption_config = dir.join("encryption-config.yaml");
        pki::write_file(&encryption_config, &encryption_yaml(socket, secrets))?;
        let apiserver = ApiServer::start(assets, &etcd, &encryption_config, dir, lifetime)?;
        Ok(Self { apiserver, etcd, encryption_config })
    }
}

/// One chain for all tests of a file. They run one after the other; a test that fails takes its chain with it, so
/// that the next one starts from a whole one.
#[derive(Debug)]
pub struct Shared {
    chain: Mutex<Option<Chain>>,
    start: fn() -> Result<Chain>,
}

impl Shared {
    /// `start` is called by the first test that needs the chain.
    pub const fn new(start: fn() -> Result<Chain>) -> Self {
        Self { chain: Mutex::new(None), start }
    }

    /// Runs one test with the chain.
    ///
    /// # Errors
    /// When the chain does not start, or the test's own.
    pub fn with(&self, test: impl FnOnce(&mut Chain) -> Result<()>) -> Result<()> {
        let mut slot = self.chain.lock().unwrap_or_else(PoisonError::into_inner);
        let mut chain = match slot.take() {
            Some(chain) => chain,
            None => (self.start)()?,
        };
        test(&mut chain)?;
        *slot = Some(chain);
        Ok(())
    }
}

/// Where a chain called `name` lives: below cargo's target folder, or below the folder for temporary files where
/// the path of its socket would be too long for the kernel (108 bytes).
pub fn run_folder(name: &str) -> PathBuf {
    let wanted = target_folder().join(name);
    if wanted.join(SOCKET).as_os_str().len() < 100 {
        return wanted;
    }
    std::env::temp_dir().join("keelson").join(name)
}

/// Makes `dir` anew, readable by its owner only.
///
/// # Errors
/// When the machine refuses.
pub fn fresh_folder(dir: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::machine(format!("empty {}", dir.display()))(error));
        }
        _ => {}
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(Error::machine(format!("make {}", dir.display())))
}

/// As in the original.
const SOCKET: &str = "keyprotectprovider.sock";
const HEALTHZ_PORT: u16 = 20358;

/// The original's `encryption-config.yaml` for secrets, and a KMS v2 entry for configmaps on the same socket.
fn encryption_yaml(socket: &Path, secrets: SecretsThrough) -> String {
    let endpoint = format!("unix://{}", socket.display());
    let v1 = format!(
        "      - kms:
          name: {V1_PROVIDER}
          endpoint: {endpoint}
          cachesize: 100
"
    );
    let v2 = format!(
        "      - kms:
          apiVersion: v2
          name: {V2_PROVIDER}
          endpoint: {endpoint}
"
    );
    let head =
        "kind: EncryptionConfiguration\napiVersion: apiserver.config.k8s.io/v1\nresources:\n";
    let block = |resources: &str, providers: &str| {
        format!("  - resources:\n{resources}    providers:\n{providers}      - identity: {{}}\n")
    };
    match secrets {
        SecretsThrough::Nothing => format!("{head}{}", block("      - secrets\n", "")),
        SecretsThrough::V1 => {
            let (secrets, configmaps) =
                (block("      - secrets\n", &v1), block("      - configmaps\n", &v2));
            format!("{head}{secrets}{configmaps}")
        }
        SecretsThrough::V2 => {
            format!("{head}{}", block("      - secrets\n      - configmaps\n", &v2))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_encryption_configuration_is_the_original_s_with_a_v2_entry_beside_it() {
        let expected = "\
kind: EncryptionConfiguration
apiVersion: apiserver.config.k8s.io/v1
resources:
  - resources:
      - secrets
    providers:
      - kms:
          name: KmsPlugin
          endpoint: unix:///etc/origin/master/keyprotectprovider.sock
          cachesize: 100
      - identity: {}
  - resources:
      - configmaps
    providers:
      - kms:
          apiVersion: v2
          name: KmsPluginV2
          endpoint: unix:///etc/origin/master/keyprotectprovider.sock
      - identity: {}
";
        let socket = Path::new("/etc/origin/master/keyprotectprovider.sock");
        assert_eq!(encryption_yaml(socket, SecretsThrough::V1), expected);
    }
}
