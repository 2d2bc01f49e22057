//! `kmsctl verify` against an etcd of our own: pages, TLS, and answers that make no sense.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Output;
use std::sync::Arc;
use std::task::{Context, Poll};

use kms_api::etcd::KeyValue;
use kms_api::etcd::proto::kv_server::{Kv, KvServer};
use kms_api::etcd::proto::{RangeRequest, RangeResponse};
use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

use crate::program::{kmsctl, run, stderr, stdout};

const PLAIN: &[u8] = b"k8s\0hunter2";

/// What stands in etcd.
#[derive(Clone, Default)]
struct Store {
    values: Arc<BTreeMap<Vec<u8>, Vec<u8>>>,
    /// Says that there is more, and gives nothing.
    endless: bool,
}

impl Store {
    fn with(entries: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let values = entries.into_iter().map(|(key, value)| (key.into_bytes(), value));
        Store { values: Arc::new(values.collect()), endless: false }
    }

    /// Serves on loopback for as long as the test runs; with TLS where a configuration is given.
    async fn serve(self, tls: Option<Arc<rustls::ServerConfig>>) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (accepted, streams) = tokio::sync::mpsc::channel(8);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let stream = match &tls {
                    None => Ok(Stream::Plain(tcp)),
                    Some(tls) => {
                        let tls = TlsAcceptor::from(tls.clone()).accept(tcp).await;
                        tls.map(|stream| Stream::Tls(Box::new(stream)))
                    }
                };
                if let Ok(stream) = stream {
                    accepted.send(Ok::<_, io::Error>(stream)).await.unwrap();
                }
            }
        });
        let streams = tokio_stream::wrappers::ReceiverStream::new(streams);
        tokio::spawn(
            Server::builder().add_service(KvServer::new(self)).serve_with_incoming(streams),
        );
        port
    }
}

#[tonic::async_trait]
impl Kv for Store {
    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let RangeRequest { key, range_end, limit } = request.into_inner();
        let range = (Bound::Included(key), Bound::Excluded(range_end));
        let found: Vec<_> = self.values.range::<Vec<u8>, _>(range).collect();
        let limit = usize::try_from(limit).unwrap();
        let entry = |(key, value): &(&Vec<u8>, &Vec<u8>)| KeyValue {
            key: (*key).clone(),
            value: (*value).clone(),
        };
        let kvs = match self.endless && limit > 1 {
            true => Vec::new(),
            false => found.iter().take(limit).map(entry).collect(),
        };
        let more = self.endless || found.len() > limit;
        let count = i64::try_from(found.len()).unwrap();
        Ok(Response::new(RangeResponse { kvs, more, count }))
    }
}

fn secrets(count: usize) -> impl Iterator<Item = (String, Vec<u8>)> {
    (0..count).map(|n| (format!("/registry/secrets/default/s{n}"), PLAIN.to_vec()))
}

async fn verify(endpoints: &str, more: &[&str]) -> Output {
    let arguments = [&["verify", "--etcd-endpoints", endpoints], more].concat();
    let output = run(kmsctl(&arguments), "").await;
    assert!(!stdout(&output).contains("hunter2") && !stderr(&output).contains("hunter2"));
    output
}

