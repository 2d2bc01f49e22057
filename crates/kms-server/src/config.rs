//! The configuration file: sections and upper-case names as in the plug-in's file. Everything is checked before
//! anything starts, and all mistakes are told at once.

use crate::app;
use crate::audit::node;
use crate::issuers::{KeySource, Trusted};
use crate::limits;
use crate::tls;
use kms_core::crypto_module::CryptoModule;
use kms_core::secret::SecretText;
use kms_core::wdek::WdekVersion;
use kms_daemon::settings::{Environment, Mistakes, Secret, Section, Settings};
use kms_daemon::telemetry::{self, LogLevel};
use kms_hsm::pkcs11::{IvChoice, Pin, TokenChoice};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A complete configuration.
#[derive(Debug)]
pub struct Config {
    pub server: Server,
    /// What else stands in SERVER_CONFIG, and ISSUERS.
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
    pub tls: tls::Files,
    /// The SQLite file.
    pub database: PathBuf,
    pub audit_file: PathBuf,
    /// `None`: the name that is kept beside the audit file.
    pub node_id: Option<String>,
}

/// HSM: where the root keys are.
#[derive(Debug)]
pub struct Hsm {
    pub library: PathBuf,
    pub token: TokenChoice,
    pub pin: SecretText,
    /// Where it was read, if not in the configuration itself; read again while the service runs.
    pub pin_file: Option<PathBuf>,
    /// Where it is kept that the token has refused a PIN: beside the database, which every command knows.
    pub refused_pin_file: PathBuf,
    /// Only `kms-server init` reads it, and only where there is no such token yet.
    pub so_pin_file: Option<PathBuf>,
    pub sessions: usize,
    pub queue: usize,
    pub deadline: Duration,
    /// How many versions of keys it has room for; 0 where nobody has said. Only shown.
    pub key_capacity: u64,
    /// Who makes the IV of AES-GCM; read always, used where WDEK_VERSION asks for AES-GCM.
    pub iv_mode: IvChoice,
    pub isolation: Isolation,
}

/// Where the HSM's library runs while the service serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// In a process of its own, which is replaced when the library crashes or hangs.
    Process,
    /// In this process, which it takes with it.
    None,
}

/// The operator: the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}: {cause}", path.display())]
    Read { path: PathBuf, cause: std::io::Error },
    #[error("{} has mistakes:\n{mistakes}", path.display())]
    Mistakes { path: PathBuf, mistakes: Mistakes },
}

impl Hsm {
    /// The PIN, unless this token has refused it in a process before this one.
    #[must_use]
    pub fn remembered_pin(&self) -> Pin {
        let token = format!("{} {}", self.library.display(), self.token);
        Pin::remembered(self.pin.clone(), self.refused_pin_file.clone(), token)
    }
}

impl Config {
    /// Reads and checks the file at `path`, and the PIN files that it names.
    ///
    /// # Errors
    /// [`ConfigError`], with every mistake in it.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|cause| ConfigError::Read { path: path.to_owned(), cause })?;
        Config::parse(&text)
            .map_err(|mistakes| ConfigError::Mistakes { path: path.to_owned(), mistakes })
    }

    /// What stands in `text`, and in the PIN files that it names.
    ///
    /// # Errors
    /// Every mistake in it.
    pub fn parse(text: &str) -> Result<Config, Mistakes> {
        parse(text)
    }
}

fn parse(text: &str) -> Result<Config, Mistakes> {
    // Nothing comes from the environment: a PIN in it would be seen by every child and in /proc.
    let mut settings = Settings::parse(text, Environment::new())?;
    let (server, mut operations) = settings.section("SERVER_CONFIG", |section| {
        let server = server(section);
        let operations = operations(section, server.tokens_address);
        (server, operations)
    });
    let mut hsm = settings.section("HSM", hsm);
    hsm.refused_pin_file = with_suffix(&server.database, ".refused-pin");
    operations.issuers = settings.sections("ISSUERS", issuer);
    check_issuers(&mut settings, &operations);
    let log = settings.section("LOGGER", log);
    settings.finish()?;
    Ok(Config { server, operations, hsm, log })
}

