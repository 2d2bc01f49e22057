//! The configuration file: the original's example as it stands, every name and default, every mistake at once, and
//! changes while the plug-in runs.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly, as tests do")]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kms_api::token::{Credential, Profile};
use kms_core::crypto_module::CryptoModule;
use kms_daemon::lifecycle::Shutdown;
use kms_daemon::settings::{Environment, Mistakes};
use kms_daemon::telemetry::{self, LogLevel};
use kms_plugin::config::{Config, Source, StatusVersion, watch};
use kms_plugin::keys::Policy;
use kms_plugin::metrics::Metrics;
use kms_plugin::provider::guard::Patience;
use tempfile::TempDir;
use tokio::sync::Notify;

const HOUR: Duration = Duration::from_secs(3600);

/// A file that is there; what it holds is not looked at here.
const CA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
const OTHER_CA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/lib.rs");

/// The original's file, its placeholders filled in and with the path of a file that exists.
fn original() -> String {
    ORIGINAL.replace("/root/kmsplugin/ca.crt", CA)
}

const ORIGINAL: &str = r#"SERVER_CONFIG:
  REGION: "IBMCloudPakForMCM"
  NUM_LEN_BYTES: 4
  CACHE_TIMEOUT_IN_HOURS: 1
  RESTART_DELAY_IN_SECONDS: 30
  UNIX_SOCKET_PATH: "/etc/origin/master/keyprotectprovider.sock"
  TOKEN_URL: "https://iam-token-service.kube-system:10443/oidc/token"
  TOKEN_URL_CA_FILE: "/root/kmsplugin/ca.crt"
  API_KEY: "an-api-key"
  HEALTHZ_PATH: "/healthz"
  HEALTHZ_PORT: ":20358"
  NEW_DEK: false
  MAX_RETRIES: 0
KP_CONFIG:
  VERSION: 1
  CRK_ID: "the-crk"
  URL: "https://kms-api.kube-system:28674"
  KP_CA_FILE: "/root/kmsplugin/ca.crt"
  INSTANCE_ID: "the-instance"
LOGGER:
  LOG_LEVEL: "info"
  LOG_ALL_VALUES: false
"#;

/// Only what has no default.
fn least() -> String {
    format!(
        r#"
SERVER_CONFIG: {{UNIX_SOCKET_PATH: "@kms", TOKEN_URL: "https://t", TOKEN_URL_CA_FILE: "{CA}", API_KEY: "k"}}
KP_CONFIG: {{CRK_ID: "c", INSTANCE_ID: "i", URL: "https://k", KP_CA_FILE: "{CA}"}}
"#
    )
}

struct File {
    _folder: TempDir,
    path: PathBuf,
}

fn file(text: &str) -> File {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kmsplugin-config.yaml");
    fs::write(&path, text).unwrap();
    File { _folder: folder, path }
}

fn environment<const N: usize>(pairs: [(&str, &str); N]) -> Environment {
    BTreeMap::from(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())))
}

fn read<const N: usize>(text: &str, pairs: [(&str, &str); N]) -> Result<Config, Mistakes> {
    let file = file(text);
    Source::new(Some(file.path.clone()), environment(pairs)).read()
}

fn mistakes(text: &str) -> Vec<String> {
    read(text, []).unwrap_err().0
}

fn api_key(config: &Config) -> String {
    match &config.server.credential {
        Credential::ApiKey(key) => key.expose().to_owned(),
        Credential::ApiKeyFile(path) | Credential::CrTokenFile { path, .. } => {
            path.display().to_string()
        }
    }
}

