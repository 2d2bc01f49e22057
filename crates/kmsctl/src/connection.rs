//! Where the services are and who asks: settings from options and the environment, and the clients made of them.
//! An API key comes from a file or the environment, never from an argument.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use kms_api::client::{Ca, Call, ClientSettings, KeyProtect, Management, USER_AGENT};
use kms_api::token::{Credential, Profile, TokenSettings, TokenSource};
use kms_core::clock::SystemClock;
use kms_core::secret::SecretText;

use crate::error::Error;

const API_KEY: &str = "KMS_API_KEY";

/// The token service, and how to prove who one is.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct Access {
    /// Full URL of the token endpoint, https://host:10443/oidc/token
    #[arg(long, global = true, env = "KMS_TOKEN_URL", value_name = "URL")]
    token_url: Option<String>,
    /// PEM file of the CA that signed the services' certificates
    #[arg(long, global = true, env = "KMS_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// File that holds the API key; without it KMS_API_KEY in the environment is the API key
    #[arg(long, global = true, env = "KMS_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// File that holds the token of a service account, in place of an API key
    #[arg(long, global = true, env = "KMS_CR_TOKEN_FILE", value_name = "FILE")]
    #[arg(conflicts_with = "api_key_file")]
    cr_token_file: Option<PathBuf>,
    /// The profile that trusts that token: its name, or its id (Profile-…)
    #[arg(long, global = true, env = "KMS_PROFILE", value_name = "PROFILE")]
    profile: Option<String>,
    /// How long one call may take
    #[arg(long, global = true, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=600))]
    timeout: u64,
}

/// The key service as well, and one instance in it.
#[derive(Debug, Args)]
pub(crate) struct KeyAccess {
    #[command(flatten)]
    access: Access,
    /// URL of the key service, https://host:28674
    #[arg(long, global = true, env = "KMS_URL", value_name = "URL", help_heading = "Connection")]
    url: Option<String>,
    /// The instance whose keys are meant
    #[arg(
        long,
        global = true,
        env = "KMS_INSTANCE_ID",
        value_name = "UUID",
        help_heading = "Connection"
    )]
    instance: Option<String>,
}

impl Access {
    pub(crate) fn management(&self) -> Result<Management, Error> {
        let (token_url, ca) = (self.token_url()?, self.ca());
        Ok(Management::new(token_url, ca.as_ref(), USER_AGENT, self.tokens()?)?)
    }

    pub(crate) fn call(&self) -> Call<'static> {
        Call::within(Duration::from_secs(self.timeout))
    }

    fn tokens(&self) -> Result<TokenSource, Error> {
        let settings = TokenSettings { url: self.token_url()?.to_owned(), ca: self.ca() };
        let credential = self.credential(std::env::var(API_KEY).ok())?;
        Ok(TokenSource::new(&settings, credential, Arc::new(SystemClock::new()))?)
    }

    fn credential(&self, environment: Option<String>) -> Result<Credential, Error> {
        if let Some(path) = self.cr_token_file.clone() {
            return Ok(Credential::CrTokenFile { path, profile: self.profile()? });
        }
        match (&self.api_key_file, environment.filter(|key| !key.is_empty())) {
            (Some(file), _) => Ok(Credential::ApiKeyFile(file.clone())),
            (None, Some(key)) => Ok(Credential::ApiKey(SecretText::new(key))),
            (None, None) => {
                let option = "--api-key-file FILE or the environment variable KMS_API_KEY";
                Err(Error::Missing { what: "the API key", option })
            }
        }
    }

    fn profile(&self) -> Result<Profile, Error> {
        let option = "--profile PROFILE or the environment variable KMS_PROFILE";
        let missing = Error::Missing { what: "the profile that trusts the token", option };
        let said = self.profile.clone().ok_or(missing)?;
        Ok(match said.starts_with("Profile-") {
            true => Profile { id: Some(said), name: None },
            false => Profile { id: None, name: Some(said) },
        })
    }

    fn token_url(&self) -> Result<&str, Error> {
        let option = "--token-url URL or the environment variable KMS_TOKEN_URL";
        self.token_url.as_deref().ok_or(Error::Missing { what: "the token service", option })
    }

    fn ca(&self) -> Option<Ca> {
        self.ca_file.clone().map(Ca::File)
    }
}

impl KeyAccess {
    pub(crate) fn client(&self) -> Result<KeyProtect, Error> {
        let option = "--url URL or the environment variable KMS_URL";
        let url = self.url.clone().ok_or(Error::Missing { what: "the key service", option })?;
        let option = "--instance UUID or the environment variable KMS_INSTANCE_ID";
        let instance_id =
            self.instance.clone().ok_or(Error::Missing { what: "the instance", option })?;
        let settings = ClientSettings {
            url,
            instance_id,
            ca: self.access.ca(),
            max_connections: 1,
            user_agent: USER_AGENT.to_owned(),
        };
        Ok(KeyProtect::new(&settings, self.access.tokens()?)?)
    }

    pub(crate) fn call(&self) -> Call<'static> {
        self.access.call()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(api_key_file: Option<&str>, cr_token_file: Option<&str>) -> Access {
        let (api_key_file, cr_token_file) =
            (api_key_file.map(PathBuf::from), cr_token_file.map(PathBuf::from));
        Access {
            token_url: None,
            ca_file: None,
            api_key_file,
            cr_token_file,
            profile: None,
            timeout: 1,
        }
    }

    #[test]
    fn a_file_comes_before_the_environment_and_empty_means_absent() {
        let environment = || Some("k".to_owned());
        let credential = |file| access(file, None).credential(environment());
        assert!(matches!(credential(Some("f")), Ok(Credential::ApiKeyFile(_))));
        assert!(matches!(credential(None), Ok(Credential::ApiKey(_))));
        let missing = access(None, None).credential(Some(String::new())).unwrap_err();
        assert!(matches!(missing, Error::Missing { what: "the API key", .. }));
    }

    #[test]
    fn a_service_accounts_token_needs_a_profile_by_name_or_id() {
        let with = |profile: Option<&str>| {
            let profile = profile.map(str::to_owned);
            Access { profile, ..access(None, Some("f")) }.credential(Some("k".to_owned()))
        };
        assert!(matches!(with(None), Err(Error::Missing { .. })));
        for (said, id, name) in
            [("node", None, Some("node")), ("Profile-1", Some("Profile-1"), None)]
        {
            let Ok(Credential::CrTokenFile { profile, .. }) = with(Some(said)) else {
                panic!("{said}")
            };
            assert_eq!((profile.id.as_deref(), profile.name.as_deref()), (id, name));
        }
    }
}
