//! KMS v1: one Encrypt for each secret that is written, and a health check of four bytes (`ping`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kms_api::grpc::v1beta1::key_management_service_server::KeyManagementService;
use kms_api::grpc::v1beta1::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, VersionRequest,
    VersionResponse,
};
use kms_core::limits::MAX_V1_CIPHER;
use kms_core::secret::SecretBytes;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::call::{Method, answer, call};
use super::status;
use crate::sealer::{Call, Sealer, SealerError};

const API: &str = "v1beta1";

#[derive(Debug)]
pub(super) struct Service {
    sealer: Arc<Sealer>,
    /// KMS v1 has no uid; so that log lines of one request are found together, ours counts.
    requests: AtomicU64,
    version: Method,
    encrypt: Method,
    decrypt: Method,
}

impl Service {
    pub(super) fn new(sealer: Arc<Sealer>) -> Service {
        let method = |name| Method::new(API, name, &sealer);
        let [version, encrypt, decrypt] = ["Version", "Encrypt", "Decrypt"].map(method);
        Service { sealer, requests: AtomicU64::new(0), version, encrypt, decrypt }
    }

    fn call(&self, metadata: &MetadataMap) -> Call {
        let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        call(&format!("v1-{number}"), metadata)
    }
}

#[tonic::async_trait]
impl KeyManagementService for Service {
    /// kube-apiserver takes `v1beta1` and nothing else, and ignores the rest.
    async fn version(
        &self,
        request: Request<VersionRequest>,
    ) -> Result<Response<VersionResponse>, Status> {
        let call = self.call(request.metadata());
        answer(&self.sealer, &self.version, &call, async {
            Ok(VersionResponse {
                version: API.to_owned(),
                runtime_name: "Keelson kmsplugin".to_owned(),
                runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            })
        })
        .await
    }

    async fn encrypt(
        &self,
        request: Request<EncryptRequest>,
    ) -> Result<Response<EncryptResponse>, Status> {
        let call = self.call(request.metadata());
        let payload = SecretBytes::new(request.into_inner().plain);
        answer(&self.sealer, &self.encrypt, &call.clone(), async {
            let cipher = self.sealer.encrypt_v1(payload, call).await.map_err(status::of)?;
            if !(1..=MAX_V1_CIPHER).contains(&cipher.len()) {
                return Err(status::unsendable("cipher has a wrong length"));
            }
            Ok(EncryptResponse { cipher })
        })
        .await
    }

    async fn decrypt(
        &self,
        request: Request<DecryptRequest>,
    ) -> Result<Response<DecryptResponse>, Status> {
        let call = self.call(request.metadata());
        let cipher = request.into_inner().cipher;
        answer(&self.sealer, &self.decrypt, &call.clone(), async {
            let payload = self.open(&cipher, call).await.map_err(status::of)?;
            Ok(DecryptResponse { plain: payload.into_vec() })
        })
        .await
    }
}

impl Service {
    async fn open(&self, cipher: &[u8], call: Call) -> Result<SecretBytes, SealerError> {
        if cipher.len() > MAX_V1_CIPHER {
            let (bytes, limit) = (cipher.len(), MAX_V1_CIPHER);
            return Err(SealerError::TooLarge { what: "cipher", bytes, limit });
        }
        self.sealer.decrypt_v1(cipher, call).await
    }
}
