//! From the configuration to the CRKs that it names and the way to each: over a key service, or into an HSM.
//!
//! Nothing here connects; the first request does.

use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest::{Context, Digest, SHA256};
use kms_api::client::{Ca, ClientSettings, KeyProtect, SetupError, USER_AGENT};
use kms_api::token::{Credential, TokenSettings, TokenSource};
use kms_daemon::settings::Mistakes;
use zeroize::Zeroizing;

use crate::config::{Config, Hsm, KpConfig, Server};
use crate::dek_cache::CrkName;
use crate::keys::{Crk, Ring};
use crate::provider::KeyService;
use crate::provider::guard::{Guard, Tools};
use crate::provider::keyprotect::KeyProtectCrk;
#[cfg(feature = "pkcs11")]
use crate::provider::pkcs11::{self, Pkcs11Crk};

/// More connections serve no more calls, and each costs a TLS handshake and memory.
const CONNECTIONS: usize = 2;

/// Makes a ring of each configuration. What outlives a configuration is kept here.
#[derive(Debug)]
pub struct RingMaker {
    tools: Tools,
    tokens: Mutex<Option<Tokens>>,
    /// One for the life of the process: a PKCS#11 library's login belongs to the process, so two HSMs would log each
    /// other out.
    #[cfg(feature = "pkcs11")]
    hsm: std::sync::OnceLock<Arc<pkcs11::Hsm>>,
}

#[derive(Debug)]
struct Tokens {
    source: TokenSource,
    /// A digest of all that decides where a token comes from, and with what.
    way: Vec<u8>,
}

impl RingMaker {
    pub fn new(tools: Tools) -> RingMaker {
        RingMaker {
            tools,
            tokens: Mutex::default(),
            #[cfg(feature = "pkcs11")]
            hsm: std::sync::OnceLock::new(),
        }
    }

    /// The clients of all CRKs that the configuration names.
    ///
    /// # Errors
    /// Every mistake.
    pub fn ring(&self, config: &Config) -> Result<Ring, Mistakes> {
        let services = match &config.hsm {
            Some(hsm) => self.in_hsm(config, hsm)?,
            None => self.behind_key_service(config)?,
        };
        let entries = config.entries().zip(services);
        let mut crks: Vec<_> =
            entries.map(|(entry, service)| self.crk(config, entry, service)).collect();
        match crks.is_empty() {
            false => Ok(Ring { current: crks.remove(0), previous: crks }),
            true => Err(Mistakes(vec!["KP_CONFIG is missing".into()])),
        }
    }

    fn behind_key_service(&self, config: &Config) -> Result<Vec<Arc<dyn KeyService>>, Mistakes> {
        let tokens = self.tokens(&config.server);
        let mut mistakes = Vec::new();
        let mut note = |name: &str, error: SetupError| mistakes.push(format!("{name}: {error}"));
        let tokens = tokens.map_err(|error| note("SERVER_CONFIG.TOKEN_URL", error)).ok();
        let services: Vec<_> = config
            .entries()
            .filter_map(|entry| {
                let name = format!("KP_CONFIG (VERSION {})", entry.version);
                let client = client(entry, tokens.clone()?);
                let client = client.map_err(|error| note(&name, error)).ok()?;
                let crk = KeyProtectCrk::new(client, entry.crk_id.clone());
                Some(Arc::new(crk) as Arc<dyn KeyService>)
            })
            .collect();
        if mistakes.is_empty() { Ok(services) } else { Err(Mistakes(mistakes)) }
    }

    /// The token in hand stays where only something else was changed: the token service may be away just now.
    fn tokens(&self, server: &Server) -> Result<TokenSource, SetupError> {
        let mut kept = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let way = way(server).ok().map(|way| way.as_ref().to_vec());
        if let (Some(way), Some(kept)) = (&way, &*kept)
            && kept.way == *way
        {
            return Ok(kept.source.clone());
        }
        let ca = Some(Ca::File(server.token_ca.clone()));
        let settings = TokenSettings { url: server.token_url.clone(), ca };
        let (credential, clock) = (server.credential.clone(), self.tools.clock.clone());
        let source = TokenSource::new(&settings, credential, clock)?;
        *kept = way.map(|way| Tokens { source: source.clone(), way });
        Ok(source)
    }

    #[cfg(feature = "pkcs11")]
    fn in_hsm(
        &self,
        config: &Config,
        settings: &Hsm,
    ) -> Result<Vec<Arc<dyn KeyService>>, Mistakes> {
        let version = settings.crk_version.ok_or_else(|| {
            let text = "PKCS11.CRK_VERSION is missing: `kmsplugin --new-crk-version` makes one and prints its name";
            Mistakes(vec![text.into()])
        })?;
        let hsm = self.hsm.get_or_init(|| Arc::new(pkcs11::Hsm::with(settings)));
        hsm.use_pin(&settings.pin);
        let crk = |entry: &KpConfig, version| {
            let (instance, crk) = (entry.instance_id.clone(), entry.crk_id.clone());
            Arc::new(Pkcs11Crk::new(hsm.clone(), instance, crk, version)) as Arc<dyn KeyService>
        };
        let previous = config.previous.iter().map(|entry| crk(entry, None));
        Ok(std::iter::once(crk(&config.current, Some(version))).chain(previous).collect())
    }

    #[cfg(not(feature = "pkcs11"))]
    fn in_hsm(&self, _: &Config, _: &Hsm) -> Result<Vec<Arc<dyn KeyService>>, Mistakes> {
        let text = "PKCS11: this kmsplugin was built without the feature pkcs11";
        Err(Mistakes(vec![text.into()]))
    }

    fn crk(&self, config: &Config, entry: &KpConfig, service: Arc<dyn KeyService>) -> Arc<Crk> {
        let (instance, crk) = (entry.instance_id.as_str().into(), entry.crk_id.as_str().into());
        let service = Guard::new(service, config.server.patience, self.tools.clone());
        Arc::new(Crk { name: CrkName { instance, crk }, kp_version: entry.version, service })
    }
}

fn client(entry: &KpConfig, tokens: TokenSource) -> Result<KeyProtect, SetupError> {
    let settings = ClientSettings {
        url: entry.url.clone(),
        instance_id: entry.instance_id.clone(),
        ca: Some(Ca::File(entry.ca.clone())),
        max_connections: CONNECTIONS,
        user_agent: USER_AGENT.to_owned(),
    };
    KeyProtect::new(&settings, tokens)
}

/// # Errors
/// When a file cannot be read.
fn way(server: &Server) -> std::io::Result<Digest> {
    let mut digest = Context::new(&SHA256);
    let mut add = |bytes: &[u8]| {
        digest.update(&bytes.len().to_be_bytes());
        digest.update(bytes);
    };
    add(server.token_url.as_bytes());
    add(&std::fs::read(&server.token_ca)?);
    match &server.credential {
        Credential::ApiKey(key) => {
            add(b"API_KEY");
            add(key.expose().as_bytes());
        }
        // The source reads it again for each token: so its place belongs to the way, too.
        Credential::ApiKeyFile(path) => {
            add(b"API_KEY_FILE");
            add(path.as_os_str().as_encoded_bytes());
            add(&Zeroizing::new(std::fs::read(path)?));
        }
        // What is in it changes every hour and is nobody else's for it.
        Credential::CrTokenFile { path, profile } => {
            add(b"CR_TOKEN_FILE");
            add(path.as_os_str().as_encoded_bytes());
            for name in [&profile.id, &profile.name] {
                add(name.as_deref().unwrap_or_default().as_bytes());
            }
        }
    }
    Ok(digest.finish())
}
