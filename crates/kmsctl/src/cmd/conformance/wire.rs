//! Below the messages: services, `:authority`, deadlines and cancelled calls, and what proto3 says about bytes that a
//! message should not hold. Asked in raw frames, because no HTTP/2 library sends all of this.

use super::raw::{Answer, Broken, Connection, Request};
use super::report::{Unmet, Verdict};
use super::subject::{Api, Failure, Subject, UNIMPLEMENTED};

const V1_VERSION: &str = "/v1beta1.KeyManagementService/Version";
const V1_ENCRYPT: &str = "/v1beta1.KeyManagementService/Encrypt";
const V2_STATUS: &str = "/v2.KeyManagementService/Status";
const V2_ENCRYPT: &str = "/v2.KeyManagementService/Encrypt";
const UNKNOWN: [&str; 3] = [
    "/v1beta1.KeyManagementService/Rotate",
    "/v2.KeyManagementService/Rotate",
    "/v99.KeyManagementService/Status",
];

/// kube-apiserver's default.
const TIMEOUT: &str = "3S";
/// Over before the server has read it.
const EXPIRED: &str = "1n";
const CANCELLED: usize = 50;
/// A field that no version of the interface has.
const UNKNOWN_FIELD: u32 = 1000;
const NO_UTF8: &[u8] = &[0xff, 0xfe];

/// 1
pub(super) async fn unknown_fields(subject: &Subject) -> Verdict {
    for api in subject.apis() {
        let (simple, encrypt) = paths(api);
        let unknown = field(UNKNOWN_FIELD, b"from a later release");
        let payload = subject.payload(32);
        let with_payload = [encrypt_message(api, &payload, b"v1beta1"), unknown.clone()].concat();
        for (path, message) in [(simple, &unknown), (encrypt, &with_payload)] {
            let answer = ask(subject, path, Some("localhost"), message).await;
            let said = answer.and_then(accepted);
            said.map_err(|failure| format!("{path} with an unknown field: {failure}"))?;
        }
    }
    Ok("ignored, the request is answered".to_owned())
}

/// 1
pub(super) async fn invalid_utf8(subject: &Subject) -> Verdict {
    let mut seen = String::new();
    for api in subject.apis() {
        let (_, path) = paths(api);
        let message = encrypt_message(api, &subject.payload(32), NO_UTF8);
        let answer = ask(subject, path, Some("localhost"), &message).await;
        match answer.and_then(accepted) {
            Ok(()) => return Err(format!("{path} is answered").into()),
            Err(failure @ Failure::Refused { .. }) => seen = failure.to_string(),
            Err(failure) => return Err(format!("{path}: {failure}").into()),
        }
    }
    Ok(seen)
}

/// 2
pub(super) async fn services(subject: &Subject) -> Verdict {
    if let Some(api) = subject.required.iter().find(|api| !subject.serves(**api)) {
        return Err(format!("KMS {api} is not served on this socket").into());
    }
    let served: Vec<String> = subject.apis().map(|api| format!("KMS {api}")).collect();
    match served.as_slice() {
        [] => Err("neither KMS v1 nor KMS v2 is served on this socket".into()),
        _ => Ok(format!("{} on this socket", served.join(" and "))),
    }
}

/// 2
pub(super) async fn unknown_method(subject: &Subject) -> Verdict {
    for path in UNKNOWN {
        match ask(subject, path, Some("localhost"), &[]).await.and_then(accepted) {
            Err(failure) if failure.has(UNIMPLEMENTED) => {}
            Err(failure) => return Err(format!("{path}: {failure}").into()),
            Ok(()) => return Err(format!("{path} is answered").into()),
        }
    }
    Ok("UNIMPLEMENTED".to_owned())
}

/// 3: KMS v2 since 1.32.
pub(super) async fn authority_localhost(subject: &Subject) -> Verdict {
    authority(subject, Some("localhost")).await
}

