//! The configuration file: sections and upper-case names as in the plug-in's file. Everything is checked before
//! anything starts, and all mistakes are told at once.

use crate::app;
use kms_core::secret::SecretText;
use kms_core::wdek::WdekVersion;
use kms_daemon::settings::{Environment, Mistakes, Section, Settings};
use kms_daemon::telemetry::{self, LogLevel};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A complete configuration.
#[derive(Debug)]
pub struct Config {
    pub server: Server,
    pub operations: app::Settings,
    pub hsm: Hsm,
    pub log: telemetry::Settings,
}

/// SERVER_CONFIG, without what concerns the operations.
#[derive(Debug)]
pub struct Server {
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
}

/// HSM: where the root keys are.
#[derive(Debug)]
pub struct Hsm {
    pub library: PathBuf,
    pub token_label: String,
    pub pin: SecretText,
    /// Only `kms-server init` reads it, and only where there is no such token yet.
    pub so_pin_file: Option<PathBuf>,
    pub sessions: usize,
    pub queue: usize,
    pub deadline: Duration,
}

/// The operator: the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}: {cause}", path.display())]
    Read { path: PathBuf, cause: std::io::Error },
    #[error("{} has mistakes:\n{mistakes}", path.display())]
    Mistakes { path: PathBuf, mistakes: Mistakes },
}

impl Config {
    /// Reads and checks the file at `path`, and the PIN files that it names.
    ///
    /// # Errors
    /// [`ConfigError`], with every mistake in it.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|cause| ConfigError::Read { path: path.to_owned(), cause })?;
        parse(&text).map_err(|mistakes| ConfigError::Mistakes { path: path.to_owned(), mistakes })
    }
}

fn parse(text: &str) -> Result<Config, Mistakes> {
    // Nothing comes from the environment: a PIN in it would be seen by every child and in /proc.
    let mut settings = Settings::parse(text, Environment::new())?;
    let (server, operations) =
        settings.section("SERVER_CONFIG", |section| (server(section), operations(section)));
    let hsm = settings.section("HSM", hsm);
    let log = settings.section("LOGGER", log);
    settings.finish()?;
    Ok(Config { server, operations, hsm, log })
}

fn server(section: &mut Section<'_>) -> Server {
    let tokens_address = address(section, "TOKENS_ADDRESS", 10443);
    let issuer = section.text("ISSUER_URL");
    // A day at most: a stolen token must not outlive the shift in which it is noticed.
    let lifetime = section.number("TOKEN_LIFETIME_IN_SECONDS", 60..=86_400, 3600);
    Server {
        keys_address: address(section, "KEYS_ADDRESS", 28674),
        tokens_address,
        health_address: address(section, "HEALTH_ADDRESS", 28675),
        tls_cert_file: section.required("TLS_CERT_FILE").into(),
        tls_key_file: section.required("TLS_KEY_FILE").into(),
        issuer_url: issuer.unwrap_or_else(|| format!("https://{tokens_address}/identity")),
        token_lifetime: Duration::from_secs(lifetime),
        database: database(section),
        audit_file: section.required("AUDIT_FILE").into(),
    }
}

fn address(section: &mut Section<'_>, name: &'static str, default: u16) -> SocketAddr {
    section.parsed(name, SocketAddr::from(([127, 0, 0, 1], default)), |text| {
        text.parse().map_err(|_| {
            format!("must be an IP address and a port, such as 0.0.0.0:{default} or [::]:{default}")
        })
    })
}

fn database(section: &mut Section<'_>) -> PathBuf {
    let name = "DATABASE_URL";
    let url = section.required(name);
    let path = url.strip_prefix("sqlite://").unwrap_or_default();
    if path.is_empty() && !url.is_empty() {
        let must_be = "must be sqlite://FILE, such as sqlite:///var/lib/kms-server/kms.db; other databases are not \
                       built into this server";
        section.mistake(name, must_be);
    }
    path.into()
}

fn operations(section: &mut Section<'_>) -> app::Settings {
    let wdek_version = section.parsed("WDEK_VERSION", WdekVersion::V2_1_0, |text| match text {
        "2.0.0" => Ok(WdekVersion::V2_0_0),
        "2.1.0" => Ok(WdekVersion::V2_1_0),
        _ => Err("must be \"2.0.0\" or \"2.1.0\"".into()),
    });
    let interval = section.number("MIN_ROTATION_INTERVAL_IN_SECONDS", 0..=366 * 86_400, 0);
    app::Settings { wdek_version, min_rotation_interval: Duration::from_secs(interval) }
}

