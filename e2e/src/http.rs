//! Just enough HTTP for plain loopback endpoints: etcd's JSON gateway and the programs' probes.
//!
//! HTTP/1.0, one request per connection, so the answer ends with the connection and is never chunked. What
//! speaks TLS is reached through kubectl and kmsctl instead.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// `GET path`: status and body.
///
/// # Errors
/// The reason in words, for a condition that is polled.
pub fn get(port: u16, path: &str) -> Result<(u16, String), String> {
    exchange(port, &format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"))
}

/// `POST path` with a JSON body: status and body.
///
/// # Errors
/// The reason in words.
pub fn post_json(port: u16, path: &str, body: &str) -> Result<(u16, String), String> {
    let length = body.len();
    let head = "Host: 127.0.0.1\r\nContent-Type: application/json";
    exchange(
        port,
        &format!("POST {path} HTTP/1.0\r\n{head}\r\nContent-Length: {length}\r\n\r\n{body}"),
    )
}

const TIMEOUT: Duration = Duration::from_secs(5);

fn exchange(port: u16, request: &str) -> Result<(u16, String), String> {
    let answer = talk(port, request).map_err(|error| format!("127.0.0.1:{port}: {error}"))?;
    let (head, body) =
        answer.split_once("\r\n\r\n").ok_or_else(|| format!("127.0.0.1:{port}: no HTTP answer"))?;
    let status = head
        .split_whitespace()
        .nth(1)
        .and_then(|code| code.parse().ok())
        .ok_or_else(|| format!("127.0.0.1:{port}: no HTTP status in {head:?}"))?;
    Ok((status, body.to_owned()))
}

fn talk(port: u16, request: &str) -> std::io::Result<String> {
    let mut stream =
        TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
