//! The chain without a key service: kube-apiserver and etcd, and kmsplugin straight on a token.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;

use crate::assets::{self, Assets, Kubernetes};
use crate::chain::{Cluster, SecretsThrough, fresh_folder, run_folder};
use crate::error::Result;
use crate::plugin::{self, Plugin};
use crate::process::{self, Lifetime};
use crate::token::{LABEL, Model, PIN, Token};
use crate::{pki, ports};

const CRK: &str = "6d3f5a2e-8a4e-4c83-9a4d-1f1f0f6f2a01";
const INSTANCE: &str = "3c1d9a70-5b0e-4b7d-8d55-9d7e6a4f1b03";

/// A running chain. Dropping it ends everything.
#[derive(Debug)]
pub struct OnHsm {
    pub cluster: Cluster,
    pub plugin: Plugin,
    pub token: Token,
    program: PathBuf,
}

impl OnHsm {
    /// A chain for the test `name`, on a fresh token with one CRK version.
    ///
    /// # Errors
    /// When a part is missing or does not start.
    pub fn for_test(name: &str, model: Model) -> Result<Self> {
        let dir = run_folder(&format!("e2e/{name}"));
        fresh_folder(&dir)?;
        let program = assets::kmsplugin_on_hsm()?;
        let token = Token::create(model, &dir)?;
        let config = config(&dir)?;
        let lifetime = Lifetime::WithParent;
        let mut plugin = Plugin::prepare(&program, &dir, config, lifetime)?;
        write(&plugin, &token, None)?;
        let version = new_version(&program, &plugin, &token)?;
        write(&plugin, &token, Some(&version))?;
        plugin.server.add_env([(token.env.0, token.env.1.clone().into())]);
        plugin.start()?;
        let assets = Assets::find(Kubernetes::V1_37)?;
        let (socket, secrets) = (&plugin.config.socket, SecretsThrough::V2);
        let cluster = Cluster::start(&assets, &dir, socket, secrets, lifetime, &mut |_| ())?;
        Ok(Self { cluster, plugin, token, program })
    }

    /// Makes a CRK version in the token and has the running plug-in wrap with it from now on. Returns its name.
    ///
    /// # Errors
    /// When the token or the plug-in refuses.
    pub fn rotate(&self) -> Result<String> {
        let version = new_version(&self.program, &self.plugin, &self.token)?;
        write(&self.plugin, &self.token, Some(&version))?;
        self.plugin.server.running()?.signal(Signal::HUP)?;
        Ok(version)
    }
}

fn config(dir: &Path) -> Result<plugin::Config> {
    Ok(plugin::Config {
        socket: dir.join("kms.sock"),
        token_url: String::new(),
        url: String::new(),
        ca: PathBuf::new(),
        api_key: String::new(),
        instance_id: INSTANCE.to_owned(),
        crk_id: CRK.to_owned(),
        kp_version: 1,
        previous: Vec::new(),
        api_key_file: None,
        service_account: None,
        health_port: ports::free()?,
        new_dek: false,
        more: Vec::new(),
    })
}

/// `kmsplugin --new-crk-version`.
fn new_version(program: &Path, plugin: &Plugin, token: &Token) -> Result<String> {
    let mut command = Command::new(program);
    command.arg("--new-crk-version").arg("--config").arg(&plugin.config_file);
    command.env(token.env.0, &token.env.1);
    let printed = process::stdout(command, b"")?;
    Ok(String::from_utf8_lossy(&printed).trim().to_owned())
}

/// The configuration of this provider; it shares hardly a line with the key service's.
fn write(plugin: &Plugin, token: &Token, version: Option<&str>) -> Result<()> {
    let version = version.map_or(String::new(), |version| format!("  CRK_VERSION: {version}\n"));
    let text = format!(
        r#"SERVER_CONFIG:
  UNIX_SOCKET_PATH: "{socket}"
  HEALTHZ_PORT: "127.0.0.1:{health}"
  PROBE_INTERVAL_IN_SECONDS: 1
KP_CONFIG:
  VERSION: 1
  CRK_ID: "{CRK}"
  INSTANCE_ID: "{INSTANCE}"
PKCS11:
  LIBRARY: "{library}"
  TOKEN_LABEL: "{LABEL}"
  PIN: "{PIN}"
{version}"#,
        socket = plugin.config.socket.display(),
        health = plugin.config.health_port,
        library = token.library.display(),
    );
    pki::write_private(&plugin.config_file, &text)
}
