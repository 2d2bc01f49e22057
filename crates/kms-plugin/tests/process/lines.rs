//! The command line and the configuration as the binary takes them.

use std::path::{Path, PathBuf};

use kms_core::crypto_module::CryptoModule;

use crate::plugin::{Setup, command, output};

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/static-pod")
}

#[test]
fn check_config_says_that_a_configuration_is_valid() {
    let setup = Setup::new();
    setup.write_config();
    let valid = (Some(0), "The configuration is valid.\n".into(), String::new());
    let mut with_option = command();
    with_option.arg("--check-config").arg("--config").arg(setup.config());
    assert_eq!(output(&mut with_option), valid);
    let mut with_variable = command();
    with_variable.arg("--check-config").env("config_file", setup.config());
    assert_eq!(output(&mut with_variable), valid);
}

#[test]
fn check_config_lists_all_mistakes_and_ends_with_64() {
    let setup = Setup::new()
        .with("MAX_RETRIES", "many")
        .with("NEW_DEKK", "true")
        .with("URL", "http://plain")
        .with("TOKEN_URL_CA_FILE", "/nowhere.pem");
    setup.write_config();
    let (code, _, stderr) =
        output(command().arg("--check-config").env("config_file", setup.config()));
    assert_eq!(code, Some(64));
    assert_eq!(
        stderr.lines().collect::<Vec<_>>(),
        [
            "SERVER_CONFIG.TOKEN_URL_CA_FILE names a file that cannot be read: No such file or directory (os error 2)",
            "SERVER_CONFIG.MAX_RETRIES must be a whole number from 0 to 20",
            "KP_CONFIG.URL must be a URL that starts with https://",
            "SERVER_CONFIG.NEW_DEKK is not a known name; did you mean NEW_DEK?",
        ]
    );
    let (code, _, stderr) = output(command().arg("--check-config"));
    assert_eq!(code, Some(64));
    assert!(stderr.contains("config_file"), "{stderr}");
}

#[test]
fn check_config_finds_what_only_a_start_would_find() {
    let setup = Setup::new();
    setup.write_config();
    let ca = setup.folder.path().join("ca.crt");
    std::fs::write(&ca, "no certificate").unwrap();
    let (code, _, stderr) =
        output(command().arg("--check-config").env("config_file", setup.config()));
    assert_eq!(code, Some(64));
    assert!(stderr.contains(&format!("the CA file {} cannot be used", ca.display())), "{stderr}");
}

/// Which of the two builds this is does not matter here: each must name its own module, and only one may be refused.
#[tokio::test]
async fn the_cryptographic_module_is_named_wherever_one_looks() {
    let module = CryptoModule::linked();
    let (code, version, _) = output(command().arg("--version"));
    assert_eq!(code, Some(0));
    assert_eq!(version, format!("kmsplugin {} ({module})\n", env!("CARGO_PKG_VERSION")));
    let plugin = Setup::new().serving();
    let line = plugin.line("Cryptography is done by");
    assert!(line.contains(&format!("Cryptography is done by {module}.")), "{line}");
    let (_, metrics) = plugin.health("/metrics").await;
    let [name, version, fips] = module.labels().map(|(name, value)| format!("{name}=\"{value}\""));
    let sample = format!("kmsplugin_crypto_module_info{{{name},{version},{fips}}} 1");
    assert!(metrics.contains(&sample), "{sample} is not in\n{metrics}");
}

#[test]
fn a_build_without_the_fips_module_does_not_start_where_it_is_required() {
    let setup = Setup::new().with("FIPS_REQUIRED", "true");
    setup.write_config();
    let checked = output(command().arg("--check-config").env("config_file", setup.config()));
    let module = CryptoModule::linked();
    if module.fips {
        assert_eq!(checked, (Some(0), "The configuration is valid.\n".into(), String::new()));
        setup.serving().line("Cryptography is done by AWS-LC FIPS");
        return;
    }
    let refusal = format!(
        "SERVER_CONFIG.FIPS_REQUIRED is true, but this build does its cryptography with {module}, which is not a FIPS \
         module; use the build that `cargo xtask build --fips` makes"
    );
    assert_eq!(checked, (Some(64), String::new(), format!("{refusal}\n")));
    let mut plugin = setup.start();
    assert_eq!(plugin.wait().code(), Some(64));
    let lines = plugin.all_lines();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains(&format!("Configuration: {refusal}")), "{lines:?}");
}

