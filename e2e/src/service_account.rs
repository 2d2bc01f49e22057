//! Service accounts of a cluster, and what they need to log in at kms-server: an issuer that it trusts, and a profile.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kms_api::client::{Ca, Error as ClientError};
use kms_api::token::{Credential, Profile, TokenSettings, TokenSource};
use kms_core::clock::SystemClock;
use kms_core::secret::SecretText;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::apiserver::{ApiServer, Kubectl};
use crate::assets::{Assets, Kubernetes};
use crate::chain::{Chain, fresh_folder};
use crate::error::{Error, Result};
use crate::etcd::Etcd;
use crate::key_service::KeyService;
use crate::pki::{write_file, write_private};
use crate::process::Lifetime;

/// For whom the tokens are: the AUDIENCE that kms-server is configured with here.
pub const AUDIENCE: &str = "kms";
/// Whom the profiles here trust.
pub const NAMESPACE: &str = "kube-system";
pub const ACCOUNT: &str = "kmsplugin";

/// Makes the chain's own cluster an issuer that its key service trusts, with the account and a profile for it.
///
/// # Errors
/// When one of the steps fails.
pub fn trust_own_cluster(chain: &mut Chain, name: &str, policy: &[&str]) -> Result<()> {
    let issuer = &chain.cluster()?.apiserver;
    create(&issuer.kubectl, NAMESPACE, ACCOUNT)?;
    publish_keys(&issuer.kubectl)?;
    let (url, ca) = (issuer.url.clone(), issuer.ca.clone());
    chain.key_service.trust(&[(&url, &ca)], AUDIENCE)?;
    profile(chain, &chain.cluster()?.apiserver, name, policy)
}

/// Another cluster, with an etcd, an issuer and an account of its own, in `dir`.
///
/// # Errors
/// When a part does not start.
pub fn another_cluster(dir: &Path) -> Result<(Etcd, ApiServer)> {
    fresh_folder(dir)?;
    let (assets, lifetime) = (Assets::find(Kubernetes::V1_37)?, Lifetime::WithParent);
    let etcd = Etcd::start(&assets.etcd, dir, lifetime)?;
    let encryption = dir.join("encryption-config.yaml");
    write_file(&encryption, NOTHING_ENCRYPTED)?;
    let apiserver = ApiServer::start(&assets, &etcd, &encryption, dir, lifetime)?;
    create(&apiserver.kubectl, NAMESPACE, ACCOUNT)?;
    publish_keys(&apiserver.kubectl)?;
    Ok((etcd, apiserver))
}

/// Lets everybody read the keys of a cluster's issuer, as kms-server must: it shows no credential there.
///
/// # Errors
/// When kube-apiserver refuses.
pub fn publish_keys(kubectl: &Kubectl) -> Result<()> {
    let role = "--clusterrole=system:service-account-issuer-discovery";
    let group = "--group=system:unauthenticated";
    kubectl.run(&["create", "clusterrolebinding", BINDING, role, group], b"").map(drop)
}

/// The opposite of [`publish_keys`].
///
/// # Errors
/// When kube-apiserver refuses.
pub fn hide_keys(kubectl: &Kubectl) -> Result<()> {
    kubectl.run(&["delete", "clusterrolebinding", BINDING], b"").map(drop)
}

/// Makes a service account.
///
/// # Errors
/// When kube-apiserver refuses.
pub fn create(kubectl: &Kubectl, namespace: &str, name: &str) -> Result<()> {
    kubectl.run(&["create", "serviceaccount", name, "-n", namespace], b"").map(drop)
}

/// A token of the account that the profiles trust, as TokenRequest gives it to kubelet.
///
/// # Errors
/// When kube-apiserver refuses.
pub fn token(kubectl: &Kubectl, duration: &str) -> Result<String> {
    let audience = ["--audience", AUDIENCE, "--duration", duration];
    token_of(kubectl, NAMESPACE, ACCOUNT, &audience)
}

