//! The plug-in's configuration, complete and checked. How the file looks is in `schema`, what IBM's containers pass
//! in their environment instead is in `hypershift`, how changes are noticed is in `watch`.

mod hsm;
mod hypershift;
mod schema;
mod watch;

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kms_api::token::Credential;
use kms_daemon::settings::{Environment, Mistakes, Settings};
use kms_daemon::telemetry;

use crate::keys::Policy;
use crate::provider::guard::Patience;
use crate::socket::{self, SocketAddress};

pub use self::hsm::{Hsm, Token};
pub use self::watch::watch;

/// No configuration is longer; whatever is, was named by mistake.
const MAX_FILE: u64 = 1024 * 1024;

/// Everything that `kmsplugin` is told.
#[derive(Debug, Clone)]
pub struct Config {
    pub server: Server,
    /// The CRK that wraps, and the way to it.
    pub current: KpConfig,
    /// Those that only unwrap.
    pub previous: Vec<KpConfig>,
    /// Where the CRKs are, if not behind a key service.
    pub hsm: Option<Hsm>,
    pub logger: telemetry::Settings,
    /// Names whose values came from the environment.
    pub overridden: Vec<&'static str>,
}

/// SERVER_CONFIG. With an HSM, what leads to a token service stays empty.
#[derive(Debug, Clone)]
pub struct Server {
    pub region: String,
    pub socket: Socket,
    pub health: Health,
    pub restart_delay: Duration,
    pub probe_interval: Duration,
    pub token_url: String,
    pub token_ca: PathBuf,
    pub credential: Credential,
    pub patience: Patience,
    pub policy: Policy,
}

/// Where kube-apiserver connects, and what Status tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    pub address: SocketAddress,
    pub take_over: bool,
    pub shared_directory: bool,
    /// Empty: root and the plug-in's own user.
    pub allowed_uids: Vec<u32>,
    pub status_version: StatusVersion,
}

/// What `version` says in a KMS v2 StatusResponse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusVersion {
    V2,
    /// Kubernetes 1.27 and 1.28 accept no other.
    V2Beta1,
}

/// Where the probes and metrics are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    pub path: String,
    /// The first that can be bound is taken.
    pub addresses: Vec<SocketAddr>,
}

/// KP_CONFIG, or one entry of KP_CONFIG_PREVIOUS. With an HSM, what leads to a key service stays empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KpConfig {
    pub version: i64,
    pub crk_id: String,
    pub instance_id: String,
    pub url: String,
    pub ca: PathBuf,
}

/// Where the configuration comes from: a file, the environment, or both.
#[derive(Debug, Clone)]
pub struct Source {
    pub path: Option<PathBuf>,
    pub environment: Environment,
}

impl Source {
    /// `--config` comes before the environment variable `config_file`.
    pub fn new(path: Option<PathBuf>, environment: Environment) -> Source {
        let path = path.or_else(|| {
            environment.get("config_file").filter(|path| !path.is_empty()).map(PathBuf::from)
        });
        Source { path, environment }
    }

    /// # Errors
    /// Every mistake at once.
    pub fn read(&self) -> Result<Config, Mistakes> {
        let mut settings = self.settings()?;
        hypershift::apply(&mut settings, &self.environment);
        schema::config(settings)
    }

    fn settings(&self) -> Result<Settings, Mistakes> {
        let Some(path) = &self.path else {
            if hypershift::is_asked_for(&self.environment) {
                return Ok(Settings::new(serde_json::Map::new(), self.environment.clone()));
            }
            let text = "no configuration: name the file with --config FILE or in the environment variable config_file";
            return Err(Mistakes(vec![text.into()]));
        };
        let bytes = read_file(path).map_err(|error| {
            Mistakes(vec![format!("{} cannot be read: {error}", path.display())])
        })?;
        let text = zeroize::Zeroizing::new(bytes);
        let text = std::str::from_utf8(&text)
            .map_err(|_| Mistakes(vec![format!("{} is not UTF-8 text", path.display())]))?;
        Settings::parse(text, self.environment.clone())
    }
}

impl Config {
    /// All entries, the one that wraps first.
    pub fn entries(&self) -> impl Iterator<Item = &KpConfig> {
        std::iter::once(&self.current).chain(&self.previous)
    }

    /// The files whose content is part of the configuration.
    pub fn files(&self) -> Vec<&Path> {
        let cas = self.entries().map(|entry| entry.ca.as_path());
        // A service account's token changes all the time and is read when it is needed.
        let api_key = match &self.server.credential {
            Credential::ApiKeyFile(path) => Some(path.as_path()),
            Credential::ApiKey(_) | Credential::CrTokenFile { .. } => None,
        };
        let pin = self.hsm.as_ref().and_then(|hsm| hsm.pin_file.as_deref());
        let files = cas.chain([self.server.token_ca.as_path()]).chain(api_key).chain(pin);
        files.filter(|path| !path.as_os_str().is_empty()).collect()
    }

    /// What is right while a CRK is brought to all nodes, and wrong after it was used there: KP_CONFIG has a lower VERSION
    /// than an earlier entry. No file shows which it is.
    pub fn doubt(&self) -> Option<String> {
        let (wraps, highest) =
            (self.current.version, self.entries().map(|entry| entry.version).max()?);
        (highest > wraps).then(|| {
            format!(
                "KP_CONFIG has VERSION {wraps}, KP_CONFIG_PREVIOUS has VERSION {highest}: right if VERSION {highest} is still to \
                 come. If it was used already, KP_CONFIG needs a VERSION that was never used, for a key_id that was never used."
            )
        })
    }

    /// The names of settings that differ in `new` and take effect only when the process starts.
    pub fn needing_restart(&self, new: &Config) -> Vec<&'static str> {
        let hsms = self.hsm.as_ref().zip(new.hsm.as_ref());
        let other_hsm = hsms.is_some_and(|(old, new)| old.is_elsewhere(new));
        let (old, new) = (&self.server, &new.server);
        let changes = [
            ("REGION", old.region != new.region),
            ("UNIX_SOCKET_PATH", old.socket.address != new.socket.address),
            ("TAKE_OVER_SOCKET", old.socket.take_over != new.socket.take_over),
            ("ALLOW_SHARED_DIRECTORY", old.socket.shared_directory != new.socket.shared_directory),
            ("ALLOWED_UIDS", old.socket.allowed_uids != new.socket.allowed_uids),
            ("KMS_V2_STATUS_VERSION", old.socket.status_version != new.socket.status_version),
            ("HEALTHZ_PATH", old.health.path != new.health.path),
            ("HEALTHZ_PORT", old.health.addresses != new.health.addresses),
            ("RESTART_DELAY_IN_SECONDS", old.restart_delay != new.restart_delay),
            ("PROBE_INTERVAL_IN_SECONDS", old.probe_interval != new.probe_interval),
            (hsm::SECTION, other_hsm),
        ];
        changes.into_iter().filter(|(_, changed)| *changed).map(|(name, _)| name).collect()
    }
}

impl Socket {
    pub fn options(&self) -> socket::Options {
        socket::Options {
            take_over: self.take_over,
            shared_directory: self.shared_directory,
            peers: socket::Peers::new(self.allowed_uids.clone()),
        }
    }
}

impl StatusVersion {
    pub fn as_str(self) -> &'static str {
        match self {
            StatusVersion::V2 => "v2",
            StatusVersion::V2Beta1 => "v2beta1",
        }
    }
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE) {
        return Err(io::Error::other(format!("it is longer than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}
