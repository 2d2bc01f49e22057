//! Trades what somebody logs in with for a token of ours: an API key, or a token of an issuer that is trusted.

use super::{Error, Origin, durable};
use crate::app::App;
use crate::audit::{Outcome, Record};
use crate::failures::{Cause, Repeated};
use crate::issuers::Identity;
use crate::policy::Caller;
use crate::store::{ApiKeyHash, Profile};
use crate::token::{Issued, Terms};
use aws_lc_rs::digest::{SHA256, digest};
use kms_api::rest::API_KEY_GRANT;
use kms_core::secret::SecretText;
use std::net::SocketAddr;
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
    /// Without one, the profile of exactly this issuer and subject, if there is one only.
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
/// `NotTrusted`, whatever is wrong with the token and also where no profile trusts it; `IssuerAway`; and those of HSM,
/// database and audit log.
pub async fn trade_token(app: &App, login: Login, origin: Origin) -> Result<Issued, Error> {
    let identity = app.issuers.verify(login.token.expose()).await?;
    let profiles = app.store.profiles().await?;
    let profile = trusted_by(&profiles, &login.profile, &identity).ok_or_else(|| {
        // The token is genuine, so its subject is no secret and no invention: the operator may want to trust it.
        let Identity { issuer, subject, .. } = &identity;
        tracing::info!("No profile trusts {subject} of {issuer} under the name that was given.");
        Error::NotTrusted
    })?;
    let caller = app.store.caller_by_profile(profile.id).await?.ok_or(Error::NotTrusted)?;
    issue(app, &caller, Terms { grant: login.grant, until: Some(identity.expires) }, origin).await
}

/// The one profile that is meant, if its conditions are met.
fn trusted_by<'p>(
    profiles: &'p [Profile],
    named: &ProfileName,
    identity: &Identity,
) -> Option<&'p Profile> {
    let mut fitting = profiles.iter().filter(|profile| {
        profile.issuer == identity.issuer
            && profile.subject == identity.subject
            && named.id.is_none_or(|id| profile.id == id)
            && named.name.as_ref().is_none_or(|name| profile.name == *name)
    });
    let first = fitting.next()?;
    fitting.next().is_none().then_some(first)
}

async fn issue(app: &App, caller: &Caller, terms: Terms, origin: Origin) -> Result<Issued, Error> {
    let issued = app.issuer.issue(&*app.vault, caller, terms).await?;
    let record = Record {
        action: "issue_token",
        outcome: Outcome::Done,
        caller: Some(caller.iam_id()),
        api_key: caller.api_key(),
        instance: None,
        target: None,
        version: None,
        correlation: origin.correlation,
        peer: Some(origin.peer),
        count: None,
    };
    durable(app, record).await?;
    Ok(issued)
}

/// Writes that nobody got in, and why: `code` is what the caller hears. Whatever is wrong with an API key takes the same
/// way through here, so how long it takes says nothing about any.
///
/// # Errors
/// When the record cannot be written: then the refusal is not answered as such.
pub async fn record_failure(
    app: &App,
    error: &Error,
    code: &'static str,
    origin: Origin,
) -> Result<(), Error> {
    let Some(cause) = Cause::of(error) else { return Ok(()) };
    app.metrics.login_refused(cause);
    if app.failures.add(origin.peer, code) {
        let Origin { peer, correlation } = origin;
        let record = Record { correlation, ..failed(code, peer) };
        durable(app, record).await.inspect_err(|_| {
            app.failures.put_back(Repeated { peer, code, count: 1 });
        })?;
    }
    Ok(())
}

/// Writes one record for all that got none of their own since the last time. What cannot be written waits.
pub async fn record_failures(app: &App) {
    for Repeated { peer, code, count } in app.failures.take() {
        let record = Record { count: Some(count), ..failed(code, peer) };
        if durable(app, record).await.is_err() {
            app.failures.put_back(Repeated { peer, code, count });
        }
    }
}

fn failed(code: &'static str, peer: SocketAddr) -> Record {
    Record {
        action: "issue_token",
        outcome: Outcome::Refused(code),
        caller: None,
        api_key: None,
        instance: None,
        target: None,
        version: None,
        correlation: None,
        peer: Some(peer),
        count: None,
    }
}

/// What is kept of an API key.
#[must_use]
pub fn hash(api_key: &SecretText) -> ApiKeyHash {
    let mut hash = ApiKeyHash::default();
    hash.copy_from_slice(digest(&SHA256, api_key.expose().as_bytes()).as_ref());
    hash
}
