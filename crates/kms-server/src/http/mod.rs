//! The wire: which method and path asks for what, and the way of every request through this server.
//!
//! The two tables below are the router. A path that is not in them is answered with 501 under the key API's prefix and
//! with 404 elsewhere, never with a guess.

mod auth;
pub mod body;
mod keys;
mod manage;
mod problem;
mod query;
mod tokens;

use crate::app::App;
use crate::limits::Whose;
use crate::ops::{self, Call, Origin, refused};
use crate::policy::{Action, Scope};
use auth::Names;
use body::Body;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use problem::{Dialect, Problem};
use query::Query;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// Both prefixes of the key API: direct, and behind the ingress of the on-premises product.
pub const KEY_PREFIXES: [&str; 2] = ["/api/v2", "/kms/api/v2"];

/// One request that is understood.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    pub method: &'static str,
    /// Below the prefix. `{id}` stands for one segment; `?action=` must be in the query.
    pub path: &'static str,
    /// What the policy is asked.
    pub action: Action,
}

const fn route(method: &'static str, path: &'static str, action: Action) -> Route {
    Route { method, path, action }
}

/// What the key API understands. Creating and importing are one request; with a payload, `ImportKey` is asked for.
pub const KEY_ROUTES: &[Route] = &[
    route("HEAD", "/keys", Action::CountKeys),
    route("GET", "/keys", Action::ListKeys),
    route("POST", "/keys", Action::CreateKey),
    route("GET", "/keys/{id}", Action::ReadKey),
    route("DELETE", "/keys/{id}", Action::DeleteKey),
    route("DELETE", "/keys/{id}/purge", Action::PurgeKey),
    route("GET", "/keys/{id}/metadata", Action::ReadMetadata),
    route("GET", "/keys/{id}/versions", Action::ListVersions),
    route("POST", "/keys/{id}/actions/wrap", Action::Wrap),
    route("POST", "/keys/{id}/actions/unwrap", Action::Unwrap),
    route("POST", "/keys/{id}/actions/rotate", Action::RotateKey),
    route("POST", "/keys/{id}/actions/disable", Action::DisableKey),
    route("POST", "/keys/{id}/actions/enable", Action::EnableKey),
    route("POST", "/keys/{id}?action=wrap", Action::Wrap),
    route("POST", "/keys/{id}?action=unwrap", Action::Unwrap),
    route("POST", "/keys/{id}?action=rotate", Action::RotateKey),
    route("POST", "/keys/{id}?action=disable", Action::DisableKey),
    route("POST", "/keys/{id}?action=enable", Action::EnableKey),
];

/// What the token service understands with a token. Tokens themselves and the signing keys are asked for without one.
pub const MANAGEMENT_ROUTES: &[Route] = &[
    route("GET", "/v1/instances", Action::ListInstances),
    route("POST", "/v1/instances", Action::CreateInstance),
    route("GET", "/v1/serviceids", Action::ListServiceIds),
    route("POST", "/v1/serviceids", Action::CreateServiceId),
    route("DELETE", "/v1/serviceids/{id}", Action::DeleteServiceId),
    route("GET", "/v1/policies", Action::ListPolicies),
    route("POST", "/v1/policies", Action::CreatePolicy),
    route("DELETE", "/v1/policies/{id}", Action::DeletePolicy),
    route("GET", "/v1/profiles", Action::ListProfiles),
    route("POST", "/v1/profiles", Action::CreateProfile),
    route("DELETE", "/v1/profiles/{id}", Action::DeleteProfile),
    route("GET", "/v1/apikeys", Action::ListApiKeys),
    route("POST", "/v1/apikeys", Action::CreateApiKey),
    route("POST", "/v1/apikeys/{id}/lock", Action::LockApiKey),
    route("DELETE", "/v1/apikeys/{id}/lock", Action::UnlockApiKey),
    route("POST", "/v1/apikeys/{id}/rotate", Action::RotateApiKey),
    route("DELETE", "/v1/apikeys/{id}", Action::DeleteApiKey),
];

/// An answer before it is bytes on a wire.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    media_type: &'static str,
    headers: HeaderMap,
    // May hold a DEK, an API key or a token: wiped once it has been sent. Copies that hyper and rustls make are not.
    body: Zeroizing<Vec<u8>>,
}

impl Answer {
    fn empty(status: StatusCode) -> Answer {
        Answer { status, media_type: "", headers: HeaderMap::new(), body: Zeroizing::default() }
    }

    fn json(status: StatusCode, media_type: &'static str, value: &impl serde::Serialize) -> Answer {
        // The types of answers are strings and numbers; they always serialise.
        let body = Zeroizing::new(serde_json::to_vec(value).unwrap_or_default());
        Answer { status, media_type, headers: HeaderMap::new(), body }
    }
}

