//! One HTTPS server, few kept connections, every exchange inside its deadline and its size. Keys, tokens and the
//! meaning of an answer are not known here, redirects are not followed, and plain HTTP is refused: an API key or a
//! DEK must never travel in the clear.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{self, Client};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kms_core::crypto_module::CryptoModule;
use rustls::client::{Resumption, WantsClientCert};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use super::Ca;
use super::error::{Error, SetupError, causes};

/// No answer of either service comes near it; more is not read.
const MAX_BODY: usize = 1024 * 1024;
/// Longest deadline that is honoured, so that adding it to a time never overflows.
const MAX_DEADLINE: Duration = Duration::from_secs(3600);
/// One SYN may be lost; a dead first address still leaves time for the second.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);
/// Bounds a response head and the read buffer of each connection.
const READ_BUFFER: usize = 16 * 1024;

pub(crate) struct Https {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    // HTTP/1.1 with 32 callers and no cap made a new TLS handshake for most requests: 4.4 times the CPU.
    permits: Semaphore,
    user_agent: HeaderValue,
    base: Uri,
    what: String,
}

/// One request, which can be sent twice.
pub(crate) struct Exchange {
    pub(crate) method: Method,
    /// Path and query, behind the path of the base URL.
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Doing it twice is the same as doing it once.
    pub(crate) replay: bool,
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Zeroizing<Vec<u8>>,
}

impl Https {
    /// `kind` is what messages call the server, such as "the key service".
    ///
    /// # Errors
    /// An URL that is not `https://host[:port][/path]`, no CA, a CA file without certificates.
    pub(crate) fn new(
        kind: &str,
        url: &str,
        ca: Option<&Ca>,
        max_connections: usize,
        user_agent: &str,
    ) -> Result<Self, SetupError> {
        let base = base(url)?;
        let ca = ca.ok_or_else(|| SetupError::NoCa { url: url.to_owned() })?;
        let connections = max_connections.max(1);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(connections)
            .http1_max_buf_size(READ_BUFFER)
            .build(connector(ca)?);
        let what = format!("{kind} at {}", base.authority().map_or("?", |host| host.as_str()));
        let user_agent = header("user agent", user_agent)?;
        Ok(Https { client, permits: Semaphore::new(connections), user_agent, base, what })
    }

    /// Sends and reads the whole answer, whatever its status. Where the connection was lost before any answer, an
    /// exchange that may be replayed is sent once more: the server may have closed a kept connection just then.
    ///
    /// # Errors
    /// `Unreachable`, `TimedOut`, or `BadAnswer` for what is no HTTP or too long.
    pub(crate) async fn exchange(
        &self,
        exchange: &Exchange,
        until: Instant,
    ) -> Result<Answer, Error> {
        let in_time = async {
            // The semaphore is never closed; if it were, the call would only be uncounted.
            let _permit = self.permits.acquire().await.ok();
            let response = match self.send(exchange).await {
                Err(lost) if exchange.replay && closed_before_answer(&lost) => {
                    self.send(exchange).await
                }
                first => first,
            };
            self.read(response.map_err(|error| self.lost(&error))?).await
        };
        timeout_at(until, in_time).await.unwrap_or_else(|_| Err(self.timed_out()))
    }

    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    pub(crate) fn timed_out(&self) -> Error {
        Error::TimedOut { what: self.what.clone() }
    }

    pub(crate) fn bad_answer(&self, cause: impl fmt::Display) -> Error {
        Error::BadAnswer { what: self.what.clone(), cause: cause.to_string() }
    }

    async fn send(&self, exchange: &Exchange) -> Result<Response<Incoming>, legacy::Error> {
        let mut request = Request::new(Full::new(exchange.body.clone()));
        *request.method_mut() = exchange.method.clone();
        *request.uri_mut() = self.uri(&exchange.path);
        *request.headers_mut() = exchange.headers.clone();
        request.headers_mut().insert(USER_AGENT, self.user_agent.clone());
        if exchange.body.is_empty() && exchange.method == Method::POST {
            request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        self.client.request(request).await
    }

    fn uri(&self, path: &str) -> Uri {
        let mut parts = self.base.clone().into_parts();
        let full = format!("{}{path}", self.base.path().trim_end_matches('/'));
        // Callers escape what they put into a path, so this always parses; the base alone would answer 404.
        parts.path_and_query = full.parse().ok().or(parts.path_and_query);
        Uri::from_parts(parts).unwrap_or_else(|_| self.base.clone())
    }

    async fn read(&self, response: Response<Incoming>) -> Result<Answer, Error> {
        let (head, mut body) = response.into_parts();
        let too_long = || self.bad_answer(format_args!("it is longer than {MAX_BODY} bytes"));
        let expected = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        if expected > MAX_BODY {
            return Err(too_long());
        }
        let mut buffer = WipedBuffer::with_capacity(expected);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.unreachable(causes(&error)))?;
            let Some(chunk) = frame.data_ref() else { continue };
            if buffer.len() + chunk.len() > MAX_BODY {
                return Err(too_long());
            }
            buffer.push(chunk);
        }
        Ok(Answer { status: head.status, body: buffer.into_inner() })
    }

    fn lost(&self, error: &legacy::Error) -> Error {
        use std::error::Error as _;
        match hyper_cause(error) {
            Some(cause) if cause.is_parse() => self.bad_answer(causes(cause)),
            // The outermost text only says which half of the client failed.
            _ => self.unreachable(error.source().map_or_else(|| error.to_string(), causes)),
        }
    }

    fn unreachable(&self, cause: String) -> Error {
        Error::Unreachable { what: self.what.clone(), cause }
    }
}

