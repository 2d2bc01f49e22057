//! A running `kmsplugin`: its files, its log line by line, its ports, and an end to it whatever the test does.

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kms_api::grpc::v1beta1::key_management_service_client::KeyManagementServiceClient as V1;
use kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient as V2;
use kms_api::grpc::{self, Channel, Status, v1beta1, v2};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::service::Service;

/// Long enough for a slow machine; a test that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A configuration and a place for the socket.
pub(crate) struct Setup {
    pub(crate) folder: Arc<TempDir>,
    health: SocketAddr,
    settings: Vec<(String, String)>,
}

pub(crate) struct Plugin {
    child: Child,
    log: Arc<Log>,
    socket: String,
    health: SocketAddr,
    /// The socket is in it.
    _folder: Arc<TempDir>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    changed: Condvar,
}

impl Setup {
    /// For a service that does not exist.
    pub(crate) fn new() -> Setup {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let health = free_address();
        let setup = Setup { folder, health, settings: Vec::new() };
        let key = rcgen::KeyPair::generate().unwrap();
        let ca = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap();
        let ca_file = setup.folder.path().join("ca.crt");
        std::fs::write(&ca_file, ca.pem()).unwrap();
        let socket = setup.folder.path().join("kms.sock");
        setup
            .with("UNIX_SOCKET_PATH", socket.to_str().unwrap())
            .with("TOKEN_URL", "https://127.0.0.1:9/oidc/token")
            .with("TOKEN_URL_CA_FILE", ca_file.to_str().unwrap())
            .with("API_KEY", "canary-api-key-93ab")
            .with("HEALTHZ_PORT", &health.to_string())
            .with("CRK_ID", "crk")
            .with("INSTANCE_ID", "instance")
            .with("URL", "https://127.0.0.1:9")
            .with("KP_CA_FILE", ca_file.to_str().unwrap())
    }

    pub(crate) fn for_service(service: &Service) -> Setup {
        let ca = service.ca.to_str().unwrap();
        Setup::new()
            .with("TOKEN_URL", &format!("{}/oidc/token", service.url()))
            .with("URL", &service.url())
            .with("TOKEN_URL_CA_FILE", ca)
            .with("KP_CA_FILE", ca)
    }

    /// One value of the file; the last one counts.
    pub(crate) fn with(mut self, name: &str, value: &str) -> Setup {
        self.settings.retain(|(old, _)| old != name);
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Setup {
        self.settings.retain(|(old, _)| old != name);
        self
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.folder.path().join("kmsplugin-config.yaml")
    }

    pub(crate) fn write_config(&self) {
        let section = |name: &str, in_it: &dyn Fn(&str) -> bool| {
            let lines = self.settings.iter().filter(|(name, _)| in_it(name));
            let lines: Vec<_> =
                lines.map(|(name, value)| format!("  {name}: {}\n", literal(value))).collect();
            if lines.is_empty() { String::new() } else { format!("{name}:\n{}", lines.concat()) }
        };
        let is_kp = |name: &str| ["CRK_ID", "INSTANCE_ID", "URL", "KP_CA_FILE"].contains(&name);
        let is_log = |name: &str| name.starts_with("LOG_");
        let text = [
            section("SERVER_CONFIG", &|name| !is_kp(name) && !is_log(name)),
            section("KP_CONFIG", &is_kp),
            section("LOGGER", &is_log),
        ];
        std::fs::write(self.config(), text.concat()).unwrap();
    }

    pub(crate) fn socket(&self) -> String {
        let socket = self.settings.iter().find(|(name, _)| name == "UNIX_SOCKET_PATH");
        socket.map(|(_, value)| value.clone()).unwrap()
    }

    /// Writes the file and starts the plug-in with it.
    pub(crate) fn start(&self) -> Plugin {
        self.start_by(command())
    }

    /// The same by a command of the caller's.
    pub(crate) fn start_by(&self, mut command: Command) -> Plugin {
        self.write_config();
        command.env("config_file", self.config());
        Plugin::spawn(command, self.socket(), self.health, self.folder.clone())
    }

    /// Starts it and waits until it serves.
    pub(crate) fn serving(&self) -> Plugin {
        let plugin = self.start();
        plugin.line("The Provider server is started.");
        plugin
    }

    /// Starts it and waits until the key service has wrapped and unwrapped.
    pub(crate) fn ready(&self) -> Plugin {
        let plugin = self.serving();
        plugin.line("ready.");
        plugin
    }
}

/// Text in quotes as in the original, numbers and switches without.
fn literal(value: &str) -> String {
    match value.parse::<u32>().is_ok() || value == "true" || value == "false" {
        true => value.to_owned(),
        false => format!("\"{value}\""),
    }
}

/// Nobody takes it between this look and the plug-in's start: each caller has a loopback address of its own, which no
/// other connection of this machine goes out from.
pub(crate) fn free_address() -> SocketAddr {
    static CALLERS: AtomicU8 = AtomicU8::new(0);
    let [_, _, pid, low] = std::process::id().to_be_bytes();
    let own = Ipv4Addr::new(127, 64 | (pid & 63), low, CALLERS.fetch_add(1, Ordering::Relaxed));
    TcpListener::bind((own, 0)).unwrap().local_addr().unwrap()
}

/// The binary with nothing of this process's environment in it.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kmsplugin"));
    command.env_clear().stdin(Stdio::null());
    command
}

