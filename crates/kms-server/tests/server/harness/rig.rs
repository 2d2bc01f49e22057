//! The real binary on a real token: SoftHSM2 behind the module that injects faults, in one folder that can be copied.

use super::http::{Answer, try_ask};
use super::{make_certificates, new_key};
use pkcs11_shim::Control;
use serde_json::{Value, json};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;
use tempfile::TempDir;

const LIBRARIES: [&str; 3] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
];

/// Far more than SoftHSM2 needs, in milliseconds.
pub(crate) const PATIENCE: u64 = 45_000;

/// One host: configuration, database, audit log, token. Or one more server on it.
pub(crate) struct Rig {
    pub(crate) dir: Arc<TempDir>,
    /// Whose configuration, audit log and messages are this server's own.
    node: &'static str,
    pub(crate) control: Control,
    library: PathBuf,
    addresses: [SocketAddr; 3],
    pub(crate) instance: String,
    pub(crate) api_key: String,
    /// The HSM's deadline is one that no loaded machine reaches: an answer to come again is a failure.
    patient: bool,
    child: Option<Child>,
}

impl Rig {
    /// Initialised and not started. `None`, with a notice, where SoftHSM2 is not installed; fails where `CI=true`.
    pub(crate) fn make() -> Option<Rig> {
        let mut rig = Rig::bare()?;
        let made = rig.run(&["init", "-o", "json"]);
        assert!(made.status.success(), "{}", stderr(&made));
        let made: Value = serde_json::from_slice(&made.stdout).unwrap();
        rig.instance = made["instance_id"].as_str().unwrap().to_owned();
        rig.api_key = made["admin"]["api_key"].as_str().unwrap().to_owned();
        Some(rig)
    }

    /// One with the HSM's usual deadline, for tests about those who wait for it: on a loaded machine it may run out at
    /// any time.
    pub(crate) fn make_impatient() -> Option<Rig> {
        let mut rig = Rig::make()?;
        rig.patient = false;
        rig.configure("process");
        Some(rig)
    }

