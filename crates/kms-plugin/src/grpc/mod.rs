//! Both versions of Kubernetes' KMS plug-in interface on one listener: messages in, the sealer's answers out.
//!
//! Nothing is decided here but sizes and codes. A payload changes into its secret type before anything else is done
//! with it.

mod call;
mod status;
mod v1beta1;
mod v2;

use std::sync::Arc;
use std::time::Duration;

use kms_api::grpc::v1beta1::key_management_service_server::KeyManagementServiceServer as V1Server;
use kms_api::grpc::v2::key_management_service_server::KeyManagementServiceServer as V2Server;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tonic::transport::Server;
use tonic::transport::server::Router;

use crate::authority::Adapter;
use crate::config::StatusVersion;
use crate::sealer::Sealer;
use crate::socket::Bound;

/// Longest request: a KMS v1 cipher of 64 KiB, or the 32 KiB of annotations and more that KMS v2 may carry.
const MAX_MESSAGE: usize = 128 * 1024;
/// kube-apiserver opens one stream per write with KMS v1, and any number for reads on a cold cache.
const MAX_STREAMS: u32 = 1024;
/// Streams that a client may have cancelled before we saw them. More of them end the connection, as a defence against
/// floods; but kube-apiserver cancels as many as its own callers do.
const MAX_CANCELLED: Option<usize> = Some(1024);
/// Flow control windows: one largest message per stream, eight of them per connection.
const STREAM_WINDOW: u32 = 128 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// A request's headers are a few hundred bytes.
const MAX_HEADERS: u32 = 16 * 1024;
/// How long running requests may take after the end was requested. Only a client that hangs needs so long; its
/// requests have deadlines of 3 s by default.
const DRAIN: Duration = Duration::from_secs(5);

/// Why serving ended unasked. Both pass if the socket is bound again.
#[derive(Debug, Error)]
pub enum ServeError {
    #[error("the socket file was removed, so that nobody can connect any more")]
    SocketGone,
    #[error("the gRPC server ended: {0}")]
    Server(#[from] tonic::transport::Error),
}

/// Serves until `shutdown` returns. Then nobody new is accepted, every client is told (GOAWAY), and what runs is
/// finished.
///
/// # Errors
/// See [`ServeError`]; what runs is finished then too.
pub async fn serve(
    bound: Bound,
    sealer: Arc<Sealer>,
    status_version: StatusVersion,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let gone = bound.gone();
    let connections = bound.incoming().map(|stream| stream.map(Adapter::new));
    let (stop, stopped) = oneshot::channel::<()>();
    let server = router(sealer, status_version).serve_with_incoming_shutdown(connections, async {
        let _ = stopped.await;
    });
    tokio::pin!(server);
    let outcome = tokio::select! {
        ended = &mut server => return Ok(ended?),
        () = shutdown => Ok(()),
        () = gone => Err(ServeError::SocketGone),
    };
    drop(stop);
    match tokio::time::timeout(DRAIN, server).await {
        Ok(ended) => ended?,
        Err(_) => {
            tracing::warn!("A client keeps its connection after {DRAIN:?}; it is left to its fate.")
        }
    }
    outcome
}

fn router(sealer: Arc<Sealer>, status_version: StatusVersion) -> Router {
    let v1 = v1beta1::Service::new(Arc::clone(&sealer));
    let v2 = v2::Service::new(sealer, status_version);
    Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_pending_accept_reset_streams(MAX_CANCELLED)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_max_header_list_size(MAX_HEADERS)
        .add_service(V1Server::new(v1).max_decoding_message_size(MAX_MESSAGE))
        .add_service(V2Server::new(v2).max_decoding_message_size(MAX_MESSAGE))
}