#[test]
fn the_original_s_file_is_read_as_it_stands() {
    let config = read(&original(), []).unwrap();
    let server = &config.server;
    assert_eq!(server.region, "IBMCloudPakForMCM");
    assert_eq!(server.socket.address.to_string(), "/etc/origin/master/keyprotectprovider.sock");
    assert_eq!(server.restart_delay, Duration::from_secs(30));
    assert_eq!(server.token_url, "https://iam-token-service.kube-system:10443/oidc/token");
    assert_eq!(server.token_ca, PathBuf::from(CA));
    assert_eq!(api_key(&config), "an-api-key");
    assert_eq!(server.health.path, "/healthz");
    assert_eq!(server.health.addresses[0], "[::]:20358".parse().unwrap());
    assert_eq!(server.patience, Patience { max_retries: 0, timeout: None });
    assert_eq!(
        (server.policy.len_bytes, server.policy.lifetime, server.policy.new_dek),
        (4, HOUR, false)
    );
    let current = &config.current;
    assert_eq!(
        (current.version, &*current.crk_id, &*current.instance_id),
        (1, "the-crk", "the-instance")
    );
    assert_eq!(current.url, "https://kms-api.kube-system:28674");
    assert_eq!(current.ca, PathBuf::from(CA));
    assert_eq!(config.logger, telemetry::Settings { level: LogLevel::Info, log_all_values: false });
}

#[test]
fn the_original_s_placeholders_are_mistakes() {
    let text = original()
        .replace("an-api-key", "<API_KEY>")
        .replace("the-crk", "<CRK_ID")
        .replace("the-instance", "<INSTANCE_ID>");
    assert_eq!(
        mistakes(&text),
        [
            "SERVER_CONFIG.API_KEY still holds the placeholder of the example",
            "KP_CONFIG.CRK_ID still holds the placeholder of the example",
            "KP_CONFIG.INSTANCE_ID still holds the placeholder of the example",
        ]
    );
}

#[test]
fn what_is_left_out_has_its_default() {
    let config = read(&least(), []).unwrap();
    let server = &config.server;
    assert_eq!((&*server.region, server.restart_delay), ("", Duration::from_secs(30)));
    assert_eq!(server.probe_interval, Duration::from_secs(30));
    assert_eq!(server.socket.status_version, StatusVersion::V2);
    assert!(!server.socket.take_over && server.socket.allowed_uids.is_empty());
    assert_eq!(server.health.path, "/healthz");
    assert_eq!(server.health.addresses.len(), 2);
    assert_eq!(server.patience, Patience { max_retries: 0, timeout: None });
    assert_eq!(
        server.policy,
        Policy {
            new_dek: false,
            lifetime: HOUR,
            max_age: 168 * HOUR,
            max_uses: 1_000_000,
            capacity: 1000,
            len_bytes: 4,
            accept_unauthenticated: false,
        }
    );
    assert_eq!(config.current.version, 1);
    assert!(config.previous.is_empty());
    assert_eq!(config.logger, telemetry::Settings { level: LogLevel::Info, log_all_values: false });
}

