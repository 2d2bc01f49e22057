//! IBM's own Python client (PyPI `redstone`), unmodified, against this server: it creates, wraps, unwraps, rotates and
//! deletes.
//!
//! Needs python3 with venv and pip. Without them the test says so and passes, except in CI, where it fails.

use crate::harness::Server;
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGE: &str = "redstone==0.6.2";

#[tokio::test]
async fn ibms_python_client_does_all_it_can_do_with_a_root_key() {
    let python = match client() {
        Ok(python) => python,
        Err(why) if std::env::var("CI").as_deref() == Ok("true") => panic!("{PACKAGE}: {why}"),
        Err(why) => return eprintln!("skipped: {PACKAGE} cannot be installed here: {why}"),
    };
    let server = Server::start().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/server/redstone_session.py");
    let mut command = Command::new(python);
    command
        .arg(script)
        .env("REQUESTS_CA_BUNDLE", server.ca())
        .env("KMS_URL", format!("https://{}", server.keys))
        .env("KMS_IAM_URL", format!("https://{}", server.tokens))
        .env("KMS_INSTANCE_ID", server.instance().to_string())
        .env("KMS_API_KEY", server.made.admin.api_key.expose());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{failed}");
    assert_eq!(said.lines().last(), Some("all done"));
}

/// The Python of a virtual environment in the target directory that has the client.
fn client() -> Result<PathBuf, String> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().ok_or("no target directory")?;
    let home = target.join("py").join(PACKAGE.replace("==", "-"));
    let python = home.join("bin/python");
    let ready = home.join(".ready");
    if ready.exists() {
        return Ok(python);
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&home))?;
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", PACKAGE]))?;
    std::fs::write(ready, PACKAGE).map_err(|e| e.to_string())?;
    Ok(python)
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)))
}