/// 3: a socket in the abstract namespace.
pub(super) async fn authority_abstract(subject: &Subject) -> Verdict {
    let name = subject.socket.trim_start_matches('@').rsplit('/').next().unwrap_or_default();
    authority(subject, Some(&format!("@{name}"))).await
}

/// 3: KMS v1 since 1.29 or so, and KMS v2 before 1.32.
pub(super) async fn authority_encoded(subject: &Subject) -> Verdict {
    authority(subject, Some(&percent_encoded(path_of(subject)?))).await
}

/// 3: both, up to 1.28.
pub(super) async fn authority_raw(subject: &Subject) -> Verdict {
    authority(subject, Some(path_of(subject)?)).await
}

/// 3: gRPC makes it optional, no API server leaves it out. So a refusal will do, silence will not.
pub(super) async fn authority_absent(subject: &Subject) -> Verdict {
    for api in subject.apis() {
        let (path, _) = paths(api);
        match ask(subject, path, None, &[]).await.and_then(accepted) {
            Err(failure @ Failure::Silent(_)) => return Err(format!("{path}: {failure}").into()),
            Err(failure) => return Ok(format!("refused: {failure}")),
            Ok(()) => {}
        }
    }
    Ok("answered".to_owned())
}

/// 27
pub(super) async fn expired(subject: &Subject) -> Verdict {
    let mut seen = Vec::new();
    for api in subject.apis() {
        let (_, path) = paths(api);
        let message = encrypt_message(api, &subject.payload(32), b"v1beta1");
        let mut connection = subject.raw().await?;
        let late = request(path, &message, EXPIRED);
        match subject.unbroken(answer_or_reset(&mut connection, &late)).await {
            Ok(said) => seen.push(said),
            Err(failure) => return Err(format!("{path}: {failure}").into()),
        }
        still_served(subject, &mut connection, path, &message).await?;
    }
    seen.dedup();
    Ok(seen.join(", "))
}

/// 27
pub(super) async fn cancelled(subject: &Subject) -> Verdict {
    for api in subject.apis() {
        let (simple, path) = paths(api);
        let message = encrypt_message(api, &subject.payload(32), b"v1beta1");
        let mut connection = subject.raw().await?;
        let mut ids = Vec::new();
        for _ in 0..CANCELLED {
            ids.push(subject.unbroken(connection.start(&request(path, &message, TIMEOUT))).await?);
        }
        // Calls are taken in turn. With one behind them answered, all of them were begun before they are cancelled.
        still_served(subject, &mut connection, simple, &[]).await?;
        subject.unbroken(connection.cancel(&ids)).await?;
        still_served(subject, &mut connection, path, &message).await?;
    }
    Ok(format!("{CANCELLED} calls cancelled, the connection goes on"))
}

/// 28, last of all
pub(super) async fn texts(subject: &Subject) -> Verdict {
    match subject.leaks().first() {
        None => Ok("no payload in any status text of this run".to_owned()),
        Some(text) => {
            let beginning: String = text.chars().take(80).collect();
            Err(format!("a payload is in the text {beginning:?}…").into())
        }
    }
}

async fn authority(subject: &Subject, authority: Option<&str>) -> Verdict {
    for api in subject.apis() {
        let (path, _) = paths(api);
        let answer = ask(subject, path, authority, &[]).await.and_then(accepted);
        answer.map_err(|failure| format!("{path}: {failure}"))?;
    }
    let answered: Vec<String> = subject.apis().map(|api| api.to_string()).collect();
    Ok(format!("{} answered", answered.join(" and ")))
}

async fn still_served(
    subject: &Subject,
    connection: &mut Connection,
    path: &str,
    message: &[u8],
) -> Result<(), String> {
    let next = subject.ask(connection, &request(path, message, TIMEOUT)).await;
    next.and_then(accepted).map_err(|failure| format!("{path}, the next call: {failure}"))
}

