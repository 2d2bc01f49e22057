//! The file: every section, name, default and rule. `docs` and `deploy/static-pod` show it; a test holds them to it.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use kms_api::token::{Credential, Profile};
use kms_core::cipher::v1;
use kms_core::crypto_module::CryptoModule;
use kms_core::key_id::{KeyId, KeyIdError};
use kms_core::secret::SecretText;
use kms_daemon::settings::{Mistakes, Section, Settings};
use kms_daemon::telemetry::{self, LogLevel};

use super::{Config, Health, KpConfig, Server, Socket, StatusVersion, hsm};
use crate::keys::Policy;
use crate::provider::guard::Patience;
use crate::socket::{AddressError, SocketAddress};

const YEAR_IN_HOURS: u64 = 8760;
/// What tells the token service who asks.
const CREDENTIAL: [&str; 5] =
    ["API_KEY", "API_KEY_FILE", "CR_TOKEN_FILE", "PROFILE_ID", "PROFILE_NAME"];
/// How services name a CRK version: by a UUID.
const LONGEST_VERSION: &str = "00000000-0000-0000-0000-000000000000";

/// Reads all sections.
///
/// # Errors
/// Every mistake at once.
pub(super) fn config(mut settings: Settings) -> Result<Config, Mistakes> {
    let hsm = hsm::read(&mut settings);
    let way = if hsm.is_some() { Way::Hsm } else { Way::KeyService };
    let server = settings.section("SERVER_CONFIG", |section| server_config(section, way));
    let current = settings.section("KP_CONFIG", |section| kp_config(section, Some(1), way));
    let previous = settings.sections("KP_CONFIG_PREVIOUS", |section| kp_config(section, None, way));
    let logger = settings.section("LOGGER", logger);
    check_versions(&mut settings, &current, &previous);
    let overridden = settings.overridden().to_vec();
    settings.finish()?;
    // Without a credential there was a mistake, and finish() has returned it.
    let server = server.ok_or_else(|| Mistakes(vec!["SERVER_CONFIG.API_KEY is missing".into()]))?;
    Ok(Config { server, current, previous, hsm, logger, overridden })
}

/// What stands behind the CRKs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    KeyService,
    Hsm,
}

fn server_config(section: &mut Section<'_>, way: Way) -> Option<Server> {
    check_module(section);
    let server = Server {
        region: section.text("REGION").unwrap_or_default(),
        socket: socket(section),
        health: health(section),
        restart_delay: seconds(section, "RESTART_DELAY_IN_SECONDS", 0, 30),
        probe_interval: seconds(section, "PROBE_INTERVAL_IN_SECONDS", 1, 30),
        token_url: of_service(section, way, "TOKEN_URL", url),
        token_ca: of_service(section, way, "TOKEN_URL_CA_FILE", file),
        patience: patience(section),
        policy: policy(section),
        credential: Credential::ApiKeyFile(PathBuf::new()),
    };
    let credential = match way {
        Way::KeyService => credential(section)?,
        Way::Hsm => {
            for name in CREDENTIAL {
                refuse_service(section, name);
            }
            Credential::ApiKeyFile(PathBuf::new())
        }
    };
    Some(Server { credential, ..server })
}

/// A build cannot be changed while it runs: FIPS_REQUIRED is held to or refused here, and nowhere else asked for.
fn check_module(section: &mut Section<'_>) {
    if section.flag("FIPS_REQUIRED", false)
        && let Err(cause) = CryptoModule::linked().require_fips()
    {
        section.mistake("FIPS_REQUIRED", &format!("is true, but {cause}"));
    }
}

fn socket(section: &mut Section<'_>) -> Socket {
    Socket {
        address: socket_address(section),
        take_over: section.flag("TAKE_OVER_SOCKET", false),
        shared_directory: section.flag("ALLOW_SHARED_DIRECTORY", false),
        allowed_uids: section.numbers("ALLOWED_UIDS"),
        status_version: section.parsed("KMS_V2_STATUS_VERSION", StatusVersion::V2, |text| {
            let versions = [StatusVersion::V2, StatusVersion::V2Beta1];
            let named = versions.into_iter().find(|version| version.as_str() == text);
            named.ok_or_else(|| "must be v2 or v2beta1".into())
        }),
    }
}

fn socket_address(section: &mut Section<'_>) -> SocketAddress {
    let text = section.required("UNIX_SOCKET_PATH");
    text.parse().unwrap_or_else(|error: AddressError| {
        if !text.is_empty() {
            section.mistake("UNIX_SOCKET_PATH", &format!("cannot be used: {error}"));
        }
        SocketAddress::Abstract(text)
    })
}