fn hsm(section: &mut Section<'_>) -> Hsm {
    let count = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    Hsm {
        library: section.required("PKCS11_LIBRARY").into(),
        token_label: section.required("TOKEN_LABEL"),
        pin: pin(section),
        so_pin_file: section.text("SO_PIN_FILE").map(PathBuf::from),
        sessions: count(section.number("SESSIONS", 1..=64, 2)),
        queue: count(section.number("QUEUE", 1..=65_536, 256)),
        deadline: Duration::from_millis(section.number(
            "DEADLINE_IN_MILLISECONDS",
            10..=60_000,
            2000,
        )),
    }
}

/// Inline or in a file of its own, never both: nobody could say which is meant.
fn pin(section: &mut Section<'_>) -> SecretText {
    let (inline_given, file_given) = (section.has("PIN"), section.has("PIN_FILE"));
    let (inline, file) = (section.text("PIN"), secret_file(section, "PIN_FILE"));
    match (inline_given, file_given) {
        (true, true) => section.mistake("PIN", "and PIN_FILE are both set; keep one"),
        (false, false) => section.mistake("PIN", "or PIN_FILE is missing"),
        _ => {}
    }
    let pin = inline.map(SecretText::new).or(file).unwrap_or_default();
    if inline_given && !file_given && pin.is_empty() {
        section.mistake("PIN", "is empty");
    }
    pin
}

fn secret_file(section: &mut Section<'_>, name: &'static str) -> Option<SecretText> {
    let path = section.text(name)?;
    read_secret(Path::new(&path))
        .map_err(|cause| {
            section.mistake(name, &format!("names {path}, which cannot be read: {cause}"))
        })
        .ok()
}

/// The first and only line of a file.
///
/// # Errors
/// Those of reading it.
pub fn read_secret(path: &Path) -> std::io::Result<SecretText> {
    let text = std::fs::read_to_string(path).map(SecretText::new)?;
    Ok(SecretText::new(text.expose().trim_end_matches(['\r', '\n']).to_owned()))
}

fn log(section: &mut Section<'_>) -> telemetry::Settings {
    let level = section.parsed("LOG_LEVEL", LogLevel::Info, |text| {
        LogLevel::parse(text)
            .ok_or_else(|| format!("must be one of {}", LogLevel::NAMES.join(", ")))
    });
    telemetry::Settings { level, log_all_values: section.flag("LOG_ALL_VALUES", false) }
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

    fn mistakes(text: &str) -> Vec<String> {
        parse(text).unwrap_err().0
    }

    #[test]
    fn what_is_not_said_has_a_default() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.server.keys_address.to_string(), "127.0.0.1:28674");
        assert_eq!(config.server.issuer_url, "https://127.0.0.1:10443/identity");
        assert_eq!(config.server.token_lifetime, Duration::from_secs(3600));
        assert_eq!(config.server.database, Path::new("/var/lib/kms/kms.db"));
        assert_eq!(config.operations.wdek_version, WdekVersion::V2_1_0);
        assert_eq!(config.operations.min_rotation_interval, Duration::ZERO);
        assert_eq!((config.hsm.sessions, config.hsm.queue), (2, 256));
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
            "SERVER_CONFIG.TLS_KEY_FILE is missing",
            "SERVER_CONFIG.TLS_KEYFILE is not a known name; did you mean TLS_KEY_FILE?",
            "SERVER_CONFIG.DATABASE_URL must be sqlite://FILE",
            "HSM.TOKEN_LABEL is missing",
            "HSM.SESSIONS must be a whole number from 1 to 64",
        ] {
            assert!(found.contains(wanted), "{wanted:?} is not in:\n{found}");
        }
    }

    #[test]
    fn a_pin_is_given_once_and_never_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "9876\n").unwrap();
        let named = format!("PIN_FILE: \"{}\"", file.path().display());
        let from_file = parse(&GOOD.replace("PIN: \"1234\"", &named)).unwrap();
        assert_eq!(from_file.hsm.pin.expose(), "9876");
        let both = format!("{GOOD}  {named}\n");
        assert_eq!(mistakes(&both), ["HSM.PIN and PIN_FILE are both set; keep one"]);
        let neither = GOOD.replace("  PIN: \"1234\"\n", "");
        assert_eq!(mistakes(&neither), ["HSM.PIN or PIN_FILE is missing"]);
        assert_eq!(mistakes(&GOOD.replace("1234", "")), ["HSM.PIN is empty"]);
        let absent = GOOD.replace("PIN: \"1234\"", "PIN_FILE: \"/nowhere/pin\"");
        assert!(mistakes(&absent)[0].starts_with("HSM.PIN_FILE names /nowhere/pin"));
        assert!(!format!("{:?}", parse(GOOD).unwrap()).contains("1234"));
    }
}
