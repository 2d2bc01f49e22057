//! `kmsctl api-keys`: what a plug-in shows to the token service. An API key is shown once, when it is made or
//! gets a new secret.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kms_api::rest::{ApiKey, NewApiKey, Rotation};
use kms_core::secret::SecretText;

use crate::connection::Access;
use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl api-keys create node-1 --service-id ServiceId-… --save /etc/kmsplugin/api-key
  kmsctl api-keys list
  kmsctl api-keys lock ApiKey-…
  kmsctl api-keys rotate ApiKey-… --overlap 3600 --save /etc/kmsplugin/api-key.new
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
    /// Make an API key useless until it is unlocked, and at once every token that was got with it
    Lock {
        /// The id (not the API key), as `list` shows it
        id: String,
    },
    /// Make a locked API key good again
    Unlock {
        /// The id (not the API key), as `list` shows it
        id: String,
    },
    /// Give an API key a new secret under the same id, and show it, this once
    Rotate {
        /// The id (not the API key), as `list` shows it
        id: String,
        /// How long the secret before it is taken as well, so that whoever uses it can change over, and an answer that is
        /// lost costs nothing. The last administrator's API key needs at least 60
        #[arg(long, value_name = "SECONDS", default_value_t = 0)]
        overlap: u32,
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
            let made = management.create_api_key(&NewApiKey { name, service_id }, call).await?;
            hand_over(made, file, save.as_deref(), output)
        }
        Verb::Lock { id } => {
            management.lock_api_key(&id, call).await?;
            output.thing(&[("locked", Some(id.clone()))], &serde_json::json!({"locked": id}))
        }
        Verb::Unlock { id } => {
            management.unlock_api_key(&id, call).await?;
            output.thing(&[("unlocked", Some(id.clone()))], &serde_json::json!({"unlocked": id}))
        }
        Verb::Rotate { id, overlap, save } => {
            let file = save.as_deref().map(NewFile::create).transpose()?;
            let rotation = Rotation { overlap_seconds: overlap };
            let made = management.rotate_api_key(&id, &rotation, call).await?;
            hand_over(made, file, save.as_deref(), output)
        }
        Verb::Revoke { id } => {
            management.revoke_api_key(&id, call).await?;
            output.thing(&[("revoked", Some(id.clone()))], &serde_json::json!({"revoked": id}))
        }
    }
}

fn show(keys: Vec<ApiKey>, output: &mut Output<'_>) -> Result<(), Error> {
    let row = |one: &ApiKey| {
        let state = if one.locked { "locked" } else { "good" };
        let since = one.rotated_at.as_ref().unwrap_or(&one.created_at);
        [&one.id, &one.name, &one.service_id, state, since].map(str::to_owned)
    };
    output.list(
        ["ID", "NAME", "SERVICE ID", "STATE", "SECRET SINCE"],
        keys.iter().map(row).collect(),
        &keys,
    )
}

/// Into the file, if there is one, or on the screen.
fn hand_over(
    mut made: ApiKey,
    file: Option<NewFile<'_>>,
    path: Option<&Path>,
    output: &mut Output<'_>,
) -> Result<(), Error> {
    if let Some(file) = file
        && let Some(key) = made.apikey.take()
    {
        file.keep(&key)?;
    }
    show_new(&made, path, output)
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
