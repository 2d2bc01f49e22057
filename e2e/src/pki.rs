//! A private CA for the two TLS endpoints of kms-server, and the key pair of the service account issuer.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::error::{Error, Result};

/// Files of the private CA. The CA's own key is never written.
#[derive(Debug, Clone)]
pub struct Pki {
    pub ca: PathBuf,
    pub server_cert: PathBuf,
    pub server_key: PathBuf,
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
        let issuer = Issuer::new(ca, ca_key);

        let key = KeyPair::generate()?;
        let mut server = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        server.distinguished_name.push(DnType::CommonName, "kms-server");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.use_authority_key_identifier_extension = true;
        let cert = server.signed_by(&key, &issuer)?;

        let pki = Self {
            ca: dir.join("ca.crt"),
            server_cert: dir.join("server.crt"),
            server_key: dir.join("server.key"),
        };
        write_file(&pki.ca, &ca_cert.pem())?;
        write_file(&pki.server_cert, &cert.pem())?;
        write_private(&pki.server_key, &key.serialize_pem())?;
        Ok(pki)
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