#[test]
fn each_value_is_overridden_by_an_environment_variable_of_its_name() {
    let names = [
        ("REGION", "eu"),
        ("NUM_LEN_BYTES", "2"),
        ("CACHE_TIMEOUT_IN_HOURS", "0"),
        ("RESTART_DELAY_IN_SECONDS", "1"),
        ("UNIX_SOCKET_PATH", "/run/kms.sock"),
        ("TOKEN_URL", "https://token"),
        ("TOKEN_URL_CA_FILE", OTHER_CA),
        ("API_KEY", "from-environment"),
        ("HEALTHZ_PATH", "/health"),
        ("HEALTHZ_PORT", "127.0.0.1:1"),
        ("NEW_DEK", "true"),
        ("MAX_RETRIES", "3"),
        ("PROBE_INTERVAL_IN_SECONDS", "7"),
        ("DEK_MAX_USES", "8"),
        ("DEK_MAX_AGE_IN_HOURS", "9"),
        ("DEK_CACHE_SIZE", "10"),
        ("KP_TIMEOUT", "11"),
        ("ALLOWED_UIDS", "0,1000"),
        ("TAKE_OVER_SOCKET", "true"),
        ("ALLOW_SHARED_DIRECTORY", "true"),
        ("KMS_V2_STATUS_VERSION", "v2beta1"),
        ("V1_ACCEPT_UNAUTHENTICATED", "true"),
        ("VERSION", "12"),
        ("CRK_ID", "crk"),
        ("URL", "https://kms"),
        ("KP_CA_FILE", OTHER_CA),
        ("INSTANCE_ID", "instance"),
        ("LOG_LEVEL", "debug"),
        ("LOG_ALL_VALUES", "true"),
    ];
    let config = read(&original(), names).unwrap();
    let server = &config.server;
    assert_eq!((&*server.region, &*server.token_url), ("eu", "https://token"));
    assert_eq!(server.token_ca, PathBuf::from(OTHER_CA));
    assert_eq!(api_key(&config), "from-environment");
    assert_eq!(server.restart_delay, Duration::from_secs(1));
    assert_eq!(server.probe_interval, Duration::from_secs(7));
    assert_eq!(server.health.path, "/health");
    assert_eq!(server.health.addresses, ["127.0.0.1:1".parse().unwrap()]);
    let timeout = Some(Duration::from_secs(11));
    assert_eq!(server.patience, Patience { max_retries: 3, timeout });
    assert_eq!(server.socket.address.to_string(), "/run/kms.sock");
    assert_eq!(server.socket.allowed_uids, [0, 1000]);
    assert_eq!(server.socket.status_version, StatusVersion::V2Beta1);
    assert!(server.socket.take_over && server.socket.shared_directory);
    assert_eq!(
        server.policy,
        Policy {
            new_dek: true,
            lifetime: Duration::ZERO,
            max_age: 9 * HOUR,
            max_uses: 8,
            capacity: 10,
            len_bytes: 2,
            accept_unauthenticated: true,
        }
    );
    let current = &config.current;
    assert_eq!((current.version, &*current.crk_id, &*current.instance_id), (12, "crk", "instance"));
    assert_eq!((&*current.url, &current.ca), ("https://kms", &PathBuf::from(OTHER_CA)));
    assert_eq!(config.logger, telemetry::Settings { level: LogLevel::Debug, log_all_values: true });
    assert_eq!(config.overridden.len(), names.len());
}

#[test]
fn all_mistakes_are_found_at_once_and_no_value_is_repeated() {
    let text = original()
        .replace("NUM_LEN_BYTES: 4", "NUM_LEN_BYTES: 9")
        .replace("NEW_DEK: false", "NEW_DEKS: SECRET")
        .replace("\"/etc/origin/master/keyprotectprovider.sock\"", "\"kms.sock\"")
        .replace("HEALTHZ_PORT: \":20358\"", "HEALTHZ_PORT: \"SECRET\"")
        .replace("MAX_RETRIES: 0", "MAX_RETRIES: -1")
        .replace("API_KEY: \"an-api-key\"", "APIKEY: \"SECRET\"")
        .replace("  VERSION: 1\n", "  VERSION: one\n  LOG_LEVEL: info\n")
        .replace("\"the-crk\"", "\"SECRET/x\"")
        .replace("LOG_LEVEL: \"info\"", "LOG_LEVEL: \"loud\"")
        .replace("LOGGER:", "EXTRA: {A: SECRET}\nLOGGER:");
    assert_eq!(
        mistakes(&text),
        [
            "SERVER_CONFIG.UNIX_SOCKET_PATH cannot be used: \"kms.sock\" is neither an absolute path nor @ and a name",
            "SERVER_CONFIG.HEALTHZ_PORT must be a port such as :20358, or an IP address and a port",
            "SERVER_CONFIG.MAX_RETRIES must be a whole number from 0 to 20",
            "SERVER_CONFIG.NUM_LEN_BYTES must be a whole number from 1 to 8",
            "SERVER_CONFIG.API_KEY is missing (or API_KEY_FILE, the file that holds it)",
            "KP_CONFIG.VERSION must be a whole number from 0 to 4294967295",
            "KP_CONFIG.CRK_ID must be printable ASCII without '/' and blanks",
            "LOGGER.LOG_LEVEL must be one of error, warn, info, debug",
            "EXTRA is not a known section; known are KP_CONFIG, KP_CONFIG_PREVIOUS, LOGGER, SERVER_CONFIG",
            "SERVER_CONFIG.APIKEY is not a known name; did you mean API_KEY?",
            "SERVER_CONFIG.NEW_DEKS is not a known name; did you mean NEW_DEK?",
            "KP_CONFIG.LOG_LEVEL is not a known name; it belongs into LOGGER",
        ]
    );
}

