//! Shows the CRKs of an instance, or how many there are.

use super::{Call, Error, Subject, record};
use crate::app::App;
use crate::policy::{self, Action, Reach};
use crate::store::{Key, KeyState, Page, Wanted};

/// Which keys are asked for.
#[derive(Debug)]
pub struct Filter {
    pub states: Vec<KeyState>,
    /// Standard keys are extractable, root keys are not, and this server has root keys only.
    pub extractable: Option<bool>,
}

/// One page, and how many keys match in all.
#[derive(Debug)]
pub struct Listed {
    pub keys: Vec<Key>,
    pub total: u64,
}

/// # Errors
/// `Denied`, and those of database and audit log.
pub async fn list_keys(
    app: &App,
    call: &Call,
    filter: Filter,
    page: Page,
) -> Result<Listed, Error> {
    let instance = call.instance()?;
    let wanted = wanted(app, filter, policy::reach(&call.caller, Action::ListKeys, instance)?);
    let keys = app.store.keys(instance, &wanted, page).await?;
    let total = app.store.count_keys(instance, &wanted).await?;
    record(app, call, Action::ListKeys, Subject::default()).await?;
    Ok(Listed { keys, total })
}

/// # Errors
/// As [`list_keys`].
pub async fn count_keys(app: &App, call: &Call, filter: Filter) -> Result<u64, Error> {
    let instance = call.instance()?;
    let wanted = wanted(app, filter, policy::reach(&call.caller, Action::CountKeys, instance)?);
    let total = app.store.count_keys(instance, &wanted).await?;
    record(app, call, Action::CountKeys, Subject::default()).await?;
    Ok(total)
}

fn wanted(app: &App, filter: Filter, reach: Reach) -> Wanted {
    let states = if filter.extractable == Some(true) { Vec::new() } else { filter.states };
    Wanted { states, now: app.now(), reach }
}