fn server(section: &mut Section<'_>) -> Server {
    check_module(section);
    Server {
        keys_address: address(section, "KEYS_ADDRESS", 28674),
        tokens_address: address(section, "TOKENS_ADDRESS", 10443),
        health_address: address(section, "HEALTH_ADDRESS", 28675),
        tls: tls::Files {
            certificate: section.required("TLS_CERT_FILE").into(),
            key: section.required("TLS_KEY_FILE").into(),
            client_ca: section.text("CLIENT_CA_FILE").map(PathBuf::from),
        },
        database: database(section),
        audit_file: section.required("AUDIT_FILE").into(),
        node_id: node_id(section),
    }
}

fn limits(section: &mut Section<'_>) -> limits::Settings {
    let default = limits::Settings::default();
    let mut count = |name, default: usize| {
        let default = u64::try_from(default).unwrap_or(u64::MAX);
        usize::try_from(section.number(name, 1..=65_536, default)).unwrap_or(usize::MAX)
    };
    let connections = count("MAX_CONNECTIONS", default.connections);
    let share = limits::Settings::share_of_address(connections);
    let mut found = limits::Settings {
        connections,
        connections_per_address: count("MAX_CONNECTIONS_PER_ADDRESS", share),
        requests: count("MAX_REQUESTS", default.requests),
        logins: count("MAX_LOGINS", default.logins),
        ..default
    };
    let mut rate = |name, default| {
        let rate = section.number(name, 0..=1_000_000, u64::from(default));
        u32::try_from(rate).unwrap_or(u32::MAX)
    };
    found.rate_per_instance = rate("MAX_RATE_PER_INSTANCE", default.rate_per_instance);
    found.rate_per_caller = rate("MAX_RATE_PER_CALLER", default.rate_per_caller);
    found.management_rate_per_caller =
        rate("MAX_MANAGEMENT_RATE_PER_CALLER", default.management_rate_per_caller);
    found.login_rate_per_caller = rate("MAX_LOGIN_RATE_PER_CALLER", default.login_rate_per_caller);
    let idle = section.number("IDLE_TIMEOUT_IN_SECONDS", 5..=3600, default.idle.as_secs());
    found.idle = Duration::from_secs(idle);
    if found.connections_per_address > found.connections {
        let more = "is more than MAX_CONNECTIONS, which all addresses share";
        section.mistake("MAX_CONNECTIONS_PER_ADDRESS", more);
    }
    found
}

/// A build cannot be changed while it runs: FIPS_REQUIRED is held to or refused here, and nowhere else asked for.
fn check_module(section: &mut Section<'_>) {
    if section.flag("FIPS_REQUIRED", false)
        && let Err(cause) = CryptoModule::linked().require_fips()
    {
        section.mistake("FIPS_REQUIRED", &format!("is true, but {cause}"));
    }
}

fn address(section: &mut Section<'_>, name: &'static str, default: u16) -> SocketAddr {
    section.parsed(name, SocketAddr::from(([127, 0, 0, 1], default)), |text| {
        text.parse().map_err(|_| {
            format!("must be an IP address and a port, such as 0.0.0.0:{default} or [::]:{default}")
        })
    })
}

