//! The echo: KMS v1 and v2 with the least that tonic needs, so that what a plug-in costs beyond gRPC itself can be
//! seen in the same run on the same machine. It protects nothing: what it calls a ciphertext is the plaintext.

use std::io;
use std::path::Path;

use kms_api::grpc::{v1beta1, v2};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// The lengths of what the plug-in answers for 32 bytes with kms-server behind it, so that as many bytes travel.
const V1_CIPHER: usize = 716;
const V2_CIPHERTEXT: usize = 442;
const KEY_ID: &str = "echo___/00000000-0000-0000-0000-000000000000/00000000-0000-0000-0000-000000000000/\
                      00000000-0000-0000-0000-000000000000";

/// Serves on a new socket at `path` until the task is dropped.
///
/// # Errors
/// The socket cannot be bound (the path must not exist), or accepting fails.
pub async fn serve(path: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    Server::builder()
        .add_service(v1beta1::key_management_service_server::KeyManagementServiceServer::new(Echo))
        .add_service(v2::key_management_service_server::KeyManagementServiceServer::new(Echo))
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await
        .map_err(io::Error::other)
}

#[derive(Debug, Clone, Copy)]
struct Echo;

#[tonic::async_trait]
impl v1beta1::key_management_service_server::KeyManagementService for Echo {
    async fn version(
        &self,
        _: Request<v1beta1::VersionRequest>,
    ) -> Result<Response<v1beta1::VersionResponse>, Status> {
        Ok(Response::new(v1beta1::VersionResponse {
            version: "v1beta1".to_owned(),
            runtime_name: "bench-echo".to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn encrypt(
        &self,
        request: Request<v1beta1::EncryptRequest>,
    ) -> Result<Response<v1beta1::EncryptResponse>, Status> {
        let cipher = pad(request.into_inner().plain, V1_CIPHER)?;
        Ok(Response::new(v1beta1::EncryptResponse { cipher }))
    }

    async fn decrypt(
        &self,
        request: Request<v1beta1::DecryptRequest>,
    ) -> Result<Response<v1beta1::DecryptResponse>, Status> {
        let plain = unpad(request.into_inner().cipher)?;
        Ok(Response::new(v1beta1::DecryptResponse { plain }))
    }
}

#[tonic::async_trait]
impl v2::key_management_service_server::KeyManagementService for Echo {
    async fn status(
        &self,
        _: Request<v2::StatusRequest>,
    ) -> Result<Response<v2::StatusResponse>, Status> {
        Ok(Response::new(v2::StatusResponse {
            version: "v2".to_owned(),
            healthz: "ok".to_owned(),
            key_id: KEY_ID.to_owned(),
        }))
    }

    async fn encrypt(
        &self,
        request: Request<v2::EncryptRequest>,
    ) -> Result<Response<v2::EncryptResponse>, Status> {
        Ok(Response::new(v2::EncryptResponse {
            ciphertext: pad(request.into_inner().plaintext, V2_CIPHERTEXT)?,
            key_id: KEY_ID.to_owned(),
            annotations: Default::default(),
        }))
    }

    async fn decrypt(
        &self,
        request: Request<v2::DecryptRequest>,
    ) -> Result<Response<v2::DecryptResponse>, Status> {
        let plaintext = unpad(request.into_inner().ciphertext)?;
        Ok(Response::new(v2::DecryptResponse { plaintext }))
    }
}

/// The plaintext, zeros up to `len`, and how many of those bytes are plaintext.
fn pad(mut plaintext: Vec<u8>, len: usize) -> Result<Vec<u8>, Status> {
    let trailer = u16::try_from(plaintext.len()).ok().filter(|held| usize::from(*held) + 2 <= len);
    let trailer = trailer.ok_or_else(|| Status::invalid_argument("too long for an echo"))?;
    plaintext.resize(len - 2, 0);
    plaintext.extend_from_slice(&trailer.to_be_bytes());
    Ok(plaintext)
}

fn unpad(mut ciphertext: Vec<u8>) -> Result<Vec<u8>, Status> {
    let held = match ciphertext.last_chunk() {
        Some(trailer) => usize::from(u16::from_be_bytes(*trailer)),
        None => usize::MAX,
    };
    if held > ciphertext.len().saturating_sub(2) {
        return Err(Status::invalid_argument("not of this echo"));
    }
    ciphertext.truncate(held);
    Ok(ciphertext)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_at_the_length_of_the_real_thing() {
        for plaintext in [vec![], vec![7; 32], vec![0; 440]] {
            let padded = pad(plaintext.clone(), V2_CIPHERTEXT).unwrap();
            assert_eq!(padded.len(), V2_CIPHERTEXT);
            assert_eq!(unpad(padded).unwrap(), plaintext);
        }
        assert!(pad(vec![0; 441], V2_CIPHERTEXT).is_err());
        assert!(unpad(vec![]).is_err() && unpad(vec![1]).is_err() && unpad(vec![0, 1]).is_err());
    }

    #[tokio::test]
    async fn both_apis_are_served_on_one_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("echo.sock");
        let server = tokio::spawn({
            let path = path.clone();
            async move { serve(&path).await }
        });
        let channel = loop {
            match kms_api::grpc::connect(path.to_str().unwrap()).await {
                Ok(channel) => break channel,
                Err(error) => assert!(!server.is_finished(), "{error}"),
            }
            tokio::task::yield_now().await;
        };
        let mut v1 = v1beta1::key_management_service_client::KeyManagementServiceClient::new(
            channel.clone(),
        );
        let request =
            v1beta1::EncryptRequest { version: "v1beta1".to_owned(), plain: b"ping".to_vec() };
        assert_eq!(v1.encrypt(request).await.unwrap().into_inner().cipher.len(), V1_CIPHER);
        let mut v2 = v2::key_management_service_client::KeyManagementServiceClient::new(channel);
        let status = v2.status(v2::StatusRequest {}).await.unwrap().into_inner();
        assert_eq!((status.version.as_str(), status.healthz.as_str()), ("v2", "ok"));
        assert_eq!(status.key_id.len(), "keelson/".len() + 3 * 36 + 2, "as long as the plug-in's");
    }
}
