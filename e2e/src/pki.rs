//! A private CA for the two TLS endpoints of kms-server, and the key pair of the service account issuer.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use crate::error::{Error, Result};

/// When a certificate is valid, against the clock of whoever checks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// For longer than any test's clock goes right.
    Now,
    Ended,
}

/// Files of the private CA. The CA's own key is never written.
#[derive(Debug, Clone)]
pub struct Pki {
    pub ca: PathBuf,
    pub server_cert: PathBuf,
    pub server_key: PathBuf,
    authority: Arc<Authority>,
}

/// The CA with its key, in memory only.
struct Authority(Issuer<'static, KeyPair>);

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl Pki {
    /// Makes a CA and a server certificate for 127.0.0.1 and localhost in `dir`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn create(dir: &Path) -> Result<Self> {
        let ca_key = KeyPair::generate()?;
        let mut ca = CertificateParams::default();
        ca.distinguished_name.push(DnType::CommonName, "Keelson private CA");
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca_cert = ca.self_signed(&ca_key)?;
        let pki = Self {
            ca: dir.join("ca.crt"),
            server_cert: dir.join("server.crt"),
            server_key: dir.join("server.key"),
            authority: Arc::new(Authority(Issuer::new(ca, ca_key))),
        };
        write_file(&pki.ca, &ca_cert.pem())?;
        pki.issue(Validity::Now)?;
        Ok(pki)
    }

    /// Another server certificate in the place of the one before; the server reads it when it starts.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn issue(&self, validity: Validity) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut server = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        server.distinguished_name.push(DnType::CommonName, "kms-server");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.use_authority_key_identifier_extension = true;
        let (from, until) = match validity {
            Validity::Now => (2020, 2100),
            Validity::Ended => (2020, 2021),
        };
        (server.not_before, server.not_after) =
            (date_time_ymd(from, 1, 1), date_time_ymd(until, 1, 1));
        let cert = server.signed_by(&key, &self.authority.0)?;
        write_file(&self.server_cert, &cert.pem())?;
        write_private(&self.server_key, &key.serialize_pem())
    }
}

/// Writes `sa.key` and `sa.pub`, with which kube-apiserver signs and checks service account tokens.
///
/// # Errors
/// When a file cannot be written.
pub fn service_account_keys(dir: &Path) -> Result<(PathBuf, PathBuf)> {
    let key = KeyPair::generate()?;
    let (private, public) = (dir.join("sa.key"), dir.join("sa.pub"));
    write_private(&private, &key.serialize_pem())?;
    write_file(&public, &key.public_key_pem())?;
    Ok((private, public))
}

/// Writes a file that anyone may read.
///
/// # Errors
/// When the machine refuses.
pub fn write_file(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(Error::machine(format!("write {}", path.display())))
}

/// Writes a file that only its owner may read, from the first byte on.
///
/// # Errors
/// When the machine refuses.
pub fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(Error::machine(format!("write {}", path.display())))
}
