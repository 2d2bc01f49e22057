//! Requests to a key service over HTTPS that stays open, with a real token.
//!
//! Closed: every connection asks again as soon as it is answered. Open: requests are due at fixed times whatever the
//! answers do, and a time counts from when its request was due, so a server that stalls is not let off the requests
//! that would have come meanwhile.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kms_core::clock::{Clock, SystemClock};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::Failure;
use crate::figures::Figures;

/// From how many loopback addresses connections come: one may not open as many as all.
const ADDRESSES: u32 = 4;
/// No answer after this time is a failure.
const PATIENCE: Duration = Duration::from_secs(10);
/// 32 bytes.
const DEK: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";

/// What is asked, how often, and where.
#[derive(Deserialize)]
pub(crate) struct Load {
    keys_port: u16,
    tokens_port: u16,
    ca: PathBuf,
    instance: String,
    api_key: String,
    key: String,
    op: Op,
    /// The status of a good answer.
    wanted: u16,
    connections: u32,
    seconds: u64,
    /// Requests a second of all connections together; 0: closed.
    rate: u32,
    /// How many requests at most; 0: as many as time allows.
    most: u64,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Op {
    Wrap,
    Unwrap,
    Create,
    /// What is known of the key: authenticated and recorded as a wrap is, and nothing asked of the HSM.
    Metadata,
}

type Stream = TlsStream<TcpStream>;

/// When one connection sends.
#[derive(Clone, Copy)]
struct Schedule {
    begin: Duration,
    end: Duration,
    /// From one request of this connection to its next; zero: closed.
    step: Duration,
    most: u64,
}

impl Load {
    pub(crate) async fn run(self) -> Result<Figures, Failure> {
        let tls = client(&self.ca)?;
        let token = self.token(&tls).await?;
        let request = Arc::new(self.request(&tls, &token).await?);
        let mut streams = Vec::new();
        for number in 0..self.connections {
            streams.push(connect(&tls, self.keys_port, number).await?);
        }
        let clock = SystemClock::new();
        let began = clock.now();
        let mut connections = JoinSet::new();
        for (number, stream) in (0..).zip(streams) {
            let (request, wanted) = (request.clone(), self.wanted);
            let schedule = self.schedule(number, began);
            connections.spawn(async move { ask(stream, &request, wanted, schedule, clock).await });
        }
        let mut all = Figures::default();
        for figures in connections.join_all().await {
            all.add(figures);
        }
        all.took(clock.now() - began);
        Ok(all)
    }

    fn schedule(&self, number: u32, began: Duration) -> Schedule {
        let (mut begin, mut step) = (began, Duration::ZERO);
        if self.rate > 0 {
            let between = Duration::from_secs(1) / self.rate;
            begin += between * number;
            step = between * self.connections;
        }
        let end = began + Duration::from_secs(self.seconds);
        Schedule { begin, end, step, most: self.most / u64::from(self.connections) }
    }

    async fn token(&self, tls: &TlsConnector) -> Result<String, Failure> {
        let form = format!(
            "grant_type=urn%3Aibm%3Aparams%3Aoauth%3Agrant-type%3Aapikey&apikey={}",
            self.api_key
        );
        let head = "POST /oidc/token HTTP/1.1\r\nHost: localhost\r\n\
                    Content-Type: application/x-www-form-urlencoded\r\nAccept: application/json\r\n";
        let answer = once(tls, self.tokens_port, &whole(head, &form)).await?;
        let token = answer["access_token"].as_str().ok_or("no access_token in the answer")?;
        Ok(token.to_owned())
    }

    async fn request(&self, tls: &TlsConnector, token: &str) -> Result<Vec<u8>, Failure> {
        let (path, body) = match self.op {
            Op::Wrap => (self.action("wrap"), plaintext()),
            Op::Create => ("/api/v2/keys".to_owned(), new_key()),
            Op::Metadata => {
                let path = format!("/api/v2/keys/{}/metadata", self.key);
                return Ok(whole(&self.head("GET", &path, token), ""));
            }
            Op::Unwrap => {
                let head = self.head("POST", &self.action("wrap"), token);
                let wrap = whole(&head, &plaintext().to_string());
                let wrapped = once(tls, self.keys_port, &wrap).await?;
                let ciphertext = wrapped["ciphertext"].as_str().ok_or("no ciphertext")?;
                (self.action("unwrap"), json!({"ciphertext": ciphertext}))
            }
        };
        Ok(whole(&self.head("POST", &path, token), &body.to_string()))
    }

