//! Trusted profiles: whose tokens of another issuer speak for which service ID. A profile has no secret of its own.

use super::service_ids::{managed, managed_one};
use super::{Call, Error, Subject, announce, record};
use crate::app::App;
use crate::policy::Action;
use crate::store::Profile;
use crate::token::random_uuid;
use uuid::Uuid;

/// What the caller says about a new profile.
#[derive(Debug)]
pub struct NewProfile {
    pub name: String,
    pub service_id: Uuid,
    pub issuer: String,
    pub subject: String,
}

/// Those of the service IDs that the caller manages.
///
/// # Errors
/// `Denied`, and those of database and audit log.
pub async fn list_profiles(app: &App, call: &Call) -> Result<Vec<Profile>, Error> {
    let mine = managed(app, call, Action::ListProfiles).await?;
    let mut profiles = app.store.profiles().await?;
    profiles.retain(|profile| mine.iter().any(|one| one.id == profile.service_id));
    record(app, call, Action::ListProfiles, Subject::default()).await?;
    Ok(profiles)
}

/// # Errors
/// `Denied`; `Field` for an issuer that the configuration does not name; `NotFound` for a service ID that does not
/// exist or that the caller does not manage; `Conflict` when the name is taken; and those of HSM, database and audit
/// log.
pub async fn create_profile(app: &App, call: &Call, asked: NewProfile) -> Result<Profile, Error> {
    let owner = managed_one(app, call, Action::CreateProfile, asked.service_id).await?;
    if !app.issuers.knows(&asked.issuer) {
        let why = "is not in ISSUERS of this server's configuration".to_owned();
        return Err(Error::Field { name: "issuer", why });
    }
    let profile = Profile {
        id: random_uuid(&*app.vault).await?,
        service_id: owner.id,
        name: asked.name,
        issuer: asked.issuer,
        subject: asked.subject,
        created_at: app.now(),
    };
    let subject = of(&profile);
    announce(app, call, Action::CreateProfile, subject.clone()).await?;
    app.store.add_profile(&profile).await?;
    record(app, call, Action::CreateProfile, subject).await?;
    Ok(profile)
}

/// Ends a profile and, with the next call, every token that was issued for it.
///
/// # Errors
/// `Denied`, `NotFound`, and those of database and audit log.
pub async fn delete_profile(app: &App, call: &Call, id: Uuid) -> Result<(), Error> {
    let mine = managed(app, call, Action::DeleteProfile).await?;
    let profiles = app.store.profiles().await?;
    let managed = |profile: &&Profile| mine.iter().any(|one| one.id == profile.service_id);
    let found = profiles.iter().filter(managed).find(|profile| profile.id == id);
    let subject = of(found.ok_or(Error::NotFound("profile"))?);
    announce(app, call, Action::DeleteProfile, subject.clone()).await?;
    if !app.store.remove_profile(id).await? {
        return Err(Error::NotFound("profile"));
    }
    record(app, call, Action::DeleteProfile, subject).await
}

fn of(profile: &Profile) -> Subject {
    let Profile { issuer, subject, .. } = profile;
    Subject::of_service_id(profile.service_id, profile.id)
        .granting(format_args!("{subject} of {issuer}"))
}
