//! Trades what somebody logs in with for a token of ours: an API key, or a token of an issuer that is trusted.

use super::refused::{self, LOGIN};
use super::{Error, Origin, durable};
use crate::app::App;
use crate::audit::{Outcome, Record};
use crate::issuers::Identity;
use crate::limits::Whose;
use crate::policy::Caller;
use crate::store::{ApiKeyHash, Profile};
use crate::token::{Issued, Terms};
use aws_lc_rs::digest::{SHA256, digest};
use kms_api::rest::API_KEY_GRANT;
use kms_core::secret::SecretText;
use uuid::Uuid;

/// # Errors
/// `UnknownApiKey`, for locked, replaced and revoked ones too, and those of HSM, database and audit log.
pub async fn issue_token(app: &App, api_key: &SecretText, origin: Origin) -> Result<Issued, Error> {
    // Found by hash: how long the search takes says nothing about any API key.
    let found = app.store.caller_by_hash(&hash(api_key), app.now()).await?;
    let caller = found.ok_or(Error::UnknownApiKey)?;
    issue(app, &caller, Terms { grant: API_KEY_GRANT, until: None }, origin).await
}

/// A token of another issuer, and the profile that it is to be good for.
#[derive(Debug)]
pub struct Login {
    /// The grant under which it came.
    pub grant: &'static str,
    pub token: SecretText,
    pub profile: ProfileName,
}

/// What is said about a profile; both must be right where both are said.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct ProfileName {
    pub id: Option<Uuid>,
    pub name: Option<String>,
}

/// The token that is issued ends no later than the one that it was traded for.
///
/// # Errors
/// `NotTrusted`, whatever is wrong with the token; `NoProfile` for a genuine one that no profile trusts; `IssuerAway`; and those of HSM,
/// database and audit log.
pub async fn trade_token(app: &App, login: Login, origin: Origin) -> Result<Issued, Error> {
    let identity = app.issuers.verify(login.token.expose()).await?;
    let profiles = app.store.profiles().await?;
    let profile = trusted_by(&profiles, &login.profile, &identity).ok_or_else(|| {
        // The token is genuine, so its subject is no secret and no invention: the operator may want to trust it.
        let Identity { issuer, subject, .. } = &identity;
        tracing::info!("No profile trusts {subject} of {issuer} under the name that was given.");
        Error::NoProfile
    })?;
    let caller = app.store.caller_by_profile(profile.id).await?.ok_or(Error::NoProfile)?;
    issue(app, &caller, Terms { grant: login.grant, until: Some(identity.expires) }, origin).await
}

/// The one profile that is meant, if its conditions are met.
fn trusted_by<'p>(
    profiles: &'p [Profile],
    named: &ProfileName,
    identity: &Identity,
) -> Option<&'p Profile> {
    profiles.iter().find(|profile| {
        profile.issuer == identity.issuer
            && profile.subject == identity.subject
            && named.id.is_none_or(|id| profile.id == id)
            && named.name.as_ref().is_none_or(|name| profile.name == *name)
    })
}

async fn issue(app: &App, caller: &Caller, terms: Terms, origin: Origin) -> Result<Issued, Error> {
    // Before what costs: the HSM signs, and the record is durable.
    if let Err(why) = app.limits.spend(Whose::logins(caller)) {
        refused::too_often(app, caller, LOGIN, &origin);
        return Err(why.into());
    }
    let issued = app.issuer.issue(&*app.vault, caller, terms).await?;
    let record = Record {
        caller: Some(caller.iam_id()),
        api_key: caller.api_key(),
        correlation: origin.correlation,
        peer: Some(origin.peer),
        ..Record::new(LOGIN, Outcome::Done)
    };
    durable(app, record).await?;
    Ok(issued)
}

/// What is kept of an API key.
#[must_use]
pub fn hash(api_key: &SecretText) -> ApiKeyHash {
    let mut hash = ApiKeyHash::default();
    hash.copy_from_slice(digest(&SHA256, api_key.expose().as_bytes()).as_ref());
    hash
}