#[test]
fn the_health_port_is_understood_in_every_usual_form() {
    for (written, first) in [
        ("\":20358\"", "[::]:20358"),
        ("20358", "[::]:20358"),
        ("\"20358\"", "[::]:20358"),
        ("\"127.0.0.1:20358\"", "127.0.0.1:20358"),
        ("\"[::1]:20358\"", "[::1]:20358"),
    ] {
        let text = original().replace("\":20358\"", written);
        let config = read(&text, []).unwrap();
        assert_eq!(config.server.health.addresses[0], first.parse().unwrap(), "{written}");
    }
}

#[test]
fn previous_entries_have_the_same_shape_and_a_version_of_their_own() {
    let entry = "- VERSION: 2\n  CRK_ID: \"old\"\n  URL: \"https://old\"\n  INSTANCE_ID: \"i\"\n";
    let entry = format!("{entry}  KP_CA_FILE: \"{CA}\"\n");
    let text = format!("{}KP_CONFIG_PREVIOUS:\n{entry}", original());
    let config = read(&text, []).unwrap();
    assert_eq!((config.previous[0].version, &*config.previous[0].crk_id), (2, "old"));
    // The environment speaks of the current entry only.
    assert_eq!(read(&text, [("CRK_ID", "new")]).unwrap().previous[0].crk_id, "old");

    let doubt = config.doubt().unwrap();
    assert!(
        doubt.starts_with("KP_CONFIG has VERSION 1, KP_CONFIG_PREVIOUS has VERSION 2: right if")
    );
    let third = text.replacen("VERSION: 1", "VERSION: 3", 1);
    assert_eq!(read(&third, []).unwrap().doubt(), None);

    let same =
        format!("{}KP_CONFIG_PREVIOUS:\n{}", original(), entry.replace("VERSION: 2", "VERSION: 1"));
    assert!(
        mistakes(&same)[0].starts_with("KP_CONFIG_PREVIOUS[0].VERSION is 1, as another entry's")
    );
    let none =
        format!("{}KP_CONFIG_PREVIOUS:\n{}", original(), entry.replace("VERSION: 2", "VERSIN: 2"));
    assert_eq!(
        mistakes(&none),
        [
            "KP_CONFIG_PREVIOUS[0].VERSION is missing: KMS v1 values name their entry by it",
            "KP_CONFIG_PREVIOUS[0].VERSIN is not a known name; did you mean VERSION?",
        ]
    );
}

#[test]
fn the_api_key_stands_in_the_file_or_in_a_file_of_its_own() {
    let key = file("from-a-file\n");
    let name = format!("API_KEY_FILE: \"{}\"", key.path.display());
    let config = read(&original().replace("API_KEY: \"an-api-key\"", &name), []).unwrap();
    assert_eq!(api_key(&config), key.path.display().to_string());
    assert!(config.files().contains(&key.path.as_path()));

    let both = original().replace("MAX_RETRIES: 0", &name);
    assert_eq!(
        mistakes(&both),
        ["SERVER_CONFIG.API_KEY and API_KEY_FILE are both set; only one of them may be"]
    );
    let gone = original().replace("API_KEY: \"an-api-key\"", "API_KEY_FILE: \"/nowhere/key\"");
    assert!(
        mistakes(&gone)[0]
            .starts_with("SERVER_CONFIG.API_KEY_FILE names a file that cannot be used")
    );
    fs::write(&key.path, " \n").unwrap();
    let empty = original().replace("API_KEY: \"an-api-key\"", &name);
    assert_eq!(
        mistakes(&empty),
        ["SERVER_CONFIG.API_KEY_FILE names a file that cannot be used: it is empty"]
    );
}

