//! Reading from etcd v3, by gRPC with or without TLS. Nothing is ever written: there is no call here that could.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use kms_core::crypto_module::CryptoModule;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::client::https::{roots, trusting};
use crate::client::{Ca, SetupError, causes};
pub use proto::{KeyValue, RangeResponse as Page};

/// Messages, client and (feature `grpc-server`) server trait, generated from `proto/etcd.proto`.
#[expect(clippy::allow_attributes_without_reason, reason = "generated code brings its own")]
#[cfg_attr(
    feature = "grpc-server",
    expect(clippy::allow_attributes, reason = "the generator writes attributes of its own")
)]
pub mod proto {
    tonic::include_proto!("etcdserverpb");
}

/// Where an etcd is, and how to prove to it who asks.
#[derive(Debug, Clone)]
pub struct EtcdSettings {
    /// `https://host:port`, or `http://` where etcd has no TLS.
    pub endpoint: String,
    pub ca: Option<Ca>,
    /// PEM files of a client certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// For the connection, and for each call.
    pub timeout: Duration,
}

/// Why nothing was read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EtcdError {
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error("the client certificate {path} cannot be used: {cause}")]
    Identity { path: String, cause: String },
    #[error("etcd at {endpoint} cannot be reached: {cause}")]
    Unreachable { endpoint: String, cause: String },
    #[error("etcd at {endpoint} refuses: {cause}")]
    Refused { endpoint: String, cause: String },
    /// So many keys at once make an answer that is too long to be read.
    #[error("the answer of etcd at {endpoint} is longer than {MAX_PAGE} bytes")]
    TooLong { endpoint: String },
}

/// One connection.
#[derive(Debug, Clone)]
pub struct Etcd {
    client: proto::kv_client::KvClient<Channel>,
    endpoint: String,
}

/// Three times the longest value that etcd can be made to hold.
const MAX_PAGE: usize = 32 * 1024 * 1024;

impl Etcd {
    /// Connects.
    ///
    /// # Errors
    /// Settings that cannot work, or nobody who answers in time.
    pub async fn connect(settings: &EtcdSettings) -> Result<Etcd, EtcdError> {
        let endpoint = settings.endpoint.clone();
        let wrong = |cause: String| SetupError::Url { url: endpoint.clone(), cause };
        let target = Endpoint::from_shared(endpoint.clone())
            .map_err(|error| wrong(causes(&error)))?
            .connect_timeout(settings.timeout)
            .timeout(settings.timeout);
        let scheme = target.uri().scheme_str();
        if !matches!(scheme, Some("http" | "https")) {
            return Err(wrong("it must begin with https:// or http://".to_owned()).into());
        }
        let connector = connector(settings, scheme == Some("https"))?;
        let channel = target.connect_with_connector(connector).await.map_err(|error| {
            EtcdError::Unreachable { endpoint: endpoint.clone(), cause: causes(&error) }
        })?;
        let client = proto::kv_client::KvClient::new(channel).max_decoding_message_size(MAX_PAGE);
        Ok(Etcd { client, endpoint })
    }

    /// At most `limit` of the keys from `key` up to but without `range_end`, in order.
    ///
    /// # Errors
    /// No answer, a refusal, or an answer that is too long: then a smaller `limit` helps.
    pub async fn range(
        &mut self,
        key: &[u8],
        range_end: &[u8],
        limit: i64,
    ) -> Result<Page, EtcdError> {
        let request =
            proto::RangeRequest { key: key.to_vec(), range_end: range_end.to_vec(), limit };
        let endpoint = || self.endpoint.clone();
        match self.client.range(request).await {
            Ok(answer) => Ok(answer.into_inner()),
            // What this side says of a message above its limit; nothing else here can be out of range.
            Err(status) if status.code() == Code::OutOfRange => {
                Err(EtcdError::TooLong { endpoint: endpoint() })
            }
            Err(status) => {
                let cause = format!("{:?}: {}", status.code(), status.message());
                match status.code() {
                    Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
                        Err(EtcdError::Unreachable { endpoint: endpoint(), cause })
                    }
                    _ => Err(EtcdError::Refused { endpoint: endpoint(), cause }),
                }
            }
        }
    }
}

fn connector(
    settings: &EtcdSettings,
    tls: bool,
) -> Result<HttpsConnector<HttpConnector>, EtcdError> {
    let roots = match (&settings.ca, tls) {
        (Some(ca), true) => roots(ca)?,
        (None, true) => return Err(SetupError::NoCa { url: settings.endpoint.clone() }.into()),
        // Plain HTTP trusts nobody; the connector wants a configuration all the same.
        (_, false) => RootCertStore::empty(),
    };
    let builder = trusting(roots)?;
    let tls = match &settings.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let wrong = |path: &Path, cause: String| EtcdError::Identity {
                path: path.display().to_string(),
                cause,
            };
            let chain = CertificateDer::pem_file_iter(certificate)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .map_err(|error| wrong(certificate, error.to_string()))?;
            let secret =
                PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, error.to_string()))?;
            builder
                .with_client_auth_cert(chain, secret)
                .map_err(|error| wrong(certificate, error.to_string()))?
        }
    };
    CryptoModule::linked().allow_tls(tls.fips()).map_err(SetupError::from)?;
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(settings.timeout));
    let connector = HttpsConnectorBuilder::new().with_tls_config(tls);
    Ok(connector.https_or_http().enable_http2().wrap_connector(tcp))
}
