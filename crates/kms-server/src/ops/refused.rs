//! The records of those who are not let in, at a login or with a token, and of what is refused to whoever is known. Nothing that
//! they showed is in any.

use super::{Call, Error, Origin, Subject, durable, write};
use crate::app::App;
use crate::audit::{Outcome, Record};
use crate::failures::{Cause, Failures, Refused};
use crate::limits::TOO_OFTEN;
use crate::policy::{Action, Caller};
use crate::token::NotValid;
use uuid::Uuid;

/// Where somebody was not let in: the action of its records.
pub(super) const LOGIN: &str = "issue_token";
const TOKEN: &str = "use_token";

/// Writes that nobody got in, and why: `code` is what the caller hears. Whatever is wrong with an API key takes the same
/// way through here, so how long it takes says nothing about any.
///
/// # Errors
/// When the record cannot be written: then the refusal is not answered as such.
pub async fn login(
    app: &App,
    error: &Error,
    code: &'static str,
    origin: Origin,
) -> Result<(), Error> {
    let Some(cause) = Cause::of(error) else { return Ok(()) };
    app.metrics.login_refused(cause);
    stranger(app, &app.failures, LOGIN, code, origin).await
}

/// Writes that a token was not taken, and why: the caller does not hear that.
///
/// # Errors
/// As [`login`].
pub async fn token(app: &App, why: NotValid, origin: Origin) -> Result<(), Error> {
    app.metrics.token_refused(why);
    stranger(app, &app.refused_tokens, TOKEN, why.code(), origin).await
}

/// Writes that `action` was refused to somebody known, with reason `code`. Who tries again and again gets no record for each.
///
/// # Errors
/// When the record cannot be written: then not even the refusal is answered as such.
pub async fn known(
    app: &App,
    call: &Call,
    action: Action,
    target: Option<Uuid>,
    code: &'static str,
) -> Result<(), Error> {
    let refused = by(&call.caller, action.name(), code, &call.origin);
    if app.refusals.add(&refused) {
        let subject = Subject { target, ..Subject::default() };
        let written = write(app, call, action, subject, Outcome::Refused(code)).await;
        written.inspect_err(|_| app.refusals.count(&refused))?;
    }
    Ok(())
}

/// Notes that `caller` asked more often than a rate allows. That costs no record, whoever it is.
pub fn too_often(app: &App, caller: &Caller, action: &'static str, origin: &Origin) {
    app.refusals.count(&by(caller, action, TOO_OFTEN, origin));
}

/// Writes one record for all that got none of their own since the last time. What cannot be written waits.
pub async fn record_rest(app: &App) {
    for failures in [&app.failures, &app.refused_tokens, &app.refusals] {
        let mut rest = failures.take().into_iter();
        while let Some(repeated) = rest.next() {
            let record = Record { count: Some(repeated.count), ..record(&repeated.last) };
            if durable(app, record).await.is_err() {
                // Each of the others would wait as long for the same disk.
                failures.put_back(&repeated);
                rest.for_each(|repeated| failures.put_back(&repeated));
                return;
            }
        }
    }
}

async fn stranger(
    app: &App,
    failures: &Failures,
    action: &'static str,
    code: &'static str,
    origin: Origin,
) -> Result<(), Error> {
    let Origin { peer, correlation } = origin;
    let refused = Refused { peer, caller: None, action, code };
    if failures.add(&refused) {
        let record = Record { correlation, ..record(&refused) };
        durable(app, record).await.inspect_err(|_| failures.count(&refused))?;
    }
    Ok(())
}

fn by(caller: &Caller, action: &'static str, code: &'static str, origin: &Origin) -> Refused {
    Refused { peer: origin.peer, caller: Some(caller.iam_id()), action, code }
}

fn record(refused: &Refused) -> Record {
    Record {
        caller: refused.caller.clone(),
        peer: Some(refused.peer),
        ..Record::new(refused.action, Outcome::Refused(refused.code))
    }
}
