//! The client of kms-server's own management interface, on the port of its token service: instances, service IDs,
//! policies, profiles and API keys. For operators; the plug-in never uses it. An API key is shown by its creation or
//! rotation and never again.

use http::Method;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::https::{Answer, Https, headers, until};
use super::{
    Ask, Ca, Call, Error, Replay, SetupError, correlation, parse, path_segment, with_token,
};
use crate::rest::{
    ApiKey, ApiKeys, Instance, Instances, NewApiKey, NewInstance, NewPolicy, NewProfile,
    NewServiceId, Policies, Policy, Profile, Profiles, Rotation, ServiceId, ServiceIds,
};
use crate::token::TokenSource;

#[derive(Debug)]
pub struct Management {
    https: Https,
    tokens: TokenSource,
}

impl Management {
    /// `token_url` is the full URL of the token endpoint, `…/oidc/token` or `…/identity/token`; management lies
    /// beside it. Connects to nothing yet.
    ///
    /// # Errors
    /// Settings that no client can be made of.
    pub fn new(
        token_url: &str,
        ca: Option<&Ca>,
        user_agent: &str,
        tokens: TokenSource,
    ) -> Result<Self, SetupError> {
        let base = ["/oidc/token", "/identity/token"]
            .iter()
            .find_map(|path| token_url.trim_end_matches('/').strip_suffix(path))
            .unwrap_or(token_url);
        let https = Https::new("the token service", base, ca, 1, user_agent)?;
        Ok(Management { https, tokens })
    }

    /// # Errors
    /// See [`Error`]; true of every method here.
    pub async fn instances(&self, call: Call<'_>) -> Result<Vec<Instance>, Error> {
        let list: Instances = self.read("/v1/instances", call).await?;
        Ok(list.instances)
    }

    pub async fn create_instance(
        &self,
        new: &NewInstance,
        call: Call<'_>,
    ) -> Result<Instance, Error> {
        self.create("/v1/instances", new, call).await
    }

    pub async fn service_ids(&self, call: Call<'_>) -> Result<Vec<ServiceId>, Error> {
        let list: ServiceIds = self.read("/v1/serviceids", call).await?;
        Ok(list.serviceids)
    }

    pub async fn create_service_id(
        &self,
        new: &NewServiceId,
        call: Call<'_>,
    ) -> Result<ServiceId, Error> {
        self.create("/v1/serviceids", new, call).await
    }

    /// Its policies, API keys and profiles go with it, and every token made with them stops working at once.
    pub async fn delete_service_id(&self, id: &str, call: Call<'_>) -> Result<(), Error> {
        self.delete(format!("/v1/serviceids/{}", path_segment(id)), call).await
    }

    pub async fn api_keys(&self, call: Call<'_>) -> Result<Vec<ApiKey>, Error> {
        let list: ApiKeys = self.read("/v1/apikeys", call).await?;
        Ok(list.apikeys)
    }

    /// The answer holds the API key, for this once.
    pub async fn create_api_key(&self, new: &NewApiKey, call: Call<'_>) -> Result<ApiKey, Error> {
        self.create("/v1/apikeys", new, call).await
    }

    /// The API key and every token made with it stop working at once.
    pub async fn revoke_api_key(&self, id: &str, call: Call<'_>) -> Result<(), Error> {
        self.delete(format!("/v1/apikeys/{}", path_segment(id)), call).await
    }

    /// The API key and every token made with it stop working at once, until it is unlocked.
    pub async fn lock_api_key(&self, id: &str, call: Call<'_>) -> Result<(), Error> {
        let ask =
            Ask::action(format!("/v1/apikeys/{}/lock", path_segment(id)), &(), Replay::Never)?;
        self.ask(ask, call).await.map(drop)
    }

    pub async fn unlock_api_key(&self, id: &str, call: Call<'_>) -> Result<(), Error> {
        self.delete(format!("/v1/apikeys/{}/lock", path_segment(id)), call).await
    }

    /// The answer holds the new secret of the same API key, for this once.
    pub async fn rotate_api_key(
        &self,
        id: &str,
        rotation: &Rotation,
        call: Call<'_>,
    ) -> Result<ApiKey, Error> {
        self.create(&format!("/v1/apikeys/{}/rotate", path_segment(id)), rotation, call).await
    }

    pub async fn policies(&self, call: Call<'_>) -> Result<Vec<Policy>, Error> {
        let list: Policies = self.read("/v1/policies", call).await?;
        Ok(list.policies)
    }

    pub async fn create_policy(&self, new: &NewPolicy, call: Call<'_>) -> Result<Policy, Error> {
        self.create("/v1/policies", new, call).await
    }

    pub async fn delete_policy(&self, id: &str, call: Call<'_>) -> Result<(), Error> {
        self.delete(format!("/v1/policies/{}", path_segment(id)), call).await
    }

    pub async fn profiles(&self, call: Call<'_>) -> Result<Vec<Profile>, Error> {
        let list: Profiles = self.read("/v1/profiles", call).await?;
        Ok(list.profiles)
    }

    pub async fn create_profile(&self, new: &NewProfile, call: Call<'_>) -> Result<Profile, Error> {
        self.create("/v1/profiles", new, call).await
    }

    /// Every token made with the profile stops working at once.
    pub async fn delete_profile(&self, id: &str, call: Call<'_>) -> Result<(), Error> {
        self.delete(format!("/v1/profiles/{}", path_segment(id)), call).await
    }

    async fn read<T: DeserializeOwned>(&self, path: &str, call: Call<'_>) -> Result<T, Error> {
        let answer = self.ask(Ask::read(path.to_owned()), call).await?;
        parse(&self.https, &answer)
    }

    async fn delete(&self, path: String, call: Call<'_>) -> Result<(), Error> {
        let ask = Ask { method: Method::DELETE, replay: Replay::Never, ..Ask::read(path) };
        self.ask(ask, call).await.map(drop)
    }

    async fn create<T: DeserializeOwned>(
        &self,
        path: &str,
        new: &impl Serialize,
        call: Call<'_>,
    ) -> Result<T, Error> {
        let ask = Ask::action(path.to_owned(), new, Replay::Never)?;
        let answer = self.ask(ask, call).await?;
        parse(&self.https, &answer)
    }

    async fn ask(&self, ask: Ask, call: Call<'_>) -> Result<Answer, Error> {
        let headers = headers([
            (HeaderName::from_static("correlation-id"), correlation(call.correlation_id)),
            (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        ]);
        with_token(&self.https, &self.tokens, ask, headers, until(call.deadline), |status, body| {
            Error::from_token_service(self.https.what(), status, body)
        })
        .await
    }
}