#[test]
fn a_service_accounts_token_stands_in_place_of_the_api_key() {
    // The file need not be there yet, and its changes are no changes of the configuration.
    let with = |more: &str| {
        let account = format!("CR_TOKEN_FILE: \"/nowhere/token\"\n{more}");
        original().replace("  API_KEY: \"an-api-key\"", &format!("  {account}"))
    };
    let named = |id: Option<&str>, name: Option<&str>| Profile {
        id: id.map(str::to_owned),
        name: name.map(str::to_owned),
    };
    for (more, wanted) in [
        ("  PROFILE_NAME: node", named(None, Some("node"))),
        ("  PROFILE_ID: Profile-1", named(Some("Profile-1"), None)),
        ("  PROFILE_ID: Profile-1\n  PROFILE_NAME: node", named(Some("Profile-1"), Some("node"))),
    ] {
        let config = read(&with(more), []).unwrap();
        assert!(!config.files().contains(&PathBuf::from("/nowhere/token").as_path()));
        let Credential::CrTokenFile { path, profile } = config.server.credential else {
            panic!("{more}")
        };
        assert_eq!((path, profile), (PathBuf::from("/nowhere/token"), wanted));
    }
    assert_eq!(
        mistakes(&with("")),
        [
            "SERVER_CONFIG.PROFILE_NAME is missing (or PROFILE_ID): CR_TOKEN_FILE is good for the profile that trusts it"
        ]
    );
    for name in ["API_KEY", "API_KEY_FILE"] {
        let both = format!("  PROFILE_NAME: node\n  {name}: \"k\"");
        assert_eq!(
            mistakes(&with(&both)),
            [format!(
                "SERVER_CONFIG.CR_TOKEN_FILE and {name} are both set; only one of them may be"
            )]
        );
    }
    let alone = original().replace("MAX_RETRIES: 0", "PROFILE_NAME: node");
    let text = "is for a service account's token, but CR_TOKEN_FILE is missing";
    assert_eq!(mistakes(&alone), [format!("SERVER_CONFIG.PROFILE_NAME {text}")]);
    // The environment of a pod may bring all of it.
    let pod = [("CR_TOKEN_FILE", "/t"), ("PROFILE_NAME", "node")];
    let config = read(&original().replace("  API_KEY: \"an-api-key\"\n", ""), pod).unwrap();
    assert_eq!(config.overridden, ["CR_TOKEN_FILE", "PROFILE_NAME"]);
}

#[test]
fn the_path_comes_from_the_option_or_from_config_file() {
    let (here, there) = (file(&original()), file(&least()));
    let there = environment([("config_file", there.path.to_str().unwrap())]);
    let region = |source: Source| source.read().unwrap().server.region;
    assert_eq!(region(Source::new(Some(here.path.clone()), there.clone())), "IBMCloudPakForMCM");
    assert_eq!(Source::new(None, there.clone()).path, there.get("config_file").map(PathBuf::from));
    let none = Source::new(None, Environment::new()).read().unwrap_err();
    assert!(none.to_string().contains("config_file"), "{none}");
    let gone = Source::new(Some("/nowhere.yaml".into()), Environment::new()).read().unwrap_err();
    assert!(gone.to_string().starts_with("/nowhere.yaml cannot be read"), "{gone}");
}

