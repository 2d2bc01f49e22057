//! The environment that OpenShift HyperShift gives to IBM's own plug-in container: KP_DATA_JSON in place of the
//! KP_CONFIG section. The other names it sets are our settings' names and override them anyway.
//!
//! KP_WDEK_PATH and KP_STATE_PATH are not read: the format of these files is not public.

use std::collections::BTreeMap;
use std::path::Path;

use kms_daemon::settings::{Environment, Settings};
use serde::Deserialize;
use serde_json::{Value, json};

const DATA: &str = "KP_DATA_JSON";
/// What a container of IBM's does not name, because there is only one.
const TOKEN_URL: &str = "https://iam.cloud.ibm.com/identity/token";
/// Where Linux distributions keep the public CAs.
const CA_BUNDLES: [&str; 2] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    #[serde(rename = "crkID")]
    crk_id: String,
    #[serde(rename = "instanceID")]
    instance_id: String,
    url: String,
    #[serde(default)]
    service_to_service: bool,
}

pub(super) fn is_asked_for(environment: &Environment) -> bool {
    environment.get(DATA).is_some_and(|data| !data.is_empty())
}

/// Puts the newest entry of KP_DATA_JSON in place of KP_CONFIG and the older ones in place of KP_CONFIG_PREVIOUS.
pub(super) fn apply(settings: &mut Settings, environment: &Environment) {
    let Some(data) = environment.get(DATA).filter(|data| !data.is_empty()) else { return };
    let entries = match serde_json::from_str::<BTreeMap<u32, Entry>>(data) {
        Ok(entries) => entries,
        Err(error) => {
            let (line, column) = (error.line(), error.column());
            settings.mistake(format!("{DATA} does not fit at line {line}, column {column}"));
            return;
        }
    };
    if entries.values().any(|entry| entry.service_to_service) {
        settings.mistake(format!("{DATA} asks for serviceToService; only an API key is supported"));
    }
    let ca = public_cas(environment, "KP_CA_FILE");
    let mut sections: Vec<_> = entries
        .iter()
        .map(|(version, entry)| {
            json!({"VERSION": version, "CRK_ID": entry.crk_id, "INSTANCE_ID": entry.instance_id,
                "URL": entry.url, "KP_CA_FILE": ca})
        })
        .collect();
    let Some(current) = sections.pop() else {
        settings.mistake(format!("{DATA} names no key"));
        return;
    };
    settings.replace("KP_CONFIG", current);
    settings.replace("KP_CONFIG_PREVIOUS", Value::Array(sections));
    settings.default("SERVER_CONFIG", "TOKEN_URL", json!(TOKEN_URL));
    // The socket is in a volume of the pod, which everybody may write to who has it mounted (mode 0777): kube-apiserver
    // and this container. HyperShift sets no name of ours that would say so.
    settings.default("SERVER_CONFIG", "ALLOW_SHARED_DIRECTORY", json!(true));
    let token_ca = json!(public_cas(environment, "TOKEN_URL_CA_FILE"));
    settings.default("SERVER_CONFIG", "TOKEN_URL_CA_FILE", token_ca);
}

/// The file that the environment names, else the distribution's.
fn public_cas(environment: &Environment, name: &str) -> Option<String> {
    let bundle = || CA_BUNDLES.into_iter().find(|path| Path::new(path).exists());
    environment.get(name).cloned().or_else(|| bundle().map(str::to_owned))
}
