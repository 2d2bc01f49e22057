//! An unmodified kube-apiserver, and kubectl against it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::assets::Assets;
use crate::error::{Error, Result};
use crate::etcd::Etcd;
use crate::process::{self, Lifetime, Process, Spec};
use crate::server::Server;
use crate::{http, pki, ports, wait};

/// One kube-apiserver.
#[derive(Debug)]
pub struct ApiServer {
    pub server: Server,
    /// Where it is, and what it writes into `iss` of its service accounts' tokens.
    pub url: String,
    /// The file with the CA that its certificate is of.
    pub ca: PathBuf,
    pub kubectl: Kubectl,
}

impl ApiServer {
    /// Starts kube-apiserver in `dir` with this EncryptionConfiguration and waits for `/readyz`.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start(
        assets: &Assets,
        etcd: &Etcd,
        encryption_config: &Path,
        dir: &Path,
        lifetime: Lifetime,
    ) -> Result<Self> {
        let port = ports::free()?;
        let (signing_key, public_key) = pki::service_account_keys(dir)?;
        let tokens = dir.join("tokens.csv");
        let token = random_token()?;
        pki::write_private(&tokens, &format!("{token},admin,1,system:masters\n"))?;
        let kubectl = Kubectl::create(&assets.kubectl, port, &token, dir)?;
        let url = format!("https://127.0.0.1:{port}");
        let certificates = dir.join("apiserver-certs");
        let spec = Spec::new("kube-apiserver", &assets.kube_apiserver, dir, lifetime)
            .arg(format!("--etcd-servers={}", etcd.url()))
            .arg(format!("--cert-dir={}", certificates.display()))
            .arg(format!("--secure-port={port}"))
            .arg("--bind-address=127.0.0.1")
            .arg(format!("--service-account-issuer={url}"))
            .arg(format!("--service-account-jwks-uri={url}/openid/v1/jwks"))
            .arg(format!("--service-account-key-file={}", public_key.display()))
            .arg(format!("--service-account-signing-key-file={}", signing_key.display()))
            .arg(format!("--token-auth-file={}", tokens.display()))
            .arg("--authorization-mode=RBAC")
            .arg("--service-cluster-ip-range=10.0.0.0/24")
            .arg("--disable-admission-plugins=ServiceAccount")
            .arg(format!("--encryption-provider-config={}", encryption_config.display()))
            .arg("--feature-gates=KMSv1=true");
        let ca = certificates.join("apiserver.crt");
        let mut apiserver = Self { server: Server::new(spec), url, ca, kubectl };
        apiserver.server.start()?;
        apiserver.wait_until_ready()?;
        Ok(apiserver)
    }

    /// Kills the process (by itself it would take over a minute to end while clients watch) and starts it again, with
    /// an empty memory.
    ///
    /// # Errors
    /// When it does not become ready again.
    pub fn restart(&mut self) -> Result<()> {
        self.server.kill()?;
        self.start_again()
    }

    /// Starts the process, which was ended before.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start_again(&mut self) -> Result<()> {
        self.server.start()?;
        self.wait_until_ready()
    }

    /// Waits for `/readyz`.
    ///
    /// # Errors
    /// When time is up or the process ends.
    fn wait_until_ready(&self) -> Result<()> {
        wait::until("kube-apiserver's readiness", READY_WITHIN, &[self.server.running()?], || {
            match self.kubectl.run(&["get", "--raw", "/readyz"], b"") {
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            }
        })
    }
}

/// `kubectl proxy`: kube-apiserver's API over plain HTTP, for more calls than one can start a kubectl for.
#[derive(Debug)]
pub struct Proxy {
    process: Process,
    pub port: u16,
}

impl Proxy {
    /// Creates an object below `path`, such as `/api/v1/namespaces/default/secrets`.
    ///
    /// # Errors
    /// Whatever is not `201 Created`, with kube-apiserver's answer.
    pub fn create(&self, path: &str, object: &str) -> Result<()> {
        expect(201, http::post_json(self.port, path, object)).map(drop)
    }

    /// Reads `path`.
    ///
    /// # Errors
    /// Whatever is not `200 OK`, with kube-apiserver's answer.
    pub fn read(&self, path: &str) -> Result<String> {
        expect(200, http::get(self.port, path))
    }
}