#[test]
fn hypershift_s_environment_is_a_configuration() {
    let data = r#"{"1":{"crkID":"old","instanceID":"i","correlationID":"x","url":"https://old","serviceToService":false},
        "3":{"crkID":"new","instanceID":"i","correlationID":"x","url":"https://new","serviceToService":false}}"#;
    let variables = environment([
        ("KP_DATA_JSON", data),
        ("API_KEY", "k"),
        ("UNIX_SOCKET_PATH", "/tmp/keyprotectprovider.sock"),
        ("HEALTHZ_PORT", ":8081"),
        ("KP_TIMEOUT", "10"),
        ("RESTART_DELAY_IN_SECONDS", "0"),
        ("KP_WDEK_PATH", "/tmp/kp/wdek"),
        ("TOKEN_URL_CA_FILE", CA),
        ("KP_CA_FILE", CA),
    ]);
    let config = Source::new(None, variables.clone()).read().unwrap();
    assert_eq!((config.current.version, &*config.current.crk_id), (3, "new"));
    assert_eq!((config.previous[0].version, &*config.previous[0].crk_id), (1, "old"));
    assert_eq!(config.server.token_url, "https://iam.cloud.ibm.com/identity/token");
    assert_eq!(config.server.patience.timeout, Some(Duration::from_secs(10)));
    assert!(config.server.socket.shared_directory, "the socket is in the pod's emptyDir");
    let stricter = [("ALLOW_SHARED_DIRECTORY".to_owned(), "false".to_owned())];
    let stricter = variables.clone().into_iter().chain(stricter).collect();
    assert!(!Source::new(None, stricter).read().unwrap().server.socket.shared_directory);

    for (data, says) in [
        ("{", "KP_DATA_JSON does not fit"),
        ("{}", "KP_DATA_JSON names no key"),
        (&data.replace("false", "true"), "KP_DATA_JSON asks for serviceToService"),
    ] {
        let variables = Environment::from_iter(
            variables.clone().into_iter().chain([("KP_DATA_JSON".into(), data.into())]),
        );
        let mistakes = Source::new(None, variables).read().unwrap_err();
        assert!(mistakes.to_string().contains(says), "{mistakes}");
    }

    let fips = [("FIPS_REQUIRED".to_owned(), "true".to_owned())];
    let variables = variables.into_iter().chain(fips).collect();
    is_refused_without_the_fips_module(Source::new(None, variables).read());
}

#[test]
fn the_fips_module_can_be_required_in_the_file_or_in_the_environment() {
    let original = original();
    let required = original.replace("NEW_DEK: false", "FIPS_REQUIRED: true");
    is_refused_without_the_fips_module(read(&required, []));
    is_refused_without_the_fips_module(read(&original, [("FIPS_REQUIRED", "true")]));
    read(&required, [("FIPS_REQUIRED", "false")]).unwrap();
}

fn is_refused_without_the_fips_module(read: Result<Config, Mistakes>) {
    let refused = CryptoModule::linked().require_fips().err();
    let mistakes = read.err().map(|Mistakes(mistakes)| mistakes).unwrap_or_default();
    let expected = refused.map(|why| format!("SERVER_CONFIG.FIPS_REQUIRED is true, but {why}"));
    assert_eq!(mistakes, Vec::from_iter(expected));
}

#[test]
fn what_needs_a_restart_is_named() {
    let old = read(&original(), []).unwrap();
    let new = read(
        &original(),
        [("UNIX_SOCKET_PATH", "@other"), ("HEALTHZ_PORT", ":1"), ("CRK_ID", "other")],
    );
    assert_eq!(old.needing_restart(&new.unwrap()), ["UNIX_SOCKET_PATH", "HEALTHZ_PORT"]);
    assert!(old.needing_restart(&old.clone()).is_empty());
}

proptest::proptest! {
    #[test]
    fn any_text_is_a_configuration_or_a_list_of_mistakes(text in "\\PC{0,200}") {
        if let Err(Mistakes(mistakes)) = read(&text, []) {
            proptest::prop_assert!(!mistakes.is_empty());
        }
    }

    #[test]
    fn any_value_in_any_place_is_taken_or_named(
        line in 0..ORIGINAL.lines().count(), value in "[^\"\\\\]{0,20}",
    ) {
        let original = original();
        let mut lines: Vec<_> = original.lines().map(str::to_owned).collect();
        let name = lines[line].split(':').next().unwrap().to_owned();
        lines[line] = format!("{name}: \"{value}\"");
        if let Err(Mistakes(mistakes)) = read(&lines.join("\n"), []) {
            let named = mistakes.iter().any(|mistake| mistake.contains(name.trim()));
            let yaml = mistakes[0].starts_with("not valid YAML");
            proptest::prop_assert!(named || yaml, "{}: {:?}", name, mistakes);
        }
    }
}

