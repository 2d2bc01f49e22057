//! A TLS server on loopback that keeps what it was asked and answers as the test says. It speaks HTTP by hand, so
//! that it can also break it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use kms_api::client::Ca;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

pub(crate) enum Reply {
    Json(u16, String),
    /// These bytes as they are, then the end of the connection.
    Raw(Vec<u8>),
    /// The end of the connection instead of an answer.
    Close,
    /// The same, as a TCP reset.
    Reset,
    Hang,
    /// Waits for one permit first.
    When(Arc<Semaphore>, Box<Reply>),
}

impl Reply {
    pub(crate) fn ok(body: impl ToString) -> Self {
        Reply::Json(200, body.to_string())
    }

    /// As the key service refuses.
    pub(crate) fn refusal(status: u16, text: &str) -> Self {
        let body = serde_json::json!({"metadata": {}, "resources": [{"errorMsg": text}]});
        Reply::Json(status, body.to_string())
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
    /// Which accepted connection it came on, from 0.
    pub(crate) connection: usize,
}

type Script = dyn Fn(usize, &Asked) -> Reply + Send + Sync;

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) ca: Ca,
    asked: Arc<Mutex<Vec<Asked>>>,
    count: watch::Receiver<usize>,
}

impl Server {
    /// `script` gets the number of the request, from 0, and the request.
    pub(crate) async fn start(
        script: impl Fn(usize, &Asked) -> Reply + Send + Sync + 'static,
    ) -> Server {
        let (acceptor, ca) = tls();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (counter, count) = watch::channel(0);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let shared = Shared { asked: Arc::clone(&asked), counter, script: Box::new(script) };
        tokio::spawn(accept(listener, acceptor, Arc::new(shared)));
        Server { address, ca, asked, count }
    }

    pub(crate) fn url(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// Waits until so many requests have come.
    pub(crate) async fn has_been_asked(&self, times: usize) {
        self.count.clone().wait_for(|count| *count >= times).await.unwrap();
    }
}

struct Shared {
    asked: Arc<Mutex<Vec<Asked>>>,
    counter: watch::Sender<usize>,
    script: Box<Script>,
}

/// A certificate for `localhost` and 127.0.0.1, signed by a CA of its own.
fn tls() -> (TlsAcceptor, Ca) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &ca).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    (TlsAcceptor::from(Arc::new(config)), Ca::Pem(ca.pem().into_bytes()))
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, shared: Arc<Shared>) {
    for connection in 0.. {
        let Ok((socket, _)) = listener.accept().await else { return };
        let (acceptor, shared) = (acceptor.clone(), Arc::clone(&shared));
        tokio::spawn(async move {
            if let Ok(stream) = acceptor.accept(socket).await {
                serve(stream, connection, &shared).await;
            }
        });
    }
}

/// One connection, until it ends or a reply ends it.
async fn serve(mut stream: TlsStream<TcpStream>, connection: usize, shared: &Shared) {
    while let Some(asked) = read(&mut stream, connection).await {
        let number = {
            let mut all = shared.asked.lock().unwrap();
            all.push(asked.clone());
            all.len() - 1
        };
        let mut reply = (shared.script)(number, &asked);
        shared.counter.send_replace(number + 1);
        while let Reply::When(gate, then) = reply {
            gate.acquire().await.unwrap().forget();
            reply = *then;
        }
        match reply {
            Reply::Json(status, body) => {
                let length = body.len();
                let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n");
                if stream.write_all(format!("{head}{body}").as_bytes()).await.is_err() {
                    return;
                }
            }
            Reply::Raw(bytes) => {
                let _ = stream.write_all(&bytes).await;
                let _ = stream.shutdown().await;
                return;
            }
            Reply::Close => return,
            Reply::Reset => {
                stream.get_ref().0.set_zero_linger().unwrap();
                return;
            }
            Reply::Hang => std::future::pending().await,
            Reply::When(..) => unreachable!("the loop above ends with another reply"),
        }
    }
}

async fn read(stream: &mut TlsStream<TcpStream>, connection: usize) -> Option<Asked> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let text = String::from_utf8(head).unwrap();
    let mut lines = text.split("\r\n").filter(|line| !line.is_empty());
    let mut first = lines.next()?.split(' ').map(str::to_owned);
    let headers: HashMap<_, _> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    let (method, path) = (first.next()?, first.next()?);
    Some(Asked { method, path, headers, body: String::from_utf8(body).unwrap(), connection })
}