fn node_id(section: &mut Section<'_>) -> Option<String> {
    let name = section.text("NODE_ID")?;
    if !node::is_name(&name) {
        let must_be = "must be 1 to 63 letters, digits, \".\", \"_\" or \"-\", and another one for each server";
        section.mistake("NODE_ID", must_be);
    }
    Some(name)
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

/// Without the issuers, which have a section of their own.
fn operations(section: &mut Section<'_>, tokens_address: SocketAddr) -> app::Settings {
    let url = section.text("ISSUER_URL");
    let url = url.unwrap_or_else(|| format!("https://{tokens_address}/identity"));
    let default = app::Settings::new(url);
    let mut seconds = |name, allowed, default: Duration| {
        Duration::from_secs(section.number(name, allowed, default.as_secs()))
    };
    // A day at most: a stolen token must not outlive the shift in which it is noticed.
    let lifetime = seconds("TOKEN_LIFETIME_IN_SECONDS", 60..=86_400, default.token_lifetime);
    let interval = "MIN_ROTATION_INTERVAL_IN_SECONDS";
    let interval = seconds(interval, 0..=366 * 86_400, default.min_rotation_interval);
    let wait = seconds("MIN_PURGE_WAIT_IN_SECONDS", 0..=366 * 86_400, default.min_purge_wait);
    let deadline = u64::try_from(default.audit_deadline.as_millis()).unwrap_or(u64::MAX);
    let deadline = section.number("AUDIT_DEADLINE_IN_MILLISECONDS", 100..=60_000, deadline);
    app::Settings {
        token_lifetime: lifetime,
        min_rotation_interval: interval,
        min_purge_wait: wait,
        audit_deadline: Duration::from_millis(deadline),
        limits: limits(section),
        wdek_version: section.parsed("WDEK_VERSION", default.wdek_version, |text| match text {
            "2.0.0" => Ok(WdekVersion::V2_0_0),
            "2.1.0" => Ok(WdekVersion::V2_1_0),
            "4.0.0" => Ok(WdekVersion::V4_0_0),
            _ => Err("must be \"2.0.0\", \"2.1.0\" or \"4.0.0\"".into()),
        }),
        ..default
    }
}

fn hsm(section: &mut Section<'_>) -> Hsm {
    let count = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    // Without one, the mistake was named.
    let pin = section.secret("PIN", "PIN_FILE");
    let pin_file = pin.as_ref().and_then(|pin| pin.file.clone());
    Hsm {
        library: section.required("PKCS11_LIBRARY").into(),
        token: token(section),
        pin: pin.map(into_text).unwrap_or_default(),
        pin_file,
        refused_pin_file: PathBuf::new(),
        so_pin_file: section.text("SO_PIN_FILE").map(PathBuf::from),
        sessions: count(section.number("SESSIONS", 1..=64, 2)),
        queue: count(section.number("QUEUE", 1..=65_536, 256)),
        deadline: Duration::from_millis(section.number(
            "DEADLINE_IN_MILLISECONDS",
            10..=60_000,
            1500,
        )),
        key_capacity: section.number("KEY_CAPACITY", 0..=100_000_000, 0),
        iv_mode: section.parsed("IV_MODE", IvChoice::Auto, |text| {
            IvChoice::parse(text).ok_or_else(|| {
                "must be \"auto\", \"caller\", \"appended\" or \"filled\"".to_owned()
            })
        }),
        isolation: section.parsed("ISOLATION", Isolation::Process, |text| match text {
            "process" => Ok(Isolation::Process),
            "none" => Ok(Isolation::None),
            _ => Err("must be \"process\" or \"none\"".into()),
        }),
    }
}

/// By one name, not by several that may contradict each other. `init` makes a token by its label.
fn token(section: &mut Section<'_>) -> TokenChoice {
    let named = ["TOKEN_LABEL", "TOKEN_SERIAL", "SLOT"].map(|name| section.has(name));
    let (label, serial) = (section.text("TOKEN_LABEL"), section.text("TOKEN_SERIAL"));
    let slot = section.number("SLOT", 0..=u64::MAX, 0);
    match named {
        [_, false, false] if label.is_none() => {
            section.mistake("TOKEN_LABEL", "is missing (or TOKEN_SERIAL, or SLOT)");
        }
        [_, false, false] | [false, true, false] | [false, false, true] => {}
        _ => section.mistake("TOKEN_LABEL", "or TOKEN_SERIAL or SLOT names the token; keep one"),
    }
    match (serial, named) {
        (Some(serial), _) => TokenChoice::Serial(serial),
        (None, [false, _, true]) => TokenChoice::Slot(slot),
        _ => TokenChoice::Label(label.unwrap_or_default()),
    }
}

fn issuer(section: &mut Section<'_>) -> Trusted {
    let url = section.required("ISSUER_URL");
    if !url.is_empty() && !url.starts_with("https://") {
        section.mistake(
            "ISSUER_URL",
            "must begin with https://, as `iss` of the issuer's tokens does",
        );
    }
    let (ca, file) = (section.text("CA_FILE"), section.text("JWKS_FILE"));
    if ca.is_some() == file.is_some() {
        let one = "or JWKS_FILE is needed, and only one of them: the CA of the issuer's server, or a file with its keys";
        section.mistake("CA_FILE", one);
    }
    let keys = match file {
        Some(file) => KeySource::File(file.into()),
        None => KeySource::Discovery { ca: ca.unwrap_or_default().into() },
    };
    Trusted { url, audience: section.required("AUDIENCE"), keys }
}

/// Two entries for one issuer, or one for this server itself, would make it unclear whose keys count.
fn check_issuers(settings: &mut Settings, found: &app::Settings) {
    let app::Settings { issuers, issuer_url, .. } = found;
    for (index, one) in issuers.iter().enumerate() {
        let again = issuers.iter().take(index).any(|before| before.url == one.url);
        if !one.url.is_empty() && (again || one.url == *issuer_url) {
            let text =
                format!("ISSUERS[{index}].ISSUER_URL is there twice, or is this server's own");
            settings.mistake(text);
        }
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn into_text(mut secret: Secret) -> SecretText {
    SecretText::new(std::mem::take(&mut *secret.text))
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
    use kms_hsm::pkcs11::IvMode;

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
        assert_eq!(config.operations.issuer_url, "https://127.0.0.1:10443/identity");
        assert_eq!(config.operations.token_lifetime, Duration::from_secs(3600));
        assert_eq!(config.server.database, Path::new("/var/lib/kms/kms.db"));
        assert_eq!(config.operations.wdek_version, WdekVersion::V2_1_0);
        assert_eq!(config.operations.min_rotation_interval, Duration::ZERO);
        assert_eq!(config.operations.min_purge_wait, Duration::from_secs(4 * 3600));
        assert_eq!(config.operations.audit_deadline, Duration::from_millis(800));
        assert_eq!((config.hsm.sessions, config.hsm.queue), (2, 256));
        assert_eq!(config.hsm.pin.expose(), "1234");
        assert_eq!(config.log.level, LogLevel::Info);
        assert_eq!(config.operations.limits, limits::Settings::default());
        assert_eq!(config.server.tls.client_ca, None);
        assert_eq!(config.hsm.key_capacity, 0);
    }

    #[test]
    fn limits_and_a_ca_for_clients_can_be_set() {
        let with = |lines: &str| {
            parse(&GOOD.replace("SERVER_CONFIG:\n", &format!("SERVER_CONFIG:\n{lines}")))
        };
        let set = with(
            "  MAX_CONNECTIONS: 40\n  MAX_CONNECTIONS_PER_ADDRESS: 4\n  MAX_REQUESTS: 20\n  MAX_LOGINS: 5\n  \
             MAX_RATE_PER_INSTANCE: 0\n  MAX_RATE_PER_CALLER: 300\n  MAX_MANAGEMENT_RATE_PER_CALLER: 7\n  \
             MAX_LOGIN_RATE_PER_CALLER: 8\n  \
             IDLE_TIMEOUT_IN_SECONDS: 350\n  AUDIT_DEADLINE_IN_MILLISECONDS: 2500\n  CLIENT_CA_FILE: \"/etc/kms/clients.crt\"\n",
        )
        .unwrap();
        assert_eq!(set.operations.audit_deadline, Duration::from_millis(2500));
        let wanted = limits::Settings {
            connections: 40,
            connections_per_address: 4,
            requests: 20,
            logins: 5,
            rate_per_instance: 0,
            rate_per_caller: 300,
            management_rate_per_caller: 7,
            login_rate_per_caller: 8,
            idle: Duration::from_secs(350),
        };
        assert_eq!(set.operations.limits, wanted);
        assert_eq!(set.server.tls.client_ca.as_deref(), Some(Path::new("/etc/kms/clients.crt")));
        let share = |lines| with(lines).unwrap().operations.limits.connections_per_address;
        let shares =
            ["", "  MAX_CONNECTIONS: 4096\n", "  MAX_CONNECTIONS: 20\n", "  MAX_CONNECTIONS: 4\n"];
        assert_eq!(shares.map(share), [128, 1024, 16, 4]);
        let wrong = with(
            "  MAX_RATE_PER_CALLER: -1\n  MAX_MANAGEMENT_RATE_PER_CALLER: 1000001\n  MAX_LOGIN_RATE_PER_CALLER: -2\n  MAX_REQUESTS: 0\n  MAX_LOGINS: 0\n  MAX_CONNECTIONS: 10\n  MAX_CONNECTIONS_PER_ADDRESS: 11\n  \
                  IDLE_TIMEOUT_IN_SECONDS: 0\n  AUDIT_DEADLINE_IN_MILLISECONDS: 99\n",
        );
        let said = wrong.unwrap_err().0.join("\n");
        for wanted in [
            "SERVER_CONFIG.MAX_RATE_PER_CALLER must be a whole number from 0 to 1000000",
            "SERVER_CONFIG.MAX_MANAGEMENT_RATE_PER_CALLER must be a whole number from 0 to 1000000",
            "SERVER_CONFIG.MAX_LOGIN_RATE_PER_CALLER must be a whole number from 0 to 1000000",
            "SERVER_CONFIG.MAX_REQUESTS must be a whole number from 1 to 65536",
            "SERVER_CONFIG.MAX_LOGINS must be a whole number from 1 to 65536",
            "SERVER_CONFIG.MAX_CONNECTIONS_PER_ADDRESS is more than MAX_CONNECTIONS",
            "SERVER_CONFIG.IDLE_TIMEOUT_IN_SECONDS must be a whole number from 5 to 3600",
            "SERVER_CONFIG.AUDIT_DEADLINE_IN_MILLISECONDS must be a whole number from 100 to 60000",
        ] {
            assert!(said.contains(wanted), "{wanted:?} is not in:\n{said}");
        }
    }

    #[test]
    fn a_token_has_one_name_and_the_iv_mode_a_known_one() {
        let named = |name: &str| parse(&GOOD.replace("TOKEN_LABEL: \"kms\"", name));
        let token = |name: &str| named(name).unwrap().hsm.token;
        assert_eq!(token("TOKEN_LABEL: \"kms\""), TokenChoice::Label("kms".into()));
        assert_eq!(token("TOKEN_SERIAL: \"1234567\""), TokenChoice::Serial("1234567".into()));
        assert_eq!(token("SLOT: 3"), TokenChoice::Slot(3));
        let two = named("TOKEN_LABEL: \"kms\"\n  SLOT: 3").unwrap_err().0;
        assert_eq!(two, ["HSM.TOKEN_LABEL or TOKEN_SERIAL or SLOT names the token; keep one"]);
        let none = named("").unwrap_err().0;
        assert_eq!(none, ["HSM.TOKEN_LABEL is missing (or TOKEN_SERIAL, or SLOT)"]);
        let mode = |mode: &str| parse(&format!("{GOOD}  IV_MODE: {mode}\n"));
        assert_eq!(mode("appended").unwrap().hsm.iv_mode, IvChoice::Only(IvMode::Appended));
        assert_eq!(
            mode("luna").unwrap_err().0,
            ["HSM.IV_MODE must be \"auto\", \"caller\", \"appended\" or \"filled\""]
        );
    }

    #[test]
    fn a_node_has_a_plain_name_or_the_one_that_is_kept() {
        let named =
            |line: &str| parse(&GOOD.replace("  AUDIT_FILE", &format!("{line}  AUDIT_FILE")));
        assert_eq!(named("").unwrap().server.node_id, None);
        let name = named("  NODE_ID: \"kms-0\"\n").unwrap().server.node_id;
        assert_eq!(name.as_deref(), Some("kms-0"));
        for bad in ["two words", "a/b", "\u{e9}", &"x".repeat(64)] {
            let found = named(&format!("  NODE_ID: \"{bad}\"\n")).unwrap_err().0;
            assert_eq!(
                found,
                [
                    "SERVER_CONFIG.NODE_ID must be 1 to 63 letters, digits, \".\", \"_\" or \"-\", and another one for each \
                  server"
                ],
                "{bad}"
            );
        }
    }

    #[test]
    fn the_library_is_isolated_unless_it_is_said_otherwise() {
        let isolation = |text: &str| parse(&format!("{GOOD}{text}")).map(|it| it.hsm.isolation);
        assert_eq!(isolation("").unwrap(), Isolation::Process);
        assert_eq!(isolation("  ISOLATION: process\n").unwrap(), Isolation::Process);
        assert_eq!(isolation("  ISOLATION: none\n").unwrap(), Isolation::None);
        let thread = isolation("  ISOLATION: thread\n").unwrap_err().0;
        assert_eq!(thread, ["HSM.ISOLATION must be \"process\" or \"none\""]);
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
    fn a_build_without_the_fips_module_is_refused_where_that_is_required() {
        let module = CryptoModule::linked();
        let found = parse(&GOOD.replace("SERVER_CONFIG:", "SERVER_CONFIG:\n  FIPS_REQUIRED: true"));
        match (module.fips, found) {
            (true, found) => drop(found.unwrap()),
            (false, found) => {
                let text = format!(
                    "SERVER_CONFIG.FIPS_REQUIRED is true, but this build does its cryptography with {module}, which is \
                     not a FIPS module; use the build that `cargo xtask build --fips` makes"
                );
                assert_eq!(found.unwrap_err().0, [text]);
            }
        }
    }

    #[test]
    fn an_issuer_is_named_once_with_one_source_of_its_keys() {
        let with = |entries: &str| parse(&format!("{GOOD}ISSUERS:\n{entries}"));
        let cluster = "- ISSUER_URL: \"https://kubernetes.default.svc\"\n  AUDIENCE: kms\n";
        let config = with(&format!("{cluster}  JWKS_FILE: \"/etc/kms/cluster.json\"\n")).unwrap();
        let KeySource::File(file) = &config.operations.issuers[0].keys else { panic!() };
        assert_eq!(file, Path::new("/etc/kms/cluster.json"));
        let config = with(&format!("{cluster}  CA_FILE: \"/etc/kms/ca.crt\"\n")).unwrap();
        assert!(matches!(&config.operations.issuers[0].keys, KeySource::Discovery { .. }));
        let both = format!("{cluster}  JWKS_FILE: a\n  CA_FILE: b\n");
        for (entries, said) in [
            (cluster.to_owned(), "ISSUERS[0].CA_FILE or JWKS_FILE is needed"),
            (both.clone(), "ISSUERS[0].CA_FILE or JWKS_FILE is needed"),
            (both.replace("https", "http"), "ISSUERS[0].ISSUER_URL must begin with https://"),
            (both.replace("AUDIENCE: kms", ""), "ISSUERS[0].AUDIENCE is missing"),
            (both.replace("AUDIENCE", "AUDENCE"), "did you mean AUDIENCE?"),
            (format!("{both}{both}"), "ISSUERS[1].ISSUER_URL is there twice"),
            (
                both.replace("kubernetes.default.svc", "127.0.0.1:10443/identity"),
                "is this server's own",
            ),
        ] {
            let found = with(&entries).unwrap_err().0.join("\n");
            assert!(found.contains(said), "{said:?} is not in:\n{found}");
        }
    }

    #[test]
    fn a_pin_is_given_once_and_never_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "9876\n").unwrap();
        let named = format!("PIN_FILE: \"{}\"", file.path().display());
        let from_file = parse(&GOOD.replace("PIN: \"1234\"", &named)).unwrap();
        assert_eq!(from_file.hsm.pin.expose(), "9876");
        assert_eq!(from_file.hsm.pin_file.as_deref(), Some(file.path()));
        let refused = Path::new("/var/lib/kms/kms.db.refused-pin");
        assert_eq!(from_file.hsm.refused_pin_file, refused);
        let both = format!("{GOOD}  {named}\n");
        assert_eq!(mistakes(&both), ["HSM.PIN and PIN_FILE are both set; only one of them may be"]);
        assert!(!format!("{:?}", parse(GOOD).unwrap()).contains("1234"));
    }
}
