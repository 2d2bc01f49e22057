//! TLS listeners: connections, their limits, and the end of both. Which request means what is not known here.

use crate::limits::{Limits, Port, TooMuch};
use crate::patient::Patient;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use kms_daemon::lifecycle::Shutdown;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// A peer that is slower than this does not hold a connection.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that does not take its answer does not hold a connection either.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Ours has eight; behind two proxies they become twenty.
const MAX_HEADERS: usize = 64;
/// Request line and headers together: a token has 4 KiB at most.
const MAX_HEAD: usize = 32 * 1024;
/// From the header to the answer: longer than every deadline behind it together.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long requests that run when the server ends may still take.
const DRAIN: Duration = Duration::from_secs(10);

/// Serves HTTP/1.1, and no other version, over TLS until the shutdown is requested, then lets running requests end. `acceptor` is asked anew
/// for each connection.
pub async fn serve<H, F>(
    listener: TcpListener,
    acceptor: impl Fn() -> TlsAcceptor,
    (limits, port): (&Limits, Port),
    handler: H,
    shutdown: Shutdown,
) where
    H: Fn(SocketAddr, Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut refusing: Option<TooMuch> = None;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.requested() => break,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                // Out of file descriptors: asking again at once would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // On a socket for both families IPv4 comes as IPv6: one peer has one name.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let place = match limits.connect(port, peer.ip()) {
            Ok(place) => place,
            Err(why) => {
                // A flood would be one of log lines, too: it is told when it begins, and counted.
                if refusing.replace(why) != Some(why) {
                    tracing::warn!("a connection from {} is refused: {why}", peer.ip());
                }
                continue;
            }
        };
        refusing = None;
        let handler = handler.clone();
        let handler = move |request| handler(peer, request);
        let idle = limits.settings().idle;
        let connection = connection(stream, acceptor(), idle, handler, shutdown.clone());
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

/// `idle` counts between requests and until a head is complete: an idle peer and one that sends a byte a second cost the
/// same place among the connections.
async fn connection<H, F>(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    idle: Duration,
    handler: H,
    shutdown: Shutdown,
) where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    // An answer is one small write: waiting to fill a segment would only delay it.
    let _ = stream.set_nodelay(true);
    let stream = Patient::new(stream, SEND_TIMEOUT);
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
        .header_read_timeout(idle)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD)
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
