//! Another issuer: its keys, its tokens, and the server that its discovery document and key set are read from.

use super::make_certificates;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize, PublicKeyComponents};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use kms_server::issuers::{KeySource, Trusted};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// One signing key of an issuer.
pub(crate) struct SigningKey {
    pub(crate) kid: String,
    pair: KeyPair,
}

impl SigningKey {
    pub(crate) fn new(kid: &str) -> SigningKey {
        SigningKey { kid: kid.into(), pair: KeyPair::generate(KeySize::Rsa2048).unwrap() }
    }

    pub(crate) fn modulus(&self) -> Vec<u8> {
        PublicKeyComponents::<Vec<u8>>::from(self.pair.public_key()).n
    }

    pub(crate) fn jwk(&self) -> Value {
        let public = PublicKeyComponents::<Vec<u8>>::from(self.pair.public_key());
        let (n, e) = (BASE64URL.encode(public.n), BASE64URL.encode(public.e));
        json!({"kty": "RSA", "use": "sig", "alg": "RS256", "kid": self.kid, "n": n, "e": e})
    }

    pub(crate) fn token(&self, claims: &Value) -> String {
        self.sign(&json!({"alg": "RS256", "kid": self.kid}), claims)
    }

    pub(crate) fn sign(&self, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| BASE64URL.encode(value.to_string());
        let text = format!("{}.{}", part(header), part(claims));
        let mut signature = vec![0; self.pair.public_modulus_len()];
        let random = SystemRandom::new();
        self.pair.sign(&RSA_PKCS1_SHA256, &random, text.as_bytes(), &mut signature).unwrap();
        format!("{text}.{}", BASE64URL.encode(signature))
    }
}

/// A file with the public halves of `keys`.
pub(crate) fn key_file(dir: &TempDir, keys: &[&SigningKey]) -> PathBuf {
    let file = dir.path().join("jwks.json");
    let keys: Vec<Value> = keys.iter().map(|key| key.jwk()).collect();
    std::fs::write(&file, json!({ "keys": keys }).to_string()).unwrap();
    file
}

/// What `/.well-known/openid-configuration` and `/keys` say, and how often they were asked.
pub(crate) struct Site {
    pub(crate) url: String,
    said: Arc<Said>,
    dir: TempDir,
}

#[derive(Default)]
struct Said {
    discovery: Mutex<String>,
    keys: Mutex<String>,
    asked: AtomicUsize,
    hangs: AtomicBool,
    held: AtomicUsize,
}

impl Site {
    pub(crate) async fn start() -> Site {
        let dir = TempDir::new().unwrap();
        make_certificates(dir.path());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let acceptor = acceptor(&dir);
        let site = Site { url, said: Arc::default(), dir };
        site.say(&site.url, &format!("{}/keys", site.url));
        let said = site.said.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, acceptor.clone(), said.clone()));
            }
        });
        site
    }

    /// The members of its discovery document.
    pub(crate) fn say(&self, issuer: &str, jwks_uri: &str) {
        let text = json!({"issuer": issuer, "jwks_uri": jwks_uri}).to_string();
        *self.said.discovery.lock().unwrap() = text;
    }

    /// Without a key, the key set is no key set.
    pub(crate) fn publish(&self, keys: &[&SigningKey]) {
        let keys: Vec<Value> = keys.iter().map(|key| key.jwk()).collect();
        *self.said.keys.lock().unwrap() = json!({ "keys": keys }).to_string();
    }

    /// Requests for its key set.
    pub(crate) fn asked(&self) -> usize {
        self.said.asked.load(Ordering::SeqCst)
    }

    /// From now on it takes connections and says nothing.
    pub(crate) fn hang(&self) {
        self.said.hangs.store(true, Ordering::SeqCst);
    }

    /// Connections on which it said nothing.
    pub(crate) fn held(&self) -> usize {
        self.said.held.load(Ordering::SeqCst)
    }

    pub(crate) fn trusted(&self) -> Trusted {
        let ca = self.dir.path().join("ca.crt");
        let keys = KeySource::Discovery { ca };
        Trusted { url: self.url.clone(), audience: "kms".into(), keys }
    }
}

async fn answer(stream: TcpStream, acceptor: TlsAcceptor, said: Arc<Said>) {
    if said.hangs.load(Ordering::SeqCst) {
        said.held.fetch_add(1, Ordering::SeqCst);
        return std::future::pending().await;
    }
    let Ok(mut stream) = acceptor.accept(stream).await else { return };
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => request.push(byte),
            Err(_) => return,
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let (status, body) = match request.split(' ').nth(1).unwrap() {
        "/.well-known/openid-configuration" => ("200 OK", said.discovery.lock().unwrap().clone()),
        // As kube-apiserver does: a key set goes by its own name only.
        "/keys" if !request.contains("application/jwk-set+json") => {
            ("406 Not Acceptable", String::new())
        }
        "/keys" => {
            said.asked.fetch_add(1, Ordering::SeqCst);
            ("200 OK", said.keys.lock().unwrap().clone())
        }
        _ => ("200 OK", String::new()),
    };
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
    let _ = stream.shutdown().await;
}

fn acceptor(dir: &TempDir) -> TlsAcceptor {
    let certificate = CertificateDer::from_pem_file(dir.path().join("tls.crt")).unwrap();
    let key = PrivateKeyDer::from_pem_file(dir.path().join("tls.key")).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}
