//! The HTTP port of a daemon: its probes and its metrics, and nothing that changes anything.
//!
//! Never here: TLS, request bodies, or a check that can take long. Checks answer from memory or within
//! a moment; this port must answer while everything behind the daemon is down.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::{self, Debug};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, ALLOW, CONTENT_TYPE};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::lifecycle::Shutdown;

/// More probes at once than any kubelet and Prometheus open; the rest wait.
const MAX_CONNECTIONS: usize = 16;
/// A peer that says nothing does not hold one of them for long.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

type Answer = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// What is looked at, and what is missing of it.
pub type Part = (&'static str, Result<(), String>);

enum Check {
    Whole(Box<dyn Fn() -> Answer + Send + Sync>),
    Parts(Box<dyn Fn() -> Vec<Part> + Send + Sync>),
}

/// What is served: checks by path, and the text of the metrics.
pub struct Routes {
    checks: BTreeMap<String, Check>,
    metrics: Box<dyn Fn() -> String + Send + Sync>,
}

impl Routes {
    /// `metrics` renders the OpenMetrics text of `/metrics`, once for each scrape.
    pub fn new(metrics: impl Fn() -> String + Send + Sync + 'static) -> Routes {
        Routes { checks: BTreeMap::new(), metrics: Box::new(metrics) }
    }

    /// Adds a check: `Ok` answers 200 and `ok`, `Err` answers 503 and its text.
    #[must_use]
    pub fn check<F, A>(mut self, path: impl Into<String>, check: F) -> Routes
    where
        F: Fn() -> A + Send + Sync + 'static,
        A: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.checks.insert(path.into(), Check::Whole(Box::new(move || Box::pin(check()))));
        self
    }

    /// Adds a check of several parts: one line for each, `ok` or its cause, or a JSON object of them for who accepts
    /// only that; 503 if one is missing.
    #[must_use]
    pub fn parts(
        mut self,
        path: impl Into<String>,
        parts: impl Fn() -> Vec<Part> + Send + Sync + 'static,
    ) -> Routes {
        self.checks.insert(path.into(), Check::Parts(Box::new(parts)));
        self
    }
}

impl Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Routes").field("checks", &self.checks.keys()).finish_non_exhaustive()
    }
}

/// Serves until the shutdown is requested.
pub async fn serve(listener: TcpListener, routes: Routes, shutdown: Shutdown) {
    let routes = Arc::new(routes);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.requested() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = answer_on(stream, routes.clone());
                tokio::spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("health port: cannot accept a connection: {error}");
                // Out of file descriptors: asking again at once would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer_on(stream: TcpStream, routes: Arc<Routes>) {
    let service = service_fn(move |request| {
        let routes = routes.clone();
        async move { Ok::<_, Infallible>(answer(&request, &routes).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!("health port: {error}");
    }
}

async fn answer<B>(request: &Request<B>, routes: &Routes) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    let check = routes.checks.get(path);
    if check.is_none() && path != "/metrics" {
        return text(StatusCode::NOT_FOUND, "not found\n".into());
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".into());
        response.headers_mut().insert(ALLOW, http::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match check {
        None => metrics(routes),
        Some(Check::Parts(parts)) => each(&parts(), wants_json(request.headers())),
        Some(Check::Whole(check)) => match check().await {
            Ok(()) => text(StatusCode::OK, "ok\n".into()),
            Err(cause) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{cause}\n")),
        },
    }
}

fn each(parts: &[Part], as_json: bool) -> Response<Full<Bytes>> {
    let good = parts.iter().all(|(_, found)| found.is_ok());
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let said = |found: &Result<(), String>| match found {
        Ok(()) => "ok".to_owned(),
        // One line each, whatever a library says in several.
        Err(cause) => cause.split_whitespace().collect::<Vec<_>>().join(" "),
    };
    if !as_json {
        let lines = parts.iter().map(|(name, found)| format!("{name}: {}\n", said(found)));
        return text(status, lines.collect());
    }
    let object: serde_json::Map<_, _> =
        parts.iter().map(|(name, found)| ((*name).to_owned(), said(found).into())).collect();
    let body = serde_json::json!({ "ready": good, "parts": object });
    let mut response = text(status, format!("{body}\n"));
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

/// Browsers and kubelets accept anything, and are shown text.
fn wants_json(headers: &HeaderMap) -> bool {
    headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|range| range.split(';').next())
        .any(|range| range.trim().eq_ignore_ascii_case("application/json"))
}

fn metrics(routes: &Routes) -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::OK, (routes.metrics)());
    response.headers_mut().insert(
        CONTENT_TYPE,
        http::HeaderValue::from_static(
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
    );
    response
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn routes() -> Routes {
        Routes::new(|| "kms_up 1\n# EOF\n".to_owned())
            .check("/healthz", || async { Ok(()) })
            .check("/healthz/readiness", || async { Err("the key service is away".to_owned()) })
    }

    async fn ask(method: Method, path: &str) -> (StatusCode, String) {
        let request = Request::builder().method(method).uri(path).body(()).unwrap();
        let response = answer(&request, &routes()).await;
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_check_answers_with_its_cause() {
        assert_eq!(ask(Method::GET, "/healthz").await, (StatusCode::OK, "ok\n".into()));
        assert_eq!(
            ask(Method::GET, "/healthz/readiness").await,
            (StatusCode::SERVICE_UNAVAILABLE, "the key service is away\n".into())
        );
    }

    #[tokio::test]
    async fn parts_are_told_apart_as_text_and_as_json() {
        let routes = Routes::new(String::new).parts("/readyz", || {
            vec![("database", Ok(())), ("HSM", Err("no token\nin slot 7".to_owned()))]
        });
        let ask = async |accept: Option<&str>| {
            let mut request = Request::builder().uri("/readyz");
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            let response = answer(&request.body(()).unwrap(), &routes).await;
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            let body = response.into_body().collect().await.unwrap().to_bytes();
            String::from_utf8(body.to_vec()).unwrap()
        };
        let text = "database: ok\nHSM: no token in slot 7\n";
        assert_eq!(ask(None).await, text);
        assert_eq!(ask(Some("text/html, */*;q=0.8")).await, text);
        let json: serde_json::Value =
            serde_json::from_str(&ask(Some("text/html, application/json;q=0.9")).await).unwrap();
        let parts = serde_json::json!({ "database": "ok", "HSM": "no token in slot 7" });
        assert_eq!(json, serde_json::json!({ "ready": false, "parts": parts }));
    }

    #[tokio::test]
    async fn metrics_and_nothing_else_are_served() {
        assert_eq!(
            ask(Method::GET, "/metrics").await,
            (StatusCode::OK, "kms_up 1\n# EOF\n".into())
        );
        assert_eq!(ask(Method::GET, "/debug").await.0, StatusCode::NOT_FOUND);
        assert_eq!(ask(Method::POST, "/healthz").await.0, StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(ask(Method::POST, "/metrics").await.0, StatusCode::METHOD_NOT_ALLOWED);
    }

    #[tokio::test]
    async fn it_serves_over_a_socket_and_stops_when_asked() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::new();
        let server = tokio::spawn(serve(listener, routes(), shutdown.clone()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        shutdown.request();
        server.await.unwrap();
    }
}