#[test]
fn a_start_with_mistakes_logs_them_and_ends() {
    let setup = Setup::new().with("MAX_RETRIES", "many");
    let mut plugin = setup.start();
    assert_eq!(plugin.wait().code(), Some(64));
    let lines = plugin.all_lines();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with(r#"{"level":"error","ts":""#), "{lines:?}");
    assert!(lines[0].contains("Configuration: SERVER_CONFIG.MAX_RETRIES must be"), "{lines:?}");
}

#[test]
fn the_environment_overrides_the_file() {
    let setup = Setup::new().with("MAX_RETRIES", "many");
    setup.write_config();
    let mut command = command();
    command.arg("--check-config").env("config_file", setup.config()).env("MAX_RETRIES", "2");
    assert_eq!(output(&mut command).0, Some(0));
}

#[test]
fn the_sample_is_valid_once_it_is_filled_in() {
    let sample = samples().join("kmsplugin-config.yaml");
    let setup = Setup::new();
    let ca = setup.folder.path().join("ca.crt");
    let mut filled_in = command();
    filled_in
        .args(["--check-config", "--config"])
        .arg(&sample)
        .env("API_KEY", "key")
        .env("CRK_ID", "crk")
        .env("INSTANCE_ID", "instance")
        .env("TOKEN_URL_CA_FILE", &ca)
        .env("KP_CA_FILE", &ca);
    assert_eq!(output(&mut filled_in).0, Some(0));
    let (code, _, stderr) = output(command().args(["--check-config", "--config"]).arg(&sample));
    assert_eq!(code, Some(64));
    assert_eq!(stderr.matches("still holds the placeholder of the example").count(), 3, "{stderr}");
    assert_eq!(stderr.matches("_CA_FILE names a file that cannot be read").count(), 2, "{stderr}");
    assert_eq!(stderr.lines().count(), 5, "{stderr}");
}

#[cfg(not(feature = "pkcs11"))]
#[test]
fn a_build_without_pkcs11_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kmsplugin-config.yaml");
    let id = "6d3f5a2e-8a4e-4c83-9a4d-1f1f0f6f2a01";
    let text = format!(
        "SERVER_CONFIG:\n  UNIX_SOCKET_PATH: \"@kms\"\n\
         KP_CONFIG:\n  CRK_ID: {id}\n  INSTANCE_ID: {id}\n\
         PKCS11:\n  LIBRARY: /opt/hsm.so\n  TOKEN_LABEL: kek\n  PIN: \"1234\"\n"
    );
    std::fs::write(&path, text).unwrap();
    let (code, _, stderr) = output(command().args(["--check-config", "--config"]).arg(&path));
    assert_eq!(code, Some(64));
    assert_eq!(stderr, "PKCS11: this kmsplugin was built without the feature pkcs11\n");
}

#[test]
fn the_samples_agree_with_each_other() {
    let read = |name: &str| {
        let text = std::fs::read_to_string(samples().join(name)).unwrap();
        serde_saphyr::from_str::<serde_json::Value>(&text).unwrap()
    };
    let config = read("kmsplugin-config.yaml");
    let (pod, encryption) = (read("kmsplugin.yaml"), read("encryption-config.yaml"));
    let server = &config["SERVER_CONFIG"];
    let provider = &encryption["resources"][0]["providers"][0]["kms"];
    let socket = server["UNIX_SOCKET_PATH"].as_str().unwrap();
    assert_eq!(provider["endpoint"], format!("unix://{socket}"));
    assert_eq!(provider["name"], "KmsPlugin");
    let container = &pod["spec"]["containers"][0];
    let port = server["HEALTHZ_PORT"].as_str().unwrap().trim_start_matches(':');
    let path = server["HEALTHZ_PATH"].as_str().unwrap();
    for (probe, name) in [("livenessProbe", "liveness"), ("readinessProbe", "readiness")] {
        let get = &container[probe]["httpGet"];
        assert_eq!(get["port"].to_string(), port);
        assert_eq!(get["path"], format!("{path}/{name}"));
    }
    assert_eq!(container["env"][0]["name"], "config_file");
    let limits = &container["resources"]["limits"];
    assert_eq!((limits["cpu"].as_str(), limits["memory"].as_str()), (Some("12m"), Some("15Mi")));
    let folder = |name: &str| {
        let mounts = container["volumeMounts"].as_array().unwrap();
        mounts.iter().find(|mount| mount["name"] == name).unwrap()["mountPath"].clone()
    };
    assert!(Path::new(socket).starts_with(folder("kms-socket").as_str().unwrap()));
    let config_file = container["env"][0]["value"].as_str().unwrap();
    assert!(Path::new(config_file).starts_with(folder("data").as_str().unwrap()));
}
