//! Whether what stands in etcd is what kube-apiserver would write today: its own rule of staleness, applied from
//! outside. What is not encrypted is never current, whatever is configured.

use std::collections::BTreeMap;

use super::census::Found;
use crate::source::encryption_config::{Block, EncryptionConfig, Provider};

/// What is known of how things should be.
#[derive(Debug, Default)]
pub(super) struct Expected {
    pub(super) config: Option<EncryptionConfig>,
    pub(super) key_ids: KeyIds,
}

/// The key_id under which a KMS v2 provider writes now.
#[derive(Debug)]
pub(super) enum KeyIds {
    /// The same for each.
    Given(String),
    ByProvider(BTreeMap<String, String>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// kube-apiserver would write it in the same way.
    Current,
    /// Encrypted; nothing is known to compare it with.
    Encrypted,
    /// Readable, but to be rewritten.
    Left(String),
    /// kube-apiserver cannot read it.
    Unreadable(String),
}

impl Default for KeyIds {
    fn default() -> Self {
        KeyIds::ByProvider(BTreeMap::new())
    }
}

impl KeyIds {
    pub(super) fn of(&self, provider: &str) -> Option<&str> {
        match self {
            KeyIds::Given(key_id) => Some(key_id),
            KeyIds::ByProvider(key_ids) => key_ids.get(provider).map(String::as_str),
        }
    }
}

impl Expected {
    pub(super) fn judge(&self, resource: &str, found: &Found) -> State {
        if let Found::Broken { why } = found {
            return State::Unreadable(why.clone());
        }
        match &self.config {
            Some(config) => self.by_config(config.block_of(resource), found),
            None => self.by_key_id(found),
        }
    }

    fn by_config(&self, block: Option<&Block>, found: &Found) -> State {
        let place =
            |block: &Block| block.providers.iter().position(|provider| reads(provider, found));
        let Some(block) = block else {
            return match found {
                Found::Identity => not_encrypted(),
                _ => State::Unreadable("the configuration does not name this resource".to_owned()),
            };
        };
        match (place(block), found) {
            (None, _) => State::Unreadable("no provider in the configuration reads it".to_owned()),
            (Some(_), Found::Identity) => not_encrypted(),
            (Some(0), Found::KmsV2 { .. }) => self.by_key_id(found),
            (Some(0), Found::Local { key, .. }) => match block.writer() {
                Provider::Local { keys, .. } if keys.first() != Some(key) => {
                    State::Left("another key is first now".to_owned())
                }
                _ => State::Current,
            },
            // KMS v1 has no key_id: nothing written by it becomes stale.
            (Some(0), _) => State::Current,
            (Some(_), _) => State::Left(format!("{} writes now", block.writer())),
        }
    }

    fn by_key_id(&self, found: &Found) -> State {
        match (found, &self.key_ids) {
            (Found::Identity, _) => not_encrypted(),
            (Found::KmsV2 { provider, key_id, seed }, key_ids) => match key_ids.of(provider) {
                None => State::Encrypted,
                Some(current) if current != key_id => {
                    State::Left("another key_id is current now".to_owned())
                }
                Some(_) if !seed => {
                    State::Left("written by Kubernetes 1.28 or earlier, without a seed".to_owned())
                }
                Some(_) => State::Current,
            },
            (_, KeyIds::Given(_)) => State::Left("not written by KMS v2".to_owned()),
            (_, KeyIds::ByProvider(_)) => State::Encrypted,
        }
    }
}

/// kube-apiserver finds its reader by the prefix of the value.
pub(super) fn reads(provider: &Provider, found: &Found) -> bool {
    match (provider, found) {
        (Provider::Identity, Found::Identity) => true,
        (Provider::Local { kind, keys }, Found::Local { kind: found, key }) => {
            kind == found && keys.contains(key)
        }
        (Provider::KmsV1 { name }, Found::KmsV1 { provider, .. })
        | (Provider::KmsV2 { name, .. }, Found::KmsV2 { provider, .. }) => name == provider,
        _ => false,
    }
}

fn not_encrypted() -> State {
    State::Left("not encrypted".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "\
kind: EncryptionConfiguration
resources:
  - resources: [secrets]
    providers:
      - kms: {apiVersion: v2, name: new, endpoint: 'unix:///s'}
      - kms: {name: old}
      - aescbc: {keys: [{name: k2}, {name: k1}]}
      - identity: {}
  - resources: [configmaps]
    providers:
      - aescbc: {keys: [{name: k2}, {name: k1}]}
";

    fn expected() -> Expected {
        let key_ids = BTreeMap::from([("new".to_owned(), "now".to_owned())]);
        Expected {
            config: Some(EncryptionConfig::parse(CONFIG).unwrap()),
            key_ids: KeyIds::ByProvider(key_ids),
        }
    }

    fn v2(provider: &str, key_id: &str, seed: bool) -> Found {
        Found::KmsV2 { provider: provider.to_owned(), key_id: key_id.to_owned(), seed }
    }

    fn v1(provider: &str) -> Found {
        Found::KmsV1 { provider: provider.to_owned(), crk_version: None }
    }

    fn cbc(key: &str) -> Found {
        let kind = crate::source::encryption_config::Local::AesCbc;
        Found::Local { kind, key: key.to_owned() }
    }

    #[test]
    fn only_what_the_first_provider_writes_under_its_key_is_current() {
        let expected = expected();
        let is = |resource: &str, found: Found, state: &str| {
            let judged = expected.judge(resource, &found);
            let name = match &judged {
                State::Current => "current",
                State::Encrypted => "encrypted",
                State::Left(_) => "left",
                State::Unreadable(_) => "unreadable",
            };
            assert_eq!(name, state, "{resource} {found:?}: {judged:?}");
        };
        is("secrets", v2("new", "now", true), "current");
        is("secrets", v2("new", "now", false), "left");
        is("secrets", v2("new", "before", true), "left");
        is("secrets", v2("other", "now", true), "unreadable");
        is("secrets", v1("old"), "left");
        is("secrets", v1("older"), "unreadable");
        is("secrets", cbc("k2"), "left");
        is("secrets", cbc("k3"), "unreadable");
        is("secrets", Found::Identity, "left");
        is("configmaps", cbc("k2"), "current");
        is("configmaps", cbc("k1"), "left");
        is("configmaps", Found::Identity, "unreadable");
        is("pods", Found::Identity, "left");
        is("pods", v1("old"), "unreadable");
        is("secrets", Found::Broken { why: "x".to_owned() }, "unreadable");
    }

    #[test]
    fn without_a_configuration_the_key_id_alone_decides() {
        let given = Expected { config: None, key_ids: KeyIds::Given("now".to_owned()) };
        assert_eq!(given.judge("secrets", &v2("any", "now", true)), State::Current);
        for left in [v2("any", "before", true), v1("old"), cbc("k"), Found::Identity] {
            assert!(matches!(given.judge("secrets", &left), State::Left(_)), "{left:?}");
        }
        let nothing = Expected::default();
        assert_eq!(nothing.judge("secrets", &v1("old")), State::Encrypted);
        assert_eq!(nothing.judge("secrets", &v2("any", "now", true)), State::Encrypted);
        assert!(matches!(nothing.judge("secrets", &Found::Identity), State::Left(_)));
    }
}