fn health(section: &mut Section<'_>) -> Health {
    let path = section.text("HEALTHZ_PATH").unwrap_or_else(|| "/healthz".into());
    if !path.starts_with('/') || path.ends_with('/') || path.contains(['?', '#', ' ']) {
        section.mistake("HEALTHZ_PATH", "must be a path such as /healthz");
    }
    Health { path, addresses: section.parsed("HEALTHZ_PORT", any_host(20358), addresses) }
}

fn patience(section: &mut Section<'_>) -> Patience {
    let timeout = seconds(section, "KP_TIMEOUT", 0, 0);
    let max_retries = section.number("MAX_RETRIES", 0..=20, 0);
    Patience {
        max_retries: u32::try_from(max_retries).unwrap_or(u32::MAX),
        timeout: Some(timeout).filter(|timeout| !timeout.is_zero()),
    }
}

fn policy(section: &mut Section<'_>) -> Policy {
    let len_bytes = section.number(
        "NUM_LEN_BYTES",
        u64::from(*v1::LEN_BYTES.start())..=u64::from(*v1::LEN_BYTES.end()),
        4,
    );
    let capacity = section.number("DEK_CACHE_SIZE", 1..=100_000, 1000);
    Policy {
        new_dek: section.flag("NEW_DEK", false),
        lifetime: hours(section, "CACHE_TIMEOUT_IN_HOURS", 0, 1),
        max_age: hours(section, "DEK_MAX_AGE_IN_HOURS", 1, 168),
        // Random nonces allow 2^32 seals under one AES-GCM key.
        max_uses: section.number("DEK_MAX_USES", 1..=1 << 32, 1_000_000),
        capacity: usize::try_from(capacity).unwrap_or(usize::MAX),
        len_bytes: u8::try_from(len_bytes).unwrap_or(u8::MAX),
        accept_unauthenticated: section.flag("V1_ACCEPT_UNAUTHENTICATED", false),
    }
}

/// An API key, or the token of a service account; never both, for nobody could say who is meant.
fn credential(section: &mut Section<'_>) -> Option<Credential> {
    let Some(path) = section.text("CR_TOKEN_FILE") else {
        for name in ["PROFILE_ID", "PROFILE_NAME"] {
            if section.text(name).is_some() {
                section.mistake(
                    name,
                    "is for a service account's token, but CR_TOKEN_FILE is missing",
                );
            }
        }
        return api_key(section);
    };
    for name in ["API_KEY", "API_KEY_FILE"] {
        if section.text(name).is_some() {
            section.mistake(
                "CR_TOKEN_FILE",
                &format!("and {name} are both set; only one of them may be"),
            );
        }
    }
    let profile = Profile { id: section.text("PROFILE_ID"), name: section.text("PROFILE_NAME") };
    if profile == Profile::default() {
        let text =
            "is missing (or PROFILE_ID): CR_TOKEN_FILE is good for the profile that trusts it";
        section.mistake("PROFILE_NAME", text);
    }
    // It need not be there yet: whoever writes it may start later, and the plug-in must not wait for them.
    Some(Credential::CrTokenFile { path: PathBuf::from(path), profile })
}

fn api_key(section: &mut Section<'_>) -> Option<Credential> {
    let mut key = section.secret("API_KEY", "API_KEY_FILE")?;
    if let Some(path) = key.file {
        return Some(Credential::ApiKeyFile(path));
    }
    refuse_placeholder(section, "API_KEY", &key.text);
    Some(Credential::ApiKey(SecretText::new(std::mem::take(&mut *key.text))))
}

fn kp_config(section: &mut Section<'_>, default_version: Option<u64>, way: Way) -> KpConfig {
    if default_version.is_none() && !section.has("VERSION") {
        section.mistake("VERSION", "is missing: KMS v1 values name their entry by it");
    }
    let version = section.number("VERSION", 0..=u64::from(u32::MAX), default_version.unwrap_or(0));
    let (crk_id, instance_id) = match way {
        Way::KeyService => names(section),
        Way::Hsm => {
            let mut name = |name| hsm::uuid(section, name).to_string();
            (name("CRK_ID"), name("INSTANCE_ID"))
        }
    };
    KpConfig {
        version: i64::try_from(version).unwrap_or(i64::MAX),
        crk_id,
        instance_id,
        url: of_service(section, way, "URL", url),
        ca: of_service(section, way, "KP_CA_FILE", file),
    }
}

