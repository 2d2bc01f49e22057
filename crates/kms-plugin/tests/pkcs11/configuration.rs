//! The section PKCS11, and what the other sections may no longer hold beside it.

use std::time::Duration;

use kms_core::crypto_module::CryptoModule;
use kms_daemon::settings::{Environment, Mistakes};
use kms_plugin::config::{Config, Source, Token};

const LIBRARY: &str = "/opt/hsm/library.so";
const ID: &str = "6d3f5a2e-8a4e-4c83-9a4d-1f1f0f6f2a01";

fn text() -> String {
    format!(
        "SERVER_CONFIG:\n  UNIX_SOCKET_PATH: \"@kms\"\n\
         KP_CONFIG:\n  CRK_ID: {ID}\n  INSTANCE_ID: {ID}\n\
         PKCS11:\n  LIBRARY: {LIBRARY}\n  TOKEN_LABEL: kek\n  PIN: \"1234\"\n  CRK_VERSION: {ID}\n"
    )
}

fn read(text: &str, environment: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kmsplugin-config.yaml");
    std::fs::write(&path, text).unwrap();
    let pairs = environment.iter().map(|(name, value)| ((*name).into(), (*value).into()));
    let environment: Environment = pairs.collect();
    Source::new(Some(path), environment).read().map_err(|Mistakes(mistakes)| mistakes)
}

#[test]
fn only_the_way_to_the_token_has_to_be_named() {
    let config = read(&text(), &[]).unwrap();
    assert!(config.files().is_empty());
    let hsm = config.hsm.unwrap();
    assert_eq!(hsm.library.to_str().unwrap(), LIBRARY);
    assert_eq!(hsm.token, Token::Label("kek".into()));
    assert_eq!((hsm.pin.expose(), hsm.sessions), ("1234", 2));
    assert_eq!(hsm.refused_pin_file, None);
    assert_eq!(hsm.deadline, Duration::from_secs(2));
    assert_eq!(hsm.crk_version.unwrap().to_string(), ID);
}

#[test]
fn a_token_is_named_by_label_serial_or_slot_and_only_once() {
    let token = |name: &str| {
        read(&text().replace("TOKEN_LABEL: kek", name), &[]).map(|config| config.hsm.unwrap().token)
    };
    assert_eq!(token("TOKEN_SERIAL: \"1234567\""), Ok(Token::Serial("1234567".into())));
    assert_eq!(token("SLOT: 3"), Ok(Token::Slot(3)));
    assert_eq!(
        token("SLOT: 3\n  TOKEN_LABEL: kek").unwrap_err(),
        ["PKCS11.TOKEN_LABEL or TOKEN_SERIAL or SLOT names the token; keep one"]
    );
}

#[test]
fn the_environment_overrides_and_one_spelling_of_uuids_counts() {
    let version = "0B8F5C11-27F5-4C3E-8F0E-5A7A2B9B3C02";
    let config = read(&text(), &[("CRK_VERSION", version), ("CRK_ID", version)]).unwrap();
    assert_eq!(config.current.crk_id, version.to_lowercase());
    assert_eq!(config.hsm.unwrap().crk_version.unwrap().to_string(), version.to_lowercase());
}

#[test]
fn the_fips_module_can_be_required_without_a_key_service_too() {
    let required = read(&text(), &[("FIPS_REQUIRED", "true")]).map(drop);
    let refused = CryptoModule::linked()
        .require_fips()
        .map_err(|why| vec![format!("SERVER_CONFIG.FIPS_REQUIRED is true, but {why}")]);
    assert_eq!(required, refused);
}

#[test]
fn the_pin_may_stand_in_a_file_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pin");
    std::fs::write(&path, "9876\n").unwrap();
    let in_file = format!("PIN_FILE: {}", path.display());
    let config = read(&text().replace("PIN: \"1234\"", &in_file), &[]).unwrap();
    assert_eq!(config.files(), [path.as_path()], "it is watched");
    assert_eq!(config.hsm.unwrap().pin.expose(), "9876");
    let both = read(&text().replace("PIN: \"1234\"", &format!("PIN: \"1\"\n  {in_file}")), &[]);
    assert_eq!(
        both.unwrap_err(),
        ["PKCS11.PIN and PIN_FILE are both set; only one of them may be"]
    );
}

#[test]
fn every_mistake_is_named_and_no_value_shown() {
    let text = text()
        .replace("UNIX_SOCKET_PATH", "API_KEY: \"secret\"\n  UNIX_SOCKET_PATH")
        .replace("  CRK_ID", "  URL: https://kms\n  CRK_ID")
        .replace("  TOKEN_LABEL: kek\n", "")
        .replace("PIN: \"1234\"", "SESSIONS: 0")
        .replace("CRK_VERSION: 6d", "CRK_VERSION: nothex");
    let mistakes = read(&text, &[]).unwrap_err();
    let expected = [
        "PKCS11.SESSIONS must be a whole number from 1 to 64",
        "PKCS11.PIN is missing (or PIN_FILE, the file that holds it)",
        "PKCS11.TOKEN_LABEL is missing (or TOKEN_SERIAL, or SLOT)",
        "PKCS11.CRK_VERSION must be a UUID",
        "SERVER_CONFIG.API_KEY is for a key service; with the section PKCS11 there is none",
        "KP_CONFIG.URL is for a key service; with the section PKCS11 there is none",
    ];
    assert_eq!(mistakes.len(), expected.len(), "{mistakes:#?}");
    for (mistake, expected) in mistakes.iter().zip(expected) {
        assert!(mistake.starts_with(expected), "{mistake} is not {expected}");
    }
}

#[test]
fn version_and_pin_change_while_it_runs_and_the_rest_waits_for_a_restart() {
    let old = read(&text(), &[]).unwrap();
    let rotated = read(&text(), &[("CRK_VERSION", "0b8f5c11-27f5-4c3e-8f0e-5a7a2b9b3c02")]);
    assert!(old.needing_restart(&rotated.unwrap()).is_empty());
    let other_pin = read(&text(), &[("PIN", "4321")]);
    assert!(old.needing_restart(&other_pin.unwrap()).is_empty());
    let file = ("REFUSED_PIN_FILE", "/var/lib/keelson/refused-pin");
    for change in [("TOKEN_LABEL", "other"), ("SESSIONS", "3"), file] {
        assert_eq!(old.needing_restart(&read(&text(), &[change]).unwrap()), ["PKCS11"]);
    }
}
