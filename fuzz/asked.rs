//! A whole key service, asked over a pipe instead of a socket: what a target sends goes through the HTTP parser, the
//! routes, the token check, the body, the operation and the answer. Database and audit log are files, keys in memory.

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kms_core::clock::{Clock, ManualClock};
use kms_core::wdek::WdekVersion;
use kms_hsm::memory::MemoryVault;
use kms_server::app::{App, Settings};
use kms_server::audit::Audit;
use kms_server::failures::Failures;
use kms_server::gate::Gates;
use kms_server::health::Health;
use kms_server::http;
use kms_server::init::{Made, fill};
use kms_server::issuers::Issuers;
use kms_server::limits::{self, Limits};
use kms_server::metrics::Metrics;
use kms_server::store::{SqliteStore, Store};
use kms_server::token::Issuer;
use kms_server::uses::Uses;
use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};

const PEER: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1));
/// More than the service reads of one request.
const PIPE: usize = 256 * 1024;
/// So many requests later, what they left behind is thrown away with the service.
const LIFE: u32 = 20_000;
const NEW_KEY: &str = r#"{"metadata":{"collectionType":"application/vnd.ibm.kms.key+json","collectionTotal":1},
    "resources":[{"type":"application/vnd.ibm.kms.key+json","name":"key","extractable":false}]}"#;

pub struct Asked {
    runtime: Runtime,
    app: Arc<App>,
    /// Token and instance of the administrator, without a line's end behind them.
    headers: String,
    /// A key that exists, unless a request has deleted it.
    pub key: String,
    _folder: tempfile::TempDir,
}

thread_local! {
    // libFuzzer has one thread.
    static ASKED: Cell<Option<(Asked, u32)>> = const { Cell::new(None) };
}

/// Runs `ask` with the service of now.
pub fn with(ask: impl FnOnce(&Asked)) {
    ASKED.with(|place| {
        let current = place.take().filter(|(_, left)| *left > 0);
        let (asked, left) = current.unwrap_or_else(|| (Asked::start(), LIFE));
        ask(&asked);
        place.set(Some((asked, left - 1)));
    });
}

impl Asked {
    fn start() -> Asked {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let folder = tempfile::tempdir().expect("a folder");
        let (app, made) = runtime.block_on(service(folder.path()));
        let mut asked = Asked {
            runtime,
            app: Arc::new(app),
            headers: String::new(),
            key: String::new(),
            _folder: folder,
        };
        let form = format!(
            "grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey={}",
            made.admin.api_key.expose()
        );
        let head = format!("POST /oidc/token HTTP/1.1\r\ncontent-length: {}\r\n\r\n", form.len());
        let token = json(&asked.tokens(format!("{head}{form}").as_bytes()))["access_token"].clone();
        let token = token.as_str().expect("a token").to_owned();
        asked.headers = format!("authorization: Bearer {token}\r\nicp-instance: {}", made.instance);
        let (headers, len) = (&asked.headers, NEW_KEY.len());
        let head =
            format!("POST /api/v2/keys HTTP/1.1\r\n{headers}\r\ncontent-length: {len}\r\n\r\n");
        let made = json(&asked.keys(format!("{head}{NEW_KEY}").as_bytes()));
        asked.key = made["resources"][0]["id"]
            .as_str()
            .unwrap_or_else(|| panic!("no key but {made}"))
            .to_owned();
        asked
    }

    pub fn headers(&self) -> &str {
        &self.headers
    }

    pub fn keys(&self, request: &[u8]) -> Vec<u8> {
        self.ask(request, |request| http::keys(self.app.clone(), PEER, request))
    }

    pub fn tokens(&self, request: &[u8]) -> Vec<u8> {
        self.ask(request, |request| http::tokens(self.app.clone(), PEER, request))
    }

    fn ask<F, A>(&self, request: &[u8], handler: F) -> Vec<u8>
    where
        F: Fn(hyper::Request<hyper::body::Incoming>) -> A,
        A: Future<Output = hyper::Response<http_body_util::Full<bytes::Bytes>>>,
    {
        let answer = self.runtime.block_on(async {
            let (mut peer, pipe) = tokio::io::duplex(PIPE);
            let service = service_fn(|request| {
                let answer = handler(request);
                async { Ok::<_, Infallible>(answer.await) }
            });
            let serving = http1::Builder::new()
                // What is asked ends before it is answered.
                .half_close(true)
                .serve_connection(TokioIo::new(pipe), service);
            let asking = async {
                let _ = peer.write_all(request).await;
                let _ = peer.shutdown().await;
                let mut answer = Vec::new();
                let _ = peer.read_to_end(&mut answer).await;
                answer
            };
            let both = async { tokio::join!(serving, asking).1 };
            tokio::time::timeout(Duration::from_secs(10), both).await.expect("an answer in time")
        });
        let status = answer.get(9..12).unwrap_or_default();
        assert!(
            !status.starts_with(b"5") || status == b"501",
            "{} for {}",
            String::from_utf8_lossy(&answer),
            String::from_utf8_lossy(request)
        );
        answer
    }
}

async fn service(folder: &std::path::Path) -> (App, Made) {
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let clock: Arc<dyn Clock> = Arc::new(ManualClock::at(start));
    let vault = Arc::new(MemoryVault::new());
    let store = SqliteStore::open(&folder.join("kms.db"), true).await.expect("a database");
    let audit =
        Audit::open(&folder.join("audit.log"), "fuzz", None, clock.clone()).expect("an audit log");
    let made = fill(&store, &*vault, &audit, start.into()).await.expect("a first content");
    let signing_key = store.signing_key().await.expect("a database").expect("a signing key");
    let lifetime = Duration::from_secs(3600);
    let limits = limits::Settings { rate_per_instance: 0, ..limits::Settings::default() };
    let app = App {
        vault,
        store: Arc::new(store),
        audit,
        issuer: Issuer::new("https://tokens.test/".into(), lifetime, signing_key, clock.clone()),
        issuers: Issuers::new(Vec::new(), clock.clone()).expect("no issuers"),
        settings: Settings {
            wdek_version: WdekVersion::V2_1_0,
            min_rotation_interval: Duration::ZERO,
        },
        failures: Failures::default(),
        uses: Uses::default(),
        gates: Gates::new(),
        limits: Limits::new(limits, clock.clone()),
        metrics: Metrics::new(),
        health: Health::unknown(),
        clock,
    };
    (app, made)
}

fn json(answer: &[u8]) -> serde_json::Value {
    let body = answer.windows(4).position(|end| end == b"\r\n\r\n").expect("a body") + 4;
    serde_json::from_slice(&answer[body..]).expect("JSON")
}