    /// A host with nothing on it.
    pub(crate) fn bare() -> Option<Rig> {
        let Some(library) = LIBRARIES.iter().map(PathBuf::from).find(|path| path.is_file()) else {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "apt-get install softhsm2");
            eprintln!("skipped, no SoftHSM2: apt-get install softhsm2");
            return None;
        };
        let dir = Arc::new(TempDir::new().unwrap());
        make_certificates(dir.path());
        let tokens = dir.path().join("tokens");
        fs::create_dir(&tokens).unwrap();
        let text = format!("directories.tokendir = {}\nlog.level = ERROR\n", tokens.display());
        fs::write(dir.path().join("softhsm2.conf"), text).unwrap();
        fs::write(dir.path().join("so-pin"), "31415926").unwrap();
        let addresses = free_addresses();
        let control = Control::new(&dir.path().join("control"));
        let (instance, api_key) = (String::new(), String::new());
        let node = "rig";
        let (patient, child) = (true, None);
        let rig = Rig { dir, node, control, library, addresses, instance, api_key, patient, child };
        rig.configure("process");
        Some(rig)
    }

    /// One more server in front of the same token and database, not started.
    pub(crate) fn replica(&self, node: &'static str) -> Rig {
        let rig = Rig {
            dir: self.dir.clone(),
            node,
            control: Control::new(&self.path("control")),
            library: self.library.clone(),
            addresses: free_addresses(),
            instance: self.instance.clone(),
            api_key: self.api_key.clone(),
            patient: self.patient,
            child: None,
        };
        rig.configure("process");
        rig
    }

    /// `none`: the library, and what is injected into it, is in the server itself.
    pub(crate) fn configure(&self, isolation: &str) {
        let (dir, [keys, tokens, health]) = (self.dir.path().display(), self.addresses);
        let library = pkcs11_shim::library().unwrap();
        let audit = self.path(&self.own("audit.log"));
        let audit = audit.display();
        let deadline = match self.patient {
            true => format!("  DEADLINE_IN_MILLISECONDS: {PATIENCE}\n"),
            false => String::new(),
        };
        let text = format!(
            "SERVER_CONFIG:\n  KEYS_ADDRESS: \"{keys}\"\n  TOKENS_ADDRESS: \"{tokens}\"\n  \
             HEALTH_ADDRESS: \"{health}\"\n  TLS_CERT_FILE: \"{dir}/tls.crt\"\n  \
             TLS_KEY_FILE: \"{dir}/tls.key\"\n  DATABASE_URL: \"sqlite://{dir}/kms.db\"\n  \
             AUDIT_FILE: \"{audit}\"\n  AUDIT_DEADLINE_IN_MILLISECONDS: {PATIENCE}\n  NODE_ID: \"{}\"\n  MAX_RATE_PER_INSTANCE: 0\n  \
             MAX_RATE_PER_CALLER: 0\n  MAX_MANAGEMENT_RATE_PER_CALLER: 0\n  MAX_LOGIN_RATE_PER_CALLER: 0\n  \
             MIN_PURGE_WAIT_IN_SECONDS: 0\n\
             HSM:\n  PKCS11_LIBRARY: \"{}\"\n  TOKEN_LABEL: \"rig\"\n  PIN: \"582910\"\n  \
             SO_PIN_FILE: \"{dir}/so-pin\"\n  ISOLATION: \"{isolation}\"\n{deadline}",
            self.node,
            library.display()
        );
        fs::write(self.config(), text).unwrap();
    }

    /// A token of the right name with nothing in it.
    pub(crate) fn make_empty_token(&self) {
        let made = Command::new("softhsm2-util")
            .args(["--init-token", "--free", "--label", "rig", "--pin", "582910"])
            .args(["--so-pin", "31415926"])
            .env("SOFTHSM2_CONF", self.dir.path().join("softhsm2.conf"))
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", stderr(&made));
    }

    /// A command of the binary, to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs the test `name` of this binary once more, as a process that sees the token and `variable`. SoftHSM2 reads
    /// from the environment where its tokens are, and a process cannot change its own.
    pub(crate) fn in_a_process(&self, name: &str, variable: &str, value: &str) {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env("SOFTHSM2_CONF", self.path("softhsm2.conf"))
            .env(pkcs11_shim::MODULE, &self.library)
            .env(variable, value)
            .output()
            .unwrap();
        let out = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && out.contains("1 passed"), "{out}\n{}", stderr(&child));
    }

    /// What `check` finds, and how it ends.
    pub(crate) fn check(&self) -> (i32, Value) {
        let done = self.run(&["check", "-o", "json"]);
        let found = serde_json::from_slice(&done.stdout);
        (done.status.code().unwrap(), found.unwrap_or_else(|_| panic!("{}", stderr(&done))))
    }

    /// Starts the server and waits until it is ready.
    pub(crate) async fn start(&mut self) {
        self.spawn();
        self.becomes("200 OK").await;
    }

    /// Waits until the answer about its readiness says so.
    pub(crate) async fn becomes(&mut self, wanted: &str) -> String {
        let mut last = String::new();
        for _ in 0..12_000 {
            last = self.readiness().await;
            if last.contains(wanted) {
                return last;
            }
            assert!(self.child.as_mut().unwrap().try_wait().unwrap().is_none(), "{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("never {wanted:?}: {last}\n{}", self.log());
    }

    /// Waits for the first anchor: the token then holds all that a server makes there by itself.
    pub(crate) async fn anchored(&self) {
        for _ in 0..6000 {
            if self.path("audit.anchor").exists() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no anchor: {}", self.log());
    }

    pub(crate) fn spawn(&mut self) {
        let log = fs::File::create(self.path(&self.own("log"))).unwrap();
        let mut command = self.command(&[]);
        command.stdout(Stdio::null()).stderr(log).process_group(0);
        self.child = Some(command.spawn().unwrap());
    }

    pub(crate) async fn readiness(&self) -> String {
        self.health("/readyz").await
    }

    /// What the health port says; nothing while nobody listens there.
    pub(crate) async fn health(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let asked = async {
            let mut stream = tokio::net::TcpStream::connect(self.addresses[2]).await?;
            let request = format!("GET {path} HTTP/1.0\r\nhost: x\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        asked.await.unwrap_or_default()
    }

    /// SIGKILL, unless it is dead already; returns once it is.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        let _ = child.kill();
        child.wait().unwrap();
    }

    /// Whether it has died by itself, within half a minute.
    pub(crate) async fn died(&mut self) -> bool {
        for _ in 0..6000 {
            if self.child.as_mut().unwrap().try_wait().unwrap().is_some() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path(&self.own("log"))).unwrap_or_default()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn client(&self) -> Client {
        let [keys, tokens, _] = self.addresses;
        let ca = self.dir.path().join("ca.crt");
        Client { keys, tokens, ca, instance: self.instance.clone(), token: String::new() }
    }

    /// A client that is logged in as the administrator.
    pub(crate) async fn admin(&self) -> Client {
        let mut client = self.client();
        client.log_in(&self.api_key).await.unwrap();
        client
    }

    fn config(&self) -> PathBuf {
        self.path(&self.own("kms-server.yaml"))
    }

    /// The first server's files have the plain names.
    fn own(&self, name: &str) -> String {
        if self.node == "rig" { name.to_owned() } else { format!("{}-{name}", self.node) }
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kms-server"));
        command
            .args(arguments)
            .arg("--config")
            .arg(self.config())
            .env("SOFTHSM2_CONF", self.dir.path().join("softhsm2.conf"))
            .env(pkcs11_shim::MODULE, &self.library)
            .env(pkcs11_shim::CONTROL, self.dir.path().join("control"))
            .env(pkcs11_shim::COUNTS, self.dir.path().join("counts"))
            .stdin(Stdio::null());
        command
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

/// Whose server may be gone at any moment: then there is no answer.
#[derive(Clone)]
pub(crate) struct Client {
    keys: SocketAddr,
    tokens: SocketAddr,
    ca: PathBuf,
    instance: String,
    token: String,
}

impl Client {
    pub(crate) async fn log_in(&mut self, api_key: &str) -> Option<u16> {
        let answer = self.ask_token(api_key).await?;
        if answer.status == 200 {
            self.token = answer.json()["access_token"].as_str().unwrap().to_owned();
        }
        Some(answer.status)
    }

    pub(crate) async fn ask_token(&self, api_key: &str) -> Option<Answer> {
        let form = format!(
            "grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey={api_key}&response_type=cloud_iam"
        );
        let headers = [("content-type", "application/x-www-form-urlencoded")];
        try_ask(self.tokens, &self.ca, "POST", "/oidc/token", &headers, &form).await
    }

    pub(crate) async fn call(&self, method: &str, path: &str, body: &str) -> Option<Answer> {
        let bearer = format!("Bearer {}", self.token);
        let headers = [("authorization", bearer.as_str()), ("icp-instance", &self.instance)];
        let path = format!("/api/v2/keys{path}");
        try_ask(self.keys, &self.ca, method, &path, &headers, body).await
    }

    pub(crate) async fn create(&self, name: &str) -> Option<String> {
        let made = self.call("POST", "", &new_key(name)).await?;
        assert_eq!(made.status, 201, "{made:?}");
        Some(made.json()["resources"][0]["id"].as_str().unwrap().to_owned())
    }

    pub(crate) async fn wrap(&self, key: &str, plaintext: &str) -> Option<Answer> {
        let body = json!({ "plaintext": plaintext }).to_string();
        self.call("POST", &format!("/{key}/actions/wrap"), &body).await
    }

    pub(crate) async fn unwrap(&self, key: &str, wdek: &str) -> Option<Answer> {
        let body = json!({ "ciphertext": wdek }).to_string();
        self.call("POST", &format!("/{key}/actions/unwrap"), &body).await
    }

    /// Gives the administrator the role that no administrator has by that name.
    pub(crate) async fn may_purge(&self) -> Option<()> {
        let bearer = format!("Bearer {}", self.token);
        let headers = [("authorization", bearer.as_str())];
        let path = "/v1/policies";
        let listed = try_ask(self.tokens, &self.ca, "GET", path, &headers, "").await?.json();
        let mut policies = listed["policies"].as_array().unwrap().iter();
        let admin = policies.find(|one| one["role"] == "ClusterAdministrator").unwrap();
        let new = json!({"service_id": admin["service_id"], "role": "KeyPurge"}).to_string();
        let made = try_ask(self.tokens, &self.ca, "POST", path, &headers, &new).await?;
        assert_eq!(made.status, 201, "{made:?}");
        Some(())
    }

    pub(crate) async fn create_api_key(&self) -> Option<String> {
        let bearer = format!("Bearer {}", self.token);
        let headers = [("authorization", bearer.as_str())];
        let listed =
            try_ask(self.tokens, &self.ca, "GET", "/v1/apikeys", &headers, "").await?.json();
        let owner = listed["apikeys"][0]["service_id"].clone();
        let body = json!({"name": "made under fire", "service_id": owner}).to_string();
        let made = try_ask(self.tokens, &self.ca, "POST", "/v1/apikeys", &headers, &body).await?;
        assert_eq!(made.status, 201, "{made:?}");
        Some(made.json()["apikey"].as_str().unwrap().to_owned())
    }
}

/// Everything below `from`, as the backup of a token's folder is.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, target) =
            (entry.as_ref().unwrap(), to.join(entry.as_ref().unwrap().file_name()));
        match entry.file_type().unwrap().is_dir() {
            true => copy_folder(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Nobody takes them while the server is down, however often it starts: each rig has a loopback address of its own,
/// which no other connection of this machine goes out from.
fn free_addresses() -> [SocketAddr; 3] {
    static RIGS: AtomicU8 = AtomicU8::new(0);
    let [_, _, pid, low] = std::process::id().to_be_bytes();
    let own = Ipv4Addr::new(127, 64 | (pid & 63), low, RIGS.fetch_add(1, Ordering::Relaxed));
    // All at once, so that they differ.
    let listeners = [(); 3].map(|()| TcpListener::bind((own, 0)).unwrap());
    listeners.each_ref().map(|listener| listener.local_addr().unwrap())
}
