//! kmsplugin with the original's configuration file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kms_core::clock::{Clock, SystemClock};
use rustix::process::Signal;

use crate::driver::Driver;
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
    pub kp_version: u32,
    /// KP_CONFIG_PREVIOUS: VERSION and CRK_ID of each entry, reached as KP_CONFIG is.
    pub previous: Vec<(u32, String)>,
    /// In place of the API key itself.
    pub api_key_file: Option<PathBuf>,
    /// In place of any API key: the file with a service account's token, and the name of the profile that trusts it.
    pub service_account: Option<(PathBuf, String)>,
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
        let credential = match (&self.service_account, &self.api_key_file) {
            (Some((path, profile)), _) => {
                format!("CR_TOKEN_FILE: \"{}\"\n  PROFILE_NAME: \"{profile}\"", path.display())
            }
            (None, Some(path)) => format!("API_KEY_FILE: \"{}\"", path.display()),
            (None, None) => format!("API_KEY: \"{}\"", self.api_key),
        };
        format!(
            r#"SERVER_CONFIG:
  REGION: "IBMCloudPakForMCM"
  NUM_LEN_BYTES: 4
  CACHE_TIMEOUT_IN_HOURS: 1
  RESTART_DELAY_IN_SECONDS: 30
  UNIX_SOCKET_PATH: "{socket}"
  TOKEN_URL: "{token_url}"
  TOKEN_URL_CA_FILE: "{ca}"
  {credential}
  HEALTHZ_PATH: "/healthz"
  HEALTHZ_PORT: ":{health}"
  NEW_DEK: {new_dek}
  MAX_RETRIES: 0
{more}KP_CONFIG:
{entry}{previous}LOGGER:
  LOG_LEVEL: "info"
  LOG_ALL_VALUES: false
"#,
            socket = self.socket.display(),
            token_url = self.token_url,
            ca = self.ca.display(),
            health = self.health_port,
            new_dek = self.new_dek,
            entry = self.entry("  ", self.kp_version, &self.crk_id),
            previous = self.previous_yaml(),
        )
    }

    fn previous_yaml(&self) -> String {
        let entries = self.previous.iter().map(|(version, crk_id)| {
            let entry = self.entry("    ", *version, crk_id);
            format!("  - {}", entry.trim_start())
        });
        let entries: String = entries.collect();
        if entries.is_empty() { entries } else { format!("KP_CONFIG_PREVIOUS:\n{entries}") }
    }

    fn entry(&self, indent: &str, version: u32, crk_id: &str) -> String {
        let (url, ca, instance) = (&self.url, self.ca.display(), &self.instance_id);
        format!(
            r#"{indent}VERSION: {version}
{indent}CRK_ID: "{crk_id}"
{indent}URL: "{url}"
{indent}KP_CA_FILE: "{ca}"
{indent}INSTANCE_ID: "{instance}"
"#
        )
    }
}

/// Longer than a start under a CPU quota takes.
const COLD_START_WITHIN: Duration = Duration::from_secs(30);

const RELOADS: &str = "kmsplugin_config_reloads_total";

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

    /// Starts the process and returns how long it took from then until Status answered with a key_id: its key service
    /// was asked for a DEK by then.
    ///
    /// # Errors
    /// When that does not happen.
    pub fn cold_start(&mut self) -> Result<Duration> {
        let clock = SystemClock::new();
        let begun = clock.now();
        self.server.start()?;
        loop {
            let answered = self.config.socket.exists()
                && Driver::connect(&self.config.socket)
                    .is_ok_and(|driver| driver.v2_status().is_ok());
            let took = clock.now() - begun;
            if answered {
                return Ok(took);
            }
            if took > COLD_START_WITHIN || self.server.running()?.ended().is_some() {
                return Err(Error::answer(
                    "kmsplugin",
                    format!("Status does not answer after {took:?}"),
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
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

    /// Writes the configuration again and tells the running process, which takes it over.
    ///
    /// # Errors
    /// When it does not run.
    pub fn reload_with(&mut self, change: impl FnOnce(&mut Config)) -> Result<()> {
        change(&mut self.config);
        pki::write_private(&self.config_file, &self.config.yaml())?;
        self.server.running()?.signal(Signal::HUP)
    }

    /// Changes the configuration file under the running process, and waits until it says that it has read it again.
    ///
    /// # Errors
    /// When it does not, or refuses the configuration.
    pub fn reconfigure(&mut self, change: impl FnOnce(&mut Config)) -> Result<()> {
        let before = self.reloads()?;
        change(&mut self.config);
        let new = self.config_file.with_extension("new");
        pki::write_private(&new, &self.config.yaml())?;
        std::fs::rename(&new, &self.config_file).map_err(Error::machine("replace a file"))?;
        self.wait_for_reload(&before)
    }

    /// What the metrics say about configurations read again, to be told from what they say after a change.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn reloads(&self) -> Result<String> {
        let (_, metrics) = self.probe("/metrics")?;
        Ok(metrics.lines().filter(|line| line.starts_with(RELOADS)).collect())
    }

    /// Waits until a changed file is in use.
    ///
    /// # Errors
    /// When it is refused or time is up.
    pub fn wait_for_reload(&self, before: &str) -> Result<()> {
        let watched = [self.server.running()?];
        wait::until("another configuration", Duration::from_secs(60), &watched, || {
            match self.reloads().map_err(|error| error.to_string())? {
                now if now != before => Ok(now),
                now => Err(now),
            }
        })
        .and_then(|now| match now.contains("refused") {
            true => Err(Error::answer("kmsplugin", format!("it refused a configuration: {now}"))),
            false => Ok(()),
        })
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
