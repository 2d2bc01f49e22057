//! TLS listeners: certificates, connections, and the end of both. Which request means what is not known here.

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use kms_daemon::lifecycle::Shutdown;
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::convert::Infallible;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// One per plug-in and per operator's tool is usual; IBM's Go client makes a new one for each call.
const MAX_CONNECTIONS: usize = 512;
/// A peer that is slower than this does not hold one of them.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Counts between requests as well: longer than clients keep an idle connection (ours: 90 s), or they would lose
/// requests to the closing of it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(100);
/// From the header to the answer: longer than every deadline behind it together.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long requests that run when the server ends may still take.
const DRAIN: Duration = Duration::from_secs(10);

/// The operator: a certificate or key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {}: {cause}", path.display())]
    Pem { path: PathBuf, cause: rustls_pki_types::pem::Error },
    #[error("{} holds no certificate", path.display())]
    NoCertificate { path: PathBuf },
    #[error("certificate {} and key {} cannot be used: {cause}", certificate.display(), key.display())]
    Pair { certificate: PathBuf, key: PathBuf, cause: rustls::Error },
}

/// TLS 1.2 and 1.3 with the certificate chain and the private key in two PEM files.
///
/// # Errors
/// [`TlsError`], also when the key is not that of the certificate.
pub fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor, TlsError> {
    let pem = |path: &Path, cause| TlsError::Pem { path: path.to_owned(), cause };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|cause| pem(certificate, cause))?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate { path: certificate.to_owned() });
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|cause| pem(key, cause))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|versions| versions.with_no_client_auth().with_single_cert(chain, private))
        .map_err(|cause| TlsError::Pair {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            cause,
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves HTTP/1.1 over TLS until the shutdown is requested, then lets running requests end.
pub async fn serve<H, F>(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    handler: H,
    shutdown: Shutdown,
) where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.requested() => break,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                // Out of file descriptors: asking again at once would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = room.clone().try_acquire_owned() else {
            tracing::warn!("a connection is refused: {MAX_CONNECTIONS} are open already");
            continue;
        };
        let connection = connection(stream, acceptor.clone(), handler.clone(), shutdown.clone());
        connections.spawn(async move {
            connection.await;
            drop(place);
        });
    }
    drop(listener);
    if timeout(DRAIN, async { while connections.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!("some requests were still running after {} s", DRAIN.as_secs());
    }
}

async fn connection<H, F>(stream: TcpStream, acceptor: TlsAcceptor, handler: H, shutdown: Shutdown)
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    // An answer is one small write: waiting to fill a segment would only delay it.
    let _ = stream.set_nodelay(true);
    let stream = match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!("TLS handshake failed: {error}"),
        Err(_) => return tracing::debug!("TLS handshake took too long"),
    };
    let service = service_fn(move |request| {
        // A task of its own: a peer that hangs up must not stop an operation in the middle.
        let running = tokio::spawn(handler(request));
        async move { Ok::<_, Infallible>(in_time(running).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let served = tokio::select! {
        served = serving.as_mut() => served,
        () = shutdown.requested() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!("connection ended: {error}");
    }
}

async fn in_time(running: tokio::task::JoinHandle<Response<Full<Bytes>>>) -> Response<Full<Bytes>> {
    let status = match timeout(REQUEST_TIMEOUT, running).await {
        Ok(Ok(response)) => return response,
        // The panic is in the log already.
        Ok(Err(_)) => StatusCode::INTERNAL_SERVER_ERROR,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}
