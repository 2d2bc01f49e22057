//! The whole server over real sockets: TLS, three listeners, SQLite in a fresh directory, a vault in memory, and a
//! clock that moves only when told to.

pub(crate) mod canary;
pub(crate) mod disk;
pub(crate) mod faulty_store;
pub(crate) mod http;
pub(crate) mod issuer;
pub(crate) mod rig;

use disk::Disk;
use faulty_store::FaultyStore;
use http::Answer;
use kms_core::audit::Link;
use kms_core::clock::{Clock, ManualClock};
use kms_core::secret::SecretText;
use kms_daemon::lifecycle::Shutdown;
use kms_hsm::memory::MemoryVault;
use kms_server::app::{App, Foundation, Settings};
use kms_server::audit::{Audit, AuditError};
use kms_server::guard::Guarded;
use kms_server::init::{Made, fill};
use kms_server::limits;
use kms_server::ops::issue_token::hash;
use kms_server::policy::{ApiKeySecret, Caller, Credential, Grant, Role, Scope};
use kms_server::serve::{self, Listeners};
use kms_server::store::{
    Access, ApiKey, Instance, Policy, Profile, ServiceId, SqliteStore, Store, Trail,
};
use kms_server::tls::{Files, Tls};
use kms_server::token::random_uuid;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer as Signer, KeyPair};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// Which server wrote the audit log.
pub(crate) const NODE: &str = "node-1";
pub(crate) const ISSUER: &str = "https://tokens.test/identity";

/// A running server, stopped when dropped.
pub(crate) struct Server {
    pub(crate) app: Arc<App>,
    pub(crate) keys: SocketAddr,
    pub(crate) tokens: SocketAddr,
    pub(crate) health: SocketAddr,
    pub(crate) made: Made,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) vault: Arc<MemoryVault>,
    pub(crate) store: Arc<FaultyStore>,
    /// The audit log's.
    pub(crate) disk: Arc<Disk>,
    pub(crate) dir: Arc<TempDir>,
    shutdown: Shutdown,
    serving: Option<JoinHandle<()>>,
}

impl Server {
    /// Production's, but that no rate has a bound: it comes back with time, and the clock of a test stands still; and that the audit log's disk has more time than a loaded machine takes.
    pub(crate) fn settings() -> Settings {
        let limits = limits::Settings {
            rate_per_instance: 0,
            rate_per_caller: 0,
            management_rate_per_caller: 0,
            login_rate_per_caller: 0,
            ..limits::Settings::default()
        };
        let audit_deadline = Duration::from_secs(30);
        Settings { limits, audit_deadline, ..Settings::new(ISSUER.into()) }
    }

    pub(crate) async fn start() -> Server {
        Server::start_with(Server::settings()).await
    }

    pub(crate) async fn start_limited(limits: limits::Settings) -> Server {
        Server::start_with(Settings { limits, ..Server::settings() }).await
    }

