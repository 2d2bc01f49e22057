//! `kmsctl api-keys`: what a plug-in shows to the token service. An API key is shown once, when it is made.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kms_api::rest::{ApiKey, NewApiKey};
use kms_core::secret::SecretText;

use crate::connection::Access;
use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl api-keys create node-1 --service-id ServiceId-… --save /etc/kmsplugin/api-key
  kmsctl api-keys list
  kmsctl api-keys revoke ApiKey-…";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    access: Access,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show every API key that can be used, by id; never the keys themselves
    List,
    /// Make an API key and show it, this once
    Create {
        /// What people call it, such as the node that uses it
        name: String,
        /// For whom it speaks
        #[arg(long, value_name = "ID")]
        service_id: String,
        /// Write it to a new file that only its owner can read, instead of showing it
        #[arg(long, value_name = "FILE")]
        save: Option<PathBuf>,
    },
    /// Make an API key useless, and at once every token that was got with it
    Revoke {
        /// The id (not the API key), as `list` shows it
        id: String,
    },
}

pub(crate) async fn run(args: Args, output: &mut Output<'_>) -> Result<(), Error> {
    let (management, call) = (args.access.management()?, args.access.call());
    match args.verb {
        Verb::List => show(management.api_keys(call).await?, output),
        Verb::Create { name, service_id, save } => {
            let file = save.as_deref().map(NewFile::create).transpose()?;
            let mut made = management.create_api_key(&NewApiKey { name, service_id }, call).await?;
            if let Some(file) = file
                && let Some(key) = made.apikey.take()
            {
                file.keep(&key)?;
            }
            show_new(&made, save.as_deref(), output)
        }
        Verb::Revoke { id } => {
            management.revoke_api_key(&id, call).await?;
            output.thing(&[("revoked", Some(id.clone()))], &serde_json::json!({"revoked": id}))
        }
    }
}

fn show(keys: Vec<ApiKey>, output: &mut Output<'_>) -> Result<(), Error> {
    let row = |one: &ApiKey| {
        [one.id.clone(), one.name.clone(), one.service_id.clone(), one.created_at.clone()]
    };
    output.list(["ID", "NAME", "SERVICE ID", "CREATED"], keys.iter().map(row).collect(), &keys)
}

fn show_new(made: &ApiKey, saved: Option<&Path>, output: &mut Output<'_>) -> Result<(), Error> {
    let members = [
        ("id", Some(made.id.clone())),
        ("name", Some(made.name.clone())),
        ("service id", Some(made.service_id.clone())),
        ("api key", made.apikey.as_ref().map(|key| key.expose().to_owned())),
        ("saved to", saved.map(|path| path.display().to_string())),
    ];
    output.thing(&members, made)?;
    match saved {
        Some(_) => Ok(()),
        None => output.note("Keep the API key now: it is not stored and cannot be shown again."),
    }
}

/// Made before the API key is, because an API key that cannot be saved would be lost; removed again unless one came.
struct NewFile<'a> {
    path: &'a Path,
    file: Option<File>,
}

impl<'a> NewFile<'a> {
    fn create(path: &'a Path) -> Result<Self, Error> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|cause| failed(path, cause))?;
        Ok(NewFile { path, file: Some(file) })
    }

    fn keep(mut self, key: &SecretText) -> Result<(), Error> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        file.write_all(key.expose().as_bytes())
            .and_then(|()| file.write_all(b"\n"))
            .and_then(|()| file.sync_all())
            .map_err(|cause| failed(self.path, cause))
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if self.file.is_some() {
            // It is empty, and the failure that led here is what the operator must read.
            let _ = std::fs::remove_file(self.path);
        }
    }
}

fn failed(path: &Path, cause: std::io::Error) -> Error {
    Error::File { path: path.display().to_string(), cause }
}