/// Answers one request to the key API.
pub async fn keys(
    app: Arc<App>,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let names = Names::of(peer, request.headers());
    let path = request.uri().path().to_owned();
    let found = KEY_PREFIXES
        .iter()
        .find_map(|prefix| path.strip_prefix(prefix).filter(|rest| rest.starts_with('/')));
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let began = app.clock.now();
    let (action, result) = match found {
        None => (None, Err(Problem::NoSuchPath)),
        Some(rest) => match find(KEY_ROUTES, request.method(), rest, &query) {
            None => (None, Err(Problem::NotBuilt)),
            Some((route, id)) => {
                let asked = Asked { action: route.action, id, query: &query };
                let request = Said::whole(request).await;
                let work = key_call(&app, request, &asked, names.origin.clone());
                let result = app.limits.request(work).await;
                (Some(route.action), result.unwrap_or_else(|why| Err(why.into())))
            }
        },
    };
    finish(&app, Dialect::KeyProtect(action), result, names, began)
}

/// Answers one request to the token service.
pub async fn tokens(
    app: Arc<App>,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let names = Names::of(peer, request.headers());
    let path = request.uri().path().to_owned();
    let query = Query::default();
    let began = app.clock.now();
    let result = match (request.method(), path.as_str()) {
        (&Method::POST, "/oidc/token" | "/identity/token") => {
            tokens::issue(&app, request, names.origin.clone()).await
        }
        (_, "/oidc/token" | "/identity/token") => Err(Problem::WrongMethod),
        (&Method::GET | &Method::HEAD, "/identity/keys") => Ok(tokens::signing_keys(&app)),
        (method, path) => match find(MANAGEMENT_ROUTES, method, path, &query) {
            None => Err(Problem::NoSuchPath),
            Some((route, id)) => {
                let asked = Asked { action: route.action, id, query: &query };
                let request = Said::whole(request).await;
                let work = management_call(&app, request, &asked, names.origin.clone());
                app.limits.request(work).await.unwrap_or_else(|why| Err(why.into()))
            }
        },
    };
    finish(&app, Dialect::Iam, result, names, began)
}

/// What the request line says.
#[derive(Debug)]
struct Asked<'a> {
    action: Action,
    id: Option<&'a str>,
    query: &'a Query,
}

/// A request whose peer has nothing more to say, and so can hold nothing up.
#[derive(Debug)]
struct Said {
    headers: HeaderMap,
    /// Told to nobody before it is known who asks.
    body: Result<Body, Problem>,
}

impl Said {
    async fn whole(request: Request<Incoming>) -> Said {
        let (head, body) = request.into_parts();
        Said { headers: head.headers, body: body::read(body).await }
    }
}

async fn key_call(
    app: &App,
    request: Said,
    asked: &Asked<'_>,
    origin: Origin,
) -> Result<Answer, Problem> {
    let caller = auth::caller(app, &request.headers, &origin).await?;
    // Whoever names none stands before the door of none: refused, and on record.
    let scope = Scope::of(auth::instance(&request.headers));
    let call = Call { caller, scope, origin };
    let result = in_instance(app, &call, request, asked).await;
    settle(app, &call, asked, result).await
}

async fn in_instance(
    app: &App,
    call: &Call,
    request: Said,
    asked: &Asked<'_>,
) -> Result<Answer, Problem> {
    // Before the door, and so whatever the instance that is named.
    app.limits.spend(Whose::caller(&call.caller))?;
    ops::enter_instance(app, call).await?;
    // Behind it: nobody can use up what is another instance's.
    let instance = call.scope.instance().map(Whose::Instance);
    instance.map_or(Ok(()), |instance| app.limits.spend(instance))?;
    auth::key_ring(&request.headers)?;
    let prefer = auth::prefers_representation(&request.headers);
    keys::perform(app, call, asked, &request.body?, prefer).await
}

async fn management_call(
    app: &App,
    request: Said,
    asked: &Asked<'_>,
    origin: Origin,
) -> Result<Answer, Problem> {
    let caller = auth::caller(app, &request.headers, &origin).await?;
    let call = Call { caller, scope: Scope::Everywhere, origin };
    let result = manage(app, &call, request, asked).await;
    settle(app, &call, asked, result).await
}

async fn manage(
    app: &App,
    call: &Call,
    request: Said,
    asked: &Asked<'_>,
) -> Result<Answer, Problem> {
    app.limits.spend(Whose::management(&call.caller))?;
    manage::perform(app, call, asked, &request.body?).await
}

