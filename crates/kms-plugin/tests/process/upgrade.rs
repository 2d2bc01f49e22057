//! Upgrades under load: callers with the manners of kube-apiserver see no failed call while one process gives way to
//! the next.
//!
//! Those manners (grpc-go with wait-for-ready): all callers share one connection; it counts as made only when the
//! server's SETTINGS have come; a call waits while there is none; a call is sent again only if the server provably
//! never saw it (no connection, GOAWAY or REFUSED_STREAM without having been processed); what the server said last is
//! read even if it no longer listens. Anything else is a failed call.

use std::error::Error;
use std::io;
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient;
use kms_api::grpc::v2::{DecryptRequest, EncryptRequest};
use kms_api::grpc::{Channel, Status};
use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tonic::transport::Endpoint;

use crate::plugin::{Plugin, Setup, activated};
use crate::service::Service;

const API_KEY: &str = "canary-api-key-93ab";
const CALLERS: usize = 8;
const UPGRADES: usize = 5;
/// More than kube-apiserver's 3 s, for slow machines; nobody waits without end.
const DEADLINE: Duration = Duration::from_secs(20);
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(2);

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_on_an_activated_socket_fails_no_call() {
    let service = Service::start(API_KEY).await;
    let setup = Setup::for_service(&service);
    let listener = UnixListener::bind(setup.socket()).unwrap();
    let mut plugin = setup.start_by(activated(&listener));
    let load = Load::start(&setup);
    for _ in 0..UPGRADES {
        load.goes_on().await;
        let status = plugin.terminate();
        assert_eq!(status.code(), Some(0), "{status:?} {:#?}", plugin.lines());
        plugin = setup.start_by(activated(&listener));
    }
    load.goes_on().await;
    load.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn taking_over_the_socket_fails_no_call() {
    let service = Service::start(API_KEY).await;
    let setup = Setup::for_service(&service).with("TAKE_OVER_SOCKET", "true");
    let mut old: Plugin = setup.ready();
    let load = Load::start(&setup);
    for _ in 0..UPGRADES {
        load.goes_on().await;
        let new = setup.ready();
        load.goes_on().await;
        assert_eq!(old.terminate().code(), Some(0));
        old = new;
    }
    load.goes_on().await;
    load.finish().await;
}

/// Callers that encrypt and read back without a pause.
struct Load {
    callers: JoinSet<Result<(), String>>,
    calls: Arc<AtomicUsize>,
    end: Arc<AtomicBool>,
}

impl Load {
    fn start(setup: &Setup) -> Load {
        let channel = channel(setup.socket());
        let (calls, end) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let (channel, calls, end) = (channel.clone(), calls.clone(), end.clone());
            callers.spawn(async move {
                while !end.load(Ordering::Relaxed) {
                    let pair = tokio::time::timeout(DEADLINE, there_and_back(&channel)).await;
                    let pair = pair.unwrap_or_else(|_| Err("a call waited too long".into()));
                    end.fetch_or(pair.is_err(), Ordering::Relaxed);
                    pair?;
                    calls.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
        }
        Load { callers, calls, end }
    }

    /// Returns once every caller could have been served many times over, or a call has failed.
    async fn goes_on(&self) {
        let until = self.calls.load(Ordering::Relaxed) + 25 * CALLERS;
        let ended = || self.end.load(Ordering::Relaxed);
        while self.calls.load(Ordering::Relaxed) < until && !ended() {
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn finish(mut self) {
        self.end.store(true, Ordering::Relaxed);
        while let Some(caller) = self.callers.join_next().await {
            assert_eq!(caller.unwrap(), Ok(()));
        }
    }
}

async fn there_and_back(channel: &Channel) -> Result<(), String> {
    let plaintext = vec![9; 32];
    let request = EncryptRequest { plaintext: plaintext.clone(), uid: "encrypt".into() };
    let sealed = sent(|| {
        let (mut client, request) =
            (KeyManagementServiceClient::new(channel.clone()), request.clone());
        async move { client.encrypt(request).await }
    });
    let sealed = sealed.await?.into_inner();
    let request = DecryptRequest {
        ciphertext: sealed.ciphertext,
        uid: "decrypt".into(),
        key_id: sealed.key_id,
        annotations: sealed.annotations,
    };
    let opened = sent(|| {
        let (mut client, request) =
            (KeyManagementServiceClient::new(channel.clone()), request.clone());
        async move { client.decrypt(request).await }
    });
    let opened = opened.await?.into_inner();
    if opened.plaintext == plaintext { Ok(()) } else { Err("another payload came back".into()) }
}

/// The call's answer; again and again as long as the server did not see it.
async fn sent<T, F: Future<Output = Result<T, Status>>>(call: impl Fn() -> F) -> Result<T, String> {
    loop {
        match call().await {
            Ok(answer) => return Ok(answer),
            Err(status) if never_seen(&status) => tokio::time::sleep(PAUSE).await,
            Err(status) => return Err(format!("{status:?}")),
        }
    }
}

/// True if the server cannot have processed the call.
fn never_seen(status: &Status) -> bool {
    let first: Option<&(dyn Error + 'static)> = Some(status);
    std::iter::successors(first, |&error| error.source()).any(|error| {
        error.is::<NoServer>()
            || error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled)
            || error.downcast_ref::<h2::Error>().is_some_and(|error| {
                let unprocessed =
                    error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
                let refused = error.reason() == Some(h2::Reason::REFUSED_STREAM);
                error.is_remote() && (unprocessed || refused)
            })
    })
}

fn channel(socket: String) -> Channel {
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move {
            let stream = connect(&socket).await.map_err(NoServer)?;
            Ok::<_, NoServer>(TokioIo::new(ReadsToTheEnd(stream)))
        }
    });
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector)
}

/// A connection on which the server has spoken.
async fn connect(socket: &str) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket).await?;
    stream.readable().await?;
    match rustix::net::recv(&stream, &mut [0; 1], RecvFlags::PEEK)? {
        (_, 0) => Err(io::ErrorKind::ConnectionReset.into()),
        _ => Ok(stream),
    }
}

/// A write that fails is not the end: the GOAWAY that tells what was processed may still wait to be read.
struct ReadsToTheEnd(UnixStream);

impl AsyncRead for ReadsToTheEnd {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for ReadsToTheEnd {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes).map(|written| match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(bytes.len()),
            written => written,
        })
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Nobody accepted, or not to the end.
#[derive(Debug, thiserror::Error)]
#[error("no server: {0}")]
struct NoServer(#[source] io::Error);