/// The regions that `watch` handed over, in order.
type Seen = Arc<Mutex<Vec<String>>>;

async fn watched(change: impl AsyncFnOnce(&File, &Notify, &Seen)) {
    tokio::time::pause();
    let (file, reload, shutdown) = (file(&original()), Arc::new(Notify::new()), Shutdown::new());
    let source = Source::new(Some(file.path.clone()), Environment::new());
    let (running, seen) = (source.read().unwrap(), Seen::default());
    let metrics = Metrics::unregistered();
    let watching =
        tokio::spawn(watch(source, running, reload.clone(), shutdown.clone(), metrics, {
            let seen = seen.clone();
            move |_: &Config, new: &Config| {
                if new.server.region == "refused" {
                    return Err(Mistakes(vec!["no".into()]));
                }
                seen.lock().unwrap().push(new.server.region.clone());
                Ok(())
            }
        }));
    tokio::task::yield_now().await;
    change(&file, &reload, &seen).await;
    shutdown.request();
    watching.await.unwrap();
}

/// Longer than between two looks at the file.
async fn a_while() {
    tokio::time::sleep(Duration::from_secs(11)).await;
}

#[tokio::test]
async fn a_changed_file_is_taken_over_without_a_restart() {
    watched(async |file, _, seen| {
        a_while().await;
        assert!(seen.lock().unwrap().is_empty(), "nothing changed");
        fs::write(&file.path, original().replace("IBMCloudPakForMCM", "second")).unwrap();
        a_while().await;
        a_while().await;
        assert_eq!(*seen.lock().unwrap(), ["second"], "once for each change");
    })
    .await;
}

#[tokio::test]
async fn a_bad_file_is_refused_and_the_next_good_one_taken() {
    watched(async |file, _, seen| {
        for bad in
            ["LOGGER: [", "REGION: 1", &original().replace("IBMCloudPakForMCM", "refused"), ""]
        {
            fs::write(&file.path, bad).unwrap();
            a_while().await;
        }
        fs::remove_file(&file.path).unwrap();
        a_while().await;
        assert!(seen.lock().unwrap().is_empty());
        fs::write(&file.path, original().replace("IBMCloudPakForMCM", "good")).unwrap();
        a_while().await;
        assert_eq!(*seen.lock().unwrap(), ["good"]);
    })
    .await;
}

#[tokio::test]
async fn sighup_reads_the_file_at_once() {
    watched(async |_, reload, seen| {
        reload.notify_one();
        while seen.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(*seen.lock().unwrap(), ["IBMCloudPakForMCM"]);
    })
    .await;
}

/// Both are part of each key_id; 1024 bytes is all that kube-apiserver takes.
#[test]
fn case_12_names_that_make_too_long_a_key_id_are_refused_at_the_start() {
    for (crk, instance, accepted) in
        [(36, 36, true), (450, 450, true), (500, 500, false), (2000, 1, false)]
    {
        let text = least()
            .replace("CRK_ID: \"c\"", &format!("CRK_ID: \"{}\"", "c".repeat(crk)))
            .replace("INSTANCE_ID: \"i\"", &format!("INSTANCE_ID: \"{}\"", "i".repeat(instance)));
        let found = read(&text, []).err().map(|Mistakes(found)| found).unwrap_or_default();
        assert_eq!(found.is_empty(), accepted, "{crk} and {instance}: {found:?}");
        assert!(
            accepted || found[0].starts_with("KP_CONFIG.CRK_ID is too long together"),
            "{found:?}"
        );
    }
}
