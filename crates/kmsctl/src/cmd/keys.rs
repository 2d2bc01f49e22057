//! `kmsctl keys`: the keys of one instance. Root keys stay in the HSM; nothing here ever prints key material.

use std::io::{BufRead, Read, Write};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::ValueEnum;
use kms_api::client::{Call, KeyProtect, KeyQuery, NewKey};
use kms_api::rest::KeyResource;
use zeroize::Zeroizing;

use crate::connection::KeyAccess;
use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl keys create cluster-1                       make a root key in the HSM
  kmsctl keys list -o json
  kmsctl keys import old-crk --material-file crk.b64
  kmsctl keys rotate 7d2e…                           add a version; what older versions wrapped stays readable
  kmsctl keys disable 7d2e…                          what it wrapped is unreadable until `keys enable`
  kmsctl keys delete 7d2e…                           asks first
  kmsctl keys purge 7d2e…                            removes a deleted key for good; asks first";

/// The service's largest page.
const PAGE: u32 = 200;
const EVERY_STATE: [u8; 5] = [0, 1, 2, 3, 5];
/// The largest material that any service takes is far below.
const MAX_MATERIAL: u64 = 64 * 1024;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    access: KeyAccess,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show every key of the instance
    List {
        /// Destroyed keys as well
        #[arg(long)]
        all: bool,
    },
    /// Let the HSM make a key
    Create(Name),
    /// Make a key of existing material, which should then be destroyed everywhere else
    Import {
        #[command(flatten)]
        name: Name,
        /// File that holds the key material; - is standard input
        #[arg(long, value_name = "FILE")]
        material_file: PathBuf,
        /// How the material is written in the file
        #[arg(long, value_enum, default_value_t = Encoding::Base64)]
        encoding: Encoding,
    },
    /// Show one key
    Show {
        /// Id or alias
        id: String,
    },
    /// Add a version to a root key, which wraps from now on
    Rotate {
        /// Id or alias
        id: String,
        /// File that holds the material of the new version, for an imported key only; - is standard input
        #[arg(long, value_name = "FILE")]
        material_file: Option<PathBuf>,
        /// How the material is written in the file
        #[arg(long, value_enum, default_value_t = Encoding::Base64)]
        encoding: Encoding,
    },
    /// Suspend a key: it neither wraps nor unwraps, and plug-ins drop what they hold of it
    Disable {
        /// Id or alias
        id: String,
    },
    /// Make a suspended key usable again
    Enable {
        /// Id or alias
        id: String,
    },
    /// Destroy a key: what it wraps can never be read again
    Delete {
        /// Id or alias
        id: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Remove a deleted key for good, out of the HSM too; needs the role KeyPurge, 4 hours after it was deleted
    Purge {
        /// Id
        id: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Name {
    /// What people call it
    name: String,
    /// What it is for
    #[arg(long)]
    description: Option<String>,
    /// Another name by which it can be addressed; may be given several times
    #[arg(long = "alias", value_name = "ALIAS")]
    aliases: Vec<String>,
    /// A standard key, whose material the service gives out, instead of a root key
    #[arg(long)]
    standard: bool,
    /// When it ends to wrap, such as 2027-11-24T00:00:00Z; what it wrapped it goes on unwrapping
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Encoding {
    Base64,
    Hex,
    Raw,
}

pub(crate) async fn run(args: Args, output: &mut Output<'_>) -> Result<(), Error> {
    let (client, call) = (args.access.client()?, args.access.call());
    match args.verb {
        Verb::List { all } => list(&client, all, call, output).await,
        Verb::Create(name) => show(client.create_key(&name.into(), call).await?, output),
        Verb::Import { name, material_file, encoding } => {
            let material = material(&material_file, encoding)?;
            show(client.import_key(&name.into(), &material, call).await?, output)
        }
        Verb::Show { id } => show(client.get_key(&id, call).await?, output),
        Verb::Rotate { id, material_file, encoding } => {
            let new = material_file.map(|file| material(&file, encoding)).transpose()?;
            client.rotate_key(&id, new.as_ref().map(|bytes| bytes.as_slice()), call).await?;
            show(client.get_key(&id, call).await?, output)
        }
        Verb::Disable { id } => {
            client.disable_key(&id, call).await?;
            show(client.get_key(&id, call).await?, output)
        }
        Verb::Enable { id } => {
            client.enable_key(&id, call).await?;
            show(client.get_key(&id, call).await?, output)
        }
        Verb::Delete { id, yes } => {
            if !yes {
                let key = client.get_key(&id, call).await?;
                let name = key.name.as_deref().unwrap_or("(no name)");
                eprintln!(
                    "Everything that the key {name:?} ({id}) wraps becomes unreadable for ever."
                );
                confirm("delete", &id, &mut std::io::stdin().lock())?;
            }
            client.delete_key(&id, call).await?;
            output.thing(&[("deleted", Some(id.clone()))], &serde_json::json!({"deleted": id}))
        }
        Verb::Purge { id, yes } => {
            if !yes {
                // The role that purges reads nothing: not even a name.
                eprintln!("The HSM destroys the key {id}, and nothing is known of it any more.");
                confirm("purge", &id, &mut std::io::stdin().lock())?;
            }
            client.purge_key(&id, call).await?;
            output.thing(&[("purged", Some(id.clone()))], &serde_json::json!({"purged": id}))
        }
    }
}

async fn list(
    client: &KeyProtect,
    all: bool,
    call: Call<'_>,
    output: &mut Output<'_>,
) -> Result<(), Error> {
    let states = if all { EVERY_STATE.to_vec() } else { Vec::new() };
    let mut keys: Vec<KeyResource> = Vec::new();
    for page in 0.. {
        let query =
            KeyQuery { limit: Some(PAGE), offset: Some(page * PAGE), states: states.clone() };
        let found = client.list_keys(&query, call).await?.resources;
        let last = found.len() < PAGE as usize;
        keys.extend(found);
        if last {
            break;
        }
    }
    let row = |key: &KeyResource| {
        let text = |member: &Option<String>| member.clone().unwrap_or_default();
        [
            text(&key.id),
            text(&key.name),
            kind(key),
            state(key).to_owned(),
            version(key).unwrap_or_default(),
            text(&key.creation_date),
        ]
    };
    let rows = keys.iter().map(row).collect();
    output.list(["ID", "NAME", "KIND", "STATE", "VERSION", "CREATED"], rows, &keys)
}

fn show(mut key: KeyResource, output: &mut Output<'_>) -> Result<(), Error> {
    // The service gives out a standard key's material; a terminal and its scrollback are no place for it.
    key.payload = None;
    let members = [
        ("id", key.id.clone()),
        ("name", key.name.clone()),
        ("aliases", Some(key.aliases.join(", ")).filter(|names| !names.is_empty())),
        ("description", key.description.clone()),
        ("kind", Some(kind(&key))),
        ("state", Some(state(&key).to_owned())),
        ("version", version(&key)),
        ("created", key.creation_date.clone()),
        ("created by", key.created_by.clone()),
        ("rotated", key.last_rotate_date.clone()),
        ("expires", key.expiration_date.clone()),
        ("deleted", key.deletion_date.clone()),
    ];
    output.thing(&members, &key)
}

fn confirm(verb: &str, id: &str, input: &mut impl BufRead) -> Result<(), Error> {
    eprint!("Type the id to {verb} it: ");
    let failed = |cause| Error::File { path: "standard input".to_owned(), cause };
    std::io::stderr().flush().map_err(failed)?;
    let mut answer = String::new();
    input.take(1024).read_line(&mut answer).map_err(failed)?;
    if answer.trim() == id {
        return Ok(());
    }
    Err(Error::NotConfirmed { expected: id.to_owned() })
}

fn kind(key: &KeyResource) -> String {
    let kind = if key.extractable == Some(true) { "standard" } else { "root" };
    if key.imported == Some(true) { format!("{kind}, imported") } else { kind.to_owned() }
}

fn state(key: &KeyResource) -> &'static str {
    match key.state {
        Some(0) => "pre-activation",
        Some(1) => "active",
        Some(2) => "suspended",
        Some(3) => "deactivated",
        Some(5) => "destroyed",
        _ => "",
    }
}

fn version(key: &KeyResource) -> Option<String> {
    key.key_version.as_ref().map(|version| version.id.clone())
}

impl From<Name> for NewKey {
    fn from(name: Name) -> Self {
        let Name { name, description, aliases, standard, expires } = name;
        NewKey { name, description, aliases, extractable: standard, expires }
    }
}

fn material(path: &Path, encoding: Encoding) -> Result<Zeroizing<Vec<u8>>, Error> {
    let what = path.display().to_string();
    let text = read(path).map_err(|cause| Error::File { path: what.clone(), cause })?;
    match decode(&text, encoding) {
        Some(material) if !material.is_empty() => Ok(material),
        Some(_) => Err(Error::Input { what, cause: "it is empty".to_owned() }),
        None => {
            let cause = "this is not in the encoding that --encoding names (base64, unless given)";
            Err(Error::Input { what, cause: cause.to_owned() })
        }
    }
}

fn read(path: &Path) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut text = Zeroizing::new(Vec::with_capacity(8 * 1024));
    if path == Path::new("-") {
        std::io::stdin().lock().take(MAX_MATERIAL).read_to_end(&mut text)?;
    } else {
        std::fs::File::open(path)?.take(MAX_MATERIAL).read_to_end(&mut text)?;
    }
    Ok(text)
}

fn decode(text: &[u8], encoding: Encoding) -> Option<Zeroizing<Vec<u8>>> {
    let decoded = match encoding {
        Encoding::Raw => text.to_vec(),
        Encoding::Base64 => STANDARD.decode(text.trim_ascii()).ok()?,
        Encoding::Hex => hex(text.trim_ascii())?,
    };
    Some(Zeroizing::new(decoded))
}

fn hex(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (pairs, rest) = text.as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_exact_id_confirms() {
        assert!(confirm("purge", "7d2e", &mut "7d2e\n".as_bytes()).is_ok());
        for answer in ["", "\n", "y\n", "7d2\n", "7d2e7d2e\n"] {
            let refused = confirm("purge", "7d2e", &mut answer.as_bytes());
            assert!(matches!(refused, Err(Error::NotConfirmed { .. })), "{answer:?}");
        }
    }

    #[test]
    fn material_in_the_wrong_encoding_is_refused() {
        assert!(decode(b"not base64!", Encoding::Base64).is_none());
        assert!(decode(b"abc", Encoding::Hex).is_none());
        assert!(decode(b"+f", Encoding::Hex).is_none());
    }

    proptest! {
        #[test]
        fn each_encoding_gives_back_the_material(material: Vec<u8>) {
            let hex: String = material.iter().map(|byte| format!("{byte:02x}")).collect();
            let base64 = format!("{}\n", STANDARD.encode(&material));
            prop_assert_eq!(&*decode(&material, Encoding::Raw).unwrap(), &material);
            prop_assert_eq!(&*decode(hex.as_bytes(), Encoding::Hex).unwrap(), &material);
            prop_assert_eq!(&*decode(base64.as_bytes(), Encoding::Base64).unwrap(), &material);
        }

        #[test]
        fn any_text_is_decoded_or_refused(text: Vec<u8>) {
            for encoding in [Encoding::Hex, Encoding::Base64] {
                if let Some(material) = decode(&text, encoding) {
                    prop_assert!(material.len() <= text.len());
                }
            }
        }
    }
}
