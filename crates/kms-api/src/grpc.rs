//! The KMS plug-in interface of Kubernetes, generated from `proto/`. Only messages, server traits (feature
//! `grpc-server`) and clients (feature `grpc-client`): what a call means is decided by who implements them.
#![cfg_attr(
    any(feature = "grpc-server", feature = "grpc-client"),
    expect(clippy::allow_attributes_without_reason, reason = "generated code brings its own")
)]
#![cfg_attr(
    feature = "grpc-server",
    expect(
        clippy::allow_attributes,
        clippy::too_many_lines,
        reason = "the generator writes one function per service, with attributes of its own"
    )
)]

/// KMS v1 (`v1beta1.KeyManagementService`).
pub mod v1beta1 {
    tonic::include_proto!("v1beta1");
}

/// KMS v2 (`v2.KeyManagementService`).
pub mod v2 {
    tonic::include_proto!("v2");
}

#[cfg(feature = "grpc-client")]
pub use client::{Channel, ConnectError, Status, connect};

#[cfg(feature = "grpc-client")]
mod client {
    use hyper_util::rt::TokioIo;
    use tokio::net::UnixStream;
    pub use tonic::Status;
    use tonic::transport::Endpoint;
    pub use tonic::transport::{Channel, Error as ConnectError};

    /// One connection to a plug-in's socket, for the generated clients: a path, or `@name` in the abstract namespace.
    /// The authority is `localhost`, as kube-apiserver sends it for KMS v2.
    ///
    /// # Errors
    /// Nobody accepts on the socket.
    pub async fn connect(socket: &str) -> Result<Channel, ConnectError> {
        let address = match socket.strip_prefix('@') {
            Some(name) => format!("\0{name}"),
            None => socket.to_owned(),
        };
        let connector = tower::service_fn(move |_| {
            let address = address.clone();
            async move { UnixStream::connect(address).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://localhost").connect_with_connector(connector).await
    }
}
