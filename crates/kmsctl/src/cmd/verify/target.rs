//! What to look at and what to compare it with: from the options, the encryption configuration and the plug-in's
//! Status.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use kms_api::client::causes;
use kms_api::grpc::connect;
use kms_api::grpc::v2::StatusRequest;
use kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::Args;
use super::census::Found;
use super::judge::{Expected, KeyIds};
use crate::error::Error;
use crate::source::encryption_config::{EncryptionConfig, MAX_CONFIG, Provider};
use crate::source::registry;

/// Where to look.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// None: everything that the configuration does not name, which must hold nothing encrypted. A block that was
    /// taken out of the file too early leaves objects behind that nobody can read.
    pub(super) resource: Option<String>,
    /// Between the prefix and the namespace.
    pub(super) folder: String,
    /// Folders inside this one that are another target's.
    others: Vec<String>,
}

impl Target {
    /// The resource of the object at `key`, which begins behind the prefix. None: it is not to be counted here.
    pub(super) fn resource_of(&self, key: &[u8], found: &Found) -> Option<String> {
        if self.others.iter().any(|folder| key.starts_with(folder.as_bytes())) {
            return None;
        }
        match &self.resource {
            Some(resource) => Some(resource.clone()),
            None if *found == Found::Identity => None,
            None => {
                let folder = key.split(|byte| *byte == b'/').next().unwrap_or_default();
                Some(String::from_utf8_lossy(folder).into_owned())
            }
        }
    }
}

/// The resources that were asked for, or all of the configuration's, or secrets.
pub(super) fn targets(
    asked: &[String],
    config: Option<&EncryptionConfig>,
    prefix: &str,
) -> Result<Vec<Target>, Error> {
    let configured = config.iter().flat_map(|config| &config.blocks);
    let mut resources: Vec<String> = match (asked, config) {
        ([], Some(_)) => configured.flat_map(|block| block.resources.clone()).collect(),
        ([], None) => vec!["secrets".to_owned()],
        (asked, _) => asked.to_vec(),
    };
    let mut seen = Vec::new();
    resources.retain(|resource| {
        let new = !seen.contains(resource);
        seen.push(resource.clone());
        new
    });
    let folder = |resource: &String| {
        registry::folder(resource)
            .map_err(|cause| Error::Input { what: format!("what lies under {prefix}"), cause })
    };
    let folders = resources.iter().map(folder).collect::<Result<Vec<_>, _>>()?;
    let target = |(resource, folder): (String, &String)| {
        let inside = |other: &&String| *other != folder && other.starts_with(folder.as_str());
        let others = folders.iter().filter(inside).cloned().collect();
        Target { resource: Some(resource), folder: folder.clone(), others }
    };
    let mut targets: Vec<Target> = resources.into_iter().zip(&folders).map(target).collect();
    if asked.is_empty() && config.is_some() && !folders.contains(&String::new()) {
        targets.push(Target { resource: None, folder: String::new(), others: folders });
    }
    Ok(targets)
}

/// Reads the configuration, and asks for the key_ids under which things are written now.
pub(super) async fn expected(args: &Args, limit: Duration) -> Result<Expected, Error> {
    let config = args.encryption_config.as_deref().map(read).transpose()?;
    let key_ids = match (&args.key_id, &args.socket, &config) {
        (Some(key_id), _, _) => KeyIds::Given(key_id.clone()),
        (None, Some(socket), _) => KeyIds::Given(current_key_id(socket, limit).await?),
        (None, None, Some(config)) => ask_writers(config, limit).await?,
        (None, None, None) => KeyIds::default(),
    };
    Ok(Expected { config, key_ids })
}

fn read(path: &Path) -> Result<EncryptionConfig, Error> {
    let fail = |cause| Error::File { path: path.display().to_string(), cause };
    let mut text = Zeroizing::new(String::new());
    let file = File::open(path).map_err(fail)?;
    file.take(MAX_CONFIG as u64 + 1).read_to_string(&mut text).map_err(fail)?;
    EncryptionConfig::parse(&text).map_err(|error| Error::Input {
        what: path.display().to_string(),
        cause: error.to_string(),
    })
}

