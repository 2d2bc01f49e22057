//! The configuration file: sections and upper-case names as in the plug-in's file. Everything is checked before
//! anything starts, and all mistakes are told at once.

mod reader;

use crate::app;
use kms_core::secret::SecretText;
use kms_core::wdek::WdekVersion;
use kms_daemon::telemetry::{self, LogLevel};
use reader::Reader;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A complete configuration.
#[derive(Debug)]
pub struct Config {
    pub keys_address: SocketAddr,
    pub tokens_address: SocketAddr,
    pub health_address: SocketAddr,
    pub tls_cert_file: PathBuf,
    pub tls_key_file: PathBuf,
    /// What stands in `iss` of every token.
    pub issuer_url: String,
    pub token_lifetime: Duration,
    /// The SQLite file.
    pub database: PathBuf,
    pub audit_file: PathBuf,
    pub operations: app::Settings,
    pub hsm: Hsm,
    pub log: telemetry::Settings,
}

/// Where the root keys are.
#[derive(Debug)]
pub struct Hsm {
    pub library: PathBuf,
    pub token_label: String,
    pub pin: SecretText,
    /// Only `kms-server init` uses it, and only where there is no such token yet.
    pub so_pin: Option<SecretText>,
    pub sessions: usize,
    pub queue: usize,
    pub deadline: Duration,
}

/// The operator: the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}: {cause}", path.display())]
    Read { path: PathBuf, cause: std::io::Error },
    #[error("{} is not YAML with sections of names and values: {cause}", path.display())]
    Yaml { path: PathBuf, cause: String },
    #[error("{} has mistakes:\n  {}", path.display(), mistakes.join("\n  "))]
    Mistakes { path: PathBuf, mistakes: Vec<String> },
}

impl Config {
    /// Reads and checks the file at `path`, and the PIN files that it names.
    ///
    /// # Errors
    /// [`ConfigError`], with every mistake in it.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|cause| ConfigError::Read { path: path.to_owned(), cause })?;
        Config::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        let mut reader = Reader::new(text)
            .map_err(|cause| ConfigError::Yaml { path: path.to_owned(), cause })?;
        let config = read(&mut reader);
        let mistakes = reader.finish();
        match config {
            Some(config) if mistakes.is_empty() => Ok(config),
            _ => Err(ConfigError::Mistakes { path: path.to_owned(), mistakes }),
        }
    }
}

/// `None` where something is missing or wrong; the reader knows what. Everything is read before the first `?`, so that
/// one mistake does not hide the next.
fn read(reader: &mut Reader) -> Option<Config> {
    let server = "SERVER_CONFIG";
    let keys_address = address(reader, "KEYS_ADDRESS", "127.0.0.1:28674");
    let tokens_address = address(reader, "TOKENS_ADDRESS", "127.0.0.1:10443");
    let health_address = address(reader, "HEALTH_ADDRESS", "127.0.0.1:28675");
    let tls_cert_file = reader.required_text(server, "TLS_CERT_FILE");
    let tls_key_file = reader.required_text(server, "TLS_KEY_FILE");
    let issuer_url = reader.text(server, "ISSUER_URL");
    // A day: a stolen token must not outlive the shift in which it is noticed.
    let lifetime = reader.number(server, "TOKEN_LIFETIME_IN_SECONDS", 3600, 60..=86_400);
    let database = database(reader);
    let audit_file = reader.required_text(server, "AUDIT_FILE");
    let operations = operations(reader);
    let hsm = hsm(reader);
    let log = log(reader);
    let tokens_address = tokens_address?;
    Some(Config {
        keys_address: keys_address?,
        tokens_address,
        health_address: health_address?,
        tls_cert_file: tls_cert_file?.into(),
        tls_key_file: tls_key_file?.into(),
        issuer_url: issuer_url.unwrap_or_else(|| format!("https://{tokens_address}/identity")),
        token_lifetime: Duration::from_secs(lifetime?),
        database: database?,
        audit_file: audit_file?.into(),
        operations: operations?,
        hsm: hsm?,
        log: log?,
    })
}