    pub(crate) async fn start_with(settings: Settings) -> Server {
        let dir = Arc::new(TempDir::new().unwrap());
        make_certificates(dir.path());
        // Tokens are told apart from real time, certificates are not: start where both agree.
        let clock =
            Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)));
        let vault = Arc::new(MemoryVault::new());
        let store = SqliteStore::open(&dir.path().join("kms.db"), true).await.unwrap();
        let audit = Audit::open(&dir.path().join("audit.log"), NODE, None, clock.clone()).unwrap();
        let made = fill(&store, &*vault, &audit, clock.wall().into(), |_| Ok(())).await.unwrap();
        drop(audit);
        Server::run(dir, clock, vault, store, settings, made).await
    }

    /// One, and a second over the same database and HSM.
    pub(crate) async fn start_pair() -> (Server, Server) {
        Server::start_pair_with(Server::settings()).await
    }

    pub(crate) async fn start_pair_with(settings: Settings) -> (Server, Server) {
        let server = Server::start_with(settings).await;
        let dir = Arc::new(TempDir::new().unwrap());
        make_certificates(dir.path());
        let (clock, vault) = (server.clock.clone(), server.vault.clone());
        let store = SqliteStore::open(&server.dir.path().join("kms.db"), false).await.unwrap();
        let (settings, made) = (server.app.settings.clone(), clone(&server.made));
        let replica = Server::run(dir, clock, vault, store, settings, made).await;
        (server, replica)
    }

    /// Another server over the same database, HSM and audit log, once this one has ended.
    pub(crate) async fn restart(mut self) -> Server {
        self.shutdown.request();
        self.serving.take().unwrap().await.unwrap();
        let (dir, clock, vault) = (self.dir.clone(), self.clock.clone(), self.vault.clone());
        let (settings, made) = (self.app.settings.clone(), clone(&self.made));
        drop(self);
        let store = SqliteStore::open(&dir.path().join("kms.db"), false).await.unwrap();
        Server::run(dir, clock, vault, store, settings, made).await
    }

    async fn run(
        dir: Arc<TempDir>,
        clock: Arc<ManualClock>,
        vault: Arc<MemoryVault>,
        store: SqliteStore,
        settings: Settings,
        made: Made,
    ) -> Server {
        let signing_key = store.signing_key().await.unwrap().unwrap();
        let store = Arc::new(FaultyStore::new(store));
        // Each server has its own audit log, and is known by a name of its own.
        let node = if dir.path().join("kms.db").exists() { NODE } else { "replica" };
        let known = store.audit_head(node).await.unwrap();
        let disk = Arc::new(Disk::new(clock.clone()));
        let audit = open_again(&dir.path().join("audit.log"), node, known, disk.clone());
        let guarded = Arc::new(Guarded::new(vault.clone(), store.clone()));
        guarded.compare().await.unwrap();
        let on = Foundation {
            clock: clock.clone(),
            store: store.clone(),
            vault: guarded,
            audit,
            signing_key,
        };
        let app = Arc::new(App::new(on, settings).unwrap());
        let listeners = Listeners {
            keys: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            tokens: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            health: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        };
        let [keys, tokens, health] = [&listeners.keys, &listeners.tokens, &listeners.health]
            .map(|l| l.local_addr().unwrap());
        let tls = Tls::open(Files {
            certificate: dir.path().join("tls.crt"),
            key: dir.path().join("tls.key"),
            client_ca: Some(dir.path().join("clients.crt")).filter(|file| file.exists()),
        })
        .unwrap();
        let shutdown = Shutdown::new();
        let serving =
            Some(tokio::spawn(serve::serve(app.clone(), listeners, tls, shutdown.clone())));
        Server {
            app,
            keys,
            tokens,
            health,
            made,
            clock,
            vault,
            store,
            disk,
            dir,
            shutdown,
            serving,
        }
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    pub(crate) fn instance(&self) -> Uuid {
        self.made.instance
    }

    pub(crate) async fn admin(&self) -> String {
        self.token(&self.made.admin.api_key).await
    }

    pub(crate) async fn viewer(&self) -> String {
        self.token(&self.made.viewer.api_key).await
    }

    /// A token from the token service.
    pub(crate) async fn token(&self, api_key: &SecretText) -> String {
        let answer = self.ask_token(api_key.expose()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["access_token"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn ask_token(&self, api_key: &str) -> Answer {
        let form = format!(
            "grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey={api_key}&response_type=cloud_iam"
        );
        let headers = [("content-type", "application/x-www-form-urlencoded")];
        http::ask(self.tokens, &self.ca(), "POST", "/oidc/token", &headers, &form).await
    }

    /// A call to the key API, in the server's own instance.
    pub(crate) async fn call(&self, token: &str, method: &str, path: &str, body: &str) -> Answer {
        self.call_in(self.instance(), token, method, path, body).await
    }

    pub(crate) async fn call_in(
        &self,
        instance: Uuid,
        token: &str,
        method: &str,
        path: &str,
        body: &str,
    ) -> Answer {
        let (bearer, instance) = (format!("Bearer {token}"), instance.to_string());
        let headers = [("authorization", bearer.as_str()), ("icp-instance", instance.as_str())];
        let path = format!("/api/v2{path}");
        http::ask(self.keys, &self.ca(), method, &path, &headers, body).await
    }

    /// A call to the management part of the token service.
    pub(crate) async fn manage(&self, token: &str, method: &str, path: &str, body: &str) -> Answer {
        let bearer = format!("Bearer {token}");
        let headers = [("authorization", bearer.as_str())];
        http::ask(self.tokens, &self.ca(), method, path, &headers, body).await
    }

    /// A new root key.
    pub(crate) async fn create(&self, token: &str, name: &str) -> Value {
        let answer = self.call(token, "POST", "/keys", &new_key(name)).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()["resources"][0].clone()
    }

    pub(crate) async fn create_id(&self, token: &str, name: &str) -> String {
        self.create(token, name).await["id"].as_str().unwrap().to_owned()
    }

    /// A WDEK and the version that wrapped it.
    pub(crate) async fn wrap(&self, token: &str, key: &str, plaintext: &str) -> (String, String) {
        let body = json!({ "plaintext": plaintext }).to_string();
        let answer = self.call(token, "POST", &format!("/keys/{key}/actions/wrap"), &body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let json = answer.json();
        (text(&json["ciphertext"]), text(&json["keyVersion"]["id"]))
    }

    pub(crate) async fn unwrap(&self, token: &str, key: &str, ciphertext: &str) -> Answer {
        let body = json!({ "ciphertext": ciphertext }).to_string();
        self.call(token, "POST", &format!("/keys/{key}/actions/unwrap"), &body).await
    }

    pub(crate) async fn rotate(&self, token: &str, key: &str) -> Answer {
        self.call(token, "POST", &format!("/keys/{key}/actions/rotate"), "").await
    }

    /// A service ID with `role`, and the token of its API key.
    pub(crate) async fn identity(&self, role: Role, scope: Scope) -> (Caller, String) {
        self.identity_with(&[Grant { role, scope }]).await
    }

    /// One with several policies.
    pub(crate) async fn identity_with(&self, grants: &[Grant]) -> (Caller, String) {
        let id = || async { random_uuid(&*self.vault).await.unwrap() };
        let (service_id, api_key) = (id().await, id().await);
        let created_at = self.clock.wall().into();
        let owner = ServiceId::with(service_id, "somebody".into(), grants[0], created_at);
        self.store.add_service_id(&owner).await.unwrap();
        for &grant in &grants[1..] {
            let policy = Policy { id: id().await, service_id, grant, created_at };
            self.store.add_policy(&policy).await.unwrap();
        }
        let key = ApiKey::new(api_key, service_id, "key".into(), created_at);
        let text = SecretText::new(api_key.to_string());
        self.store.add_api_key(&key, &hash(&text)).await.unwrap();
        let token = self.token(&text).await;
        let credential = Credential::ApiKey(ApiKeySecret { api_key, generation: 1 });
        (Caller { service_id, credential, grants: grants.to_vec() }, token)
    }

    /// A profile of this service ID.
    pub(crate) async fn profile(&self, service_id: Uuid) -> Uuid {
        let id = random_uuid(&*self.vault).await.unwrap();
        let (name, created_at) = (id.to_string(), self.clock.wall().into());
        let (issuer, subject) = ("https://issuer.test".into(), "somebody".into());
        let profile = Profile { id, service_id, name, issuer, subject, created_at };
        self.store.add_profile(&profile).await.unwrap();
        id
    }

    pub(crate) async fn other_instance(&self) -> Uuid {
        let id = random_uuid(&*self.vault).await.unwrap();
        let created_at = self.clock.wall().into();
        let instance = Instance { id, name: format!("tenant {id}"), created_at };
        self.store.add_instance(&instance).await.unwrap();
        id
    }

    /// What the audit log holds, as text.
    pub(crate) fn audit(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("audit.log")).unwrap()
    }
}

/// How many of those who take as long as `one` alone come at once: a hundred, and fewer on a machine whose disk or
/// processor would keep them waiting until they are told to come again.
pub(crate) fn crowd(one: Duration) -> usize {
    let within = Duration::from_secs(4).as_millis() / one.as_millis().max(1);
    usize::try_from(within).unwrap_or(usize::MAX).clamp(4, 100)
}

/// The log that another server of this test had until now. A process that another test has just forked holds a copy of
/// the descriptor, and with it the lock, until it has become its program.
fn open_again(path: &Path, node: &str, known: Option<Link>, clock: Arc<dyn Clock>) -> Audit {
    for _ in 0..6000 {
        match Audit::open(path, node, known, clock.clone()) {
            // Of the machine's time: the runtime's stands still in some tests.
            Err(AuditError::InUse { .. }) => std::thread::sleep(Duration::from_millis(10)),
            opened => return opened.unwrap(),
        }
    }
    panic!("{} is in use for ever", path.display())
}

impl Drop for Server {
    fn drop(&mut self) {
        self.disk.hang(false);
        self.shutdown.request();
    }
}

/// What the health port answers.
pub(crate) async fn health(server: &Server, path: &str, accept: &str) -> String {
    let mut stream = TcpStream::connect(server.health).await.unwrap();
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

pub(crate) fn new_key(name: &str) -> String {
    json!({
        "metadata": {"collectionType": "application/vnd.ibm.kms.key+json", "collectionTotal": 1},
        "resources": [{
            "type": "application/vnd.ibm.kms.key+json", "name": name, "extractable": false,
        }],
    })
    .to_string()
}

pub(crate) fn make_certificates(dir: &Path) {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(vec![]).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(rcgen::DnType::CommonName, "kms-server test CA");
    // IBM's Python client checks that a CA may sign.
    ca.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    std::fs::write(dir.join("ca.crt"), ca.self_signed(&ca_key).unwrap().pem()).unwrap();
    let key = KeyPair::generate().unwrap();
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let mut leaf = CertificateParams::new(names).unwrap();
    leaf.use_authority_key_identifier_extension = true;
    leaf.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let signed = leaf.signed_by(&key, &Signer::new(ca, ca_key)).unwrap();
    std::fs::write(dir.join("tls.crt"), signed.pem()).unwrap();
    std::fs::write(dir.join("tls.key"), key.serialize_pem()).unwrap();
}

fn clone(made: &Made) -> Made {
    let identity = |one: &kms_server::init::Identity| kms_server::init::Identity {
        service_id: one.service_id,
        api_key: one.api_key.clone(),
    };
    Made { instance: made.instance, admin: identity(&made.admin), viewer: identity(&made.viewer) }
}