/// Only what writes has a current key_id: what a provider further down wrote is to be rewritten in any case.
async fn ask_writers(config: &EncryptionConfig, limit: Duration) -> Result<KeyIds, Error> {
    let mut key_ids = BTreeMap::new();
    for block in &config.blocks {
        if let Provider::KmsV2 { name, endpoint } = block.writer() {
            let socket = socket_of(endpoint).ok_or_else(|| Error::Socket {
                socket: endpoint.clone(),
                cause: "the endpoint is not of the form unix:///path or unix:///@name".to_owned(),
            })?;
            key_ids.insert(name.clone(), current_key_id(&socket, limit).await?);
        }
    }
    Ok(KeyIds::ByProvider(key_ids))
}

/// `unix:///path`, or `unix:///@name` in the abstract namespace. What else a URL could be is left to `--socket`.
fn socket_of(endpoint: &str) -> Option<String> {
    let path = endpoint.strip_prefix("unix://")?;
    let plain = path.starts_with('/') && !path.contains(['%', '?', '#']);
    plain.then(|| path.strip_prefix("/@").map_or(path.to_owned(), |name| format!("@{name}")))
}

async fn current_key_id(socket: &str, limit: Duration) -> Result<String, Error> {
    let fail = |cause| Error::Socket { socket: socket.to_owned(), cause };
    let ask = async {
        let channel = connect(socket).await.map_err(|error| fail(causes(&error)))?;
        let status = KeyManagementServiceClient::new(channel).status(StatusRequest {}).await;
        let status = status.map_err(|status| Error::Status {
            socket: socket.to_owned(),
            cause: format!("{:?}: {}", status.code(), status.message()),
        })?;
        Ok(status.into_inner().key_id)
    };
    timeout(limit, ask).await.unwrap_or_else(|_| Err(fail("no answer in time".to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_path_or_an_abstract_name() {
        assert_eq!(socket_of("unix:///run/kms.sock").as_deref(), Some("/run/kms.sock"));
        assert_eq!(socket_of("unix:///@kms.sock").as_deref(), Some("@kms.sock"));
        for other in ["unix://run/kms.sock", "unix:///a%20b", "tcp://1.2.3.4:5", "unix://@kms"] {
            assert_eq!(socket_of(other), None, "{other}");
        }
    }

    #[test]
    fn each_resource_is_counted_once() {
        let text = "kind: EncryptionConfiguration\nresources:\n  \
                    - {resources: [secrets, secrets], providers: [identity: {}]}\n  \
                    - {resources: ['*.*'], providers: [identity: {}]}\n";
        let config = EncryptionConfig::parse(text).unwrap();
        let targets = targets(&[], Some(&config), "/registry/").unwrap();
        assert_eq!(targets.len(), 2);
        let counted =
            |target: &Target, key: &str| target.resource_of(key.as_bytes(), &Found::Identity);
        assert_eq!(counted(&targets[0], "secrets/a/b").as_deref(), Some("secrets"));
        assert_eq!(counted(&targets[1], "secrets/a/b"), None);
        assert_eq!(counted(&targets[1], "pods/a/b").as_deref(), Some("*.*"));
    }

    #[test]
    fn what_the_configuration_does_not_name_must_not_be_encrypted() {
        let text = "kind: EncryptionConfiguration\nresources:\n  \
                    - {resources: [secrets], providers: [identity: {}]}\n";
        let config = EncryptionConfig::parse(text).unwrap();
        let given = targets(&[], Some(&config), "/registry/").unwrap();
        let v1 = Found::KmsV1 { provider: "p".to_owned(), crk_version: None };
        let counted = |key: &[u8], found| given[1].resource_of(key, found);
        assert_eq!(counted(b"configmaps/a/b", &v1).as_deref(), Some("configmaps"));
        assert_eq!(counted(b"configmaps/a/b", &Found::Identity), None);
        assert_eq!(counted(b"secrets/a/b", &v1), None);
        let asked = targets(&["secrets".to_owned()], Some(&config), "/registry/").unwrap();
        assert_eq!(asked.len(), 1, "who names resources means those");
    }
}