fn address(reader: &mut Reader, name: &'static str, default: &str) -> Option<SocketAddr> {
    let text = reader.text("SERVER_CONFIG", name).unwrap_or_else(|| default.to_owned());
    let parsed = text.parse().ok();
    if parsed.is_none() {
        let why = "must be an IP address and a port, such as 0.0.0.0:28674 or [::]:28674";
        reader.mistake("SERVER_CONFIG", name, why);
    }
    parsed
}

fn database(reader: &mut Reader) -> Option<PathBuf> {
    let (section, name) = ("SERVER_CONFIG", "DATABASE_URL");
    let url = reader.required_text(section, name)?;
    match url.strip_prefix("sqlite://") {
        Some(path) if !path.is_empty() => Some(path.into()),
        _ => {
            let why = "must be sqlite://FILE, such as sqlite:///var/lib/kms-server/kms.db; \
                       other databases are not built into this server";
            reader.mistake(section, name, why);
            None
        }
    }
}

fn operations(reader: &mut Reader) -> Option<app::Settings> {
    let section = "SERVER_CONFIG";
    let version = reader.text(section, "WDEK_VERSION").unwrap_or_else(|| "2.1.0".to_owned());
    let interval = reader.number(section, "MIN_ROTATION_INTERVAL_IN_SECONDS", 0, 0..=366 * 86_400);
    let wdek_version = match version.as_str() {
        "2.0.0" => Some(WdekVersion::V2_0_0),
        "2.1.0" => Some(WdekVersion::V2_1_0),
        _ => {
            reader.mistake(section, "WDEK_VERSION", "must be \"2.0.0\" or \"2.1.0\"");
            None
        }
    };
    Some(app::Settings {
        wdek_version: wdek_version?,
        min_rotation_interval: Duration::from_secs(interval?),
    })
}

fn hsm(reader: &mut Reader) -> Option<Hsm> {
    let section = "HSM";
    let library = reader.required_text(section, "PKCS11_LIBRARY");
    let token_label = reader.required_text(section, "TOKEN_LABEL");
    let pin = pin(reader);
    let so_pin =
        reader.text(section, "SO_PIN_FILE").map(|path| secret_file(reader, "SO_PIN_FILE", &path));
    let sessions = reader.number(section, "SESSIONS", 2, 1..=64);
    let queue = reader.number(section, "QUEUE", 256, 1..=65_536);
    let deadline = reader.number(section, "DEADLINE_IN_MILLISECONDS", 2000, 10..=60_000);
    let so_pin = match so_pin {
        Some(read) => Some(read?),
        None => None,
    };
    Some(Hsm {
        library: library?.into(),
        token_label: token_label?,
        pin: pin?,
        so_pin,
        sessions: usize::try_from(sessions?).ok()?,
        queue: usize::try_from(queue?).ok()?,
        deadline: Duration::from_millis(deadline?),
    })
}

/// Inline or in a file of its own, never both: nobody could say which is meant.
fn pin(reader: &mut Reader) -> Option<SecretText> {
    let section = "HSM";
    match (reader.text(section, "PIN"), reader.text(section, "PIN_FILE")) {
        (Some(pin), None) => Some(SecretText::new(pin)),
        (None, Some(path)) => secret_file(reader, "PIN_FILE", &path),
        (None, None) => {
            reader.mistake(section, "PIN", "or PIN_FILE is required");
            None
        }
        (Some(_), Some(_)) => {
            reader.mistake(section, "PIN", "and PIN_FILE are both set; keep one");
            None
        }
    }
}

fn secret_file(reader: &mut Reader, name: &'static str, path: &str) -> Option<SecretText> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let secret = SecretText::new(text.trim_end_matches(['\r', '\n']).to_owned());
            drop(zeroize::Zeroizing::new(text));
            Some(secret)
        }
        Err(cause) => {
            reader.mistake("HSM", name, &format!("names {path}, which cannot be read: {cause}"));
            None
        }
    }
}