/// The binary as systemd starts it for a socket that it has bound: descriptor 3, and its own pid in LISTEN_PID.
pub(crate) fn activated(listener: &UnixListener) -> Command {
    let mut command = Command::new("/bin/sh");
    let script = r#"exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0""#;
    let listener = OwnedFd::from(listener.try_clone().unwrap());
    command.env_clear().args(["-c", script, env!("CARGO_BIN_EXE_kmsplugin")]).stdin(listener);
    command
}

pub(crate) fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

impl Log {
    fn fill(&self, stderr: impl Read) {
        for line in BufReader::new(stderr).lines() {
            self.lines.lock().unwrap().0.push(line.unwrap());
            self.changed.notify_all();
        }
        self.lines.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

impl Plugin {
    /// Runs a command that will serve `socket` and `health`.
    pub(crate) fn spawn(
        mut command: Command,
        socket: String,
        health: SocketAddr,
        folder: Arc<TempDir>,
    ) -> Plugin {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        let (stderr, into) = (child.stderr.take().unwrap(), log.clone());
        std::thread::spawn(move || into.fill(stderr));
        Plugin { child, log, socket, health, _folder: folder }
    }

    /// Waits for a line that holds this text.
    pub(crate) fn line(&self, text: &str) -> String {
        let found = |lines: &[String]| lines.iter().find(|line| line.contains(text)).cloned();
        let lines = self.log.lines.lock().unwrap();
        let (lines, _) = self
            .log
            .changed
            .wait_timeout_while(lines, PATIENCE, |(lines, ended)| found(lines).is_none() && !*ended)
            .unwrap();
        found(&lines.0).unwrap_or_else(|| panic!("no line with {text:?} in {:#?}", lines.0))
    }

    /// All lines so far.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.log.lines.lock().unwrap().0.clone()
    }

    /// All lines that there will ever be.
    pub(crate) fn all_lines(&self) -> Vec<String> {
        let lines = self.log.lines.lock().unwrap();
        self.log.changed.wait_while(lines, |(_, ended)| !*ended).unwrap().0.clone()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// One line of /proc/PID/status, in the unit that it has there.
    pub(crate) fn memory(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    pub(crate) fn kill(&mut self) {
        self.signal(Signal::KILL);
        assert_eq!(self.wait().signal(), Some(9));
    }

    /// (status, body) of the health port.
    pub(crate) async fn health(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.health).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    pub(crate) async fn channel(&self) -> Channel {
        grpc::connect(&self.socket).await.unwrap()
    }

    pub(crate) async fn encrypt_v1(&self, plain: &[u8]) -> Result<Vec<u8>, Status> {
        let request = v1beta1::EncryptRequest { version: "v1beta1".into(), plain: plain.into() };
        Ok(V1::new(self.channel().await).encrypt(request).await?.into_inner().cipher)
    }

    pub(crate) async fn decrypt_v1(&self, cipher: &[u8]) -> Result<Vec<u8>, Status> {
        let request = v1beta1::DecryptRequest { version: "v1beta1".into(), cipher: cipher.into() };
        Ok(V1::new(self.channel().await).decrypt(request).await?.into_inner().plain)
    }

    pub(crate) async fn status(&self) -> Result<v2::StatusResponse, Status> {
        Ok(V2::new(self.channel().await).status(v2::StatusRequest {}).await?.into_inner())
    }

    pub(crate) async fn encrypt_v2(&self, plain: &[u8]) -> Result<v2::EncryptResponse, Status> {
        let request = v2::EncryptRequest { plaintext: plain.into(), uid: "canary-uid".into() };
        Ok(V2::new(self.channel().await).encrypt(request).await?.into_inner())
    }

    pub(crate) async fn decrypt_v2(&self, sealed: &v2::EncryptResponse) -> Result<Vec<u8>, Status> {
        let request = v2::DecryptRequest {
            ciphertext: sealed.ciphertext.clone(),
            uid: "canary-uid".into(),
            key_id: sealed.key_id.clone(),
            annotations: sealed.annotations.clone(),
        };
        Ok(V2::new(self.channel().await).decrypt(request).await?.into_inner().plaintext)
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
