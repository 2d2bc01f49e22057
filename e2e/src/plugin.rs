//! kmsplugin with the original's configuration file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::process::{Lifetime, Spec};
use crate::server::Server;
use crate::{http, pki, wait};

/// The values of the original's `kmsplugin-config.yaml`; what is not here stands in the file as in the original.
#[derive(Debug, Clone)]
pub struct Config {
    pub socket: PathBuf,
    pub token_url: String,
    pub url: String,
    pub ca: PathBuf,
    pub api_key: String,
    pub instance_id: String,
    pub crk_id: String,
    pub health_port: u16,
    pub new_dek: bool,
    /// Settings of ours in SERVER_CONFIG, beyond the original's.
    pub more: Vec<(&'static str, String)>,
}

impl Config {
    /// The file's text.
    pub fn yaml(&self) -> String {
        let more: String =
            self.more.iter().map(|(name, value)| format!("  {name}: {value}\n")).collect();
        format!(
            r#"SERVER_CONFIG:
  REGION: "IBMCloudPakForMCM"
  NUM_LEN_BYTES: 4
  CACHE_TIMEOUT_IN_HOURS: 1
  RESTART_DELAY_IN_SECONDS: 30
  UNIX_SOCKET_PATH: "{socket}"
  TOKEN_URL: "{token_url}"
  TOKEN_URL_CA_FILE: "{ca}"
  API_KEY: "{api_key}"
  HEALTHZ_PATH: "/healthz"
  HEALTHZ_PORT: ":{health}"
  NEW_DEK: {new_dek}
  MAX_RETRIES: 0
{more}KP_CONFIG:
  VERSION: 1
  CRK_ID: "{crk}"
  URL: "{url}"
  KP_CA_FILE: "{ca}"
  INSTANCE_ID: "{instance}"
LOGGER:
  LOG_LEVEL: "info"
  LOG_ALL_VALUES: false
"#,
            socket = self.socket.display(),
            token_url = self.token_url,
            ca = self.ca.display(),
            api_key = self.api_key,
            health = self.health_port,
            new_dek = self.new_dek,
            crk = self.crk_id,
            url = self.url,
            instance = self.instance_id,
        )
    }
}

/// The plug-in of one chain.
#[derive(Debug)]
pub struct Plugin {
    pub server: Server,
    pub config_file: PathBuf,
    pub config: Config,
}

impl Plugin {
    /// Writes `kmsplugin-config.yaml` into `dir`; nothing runs yet.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn prepare(program: &Path, dir: &Path, config: Config, lifetime: Lifetime) -> Result<Self> {
        let config_file = dir.join("kmsplugin-config.yaml");
        pki::write_private(&config_file, &config.yaml())?;
        let spec = Spec::new("kmsplugin", program, dir, lifetime).env("config_file", &config_file);
        Ok(Self { server: Server::new(spec), config_file, config })
    }

    /// Starts the process and waits until its readiness probe answers 200.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start(&mut self) -> Result<()> {
        self.server.start()?;
        self.wait_for_probe("/healthz/readiness", 200)
    }

    /// Starts the process and waits for liveness only: for chains that are broken on purpose.
    ///
    /// # Errors
    /// When it does not come to life.
    pub fn start_unready(&mut self) -> Result<()> {
        self.server.start()?;
        self.wait_for_probe("/healthz/liveness", 200)
    }

    /// Waits until a probe answers with `status`.
    ///
    /// # Errors
    /// When time is up or the process ends.
    pub fn wait_for_probe(&self, path: &str, status: u16) -> Result<()> {
        let what = format!("{status} from kmsplugin's {path}");
        let port = self.config.health_port;
        wait::until(&what, Duration::from_secs(60), &[self.server.running()?], || match http::get(
            port, path,
        )? {
            (seen, _) if seen == status => Ok(()),
            (seen, body) => Err(format!("{seen} {body}")),
        })
    }

    /// One look at a probe or at `/metrics`: status and text.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn probe(&self, path: &str) -> Result<(u16, String)> {
        http::get(self.config.health_port, path).map_err(|text| Error::answer("kmsplugin", text))
    }

    /// Writes the configuration again and restarts the process. Waits for liveness only.
    ///
    /// # Errors
    /// When it does not come to life.
    pub fn restart_with(&mut self, change: impl FnOnce(&mut Config)) -> Result<()> {
        self.server.stop()?;
        change(&mut self.config);
        pki::write_private(&self.config_file, &self.config.yaml())?;
        self.start_unready()
    }
}