/// A deadline that has passed may also end in a reset of the stream.
async fn answer_or_reset(
    connection: &mut Connection,
    request: &Request<'_>,
) -> Result<String, Broken> {
    match connection.ask(request).await {
        Ok(answer) => Ok(match accepted(answer) {
            Ok(()) => "answered in time".to_owned(),
            Err(failure) => failure.to_string(),
        }),
        Err(Broken::Reset(_)) => Ok("the stream is reset".to_owned()),
        Err(broken) => Err(broken),
    }
}

/// One request on a connection of its own.
async fn ask(
    subject: &Subject,
    path: &str,
    authority: Option<&str>,
    message: &[u8],
) -> Result<Answer, Failure> {
    let mut connection = subject.raw().await?;
    let request = Request { authority, ..request(path, message, TIMEOUT) };
    subject.ask(&mut connection, &request).await
}

fn request<'a>(path: &'a str, message: &'a [u8], timeout: &'a str) -> Request<'a> {
    Request { path, authority: Some("localhost"), timeout, message }
}

/// An answer with a message and status 0; else what was said instead.
fn accepted(answer: Answer) -> Result<(), Failure> {
    let said = &answer.said;
    match (said.grpc_status, answer.message()) {
        (Some(0), Some(_)) => Ok(()),
        (Some(0), None) => Err(Failure::Lost("status 0 without a message".to_owned())),
        (Some(status), _) => {
            let code = i32::try_from(status).unwrap_or(i32::MAX);
            let (name, text) = (format!("status {status}"), said.grpc_message.clone());
            Err(Failure::Refused { code, name, text })
        }
        (None, _) => {
            let http = said.http_status.map_or("no".to_owned(), |status| status.to_string());
            Err(Failure::Lost(format!("HTTP status {http}, but no gRPC status")))
        }
    }
}

/// The simplest method, and Encrypt.
fn paths(api: Api) -> (&'static str, &'static str) {
    match api {
        Api::V1 => (V1_VERSION, V1_ENCRYPT),
        Api::V2 => (V2_STATUS, V2_ENCRYPT),
    }
}

/// An EncryptRequest; `string` is the version of KMS v1, the uid of KMS v2.
fn encrypt_message(api: Api, payload: &[u8], string: &[u8]) -> Vec<u8> {
    match api {
        Api::V1 => [field(1, string), field(2, payload)].concat(),
        Api::V2 => [field(1, payload), field(2, string)].concat(),
    }
}

/// A length-delimited field of a protobuf message.
fn field(number: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint(u64::from(number) << 3 | 2, &mut bytes);
    varint(u64::try_from(content.len()).unwrap_or(u64::MAX), &mut bytes);
    bytes.extend_from_slice(content);
    bytes
}

fn varint(mut number: u64, bytes: &mut Vec<u8>) {
    while number >= 0x80 {
        bytes.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    bytes.push(number.to_le_bytes()[0]);
}

fn path_of(subject: &Subject) -> Result<&str, Unmet> {
    let path = Some(&*subject.socket).filter(|socket| !socket.starts_with('@'));
    let skipped = || "an abstract socket has no path that anybody could send".to_owned();
    path.ok_or_else(|| Unmet::Skipped(skipped()))
}

/// As grpc-go writes a socket path into an authority.
fn percent_encoded(path: &str) -> String {
    let kept = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:[]@".contains(byte);
    let encoded = path.bytes().map(|byte| match kept(&byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    });
    encoded.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_encoded_as_kube_apiserver_sends_it() {
        assert_eq!(percent_encoded("/var/run/kms.sock"), "%2Fvar%2Frun%2Fkms.sock");
        assert_eq!(percent_encoded("/a b/@ü"), "%2Fa%20b%2F@%C3%BC");
    }

    #[test]
    fn messages_are_those_of_the_generated_clients() {
        assert_eq!(encrypt_message(Api::V1, b"p", b"v"), b"\x0a\x01v\x12\x01p");
        assert_eq!(encrypt_message(Api::V2, b"p", b"u"), b"\x0a\x01p\x12\x01u");
        let long = field(1000, &[7; 200]);
        assert_eq!(long[..4], [0xc2, 0x3e, 0xc8, 0x01]);
        assert_eq!(long.len(), 204);
    }
}