async fn json(endpoints: &str, more: &[&str]) -> (Option<i32>, serde_json::Value) {
    let output = verify(endpoints, &[more, &["-o", "json"]].concat()).await;
    let report = serde_json::from_str(stdout(&output));
    (output.status.code(), report.unwrap_or_else(|_| panic!("{}", stderr(&output))))
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

#[tokio::test]
async fn every_object_is_counted_once_over_many_pages() {
    let aescbc = b"k8s:enc:aescbc:v1:key1:0123456789abcdef0123456789abcdef".to_vec();
    let others = [
        ("/registry/secrets/other/x".to_owned(), aescbc),
        ("/registry/secretsfoo/x".to_owned(), PLAIN.to_vec()),
        ("/registry/configmaps/default/x".to_owned(), PLAIN.to_vec()),
    ];
    let port = Store::with(secrets(1000).chain(others)).serve(None).await;
    let (code, report) = json(&url(port), &[]).await;
    assert_eq!((code, &report["objects"], &report["left"]), (Some(1), &1001.into(), &1000.into()));
    assert_eq!(report["rows"][0]["example"], "/registry/secrets/default/s0");
    assert_eq!(report["rows"][1]["state"], "encrypted");

    let output = verify(&url(port), &[]).await;
    assert_eq!(
        stdout(&output),
        "RESOURCE  PROVIDER  KEY   OBJECTS  STATE\n\
         secrets   identity  -     1000     left: not encrypted\n\
         secrets   aescbc    key1  1        encrypted\n\
         What is stale is not known: give --encryption-config, or --socket, or --key-id.\n"
    );
    assert_eq!(
        stderr(&output),
        "kmsctl: 1000 of 1001 objects are not as they would be written now\n"
    );
}

#[tokio::test]
async fn values_too_long_for_one_page_are_read_in_smaller_ones() {
    let long = vec![b'x'; 9 * 1024 * 1024];
    let entries = (0..5).map(|n| (format!("/registry/secrets/default/s{n}"), long.clone()));
    let port = Store::with(entries).serve(None).await;
    assert_eq!(json(&url(port), &[]).await.1["objects"], 5);
}

#[tokio::test]
async fn a_dead_endpoint_is_passed_over() {
    let port = Store::with(secrets(1)).serve(None).await;
    // On an address that no other test listens on.
    let dead = TcpListener::bind("127.255.0.1:0").await.unwrap().local_addr().unwrap();
    // As etcdctl takes them: without a scheme.
    let endpoints = format!("{dead},127.0.0.1:{port}");
    assert_eq!(json(&endpoints, &[]).await.1["objects"], 1);
    let output = verify(&format!("http://{dead}"), &[]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("cannot be reached"), "{}", stderr(&output));
    assert!(stderr(&output).contains("--etcd-endpoints"), "{}", stderr(&output));
}

#[tokio::test]
async fn what_proves_nothing_is_no_success() {
    let port = Store::with(secrets(1)).serve(None).await;
    let output = verify(&url(port), &["--etcd-prefix", "/other"]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("holds nothing under /other/"), "{}", stderr(&output));
    assert!(stderr(&output).contains("--etcd-prefix"), "{}", stderr(&output));

    let port = Store { endless: true, ..Store::with(secrets(1)) }.serve(None).await;
    let output = verify(&url(port), &[]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("says there is more"), "{}", stderr(&output));

    let output = verify(&url(port), &["--resource", "*.apps"]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("only the cluster knows"), "{}", stderr(&output));
}

#[tokio::test]
async fn etcd_is_asked_over_tls_with_a_client_certificate() {
    let pki = Pki::create();
    let port = Store::with(secrets(2)).serve(Some(pki.server())).await;
    let endpoint = format!("https://localhost:{port}");
    let (ca, cert, key) = (pki.path("ca.crt"), pki.path("client.crt"), pki.path("client.key"));
    let identity = ["--etcd-cacert", &ca, "--etcd-cert", &cert, "--etcd-key", &key];
    assert_eq!(json(&endpoint, &identity).await.1["objects"], 2);

    let output = verify(&endpoint, &[]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--etcd-cacert"), "{}", stderr(&output));
    let output = verify(&endpoint, &identity[..2]).await;
    assert_eq!(output.status.code(), Some(2), "without a client certificate");
    let other = Pki::create();
    let output = verify(&endpoint, &["--etcd-cacert", &other.path("ca.crt")]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("Check --etcd-cacert"), "{}", stderr(&output));
}

/// A CA, and certificates of a server and a client.
struct Pki {
    dir: TempDir,
    server: (CertificateDer<'static>, PrivateKeyDer<'static>),
    roots: RootCertStore,
}

impl Pki {
    fn create() -> Self {
        let dir = TempDir::new().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let signed = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new([name.to_owned()]).unwrap();
            (params.signed_by(&key, &ca).unwrap(), key)
        };
        let (server, server_key) = signed("localhost");
        let (client, client_key) = signed("client");
        std::fs::write(dir.path().join("ca.crt"), ca.pem()).unwrap();
        std::fs::write(dir.path().join("client.crt"), client.pem()).unwrap();
        std::fs::write(dir.path().join("client.key"), client_key.serialize_pem()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(ca.der().clone()).unwrap();
        let key = PrivateKeyDer::try_from(server_key.serialize_der()).unwrap();
        Pki { dir, server: (server.der().clone(), key), roots }
    }

    fn path(&self, name: &str) -> String {
        let path: PathBuf = self.dir.path().join(name);
        path.display().to_string()
    }

    fn server(&self) -> Arc<rustls::ServerConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = Arc::new(self.roots.clone());
        let clients =
            WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build().unwrap();
        let (certificate, key) = (self.server.0.clone(), self.server.1.clone_key());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![certificate], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }
}

/// What tonic serves on: it knows neither that we chose TLS nor how.
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connected for Stream {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