fn log(reader: &mut Reader) -> Option<telemetry::Settings> {
    let section = "LOGGER";
    let level = reader.text(section, "LOG_LEVEL").unwrap_or_else(|| "info".to_owned());
    let log_all_values = reader.flag(section, "LOG_ALL_VALUES", false);
    let parsed = LogLevel::parse(&level);
    if parsed.is_none() {
        let why = format!("must be one of {}", LogLevel::NAMES.join(", "));
        reader.mistake(section, "LOG_LEVEL", &why);
    }
    Some(telemetry::Settings { level: parsed?, log_all_values: log_all_values? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
SERVER_CONFIG:
  TLS_CERT_FILE: "/etc/kms/tls.crt"
  TLS_KEY_FILE: "/etc/kms/tls.key"
  DATABASE_URL: "sqlite:///var/lib/kms/kms.db"
  AUDIT_FILE: "/var/lib/kms/audit.log"
HSM:
  PKCS11_LIBRARY: "/usr/lib/softhsm/libsofthsm2.so"
  TOKEN_LABEL: "kms"
  PIN: "1234"
"#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("kms.yaml"), text)
    }

    fn mistakes(text: &str) -> Vec<String> {
        match parse(text) {
            Err(ConfigError::Mistakes { mistakes, .. }) => mistakes,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_said_has_a_default() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.keys_address.to_string(), "127.0.0.1:28674");
        assert_eq!(config.issuer_url, "https://127.0.0.1:10443/identity");
        assert_eq!(config.token_lifetime, Duration::from_secs(3600));
        assert_eq!(config.database, Path::new("/var/lib/kms/kms.db"));
        assert_eq!(config.operations.wdek_version, WdekVersion::V2_1_0);
        assert_eq!(config.hsm.sessions, 2);
        assert_eq!(config.hsm.pin.expose(), "1234");
        assert_eq!(config.log.level, LogLevel::Info);
    }

    #[test]
    fn all_mistakes_are_told_at_once_and_unknown_names_get_a_suggestion() {
        let text = GOOD
            .replace("TLS_KEY_FILE", "TLS_KEYFILE")
            .replace("TOKEN_LABEL: \"kms\"", "SESSIONS: many")
            .replace("sqlite:///", "postgres://");
        let found = mistakes(&text).join("\n");
        for wanted in [
            "SERVER_CONFIG.TLS_KEY_FILE is required",
            "SERVER_CONFIG.TLS_KEYFILE is not known; did you mean TLS_KEY_FILE?",
            "SERVER_CONFIG.DATABASE_URL must be sqlite://FILE",
            "HSM.TOKEN_LABEL is required",
            "HSM.SESSIONS must be a whole number from 1 to 64",
        ] {
            assert!(found.contains(wanted), "{wanted:?} is not in:\n{found}");
        }
    }

    #[test]
    fn unknown_sections_get_a_suggestion() {
        assert_eq!(
            mistakes(&format!("{GOOD}\nLOGER:\n  LOG_LEVEL: debug\n")),
            ["LOGER is not a known section; did you mean LOGGER?"]
        );
    }

    #[test]
    fn a_pin_is_given_once_and_never_shown() {
        let both = format!("{GOOD}  PIN_FILE: \"/nowhere\"\n");
        assert_eq!(mistakes(&both), ["HSM.PIN and PIN_FILE are both set; keep one"]);
        let neither = GOOD.replace("  PIN: \"1234\"\n", "");
        assert_eq!(mistakes(&neither), ["HSM.PIN or PIN_FILE is required"]);
        assert!(!format!("{:?}", parse(GOOD).unwrap()).contains("1234"));
    }

    #[test]
    fn what_is_no_yaml_of_sections_is_refused() {
        for text in ["- a\n- b\n", "SERVER_CONFIG: [", "SERVER_CONFIG: 5\n"] {
            assert!(matches!(parse(text), Err(ConfigError::Yaml { .. })), "{text}");
        }
    }
}
