//! A KMS plug-in as the load sees it: both versions of the interface behind one pair of calls.

use std::collections::HashMap;
use std::future::Future;

use kms_api::grpc::v1beta1::key_management_service_client::KeyManagementServiceClient as V1Client;
use kms_api::grpc::v2::key_management_service_client::KeyManagementServiceClient as V2Client;
use kms_api::grpc::{Channel, Status, v1beta1, v2};
use uuid::Uuid;

pub(super) trait Plugin: Send {
    /// What Encrypt gives and Decrypt takes.
    type Sealed: Send + Sync;

    fn encrypt(
        &mut self,
        payload: Vec<u8>,
    ) -> impl Future<Output = Result<Self::Sealed, String>> + Send;
    fn decrypt(
        &mut self,
        sealed: &Self::Sealed,
    ) -> impl Future<Output = Result<Vec<u8>, String>> + Send;
}

/// KMS v1.
pub(super) struct V1 {
    client: V1Client<Channel>,
}

/// KMS v2.
pub(super) struct V2 {
    client: V2Client<Channel>,
    calls: u128,
}

pub(super) struct V2Sealed {
    ciphertext: Vec<u8>,
    key_id: String,
    annotations: HashMap<String, Vec<u8>>,
}

impl V1 {
    pub(super) fn new(channel: Channel) -> Self {
        V1 { client: V1Client::new(channel) }
    }
}

impl Plugin for V1 {
    type Sealed = Vec<u8>;

    async fn encrypt(&mut self, plain: Vec<u8>) -> Result<Vec<u8>, String> {
        let request = v1beta1::EncryptRequest { version: "v1beta1".to_owned(), plain };
        let answer = self.client.encrypt(request).await.map_err(text)?;
        Ok(answer.into_inner().cipher)
    }

    async fn decrypt(&mut self, cipher: &Vec<u8>) -> Result<Vec<u8>, String> {
        let request =
            v1beta1::DecryptRequest { version: "v1beta1".to_owned(), cipher: cipher.clone() };
        let answer = self.client.decrypt(request).await.map_err(text)?;
        Ok(answer.into_inner().plain)
    }
}

impl V2 {
    pub(super) fn new(channel: Channel) -> Self {
        V2 { client: V2Client::new(channel), calls: 0 }
    }

    /// As long as kube-apiserver's, which draws it anew for each call.
    fn uid(&mut self) -> String {
        self.calls += 1;
        Uuid::from_u128(self.calls).to_string()
    }
}

impl Plugin for V2 {
    type Sealed = V2Sealed;

    async fn encrypt(&mut self, plaintext: Vec<u8>) -> Result<V2Sealed, String> {
        let request = v2::EncryptRequest { plaintext, uid: self.uid() };
        let answer = self.client.encrypt(request).await.map_err(text)?.into_inner();
        let v2::EncryptResponse { ciphertext, key_id, annotations } = answer;
        Ok(V2Sealed { ciphertext, key_id, annotations })
    }

    async fn decrypt(&mut self, sealed: &V2Sealed) -> Result<Vec<u8>, String> {
        let request = v2::DecryptRequest {
            ciphertext: sealed.ciphertext.clone(),
            uid: self.uid(),
            key_id: sealed.key_id.clone(),
            annotations: sealed.annotations.clone(),
        };
        let answer = self.client.decrypt(request).await.map_err(text)?;
        Ok(answer.into_inner().plaintext)
    }
}

fn text(status: Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}
