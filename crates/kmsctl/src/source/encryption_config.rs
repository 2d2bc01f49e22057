//! kube-apiserver's EncryptionConfiguration: who writes a resource and who else reads it.
//!
//! The file may hold keys in plain text. They are never taken out of it, and no message quotes it.

use std::fmt;

use serde::Deserialize;
use serde::de::IgnoredAny;
use thiserror::Error;

/// Largest file read; a real one has a few kilobytes.
pub const MAX_CONFIG: usize = 1024 * 1024;

/// A whole file: its blocks in order. The first block that names a resource is the one that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncryptionConfig {
    pub blocks: Vec<Block>,
}

/// Resources that are stored in the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub resources: Vec<String>,
    /// The first writes; all read, in this order. Never empty.
    pub providers: Vec<Provider>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Provider {
    Identity,
    /// Local keys; the first of them writes.
    Local {
        kind: Local,
        keys: Vec<String>,
    },
    KmsV1 {
        name: String,
    },
    KmsV2 {
        name: String,
        endpoint: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Local {
    AesCbc,
    AesGcm,
    Secretbox,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    #[error("it has {0} bytes, at most {MAX_CONFIG} are read")]
    TooLong(usize),
    #[error("it is no valid YAML of this form: {0}")]
    Yaml(String),
    #[error("it is of kind {0:?}, an EncryptionConfiguration is needed")]
    Kind(String),
    #[error("block {block} names no {what}")]
    Empty { block: usize, what: &'static str },
    #[error(
        "provider {provider} of block {block} must be one of identity, aescbc, aesgcm, secretbox and kms"
    )]
    Provider { block: usize, provider: usize },
    #[error(
        "provider {provider} of block {block}: apiVersion of kms must be v1 or v2, not {version:?}"
    )]
    Version { block: usize, provider: usize, version: String },
}

impl EncryptionConfig {
    /// Reads the file's text, YAML or JSON.
    ///
    /// # Errors
    /// It is not such a file. Whether kube-apiserver takes it is for kube-apiserver to say.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        if text.len() > MAX_CONFIG {
            return Err(ConfigError::TooLong(text.len()));
        }
        // Without the snippet: it would show the lines around the mistake, and with them a key.
        let options = serde_saphyr::options! { with_snippet: false };
        let file: File = serde_saphyr::from_str_with_options(text, options)
            .map_err(|error| ConfigError::Yaml(error.to_string()))?;
        if file.kind != "EncryptionConfiguration" {
            return Err(ConfigError::Kind(file.kind));
        }
        let blocks = file.resources.into_iter().zip(1..).map(block).collect::<Result<_, _>>()?;
        Ok(Self { blocks })
    }

    /// The block by which a resource is stored. None: it is stored as it is.
    #[must_use]
    pub fn block_of(&self, resource: &str) -> Option<&Block> {
        self.blocks.iter().find(|block| block.resources.iter().any(|named| covers(named, resource)))
    }
}

impl Block {
    #[must_use]
    pub fn writer(&self) -> &Provider {
        &self.providers[0]
    }
}

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Local::AesCbc => "aescbc",
            Local::AesGcm => "aesgcm",
            Local::Secretbox => "secretbox",
        })
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Provider::Identity => f.write_str("identity"),
            Provider::Local { kind, .. } => kind.fmt(f),
            Provider::KmsV1 { name } => write!(f, "kms v1 {name}"),
            Provider::KmsV2 { name, .. } => write!(f, "kms v2 {name}"),
        }
    }
}

/// `*.*` covers everything, `*.apps` a group, `*.` the group without a name.
fn covers(named: &str, resource: &str) -> bool {
    if named == resource || named == "*.*" {
        return true;
    }
    let group = resource.split_once('.').map_or("", |(_, group)| group);
    named.strip_prefix("*.").is_some_and(|wanted| wanted == group)
}

fn block((wire, block): (WireBlock, usize)) -> Result<Block, ConfigError> {
    if wire.resources.is_empty() {
        return Err(ConfigError::Empty { block, what: "resources" });
    }
    if wire.providers.is_empty() {
        return Err(ConfigError::Empty { block, what: "providers" });
    }
    let providers = wire.providers.into_iter().zip(1..);
    let providers = providers.map(|(wire, number)| provider(wire, block, number));
    Ok(Block { resources: wire.resources, providers: providers.collect::<Result<_, _>>()? })
}