/// The same with other arguments for `kubectl create token`.
///
/// # Errors
/// When kube-apiserver refuses.
pub fn token_of(
    kubectl: &Kubectl,
    namespace: &str,
    name: &str,
    arguments: &[&str],
) -> Result<String> {
    let create = [&["create", "token", name, "-n", namespace], arguments].concat();
    Ok(kubectl.run(&create, b"")?.trim().to_owned())
}

/// Puts a token in the place of the one before in one step, as kubelet does.
///
/// # Errors
/// When the machine refuses.
pub fn place(file: &Path, token: &str) -> Result<()> {
    let next = file.with_extension("next");
    write_private(&next, token)?;
    std::fs::rename(&next, file).map_err(Error::machine("replace a token"))
}

/// A profile for the account of this issuer, which speaks for a new service ID with `policy`, such as
/// `["--role", "Viewer", "--key", …]`.
///
/// # Errors
/// When kms-server refuses.
pub fn profile(chain: &Chain, issuer: &ApiServer, name: &str, policy: &[&str]) -> Result<()> {
    let instance = ["--instance", &chain.key_service.instance_id];
    let new = [&["service-ids", "create", name], policy, &instance].concat();
    let owner = text_in(&chain.kmsctl.json(&new, b"")?, "id")?;
    profile_for(chain, &owner, &issuer.url, name)
}

/// Deletes the profile of this name; returns what makes it again: see [`profile_for`].
///
/// # Errors
/// When kms-server refuses, or there is none.
pub fn delete_profile(chain: &Chain, name: &str) -> Result<(String, String)> {
    let all = chain.kmsctl.json(&["profiles", "list"], b"")?;
    let found = all.as_array().and_then(|all| all.iter().find(|one| one["name"] == name));
    let found = found.ok_or_else(|| Error::answer("kmsctl", format!("no {name} in {all}")))?;
    chain.kmsctl.run(&["profiles", "delete", &text_in(found, "id")?], b"")?;
    Ok((text_in(found, "service_id")?, text_in(found, "issuer")?))
}

/// A profile that speaks for the service ID `owner`.
///
/// # Errors
/// When kms-server refuses.
pub fn profile_for(chain: &Chain, owner: &str, issuer: &str, name: &str) -> Result<()> {
    let whom = ["--issuer", issuer, "--namespace", NAMESPACE, "--service-account", ACCOUNT];
    let new = [&["profiles", "create", name, "--service-id", owner], &whom[..]].concat();
    chain.kmsctl.run(&new, b"").map(drop)
}

/// What the token service answers to a token, shown for the profile of this name.
///
/// # Errors
/// When there is nobody to ask.
pub fn log_in(
    service: &KeyService,
    token: &str,
    profile: &str,
) -> Result<std::result::Result<Arc<SecretText>, ClientError>> {
    let file = service.config.with_file_name("log-in.token");
    place(&file, token)?;
    let runtime = Runtime::new().map_err(Error::machine("start a runtime"))?;
    let tokens = tokens(service, file, profile)?;
    Ok(runtime.block_on(tokens.token(Duration::from_secs(10))))
}

/// Tokens for whoever has this file.
///
/// # Errors
/// When no client can be made.
pub fn tokens(service: &KeyService, path: PathBuf, profile: &str) -> Result<TokenSource> {
    let profile = Profile { id: None, name: Some(profile.to_owned()) };
    let settings =
        TokenSettings { url: service.token_url.clone(), ca: Some(Ca::File(service.ca.clone())) };
    let credential = Credential::CrTokenFile { path, profile };
    TokenSource::new(&settings, credential, Arc::new(SystemClock::new()))
        .map_err(|error| Error::answer("the client", error.to_string()))
}

const BINDING: &str = "everybody-reads-the-issuer";

const NOTHING_ENCRYPTED: &str = "\
kind: EncryptionConfiguration
apiVersion: apiserver.config.k8s.io/v1
resources:
  - resources: [secrets]
    providers: [identity: {}]
";

fn text_in(answer: &Value, member: &str) -> Result<String> {
    let text = answer[member].as_str().map(str::to_owned);
    text.ok_or_else(|| Error::answer("kmsctl", format!("no {member} in {answer}")))
}