fn names(section: &mut Section<'_>) -> (String, String) {
    let crk_id = filled_in(section, "CRK_ID");
    let instance_id = filled_in(section, "INSTANCE_ID");
    let mut printable = true;
    for (name, text) in [("CRK_ID", &*crk_id), ("INSTANCE_ID", &*instance_id)] {
        if matches!(KeyId::new(text, "c", "v"), Err(KeyIdError::Character(_))) {
            section.mistake(name, "must be printable ASCII without '/' and blanks");
            printable = false;
        }
    }
    let longest = KeyId::of_entry(&instance_id, &crk_id, LONGEST_VERSION, i64::MAX);
    if printable && matches!(longest, Err(KeyIdError::TooLong(_))) {
        let text = "is too long together with INSTANCE_ID: both are part of a key_id, of which kube-apiserver takes \
                    1024 bytes";
        section.mistake("CRK_ID", text);
    }
    (crk_id, instance_id)
}

fn check_versions(settings: &mut Settings, current: &KpConfig, previous: &[KpConfig]) {
    let mut seen = BTreeSet::from([current.version]);
    for (index, entry) in previous.iter().enumerate() {
        if !seen.insert(entry.version) {
            settings.mistake(format!(
                "KP_CONFIG_PREVIOUS[{index}].VERSION is {}, as another entry's: KMS v1 values name their entry by it, \
                 so each needs its own",
                entry.version
            ));
        }
    }
}

fn logger(section: &mut Section<'_>) -> telemetry::Settings {
    telemetry::Settings {
        level: section.parsed("LOG_LEVEL", LogLevel::Info, |text| {
            let names = || format!("must be one of {}", LogLevel::NAMES.join(", "));
            LogLevel::parse(text).ok_or_else(names)
        }),
        log_all_values: section.flag("LOG_ALL_VALUES", false),
    }
}

/// A text that the operator had to write into the example.
fn filled_in(section: &mut Section<'_>, name: &'static str) -> String {
    let text = section.required(name);
    refuse_placeholder(section, name, &text);
    text
}

/// A setting that only a key service needs.
fn of_service<T: Default>(
    section: &mut Section<'_>,
    way: Way,
    name: &'static str,
    read: fn(&mut Section<'_>, &'static str) -> T,
) -> T {
    if way == Way::KeyService {
        return read(section, name);
    }
    refuse_service(section, name);
    T::default()
}

/// An API key that nobody uses should not lie about in a file.
fn refuse_service(section: &mut Section<'_>, name: &'static str) {
    if section.text(name).is_some() {
        section.mistake(name, "is for a key service; with the section PKCS11 there is none");
    }
}

fn refuse_placeholder(section: &mut Section<'_>, name: &str, text: &str) {
    if text.starts_with('<') {
        section.mistake(name, "still holds the placeholder of the example");
    }
}

fn url(section: &mut Section<'_>, name: &'static str) -> String {
    let url = section.required(name);
    if !url.is_empty() && !url.starts_with("https://") {
        section.mistake(name, "must be a URL that starts with https://");
    }
    url
}

/// A file that has to be there, with something in it.
fn file(section: &mut Section<'_>, name: &'static str) -> PathBuf {
    let path = PathBuf::from(section.required(name));
    if path.as_os_str().is_empty() {
        return path;
    }
    match super::read_file(&path).map(zeroize::Zeroizing::new) {
        Ok(content) if content.trim_ascii().is_empty() => {
            section.mistake(name, "names an empty file")
        }
        Ok(_) => {}
        Err(error) => section.mistake(name, &format!("names a file that cannot be read: {error}")),
    }
    path
}

fn seconds(section: &mut Section<'_>, name: &'static str, least: u64, default: u64) -> Duration {
    Duration::from_secs(section.number(name, least..=3600, default))
}

fn hours(section: &mut Section<'_>, name: &'static str, least: u64, default: u64) -> Duration {
    Duration::from_secs(3600 * section.number(name, least..=YEAR_IN_HOURS, default))
}

/// `:20358`, `20358` (on all addresses), `127.0.0.1:20358`, `[::1]:20358`.
fn addresses(text: &str) -> Result<Vec<SocketAddr>, String> {
    if let Ok(port) = text.strip_prefix(':').unwrap_or(text).parse() {
        return Ok(any_host(port));
    }
    let address =
        text.parse().map_err(|_| "must be a port such as :20358, or an IP address and a port");
    Ok(vec![address?])
}

/// IPv6 takes IPv4 along; a node without IPv6 has the second.
fn any_host(port: u16) -> Vec<SocketAddr> {
    vec![(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()]
}