/// A refusal to somebody who is known is a use, too: it is recorded before it is answered.
async fn settle(
    app: &App,
    call: &Call,
    asked: &Asked<'_>,
    result: Result<Answer, Problem>,
) -> Result<Answer, Problem> {
    let problem = match &result {
        Ok(_) => return result,
        // A flood must not become one of the audit log.
        Err(Problem::TooMuch(_)) => {
            refused::too_often(app, &call.caller, asked.action.name(), &call.origin);
            return result;
        }
        Err(problem) => problem,
    };
    let target = asked.id.and_then(auth::uuid);
    refused::known(app, call, asked.action, target, problem.code()).await?;
    result
}

fn finish(
    app: &App,
    dialect: Dialect,
    result: Result<Answer, Problem>,
    names: Names,
    began: Duration,
) -> Response<Full<Bytes>> {
    log(dialect, &result, &names);
    let answer = result.unwrap_or_else(|problem| problem.answer(dialect));
    let took = app.clock.now().saturating_sub(began);
    app.metrics.answered(dialect.name(), answer.status.as_u16(), took);
    let mut response = Response::new(Full::new(Bytes::from_owner(answer.body)));
    *response.status_mut() = answer.status;
    *response.headers_mut() = answer.headers;
    let headers = response.headers_mut();
    if !answer.media_type.is_empty() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(answer.media_type));
    }
    if let Some(id) = names.origin.correlation.and_then(|id| HeaderValue::try_from(id).ok()) {
        headers.insert(HeaderName::from_static("correlation-id"), id);
    }
    response
}

fn log(dialect: Dialect, result: &Result<Answer, Problem>, names: &Names) {
    let (what, correlation) = (dialect.name(), names.origin.correlation.as_deref().unwrap_or("-"));
    let trace_id = || names.trace.map(|trace| tracing::field::display(trace.trace_id()));
    match result {
        Ok(answer) => {
            let status = answer.status.as_u16();
            tracing::debug!(correlation, trace_id = trace_id(), "{what}: {status}");
        }
        // Under overload a line for each would be one more load; they are counted.
        Err(problem @ Problem::TooMuch(_)) => {
            tracing::debug!(correlation, trace_id = trace_id(), "{what} refused: {problem}");
        }
        Err(problem) if problem.is_for_the_operator() => {
            tracing::error!(correlation, trace_id = trace_id(), "{what} failed: {problem}");
        }
        Err(problem) => {
            tracing::info!(correlation, trace_id = trace_id(), "{what} refused: {problem}");
        }
    }
}

/// The route for a request, and what stands in the place of `{id}`.
fn find<'p>(
    routes: &'static [Route],
    method: &Method,
    path: &'p str,
    query: &Query,
) -> Option<(&'static Route, Option<&'p str>)> {
    routes.iter().filter(|route| method == route.method).find_map(|route| {
        let (template, action) = match route.path.split_once("?action=") {
            Some((template, action)) => (template, Some(action)),
            None => (route.path, None),
        };
        if action.is_some() && action != query.text("action") {
            return None;
        }
        Some((route, matched(template, path)?))
    })
}

/// `None`: the path is another one. Segments are compared as they stand; an escaped one matches nothing but `{id}`.
fn matched<'p>(template: &str, path: &'p str) -> Option<Option<&'p str>> {
    let mut id = None;
    let mut segments = path.split('/');
    for wanted in template.split('/') {
        let segment = segments.next()?;
        match wanted {
            "{id}" if !segment.is_empty() => id = Some(segment),
            _ if wanted == segment => {}
            _ => return None,
        }
    }
    segments.next().is_none().then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action<'p>(method: Method, path: &'p str, query: &str) -> Option<(Action, Option<&'p str>)> {
        find(KEY_ROUTES, &method, path, &Query::parse(query)).map(|(route, id)| (route.action, id))
    }

    #[test]
    fn both_forms_of_an_action_are_one() {
        let long = action(Method::POST, "/keys/k1/actions/wrap", "");
        let short = action(Method::POST, "/keys/k1", "action=wrap");
        assert_eq!(long, Some((Action::Wrap, Some("k1"))));
        assert_eq!(long, short);
    }

    #[test]
    fn what_is_not_in_the_table_matches_nothing() {
        for (method, path, query) in [
            (Method::POST, "/keys/k1", ""),
            (Method::POST, "/keys/k1", "action=rewrap"),
            (Method::POST, "/keys/k1/actions/rewrap", ""),
            (Method::PATCH, "/keys/k1", ""),
            (Method::GET, "/keys/", ""),
            (Method::GET, "/keys/k1/", ""),
            (Method::GET, "//keys", ""),
            (Method::GET, "/keys/../keys", ""),
            (Method::GET, "/key%73", ""),
        ] {
            assert_eq!(action(method.clone(), path, query), None, "{method} {path}?{query}");
        }
    }
}
