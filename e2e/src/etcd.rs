//! A single etcd on loopback. Values are read through its own JSON gateway, exactly as they are stored.

use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::process::{Lifetime, Process, Spec};
use crate::{http, ports, wait};

/// A running etcd.
#[derive(Debug)]
pub struct Etcd {
    pub process: Process,
    port: u16,
}

impl Etcd {
    /// Starts an empty etcd in `dir` and waits until it answers.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(program: &Path, dir: &Path, lifetime: Lifetime) -> Result<Self> {
        let (port, peers) = (ports::free()?, ports::free()?);
        let client_url = format!("http://127.0.0.1:{port}");
        let spec = Spec::new("etcd", program, dir, lifetime)
            .arg(format!("--data-dir={}", dir.join("etcd").display()))
            .arg(format!("--listen-client-urls={client_url}"))
            .arg(format!("--advertise-client-urls={client_url}"))
            .arg(format!("--listen-peer-urls=http://127.0.0.1:{peers}"))
            .arg("--log-level=warn");
        let process = Process::start(&spec)?;
        let etcd = Self { process, port };
        wait::until(
            "etcd's health",
            Duration::from_secs(30),
            &[&etcd.process],
            || match http::get(port, "/health")? {
                (200, _) => Ok(()),
                (status, body) => Err(format!("{status} {body}")),
            },
        )?;
        Ok(etcd)
    }

    /// What ETCDCTL_ENDPOINTS and `--etcd-servers` take.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The stored value of `key`.
    ///
    /// # Errors
    /// When there is none.
    pub fn value(&self, key: &str) -> Result<Vec<u8>> {
        let request = format!(r#"{{"key":"{}"}}"#, BASE64.encode(key));
        let (status, body) = http::post_json(self.port, "/v3/kv/range", &request)
            .map_err(|text| Error::answer("etcd", text))?;
        if status != 200 {
            return Err(Error::answer("etcd", format!("{status} {body}")));
        }
        let range: Range = serde_json::from_str(&body)
            .map_err(|error| Error::answer("etcd", format!("{error}: {body}")))?;
        let first = range
            .kvs
            .into_iter()
            .next()
            .ok_or_else(|| Error::answer("etcd", format!("there is no {key}")))?;
        BASE64.decode(&first.value).map_err(|error| Error::answer("etcd", error.to_string()))
    }

    /// What `etcdctl get KEY` prints: the key, a line end, the value, a line end. The golden dump is one.
    ///
    /// # Errors
    /// When there is no such key.
    pub fn printed(&self, key: &str) -> Result<Vec<u8>> {
        Ok([key.as_bytes(), b"\n", &self.value(key)?, b"\n"].concat())
    }
}

#[derive(Deserialize)]
struct Range {
    #[serde(default)]
    kvs: Vec<KeyValue>,
}

#[derive(Deserialize)]
struct KeyValue {
    #[serde(default)]
    value: String,
}
