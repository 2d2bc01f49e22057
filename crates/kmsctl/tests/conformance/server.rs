//! Serves the double on a socket, one hyper connection after the other, so that faults below the messages can be put
//! in: hyper does not look at `grpc-timeout`, and no tonic server is in between.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::header::CONTENT_TYPE;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use kms_api::grpc::v1beta1::key_management_service_server::KeyManagementServiceServer as V1Server;
use kms_api::grpc::v2::key_management_service_server::KeyManagementServiceServer as V2Server;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::service::Routes;
use tower::ServiceExt;

use crate::double::{Double, Fault};

const UNKNOWN: u8 = 2;
const DEADLINE_EXCEEDED: u8 = 4;
const UNIMPLEMENTED: u8 = 12;
const INTERNAL: u8 = 13;

/// Serves until it is dropped.
pub(crate) struct Server {
    pub(crate) socket: String,
    task: JoinHandle<()>,
    _dir: TempDir,
}

impl Server {
    pub(crate) fn start(fault: Fault) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kms.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let socket = path.to_str().unwrap().to_owned();
        Server { socket, task: tokio::spawn(accept(listener, fault)), _dir: dir }
    }

    pub(crate) fn on_an_abstract_socket() -> Server {
        let name = format!("kmsctl-conformance-{}", std::process::id());
        let listener = UnixListener::bind(format!("\0{name}")).unwrap();
        let task = tokio::spawn(accept(listener, Fault::None));
        Server { socket: format!("@{name}"), task, _dir: tempfile::tempdir().unwrap() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: UnixListener, fault: Fault) {
    let double = Arc::new(Double::new(fault));
    let routes = Routes::new(V2Server::from_arc(Arc::clone(&double)))
        .add_service(V1Server::from_arc(double))
        .prepare();
    // Of those that a fault keeps, there are as many as `cancelled-calls` cancels.
    let front = Front { fault, routes, slots: Arc::new(Semaphore::new(50)) };
    while let Ok((stream, _)) = listener.accept().await {
        match fault {
            Fault::StockAuthority => tokio::spawn(serve(stream, front.clone())),
            _ => {
                let (near, far) = tokio::io::duplex(64 * 1024);
                tokio::spawn(relay(stream, near));
                tokio::spawn(serve(far, front.clone()))
            }
        };
    }
}

async fn serve(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, front: Front) {
    let service = tower::service_fn(move |request| front.clone().answer(request));
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(service));
    // It ends when the client goes.
    let _ = connection.await;
}

/// hyper refuses a socket path as authority. A plug-in that is to serve KMS v1 needs some way around that; this one
/// does for requests that are written as kmsctl writes them.
async fn relay(stream: UnixStream, server: tokio::io::DuplexStream) {
    let (mut from_client, mut to_client) = stream.into_split();
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let back = tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from_client.read(&mut bytes).await {
        without_paths(&mut bytes[..length]);
        if to_server.write_all(&bytes[..length]).await.is_err() {
            break;
        }
    }
    let _ = to_server.shutdown().await;
    let _ = back.await;
}

fn without_paths(bytes: &mut [u8]) {
    const NAME: &[u8] = b"\x0a:authority";
    let found = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(NAME)).collect::<Vec<_>>();
    for at in found {
        let at = at + NAME.len();
        let length = usize::from(bytes[at]);
        assert!(length < 127, "the socket's path is too long for this relay");
        for byte in &mut bytes[at + 1..=at + length] {
            if matches!(byte, b'/' | b'%') {
                *byte = b'-';
            }
        }
    }
}

#[derive(Clone)]
struct Front {
    fault: Fault,
    routes: Routes,
    slots: Arc<Semaphore>,
}

impl Front {
    async fn answer(
        self,
        request: http::Request<Incoming>,
    ) -> Result<http::Response<Body>, Infallible> {
        let path = request.uri().path().to_owned();
        let timeout = request.headers().get("grpc-timeout").cloned();
        let raw = timeout.is_some();
        if timeout.is_some_and(|timeout| timeout == "1n") {
            if self.fault == Fault::HangsWhenExpired {
                return std::future::pending().await;
            }
            return Ok(refusal(DEADLINE_EXCEEDED));
        }
        match self.fault {
            Fault::NoV1 if path.starts_with("/v1beta1.") => return Ok(refusal(UNIMPLEMENTED)),
            Fault::NeitherService => return Ok(refusal(UNIMPLEMENTED)),
            Fault::SilentWithoutAuthority if request.uri().authority().is_none() => {
                return std::future::pending().await;
            }
            Fault::UnknownMethodIsUnknown if path.ends_with("/Rotate") => {
                return Ok(refusal(UNKNOWN));
            }
            Fault::KeepsCancelledCalls if raw && path.ends_with("/Encrypt") => {
                let slot = self.slots.acquire().await.unwrap();
                // Freed only where the call comes to its end.
                slot.forget();
                tokio::time::sleep(Duration::from_millis(100)).await;
                self.slots.add_permits(1);
            }
            _ => {}
        }
        let (head, body) = request.into_parts();
        let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        match self.body(body) {
            Some(body) => {
                let request = http::Request::from_parts(head, Full::new(body));
                self.routes.oneshot(request.map(Body::new)).await
            }
            None => Ok(refusal(INTERNAL)),
        }
    }

    /// The body to go on with.
    fn body(&self, body: Bytes) -> Option<Bytes> {
        let found = |part: &[u8]| body.windows(part.len()).position(|window| window == part);
        match self.fault {
            Fault::RefusesUnknownFields if found(b"from a later release").is_some() => None,
            Fault::TakesInvalidUtf8 => Some(match found(&[2, 0xff, 0xfe]) {
                Some(at) => [&body[..at], b"\x02??", &body[at + 3..]].concat().into(),
                None => body,
            }),
            _ => Some(body),
        }
    }
}

fn refusal(code: u8) -> http::Response<Body> {
    http::Response::builder()
        .header(CONTENT_TYPE, "application/grpc")
        .header("grpc-status", code.to_string())
        .body(Body::empty())
        .unwrap()
}
