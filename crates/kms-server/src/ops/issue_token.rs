//! Trades an API key for a token.

use super::Error;
use crate::app::App;
use crate::audit::{Outcome, Record};
use crate::store::ApiKeyHash;
use crate::token::Issued;
use aws_lc_rs::digest::{SHA256, digest};
use kms_core::secret::SecretText;

/// # Errors
/// `UnknownApiKey`, for revoked ones too, and those of HSM, database and audit log.
pub async fn issue_token(
    app: &App,
    api_key: &SecretText,
    correlation: Option<String>,
) -> Result<Issued, Error> {
    // Found by hash: how long the search takes says nothing about any API key.
    let caller = app.store.caller_by_hash(&hash(api_key)).await?.ok_or(Error::UnknownApiKey)?;
    let issued = app.issuer.issue(&*app.vault, &caller).await?;
    let record = Record {
        action: "issue_token",
        outcome: Outcome::Done,
        caller: Some(caller.iam_id()),
        api_key: Some(caller.api_key),
        instance: None,
        target: None,
        version: None,
        correlation,
    };
    app.audit.record(record).await?;
    Ok(issued)
}

/// What is kept of an API key.
#[must_use]
pub fn hash(api_key: &SecretText) -> ApiKeyHash {
    let mut hash = ApiKeyHash::default();
    hash.copy_from_slice(digest(&SHA256, api_key.expose().as_bytes()).as_ref());
    hash
}
