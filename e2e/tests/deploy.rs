//! The files that an operator copies are files that the programs accept.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use keelson_e2e::assets::{Programs, root};
use keelson_e2e::pki::{self, Pki};
use keelson_e2e::{Error, Result, process};

#[test]
fn the_plug_in_accepts_the_sample_configuration_once_it_is_filled_in() -> Result<()> {
    let sample = sample("kmsplugin-config.yaml")?;
    let refused = check(&sample, "placeholders")?;
    assert!(!refused.status.success(), "the placeholders were taken for values");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("API_KEY"), "{refused:?}");

    let dir = folder("filled-in")?;
    let pki = Pki::create(&dir)?;
    let filled_in = sample
        .replace("<API_KEY>", "an-api-key")
        .replace("<CRK_ID>", "7c1d2f0e-93a5-4d8e-b1f7-0f6a2c4e8d11")
        .replace("<INSTANCE_ID>", "2b7e1516-28ae-4d2a-a6ab-f7158809cf4f")
        .replace("/root/kmsplugin/ca.crt", &pki.ca.display().to_string());
    let accepted = check(&filled_in, "filled-in")?;
    assert!(accepted.status.success(), "{}", String::from_utf8_lossy(&accepted.stderr));
    Ok(())
}

#[test]
fn the_three_files_name_the_same_socket_and_port() -> Result<()> {
    let config = sample("kmsplugin-config.yaml")?;
    let encryption = sample("encryption-config.yaml")?;
    let pod = sample("kmsplugin.yaml")?;
    let socket = "/etc/origin/master/keyprotectprovider.sock";
    assert!(config.contains(&format!("UNIX_SOCKET_PATH: \"{socket}\"")));
    assert!(encryption.contains(&format!("endpoint: unix://{socket}")));
    assert!(pod.contains("mountPath: \"/etc/origin/master\""));
    assert!(config.contains("HEALTHZ_PORT: \":20358\""));
    assert_eq!(pod.matches("port: 20358").count(), 2);
    // The original's limits.
    let words: Vec<&str> = pod.split_whitespace().collect();
    let limits = ["limits:", "cpu:", "12m", "memory:", "15Mi"];
    assert!(words.windows(limits.len()).any(|window| window == limits), "{pod}");
    Ok(())
}

fn sample(name: &str) -> Result<String> {
    let path = root().join("deploy/static-pod").join(name);
    fs::read_to_string(&path).map_err(Error::machine(format!("read {}", path.display())))
}

fn folder(name: &str) -> Result<PathBuf> {
    let dir = keelson_e2e::chain::run_folder(&format!("e2e/deploy/{name}"));
    fs::create_dir_all(&dir).map_err(Error::machine(format!("make {}", dir.display())))?;
    Ok(dir)
}

/// `kmsplugin --check-config` with this text in the file that the environment variable config_file names.
fn check(text: &str, name: &str) -> Result<std::process::Output> {
    let file = folder(name)?.join("kmsplugin-config.yaml");
    pki::write_private(&file, text)?;
    let mut command = Command::new(Programs::find()?.kmsplugin);
    command.arg("--check-config").env_clear().env("config_file", &file);
    process::output(command, b"")
}