impl fmt::Debug for Https {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Https").field("base", &self.base).finish_non_exhaustive()
    }
}

/// The moment at which a budget that starts now is used up.
pub(crate) fn until(deadline: Duration) -> Instant {
    Instant::now() + deadline.min(MAX_DEADLINE)
}

/// A configured text as a header value.
///
/// # Errors
/// Control characters in it.
pub(crate) fn header(name: &'static str, value: &str) -> Result<HeaderValue, SetupError> {
    HeaderValue::from_str(value).map_err(|_| SetupError::Header { name, value: value.to_owned() })
}

/// Headers from names and values, for a request.
pub(crate) fn headers<const N: usize>(pairs: [(HeaderName, HeaderValue); N]) -> HeaderMap {
    HeaderMap::from_iter(pairs)
}

/// Bytes that grow without leaving copies of themselves in freed memory.
pub(crate) struct WipedBuffer(Zeroizing<Vec<u8>>);

impl WipedBuffer {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        WipedBuffer(Zeroizing::new(Vec::with_capacity(capacity)))
    }

    pub(crate) fn push(&mut self, chunk: &[u8]) {
        let needed = self.len() + chunk.len();
        if needed > self.0.capacity() {
            let mut larger = Zeroizing::new(Vec::with_capacity(needed.max(2 * self.0.capacity())));
            larger.extend_from_slice(&self.0);
            self.0 = larger;
        }
        self.0.extend_from_slice(chunk);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn into_inner(self) -> Zeroizing<Vec<u8>> {
        self.0
    }

    /// As a request body, wiped when the last copy is dropped.
    pub(crate) fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self.0)
    }
}

impl io::Write for WipedBuffer {
    fn write(&mut self, chunk: &[u8]) -> io::Result<usize> {
        self.push(chunk);
        Ok(chunk.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn base(url: &str) -> Result<Uri, SetupError> {
    let wrong = |cause: &str| SetupError::Url { url: url.to_owned(), cause: cause.to_owned() };
    let uri: Uri = url.parse().map_err(|error: http::uri::InvalidUri| wrong(&error.to_string()))?;
    if uri.scheme_str() != Some("https") {
        return Err(wrong("it must begin with https://"));
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(wrong("it names no host"));
    }
    if uri.query().is_some() {
        return Err(wrong("it must not have a query"));
    }
    Ok(uri)
}

fn connector(ca: &Ca) -> Result<HttpsConnector<HttpConnector>, SetupError> {
    let mut tls = trusting(roots(ca)?)?.with_no_client_auth();
    CryptoModule::linked().allow_tls(tls.fips())?;
    // One server name: the default of 256 would only hold memory.
    tls.resumption = Resumption::in_memory_sessions(2);
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(TCP_KEEPALIVE));
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    Ok(HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_only()
        .enable_http1()
        .wrap_connector(tcp))
}

/// TLS as each client here speaks it; what is left to say is who the client is.
pub(crate) fn trusting(
    roots: RootCertStore,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, SetupError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| SetupError::Tls { cause: error.to_string() })?;
    Ok(builder.with_root_certificates(roots))
}

pub(crate) fn roots(ca: &Ca) -> Result<RootCertStore, SetupError> {
    let wrong = |cause: String| SetupError::Ca { path: ca.to_string(), cause };
    let file;
    let pem = match ca {
        Ca::Pem(pem) => pem,
        Ca::File(path) => {
            file = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
            &file
        }
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
        roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(wrong("it holds no certificate in PEM form".to_owned()));
    }
    Ok(roots)
}

/// The connection ended and no byte of an answer had come.
fn closed_before_answer(error: &legacy::Error) -> bool {
    if error.is_connect() {
        return false;
    }
    let Some(cause) = hyper_cause(error) else { return false };
    cause.is_incomplete_message() || cause.is_canceled() || lost_socket(cause)
}

fn lost_socket(error: &hyper::Error) -> bool {
    use std::error::Error as _;
    let kind =
        error.source().and_then(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
    matches!(
        kind,
        Some(
            io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::UnexpectedEof
        )
    )
}

fn hyper_cause(error: &legacy::Error) -> Option<&hyper::Error> {
    use std::error::Error as _;
    error.source().and_then(|cause| cause.downcast_ref::<hyper::Error>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_is_that_of_the_fips_module_wherever_the_module_is() {
        let tls = trusting(RootCertStore::empty()).unwrap().with_no_client_auth();
        assert_eq!(tls.fips(), CryptoModule::linked().fips);
    }
}