fn expect(status: u16, answer: std::result::Result<(u16, String), String>) -> Result<String> {
    match answer {
        Ok((seen, body)) if seen == status => Ok(body),
        Ok((seen, body)) => Err(Error::answer("kube-apiserver", format!("{seen} {body}"))),
        Err(text) => Err(Error::answer("kubectl proxy", text)),
    }
}

/// kubectl with the administrator's credentials.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    pub kubeconfig: PathBuf,
    cache: PathBuf,
}

impl Kubectl {
    /// Runs kubectl and returns what it printed on standard output.
    ///
    /// # Errors
    /// When it fails, with all that it printed.
    pub fn run(&self, args: &[&str], stdin: &[u8]) -> Result<String> {
        let bytes = process::stdout(self.command(args), stdin)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Starts `kubectl proxy` and waits until kube-apiserver answers through it.
    ///
    /// # Errors
    /// When it does not.
    pub fn proxy(&self, dir: &Path, lifetime: Lifetime) -> Result<Proxy> {
        let port = ports::free()?;
        let spec = Spec::new("kubectl-proxy", &self.program, dir, lifetime)
            .arg("proxy")
            .arg(format!("--port={port}"))
            .env("KUBECONFIG", &self.kubeconfig);
        let proxy = Proxy { process: Process::start(&spec)?, port };
        wait::until("kubectl proxy", READY_WITHIN, &[&proxy.process], || {
            proxy.read("/livez").map_err(|error| error.to_string())
        })?;
        Ok(proxy)
    }

    /// `kubectl create secret generic NAME --from-literal=KEY=VALUE` in the namespace `default`.
    ///
    /// # Errors
    /// When kube-apiserver refuses, with its text.
    pub fn create_secret(&self, name: &str, key: &str, value: &str) -> Result<String> {
        self.run(
            &["create", "secret", "generic", name, &format!("--from-literal={key}={value}")],
            b"",
        )
    }

    /// `kubectl create configmap NAME --from-literal=KEY=VALUE` in the namespace `default`.
    ///
    /// # Errors
    /// When kube-apiserver refuses, with its text.
    pub fn create_configmap(&self, name: &str, key: &str, value: &str) -> Result<String> {
        self.run(&["create", "configmap", name, &format!("--from-literal={key}={value}")], b"")
    }

    /// One value of a secret, decoded.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn secret_value(&self, name: &str, key: &str) -> Result<String> {
        let template = format!("go-template={{{{index .data \"{key}\" | base64decode}}}}");
        self.run(&["get", "secret", name, "-o", &template], b"")
    }

    /// One value of a configmap.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn configmap_value(&self, name: &str, key: &str) -> Result<String> {
        let template = format!("go-template={{{{index .data \"{key}\"}}}}");
        self.run(&["get", "configmap", name, "-o", &template], b"")
    }

    fn create(program: &Path, port: u16, token: &str, dir: &Path) -> Result<Self> {
        let kubeconfig = dir.join("kubeconfig");
        // kube-apiserver makes its own serving certificate at start: there is nothing yet to pin here.
        let text = format!(
            "apiVersion: v1
kind: Config
clusters:
- name: keelson
  cluster:
    server: https://127.0.0.1:{port}
    insecure-skip-tls-verify: true
users:
- name: admin
  user:
    token: {token}
contexts:
- name: keelson
  context:
    cluster: keelson
    user: admin
    namespace: default
current-context: keelson
"
        );
        pki::write_private(&kubeconfig, &text)?;
        let cache = dir.join("kube-cache");
        fs::create_dir_all(&cache).map_err(Error::machine(format!("make {}", cache.display())))?;
        Ok(Self { program: program.to_owned(), kubeconfig, cache })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).env("KUBECONFIG", &self.kubeconfig).env("KUBECACHEDIR", &self.cache);
        command
    }
}

/// The administrator's token: other users of this machine can reach the port as well.
fn random_token() -> Result<String> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Error::answer("the random source", "no random bytes"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

const READY_WITHIN: Duration = Duration::from_secs(120);
