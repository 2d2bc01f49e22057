//! A whole key service, asked over a pipe instead of a socket: what a target sends goes through the HTTP parser, the
//! routes, the token check, the body, the operation and the answer. Database and audit log are files, keys in memory.

// Each target uses a part of it.
#![allow(dead_code)]

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kms_core::clock::{Clock, ManualClock};
use kms_hsm::memory::MemoryVault;
use kms_server::app::{App, Foundation, Settings};
use kms_server::audit::Audit;
use kms_server::guard::Guarded;
use kms_server::http;
use kms_server::init::{Made, fill};
use kms_server::issuers::{KeySource, Trusted};
use kms_server::limits;
use kms_server::store::{SqliteStore, Store};
use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};

const PEER: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1));
/// More than the service reads of one request.
const PIPE: usize = 256 * 1024;
/// So many inputs of one request later, what they left behind is thrown away with the service.
pub const LIFE: u32 = 20_000;
/// One that is trusted, and whose keys are none.
pub const OTHER_ISSUER: &str = "https://nobody.test";
const NEW_KEY: &str = r#"{"metadata":{"collectionType":"application/vnd.ibm.kms.key+json","collectionTotal":1},
    "resources":[{"type":"application/vnd.ibm.kms.key+json","name":"key","extractable":false}]}"#;

pub struct Asked {
    pub runtime: Runtime,
    pub app: Arc<App>,
    pub clock: Arc<ManualClock>,
    pub made: Made,
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

/// Runs `ask` with the service of now; after `life` inputs there is another one.
pub fn with(life: u32, ask: impl FnOnce(&Asked)) {
    ASKED.with(|place| {
        let current = place.take().filter(|(_, left)| *left > 0);
        let (asked, left) = current.unwrap_or_else(|| (Asked::start(), life));
        ask(&asked);
        place.set(Some((asked, left - 1)));
    });
}

impl Asked {
    fn start() -> Asked {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let folder = tempfile::tempdir().expect("a folder");
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = Arc::new(ManualClock::at(start));
        let (app, made) = runtime.block_on(service(folder.path(), clock.clone()));
        let mut asked = Asked {
            runtime,
            app: Arc::new(app),
            clock,
            made,
            headers: String::new(),
            key: String::new(),
            _folder: folder,
        };
        asked.headers = format!(
            "authorization: Bearer {}\r\nicp-instance: {}",
            asked.administrator(),
            asked.made.instance
        );
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

    /// A new token of the administrator.
    pub fn administrator(&self) -> String {
        self.log_in(self.made.admin.api_key.expose()).expect("a token")
    }

    /// The token that this API key gets, if it does.
    pub fn log_in(&self, api_key: &str) -> Option<String> {
        let form = format!("grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey={api_key}");
        let head = format!("POST /oidc/token HTTP/1.1\r\ncontent-length: {}\r\n\r\n", form.len());
        let answer = json(&self.tokens(format!("{head}{form}").as_bytes()));
        Some(answer["access_token"].as_str()?.to_owned())
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

async fn service(folder: &Path, clock: Arc<ManualClock>) -> (App, Made) {
    let vault = Arc::new(MemoryVault::new());
    let store = SqliteStore::open(&folder.join("kms.db"), true).await.expect("a database");
    let audit =
        Audit::open(&folder.join("audit.log"), "fuzz", None, clock.clone()).expect("an audit log");
    let tell = |_: &_| Ok(());
    let made = fill(&store, &*vault, &audit, clock.wall().into(), tell).await;
    let made = made.expect("a first content");
    let signing_key = store.signing_key().await.expect("a database").expect("a signing key");
    let store: Arc<dyn Store> = Arc::new(store);
    let vault = Arc::new(Guarded::new(vault, store.clone()));
    vault.compare().await.expect("an empty vault for an empty database");
    let keys = folder.join("issuer.json");
    std::fs::write(&keys, r#"{"keys":[]}"#).expect("a file");
    let issuer =
        Trusted { url: OTHER_ISSUER.into(), audience: "kms".into(), keys: KeySource::File(keys) };
    // A rate comes back with time, and this clock stands still.
    let limits = limits::Settings {
        rate_per_instance: 0,
        rate_per_caller: 0,
        management_rate_per_caller: 0,
        login_rate_per_caller: 0,
        ..limits::Settings::default()
    };
    let settings =
        Settings { limits, issuers: vec![issuer], ..Settings::new("https://tokens.test/".into()) };
    let on = Foundation { clock, store, vault, audit, signing_key };
    (App::new(on, settings).expect("an issuer without a URL to ask"), made)
}

pub fn json(answer: &[u8]) -> serde_json::Value {
    let body = answer.windows(4).position(|end| end == b"\r\n\r\n").expect("a body") + 4;
    serde_json::from_slice(&answer[body..]).expect("JSON")
}
