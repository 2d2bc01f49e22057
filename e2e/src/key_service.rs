//! kms-server with its SoftHSM2 token: initialised once, then started, stopped, frozen and killed at will.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::pki::{self, Pki};
use crate::process::{self, Lifetime, Spec};
use crate::server::Server;
use crate::softhsm::SoftHsm;
use crate::{http, ports, wait};

/// The key service of one chain.
#[derive(Debug)]
pub struct KeyService {
    pub server: Server,
    pub health_port: u16,
    /// `kms-server.yaml`.
    pub config: PathBuf,
    pub audit: PathBuf,
    pub pki: Pki,
    pub url: String,
    pub token_url: String,
    pub ca: PathBuf,
    pub instance_id: String,
    pub admin_api_key: String,
}

impl KeyService {
    /// Writes the configuration, makes the token, the database, the default instance and the administrator, and
    /// starts the server. Takes the original's ports when `usual_ports` is set and they are free.
    ///
    /// # Errors
    /// When a step fails, with what the program printed.
    pub fn start(
        program: &Path,
        dir: &Path,
        usual_ports: bool,
        lifetime: Lifetime,
    ) -> Result<Self> {
        let pki = Pki::create(dir)?;
        let hsm = SoftHsm::create(dir)?;
        let (keys, tokens) = if usual_ports {
            (ports::prefer(KEYS_PORT)?, ports::prefer(TOKENS_PORT)?)
        } else {
            (ports::free()?, ports::free()?)
        };
        let health_port = ports::free()?;
        let config = write_config(dir, &pki, &hsm, Ports { keys, tokens, health: health_port })?;
        let identity = initialise(program, &config, &hsm)?;
        let spec = Spec::new("kms-server", program, dir, lifetime)
            .arg("--config")
            .arg(&config)
            .env("SOFTHSM2_CONF", &hsm.config);
        let mut service = Self {
            server: Server::new(spec),
            health_port,
            config,
            audit: dir.join(AUDIT),
            url: format!("https://127.0.0.1:{keys}"),
            token_url: format!("https://127.0.0.1:{tokens}/oidc/token"),
            ca: pki.ca.clone(),
            pki,
            instance_id: identity.instance_id,
            admin_api_key: identity.admin.api_key,
        };
        service.server.start()?;
        service.wait_until_ready()?;
        Ok(service)
    }

    /// Trusts these issuers of tokens, each by its URL and CA file, and no others from now on; it is restarted for it.
    ///
    /// # Errors
    /// When it does not become ready again.
    pub fn trust(&mut self, issuers: &[(&str, &Path)], audience: &str) -> Result<()> {
        let text = std::fs::read_to_string(&self.config)
            .map_err(Error::machine(format!("read {}", self.config.display())))?;
        let (own, _) = text.split_once("ISSUERS:").unwrap_or((&text, ""));
        let entry = |(url, ca): &(&str, &Path)| {
            let ca = ca.display();
            format!("- ISSUER_URL: \"{url}\"\n  AUDIENCE: \"{audience}\"\n  CA_FILE: \"{ca}\"\n")
        };
        let entries: String = issuers.iter().map(entry).collect();
        pki::write_private(&self.config, &format!("{own}ISSUERS:\n{entries}"))?;
        self.server.stop()?;
        self.server.start()?;
        self.wait_until_ready()
    }

    /// How many calls of one kind it has answered: lines of its audit file.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn audited(&self, action: &str) -> Result<usize> {
        let text = std::fs::read_to_string(&self.audit)
            .map_err(Error::machine(format!("read {}", self.audit.display())))?;
        let member = format!(r#""action":"{action}""#);
        Ok(text.lines().filter(|line| line.contains(&member)).count())
    }

    /// Waits until it says that it is ready: after a start, or after [`Server::thaw`].
    ///
    /// # Errors
    /// When time is up or the process ends.
    pub fn wait_until_ready(&self) -> Result<()> {
        let watched = [self.server.running()?];
        wait::until("kms-server's readiness", Duration::from_secs(60), &watched, || {
            match self.readiness()? {
                (200, _) => Ok(()),
                (status, body) => Err(format!("{status} {body}")),
            }
        })
    }

    /// Waits until it says that it is not ready, because of `cause`.
    ///
    /// # Errors
    /// When time is up or the process ends.
    pub fn wait_until_not_ready(&self, cause: &str) -> Result<()> {
        let watched = [self.server.running()?];
        let what = format!("kms-server without {cause}");
        wait::until(&what, Duration::from_secs(60), &watched, || match self.readiness()? {
            (503, body) if body.contains(cause) => Ok(()),
            (status, body) => Err(format!("{status} {body}")),
        })
    }

    fn readiness(&self) -> std::result::Result<(u16, String), String> {
        http::get(self.health_port, "/readyz")
    }
}

/// As in the original.
const KEYS_PORT: u16 = 28674;
const TOKENS_PORT: u16 = 10443;

const AUDIT: &str = "audit.log";

struct Ports {
    keys: u16,
    tokens: u16,
    health: u16,
}

#[derive(Deserialize)]
struct Identity {
    instance_id: String,
    admin: Credential,
}

#[derive(Deserialize)]
struct Credential {
    api_key: String,
}

fn write_config(dir: &Path, pki: &Pki, hsm: &SoftHsm, ports: Ports) -> Result<PathBuf> {
    let pin = dir.join("pin");
    let so_pin = dir.join("so-pin");
    pki::write_private(&pin, "pin-582910-of-the-token")?;
    pki::write_private(&so_pin, "so-pin-31415926-of-it")?;
    let text = format!(
        r#"SERVER_CONFIG:
  KEYS_ADDRESS: "127.0.0.1:{keys}"
  TOKENS_ADDRESS: "127.0.0.1:{tokens}"
  HEALTH_ADDRESS: "127.0.0.1:{health}"
  TLS_CERT_FILE: "{cert}"
  TLS_KEY_FILE: "{key}"
  ISSUER_URL: "https://127.0.0.1:{tokens}"
  DATABASE_URL: "sqlite://{database}"
  AUDIT_FILE: "{audit}"
  AUDIT_DEADLINE_IN_MILLISECONDS: 5000
HSM:
  PKCS11_LIBRARY: "{library}"
  TOKEN_LABEL: "keelson"
  PIN_FILE: "{pin}"
  SO_PIN_FILE: "{so_pin}"
LOGGER:
  LOG_LEVEL: "info"
  LOG_ALL_VALUES: false
"#,
        keys = ports.keys,
        tokens = ports.tokens,
        health = ports.health,
        cert = pki.server_cert.display(),
        key = pki.server_key.display(),
        database = dir.join("kms.db").display(),
        audit = dir.join(AUDIT).display(),
        library = hsm.library.display(),
        pin = pin.display(),
        so_pin = so_pin.display(),
    );
    let config = dir.join("kms-server.yaml");
    pki::write_private(&config, &text)?;
    Ok(config)
}

fn initialise(program: &Path, config: &Path, hsm: &SoftHsm) -> Result<Identity> {
    let mut init = std::process::Command::new(program);
    init.args(["init", "-o", "json", "--config"]).arg(config).env("SOFTHSM2_CONF", &hsm.config);
    let printed = process::stdout(init, b"")?;
    serde_json::from_slice(&printed).map_err(|error| {
        // The answer holds API keys: only its shape is told.
        Error::answer("kms-server init", format!("{error}, in {} bytes of JSON", printed.len()))
    })
}
