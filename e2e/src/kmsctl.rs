//! kmsctl, the operator's tool, as the harness calls it.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::etcd::Etcd;
use crate::key_service::KeyService;
use crate::process;

/// kmsctl with the service's addresses and one API key in its environment.
#[derive(Debug, Clone)]
pub struct Kmsctl {
    program: PathBuf,
    instance_id: String,
    envs: Vec<(&'static str, String)>,
}

/// An API key of a new service ID.
#[derive(Debug, Clone)]
pub struct Credential {
    pub api_key_id: String,
    pub api_key: String,
}

impl Kmsctl {
    /// kmsctl as the administrator of `service`.
    pub fn new(program: &Path, service: &KeyService) -> Self {
        let envs = vec![
            ("KMS_URL", service.url.clone()),
            ("KMS_TOKEN_URL", service.token_url.clone()),
            ("KMS_CA_FILE", service.ca.display().to_string()),
            ("KMS_INSTANCE_ID", service.instance_id.clone()),
            ("KMS_API_KEY", service.admin_api_key.clone()),
        ];
        Self { program: program.to_owned(), instance_id: service.instance_id.clone(), envs }
    }

    /// The variables that kmsctl and the demo's `env.sh` share.
    pub fn envs(&self) -> &[(&'static str, String)] {
        &self.envs
    }

    /// Runs kmsctl and returns what it printed.
    ///
    /// # Errors
    /// When it fails, with all that it printed.
    pub fn run(&self, args: &[&str], stdin: &[u8]) -> Result<String> {
        let bytes = process::stdout(self.command(args), stdin)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Runs kmsctl with `-o json`.
    ///
    /// # Errors
    /// When it fails or prints no JSON.
    pub fn json(&self, args: &[&str], stdin: &[u8]) -> Result<Value> {
        let text = self.run(&[args, &["-o", "json"]].concat(), stdin)?;
        serde_json::from_str(&text)
            .map_err(|error| Error::answer("kmsctl", format!("{error}: {text}")))
    }

    /// What `kmsctl verify` finds in etcd, and its exit code: 0 all current, 1 something left.
    ///
    /// # Errors
    /// When it finds out nothing (its exit code 2), with all that it printed.
    pub fn verify(&self, etcd: &Etcd, args: &[&str]) -> Result<(i32, Value)> {
        let endpoint = etcd.url();
        let verify = ["verify", "-o", "json", "--etcd-endpoints", &endpoint];
        let output = process::output(self.command(&[&verify, args].concat()), b"")?;
        match output.status.code() {
            Some(code @ (0 | 1)) => serde_json::from_slice(&output.stdout)
                .map(|report| (code, report))
                .map_err(|error| Error::answer("kmsctl verify", error.to_string())),
            _ => Err(Error::answer(
                "kmsctl verify",
                String::from_utf8_lossy(&output.stderr).into_owned(),
            )),
        }
    }

    /// Makes a root key; returns its id.
    ///
    /// # Errors
    /// When the service refuses.
    pub fn create_key(&self, name: &str) -> Result<String> {
        text_of(&self.json(&["keys", "create", name], b"")?, "id")
    }

    /// Makes a root key that expires (RFC 3339); returns its id.
    ///
    /// # Errors
    /// When the service refuses.
    pub fn create_key_until(&self, name: &str, expires: &str) -> Result<String> {
        text_of(&self.json(&["keys", "create", name, "--expires", expires], b"")?, "id")
    }

    /// Gives the root key a new version.
    ///
    /// # Errors
    /// When the service refuses.
    pub fn rotate_key(&self, id: &str) -> Result<()> {
        self.run(&["keys", "rotate", id], b"").map(drop)
    }

    /// Makes a service ID with one role in the instance, and an API key for it.
    ///
    /// # Errors
    /// When the service refuses.
    pub fn create_credential(&self, name: &str, role: &str) -> Result<Credential> {
        let scope = ["--role", role, "--instance", &self.instance_id];
        let service = self.json(&[&["service-ids", "create", name], &scope[..]].concat(), b"")?;
        let service_id = text_of(&service, "id")?;
        let key = self.json(&["api-keys", "create", name, "--service-id", &service_id], b"")?;
        Ok(Credential { api_key_id: text_of(&key, "id")?, api_key: text_of(&key, "apikey")? })
    }

    /// Withdraws an API key and every token that was made with it.
    ///
    /// # Errors
    /// When the service refuses.
    pub fn revoke_api_key(&self, id: &str) -> Result<()> {
        self.run(&["api-keys", "revoke", id], b"").map(drop)
    }

    /// Explains a stored value.
    ///
    /// # Errors
    /// When it is none.
    pub fn inspect(&self, stored: &[u8]) -> Result<Value> {
        self.json(&["inspect", "-"], stored)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        // Of the caller's environment, KMS_API_KEY_FILE for one would win over what is set here.
        command.args(args).env_clear().envs(self.envs.iter().map(|(name, value)| (name, value)));
        command
    }
}

fn text_of(answer: &Value, member: &str) -> Result<String> {
    answer[member]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::answer("kmsctl", format!("no {member:?} in its answer")))
}