fn provider(wire: WireProvider, block: usize, provider: usize) -> Result<Provider, ConfigError> {
    let local = |kind, wire: WireKeys| Provider::Local {
        kind,
        keys: wire.keys.into_iter().map(|key| key.name).collect(),
    };
    match wire {
        WireProvider {
            identity: Some(_),
            aescbc: None,
            aesgcm: None,
            secretbox: None,
            kms: None,
        } => Ok(Provider::Identity),
        WireProvider {
            identity: None,
            aescbc: Some(keys),
            aesgcm: None,
            secretbox: None,
            kms: None,
        } => Ok(local(Local::AesCbc, keys)),
        WireProvider {
            identity: None,
            aescbc: None,
            aesgcm: Some(keys),
            secretbox: None,
            kms: None,
        } => Ok(local(Local::AesGcm, keys)),
        WireProvider {
            identity: None,
            aescbc: None,
            aesgcm: None,
            secretbox: Some(keys),
            kms: None,
        } => Ok(local(Local::Secretbox, keys)),
        WireProvider {
            identity: None,
            aescbc: None,
            aesgcm: None,
            secretbox: None,
            kms: Some(kms),
        } => match kms.api_version.as_deref() {
            None | Some("v1") => Ok(Provider::KmsV1 { name: kms.name }),
            Some("v2") => Ok(Provider::KmsV2 { name: kms.name, endpoint: kms.endpoint }),
            Some(version) => {
                Err(ConfigError::Version { block, provider, version: version.to_owned() })
            }
        },
        _ => Err(ConfigError::Provider { block, provider }),
    }
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    resources: Vec<WireBlock>,
}

#[derive(Deserialize)]
struct WireBlock {
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    providers: Vec<WireProvider>,
}

#[derive(Deserialize)]
struct WireProvider {
    identity: Option<IgnoredAny>,
    aescbc: Option<WireKeys>,
    aesgcm: Option<WireKeys>,
    secretbox: Option<WireKeys>,
    kms: Option<WireKms>,
}

/// The secrets beside the names are not read.
#[derive(Deserialize)]
struct WireKeys {
    #[serde(default)]
    keys: Vec<WireKey>,
}

#[derive(Deserialize)]
struct WireKey {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireKms {
    api_version: Option<String>,
    name: String,
    #[serde(default)]
    endpoint: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: &str = "\
kind: EncryptionConfiguration
apiVersion: apiserver.config.k8s.io/v1
resources:
  - resources: [secrets, widgets.example.com]
    providers:
      - kms: {apiVersion: v2, name: new, endpoint: 'unix:///run/a.sock', timeout: 3s}
      - kms: {name: 'old:one', endpoint: 'unix:///run/a.sock', cachesize: 100}
      - aescbc: {keys: [{name: key1, secret: c2VjcmV0}, {name: key0, secret: c2VjcmV0}]}
      - identity: {}
  - resources: ['*.apps', configmaps]
    providers:
      - secretbox: {keys: [{name: k, secret: c2VjcmV0}]}
";

    fn error(text: &str) -> ConfigError {
        EncryptionConfig::parse(text).unwrap_err()
    }

    #[test]
    fn providers_keep_their_order_and_their_names() {
        let config = EncryptionConfig::parse(FILE).unwrap();
        let providers: Vec<_> =
            config.blocks[0].providers.iter().map(ToString::to_string).collect();
        assert_eq!(providers, ["kms v2 new", "kms v1 old:one", "aescbc", "identity"]);
        let keys = vec!["key1".to_owned(), "key0".to_owned()];
        assert_eq!(config.blocks[0].providers[2], Provider::Local { kind: Local::AesCbc, keys });
        let writer =
            |resource: &str| config.block_of(resource).map(|block| block.writer().to_string());
        assert_eq!(writer("secrets").as_deref(), Some("kms v2 new"));
        assert_eq!(writer("deployments.apps").as_deref(), Some("secretbox"));
        assert_eq!(writer("pods"), None);
    }

    #[test]
    fn what_is_wrong_is_said_without_quoting_the_file() {
        assert_eq!(error("kind: Pod"), ConfigError::Kind("Pod".into()));
        let secret =
            FILE.replace("secret: c2VjcmV0}, {name: key0", "secret: c2VjcmV0}, {nam: key0");
        let text = error(&secret).to_string();
        assert!(text.contains("line 8") && !text.contains("c2VjcmV0"), "{text}");
        let both = FILE.replace("- identity: {}", "- {identity: {}, kms: {name: x}}");
        assert_eq!(error(&both), ConfigError::Provider { block: 1, provider: 4 });
        let version = FILE.replace("apiVersion: v2", "apiVersion: v3");
        let expected = ConfigError::Version { block: 1, provider: 1, version: "v3".into() };
        assert_eq!(error(&version), expected);
        let none = "kind: EncryptionConfiguration\nresources: [{resources: [a]}]";
        assert_eq!(error(none), ConfigError::Empty { block: 1, what: "providers" });
        assert_eq!(error(&" ".repeat(MAX_CONFIG + 1)), ConfigError::TooLong(MAX_CONFIG + 1));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text: String, at in 0..FILE.len(), byte in "[ -~\n]") {
            let _ = EncryptionConfig::parse(&text);
            let mut changed = FILE.to_owned();
            changed.replace_range(at..=at, &byte);
            let _ = EncryptionConfig::parse(&changed);
        }
    }
}
