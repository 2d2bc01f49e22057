//! A token service and a key service on one TLS port, as far as a plug-in needs them. It refuses, hangs and rotates
//! when told to.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::server::TlsStream;

pub(crate) const TOKEN: &str = "canary-token-4f1d";

pub(crate) struct Service {
    pub(crate) address: SocketAddr,
    pub(crate) ca: PathBuf,
    _folder: TempDir,
    state: Arc<State>,
}

struct State {
    facts: Mutex<Facts>,
    /// False: every answer waits.
    answers: watch::Sender<bool>,
}

#[derive(Default)]
struct Facts {
    api_key: String,
    version: u32,
    /// WDEK to (DEK in base64, version).
    deks: HashMap<String, (String, u32)>,
    asked: usize,
    /// The path, the correlation id and `traceparent` of each request.
    named: Vec<[String; 3]>,
}

struct Request {
    path: String,
    correlation_id: String,
    traceparent: String,
    body: String,
}

impl Service {
    pub(crate) async fn start(api_key: &str) -> Service {
        let folder = tempfile::tempdir().unwrap();
        let ca = folder.path().join("ca.crt");
        let acceptor = tls(&ca);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let facts = Facts { api_key: api_key.to_owned(), version: 1, ..Facts::default() };
        let state = Arc::new(State { facts: Mutex::new(facts), answers: watch::Sender::new(true) });
        tokio::spawn(accept(listener, acceptor, state.clone()));
        Service { address, ca, _folder: folder, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    pub(crate) fn accept_api_key(&self, api_key: &str) {
        self.facts(|facts| facts.api_key = api_key.to_owned());
    }

    /// The CRK gets a new version.
    pub(crate) fn rotate(&self) {
        self.facts(|facts| facts.version += 1);
    }

    pub(crate) fn answers(&self, answers: bool) {
        self.state.answers.send_replace(answers);
    }

    /// Returns once `count` requests have come.
    pub(crate) async fn was_asked(&self, count: usize) {
        while self.asked() < count {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn asked(&self) -> usize {
        self.facts(|facts| facts.asked)
    }

    /// The correlation ids of the requests for this path.
    pub(crate) fn correlation_ids(&self, path: &str) -> Vec<String> {
        let named = self.facts(|facts| facts.named.clone());
        named.into_iter().filter(|[asked, ..]| asked == path).map(|[_, id, _]| id).collect()
    }

    /// The `traceparent` of each request with this correlation id; empty where there was none.
    pub(crate) fn traceparents(&self, correlation_id: &str) -> Vec<String> {
        let named = self.facts(|facts| facts.named.clone());
        named
            .into_iter()
            .filter(|[_, id, _]| id == correlation_id)
            .map(|[.., trace]| trace)
            .collect()
    }

    pub(crate) fn wdeks(&self) -> Vec<String> {
        self.facts(|facts| facts.deks.keys().cloned().collect())
    }

    /// All DEKs in base64.
    pub(crate) fn deks(&self) -> Vec<String> {
        self.facts(|facts| facts.deks.values().map(|(dek, _)| dek.clone()).collect())
    }

    fn facts<T>(&self, look: impl FnOnce(&mut Facts) -> T) -> T {
        look(&mut self.state.facts.lock().unwrap())
    }
}

fn tls(ca_file: &std::path::Path) -> TlsAcceptor {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(ca_file, ca.pem()).unwrap();
    let key = KeyPair::generate().unwrap();
    let names = CertificateParams::new(["localhost".to_owned()]).unwrap();
    let certificate = names.signed_by(&key, &ca).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, state: Arc<State>) {
    while let Ok((socket, _)) = listener.accept().await {
        let (acceptor, state) = (acceptor.clone(), state.clone());
        tokio::spawn(async move {
            if let Ok(stream) = acceptor.accept(socket).await {
                serve(stream, &state).await;
            }
        });
    }
}

async fn serve(mut stream: TlsStream<TcpStream>, state: &State) {
    while let Some(request) = read(&mut stream).await {
        let (status, answer) = {
            let mut facts = state.facts.lock().unwrap();
            facts.asked += 1;
            let answer = answer(&mut facts, &request.path, &request.body);
            facts.named.push([request.path, request.correlation_id, request.traceparent]);
            answer
        };
        state.answers.subscribe().wait_for(|answers| *answers).await.unwrap();
        let answer = answer.to_string();
        let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", answer.len());
        if stream.write_all(format!("{head}{answer}").as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn read(stream: &mut TlsStream<TcpStream>) -> Option<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap();
    let header = |wanted: &str| {
        head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case(wanted).then_some(value)
        })
    };
    let mut body = vec![0; header("content-length").map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await.ok()?;
    Some(Request {
        path: head.split(' ').nth(1)?.to_owned(),
        correlation_id: header("correlation-id").unwrap_or_default().to_owned(),
        traceparent: header("traceparent").unwrap_or_default().to_owned(),
        body: String::from_utf8(body).unwrap(),
    })
}

fn answer(facts: &mut Facts, path: &str, body: &str) -> (u16, Value) {
    if path == "/oidc/token" {
        return token(facts, body);
    }
    match path {
        "/api/v2/keys/crk?action=wrap" => (200, wrap(facts)),
        "/api/v2/keys/crk?action=unwrap" => unwrap(facts, &serde_json::from_str(body).unwrap()),
        _ => refusal(404, "Not Found: key does not exist"),
    }
}

fn token(facts: &Facts, body: &str) -> (u16, Value) {
    if !body.contains(&format!("apikey={}", facts.api_key)) {
        let message = "Provided API key could not be found.";
        return (400, json!({"errorCode": "BXNIM0415E", "errorMessage": message}));
    }
    (200, json!({"access_token": TOKEN, "token_type": "Bearer", "expires_in": 3600}))
}

fn wrap(facts: &mut Facts) -> Value {
    let number = u8::try_from(facts.deks.len()).unwrap();
    let dek = STANDARD.encode([&[number; 8][..], b"canary-dek-is-not-a-log!"].concat());
    let wdek = STANDARD.encode(format!("{{\"canary-wdek\":{number}}}"));
    facts.deks.insert(wdek.clone(), (dek.clone(), facts.version));
    json!({"ciphertext": wdek, "plaintext": dek, "keyVersion": {"id": format!("v{}", facts.version)}})
}

fn unwrap(facts: &Facts, request: &Value) -> (u16, Value) {
    match facts.deks.get(request["ciphertext"].as_str().unwrap()) {
        Some((dek, version)) => {
            (200, json!({"plaintext": dek, "keyVersion": {"id": format!("v{version}")}}))
        }
        None => refusal(422, "Unprocessable ciphertext"),
    }
}

fn refusal(status: u16, text: &str) -> (u16, Value) {
    (status, json!({"metadata": {}, "resources": [{"errorMsg": text}]}))
}