    fn action(&self, name: &str) -> String {
        format!("/api/v2/keys/{}/actions/{name}", self.key)
    }

    fn head(&self, method: &str, path: &str, token: &str) -> String {
        format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nBluemix-Instance: {}\r\n\
             Content-Type: application/json\r\n",
            self.instance
        )
    }
}

fn plaintext() -> Value {
    json!({"plaintext": DEK})
}

fn new_key() -> Value {
    let kind = "application/vnd.ibm.kms.key+json";
    json!({
        "metadata": {"collectionType": kind, "collectionTotal": 1},
        "resources": [{"type": kind, "name": "one of many", "extractable": false}],
    })
}

/// Sends the same request again and again.
async fn ask(
    mut stream: Stream,
    request: &[u8],
    wanted: u16,
    schedule: Schedule,
    clock: SystemClock,
) -> Figures {
    let mut figures = Figures::default();
    let mut due = schedule.begin;
    let mut buffer = Vec::new();
    for _ in 0..if schedule.most == 0 { u64::MAX } else { schedule.most } {
        if schedule.step.is_zero() {
            due = clock.now();
        }
        if due >= schedule.end || clock.now() >= schedule.end {
            break;
        }
        let early = due.saturating_sub(clock.now());
        if !early.is_zero() {
            tokio::time::sleep(early).await;
        }
        let answer = tokio::time::timeout(PATIENCE, exchange(&mut stream, request, &mut buffer));
        let status = match answer.await {
            Ok(Ok((status, _))) => status,
            Ok(Err(_)) | Err(_) => 0,
        };
        figures.count(status, wanted, clock.now().saturating_sub(due));
        if status == 0 {
            break;
        }
        due += schedule.step;
    }
    figures
}

fn client(ca: &std::path::Path) -> Result<TlsConnector, Failure> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca)? {
        roots.add(certificate?)?;
    }
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

async fn connect(tls: &TlsConnector, port: u16, number: u32) -> Result<Stream, Failure> {
    let [.., last] = (1 + number % ADDRESSES).to_be_bytes();
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 0)))?;
    let tcp = socket.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?;
    tcp.set_nodelay(true)?;
    Ok(tls.connect(ServerName::try_from("localhost")?, tcp).await?)
}

/// One request on a connection of its own that must succeed; its JSON.
async fn once(tls: &TlsConnector, port: u16, request: &[u8]) -> Result<Value, Failure> {
    let mut stream = connect(tls, port, 0).await?;
    let mut buffer = Vec::new();
    let (status, head) = exchange(&mut stream, request, &mut buffer).await?;
    if status != 200 {
        // The body may hold a secret, or name one.
        return Err(format!("port {port} answered {status} before the load began").into());
    }
    Ok(serde_json::from_slice(buffer.get(head..).unwrap_or_default())?)
}

/// Sends `request` and reads one whole answer into `buffer`: its status, and where its body begins.
async fn exchange(
    stream: &mut Stream,
    request: &[u8],
    buffer: &mut Vec<u8>,
) -> Result<(u16, usize), Failure> {
    stream.write_all(request).await?;
    stream.flush().await?;
    buffer.clear();
    loop {
        if let Some((status, head, length)) = parse(buffer)
            && buffer.len() >= head + length
        {
            return Ok((status, head));
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err("the server closed the connection".into());
        }
    }
}

/// Status, length of the head, length of the body; `None` before the head is whole.
fn parse(answer: &[u8]) -> Option<(u16, usize, usize)> {
    let head = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let text = std::str::from_utf8(answer.get(..head)?).ok()?;
    let mut lines = text.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    Some((status, head + 4, length.unwrap_or(0)))
}

fn whole(head: &str, body: &str) -> Vec<u8> {
    format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_to_its_end() {
        let answer = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 3\r\n\r\nabc";
        assert_eq!(parse(answer), Some((429, answer.len() - 3, 3)));
        assert_eq!(parse(&answer[..40]), None);
        assert_eq!(parse(b"HTTP/1.1 204 No Content\r\n\r\n"), Some((204, 27, 0)));
    }
}
