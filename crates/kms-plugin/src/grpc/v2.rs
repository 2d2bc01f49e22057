//! KMS v2: Status is polled, Encrypt follows a changed key_id, Decrypt comes for seeds that are in no cache.
//!
//! We write no annotations. So a value with annotations was changed or is not ours, and reads like any other value that
//! does not authenticate.

use std::collections::HashMap;
use std::sync::Arc;

use kms_api::grpc::v2::key_management_service_server::KeyManagementService;
use kms_api::grpc::v2::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, StatusRequest, StatusResponse,
};
use kms_core::limits::{MAX_KEY_ID, MAX_V2_CIPHERTEXT};
use kms_core::secret::SecretBytes;
use tonic::{Request, Response, Status};

use super::call::{Method, answer, call};
use super::status;
use crate::config::StatusVersion;
use crate::sealer::{Call, Sealed, Sealer, SealerError};

const API: &str = "v2";
/// The one word that counts as healthy. Anything else would be shown, but let writes go on for ever: when the plug-in
/// cannot seal, Status fails instead.
const HEALTHY: &str = "ok";

#[derive(Debug)]
pub(super) struct Service {
    sealer: Arc<Sealer>,
    status_version: StatusVersion,
    status: Method,
    encrypt: Method,
    decrypt: Method,
}

impl Service {
    pub(super) fn new(sealer: Arc<Sealer>, status_version: StatusVersion) -> Service {
        let method = |name| Method::new(API, name, &sealer);
        let [status, encrypt, decrypt] = ["Status", "Encrypt", "Decrypt"].map(method);
        Service { sealer, status_version, status, encrypt, decrypt }
    }
}

#[tonic::async_trait]
impl KeyManagementService for Service {
    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        answer(&self.sealer, &self.status, &call("", request.metadata()), async {
            let key_id = self.sealer.status().map_err(status::of)?.key_id.to_string();
            Ok(StatusResponse {
                version: self.status_version.as_str().to_owned(),
                healthz: HEALTHY.to_owned(),
                key_id,
            })
        })
        .await
    }

    async fn encrypt(
        &self,
        request: Request<EncryptRequest>,
    ) -> Result<Response<EncryptResponse>, Status> {
        let call = call(&request.get_ref().uid, request.metadata());
        let payload = SecretBytes::new(request.into_inner().plaintext);
        answer(&self.sealer, &self.encrypt, &call.clone(), async {
            sendable(self.sealer.encrypt_v2(payload, call).await.map_err(status::of)?)
        })
        .await
    }

    async fn decrypt(
        &self,
        request: Request<DecryptRequest>,
    ) -> Result<Response<DecryptResponse>, Status> {
        let call = call(&request.get_ref().uid, request.metadata());
        let message = request.into_inner();
        answer(&self.sealer, &self.decrypt, &call.clone(), async {
            let payload = self.open(&message, call).await.map_err(status::of)?;
            Ok(DecryptResponse { plaintext: payload.into_vec() })
        })
        .await
    }
}

impl Service {
    async fn open(&self, message: &DecryptRequest, call: Call) -> Result<SecretBytes, SealerError> {
        let DecryptRequest { ciphertext, key_id, annotations, uid: _ } = message;
        within("ciphertext", ciphertext.len(), MAX_V2_CIPHERTEXT)?;
        within("key_id", key_id.len(), MAX_KEY_ID)?;
        if !annotations.is_empty() {
            return Err(SealerError::NotAuthentic);
        }
        self.sealer.decrypt_v2(ciphertext, key_id, call).await
    }
}

fn within(what: &'static str, bytes: usize, limit: usize) -> Result<(), SealerError> {
    if bytes <= limit { Ok(()) } else { Err(SealerError::TooLarge { what, bytes, limit }) }
}

/// What kube-apiserver checks of an answer, before it is sent.
fn sendable(sealed: Sealed) -> Result<EncryptResponse, Status> {
    let Sealed { ciphertext, key_id } = sealed;
    let key_id = key_id.to_string();
    if !(1..=MAX_V2_CIPHERTEXT).contains(&ciphertext.len()) {
        return Err(status::unsendable("ciphertext has a wrong length"));
    }
    if !(1..=MAX_KEY_ID).contains(&key_id.len()) {
        return Err(status::unsendable("key_id has a wrong length"));
    }
    Ok(EncryptResponse { ciphertext, key_id, annotations: HashMap::new() })
}
