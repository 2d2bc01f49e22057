//! Certificates: what is in the files that the operator names, for as long as it can be used. Renewed files are taken
//! without a restart; what cannot be used is said, and the certificate before it stays.

use crate::certificate;
use aws_lc_rs::digest;
use kms_core::crypto_module::{CryptoModule, NotFips};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;
use tokio_rustls::TlsAcceptor;
use zeroize::Zeroizing;

/// A chain of certificates has a few KiB; a bundle of a company's CAs some hundred.
const MAX_FILE: u64 = 1024 * 1024;

/// The operator: a certificate or key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {}: {cause}", path.display())]
    Read { path: PathBuf, cause: io::Error },
    #[error("cannot read {}: {cause}", path.display())]
    Pem { path: PathBuf, cause: rustls_pki_types::pem::Error },
    #[error("{} holds no certificate", path.display())]
    NoCertificate { path: PathBuf },
    #[error("certificate {} and key {} cannot be used: {cause}", certificate.display(), key.display())]
    Pair { certificate: PathBuf, key: PathBuf, cause: rustls::Error },
    #[error("the certificates in {} cannot be those of a CA for clients: {cause}", path.display())]
    ClientCa { path: PathBuf, cause: Box<dyn std::error::Error + Send + Sync> },
    #[error(transparent)]
    NotFips(#[from] NotFips),
}

/// The PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The chain, the server's own certificate first.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Whose certificates clients of the key API must show. Without it they show none.
    pub client_ca: Option<PathBuf>,
}

/// The certificate of now.
#[derive(Debug)]
pub struct Tls {
    files: Files,
    current: RwLock<Current>,
}

#[derive(Debug)]
struct Current {
    /// What was read last, good or not: so each change is judged, and spoken of, once.
    seen: Option<Digest>,
    pair: Pair,
}

#[derive(Debug, Clone)]
struct Pair {
    keys: Arc<ServerConfig>,
    tokens: Arc<ServerConfig>,
    not_after: Option<SystemTime>,
}

type Digest = [u8; digest::SHA256_OUTPUT_LEN];

/// The bytes of the files, read once: they may be replaced at any moment.
struct Contents {
    certificate: Zeroizing<Vec<u8>>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Option<Zeroizing<Vec<u8>>>,
}

impl Tls {
    /// # Errors
    /// [`TlsError`], also when the key is not that of the certificate.
    pub fn open(files: Files) -> Result<Tls, TlsError> {
        let read = files.read()?;
        let current = Current { seen: Some(read.digest()), pair: files.pair(&read)? };
        Ok(Tls { files, current: RwLock::new(current) })
    }

    /// For the next connection to the key API.
    #[must_use]
    pub fn keys(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.pair().keys)
    }

    /// For the next connection to the token service; no certificate is asked of its clients, who come for what proves
    /// who they are.
    #[must_use]
    pub fn tokens(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.pair().tokens)
    }

    /// When the certificate in use ends.
    #[must_use]
    pub fn not_after(&self) -> Option<SystemTime> {
        self.pair().not_after
    }

    /// Looks at the files again; true when there is another certificate, key or CA in them, which serves from now on.
    ///
    /// # Errors
    /// [`TlsError`] once for each change that cannot be used; what was used before still is.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let read = self.files.read();
        let seen = read.as_ref().ok().map(Contents::digest);
        if self.current.read().unwrap_or_else(PoisonError::into_inner).seen == seen {
            return Ok(false);
        }
        let pair = read.and_then(|read| self.files.pair(&read));
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        current.seen = seen;
        current.pair = pair?;
        Ok(true)
    }

    fn pair(&self) -> Pair {
        self.current.read().unwrap_or_else(PoisonError::into_inner).pair.clone()
    }
}

impl Files {
    fn read(&self) -> Result<Contents, TlsError> {
        Ok(Contents {
            certificate: read(&self.certificate)?,
            key: read(&self.key)?,
            client_ca: self.client_ca.as_deref().map(read).transpose()?,
        })
    }

    fn pair(&self, read: &Contents) -> Result<Pair, TlsError> {
        let chain = certificates(&self.certificate, &read.certificate)?;
        let not_after = chain.first().and_then(|own| certificate::not_after(own));
        let tokens = self.config(chain.clone(), read, None)?;
        let keys = match &read.client_ca {
            Some(ca) => self.config(chain, read, Some(ca))?,
            None => tokens.clone(),
        };
        Ok(Pair { keys, tokens, not_after })
    }

    /// TLS 1.2 and 1.3; with `client_ca`, only for clients whose certificate it has signed.
    fn config(
        &self,
        chain: Vec<CertificateDer<'static>>,
        read: &Contents,
        client_ca: Option<&Zeroizing<Vec<u8>>>,
    ) -> Result<Arc<ServerConfig>, TlsError> {
        let private = PrivateKeyDer::from_pem_slice(&read.key)
            .map_err(|cause| TlsError::Pem { path: self.key.clone(), cause })?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let unusable = |cause| TlsError::Pair {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            cause,
        };
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(unusable)?;
        let builder = match (client_ca, &self.client_ca) {
            (Some(pem), Some(path)) => {
                let wrong = |cause| TlsError::ClientCa { path: path.clone(), cause };
                let mut roots = RootCertStore::empty();
                for ca in certificates(path, pem)? {
                    roots.add(ca).map_err(|error| wrong(error.into()))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .build()
                        .map_err(|error| wrong(error.into()))?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, private).map_err(unusable)?;
        CryptoModule::linked().allow_tls(config.fips())?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

impl Contents {
    fn digest(&self) -> Digest {
        let mut digest = digest::Context::new(&digest::SHA256);
        for file in [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref()] {
            let bytes = file.map(|bytes| bytes.as_slice()).unwrap_or_default();
            digest.update(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
            digest.update(bytes);
        }
        let mut out = Digest::default();
        out.copy_from_slice(digest.finish().as_ref());
        out
    }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let mut bytes = Zeroizing::new(Vec::new());
    let failed = |cause| TlsError::Read { path: path.to_owned(), cause };
    let file = std::fs::File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    // Reserved at once: a growing vector would leave copies of the key behind.
    bytes.reserve_exact(usize::try_from(size.min(MAX_FILE)).unwrap_or_default() + 1);
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|cause| TlsError::Pem { path: path.to_owned(), cause })?;
    if found.is_empty() {
        return Err(TlsError::NoCertificate { path: path.to_owned() });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    fn write(folder: &TempDir, name: &str, algorithm: &'static rcgen::SignatureAlgorithm) -> Files {
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let mut certificate = rcgen::CertificateParams::new(vec!["kms".into()]).unwrap();
        certificate.not_after = rcgen::date_time_ymd(2030, 1, 1);
        let certificate = certificate.self_signed(&key).unwrap();
        let [crt, pem] = ["crt", "key"].map(|end| folder.path().join(format!("{name}.{end}")));
        fs::write(&crt, certificate.pem()).unwrap();
        fs::write(&pem, key.serialize_pem()).unwrap();
        Files { certificate: crt, key: pem, client_ca: None }
    }

    /// In either build, and with every kind of key that an operator may have.
    #[test]
    fn tls_is_that_of_the_fips_module_wherever_the_module_is() {
        let folder = TempDir::new().unwrap();
        for algorithm in [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ECDSA_P521_SHA512,
            &rcgen::PKCS_ED25519,
            &rcgen::PKCS_RSA_SHA256,
        ] {
            let mut files = write(&folder, "tls", algorithm);
            files.client_ca = Some(files.certificate.clone());
            let tls = Tls::open(files).unwrap();
            for acceptor in [tls.keys(), tls.tokens()] {
                assert_eq!(acceptor.config().fips(), CryptoModule::linked().fips, "{algorithm:?}");
            }
        }
    }

    #[test]
    fn files_that_changed_are_taken_and_bad_ones_are_refused_once() {
        let folder = TempDir::new().unwrap();
        let files = write(&folder, "tls", &rcgen::PKCS_ED25519);
        let other = write(&folder, "other", &rcgen::PKCS_ED25519);
        let tls = Tls::open(files.clone()).unwrap();
        let first = tls.keys();
        assert!(!tls.reload().unwrap(), "nothing has changed");

        // Half of a renewal: the key still is that of the certificate before.
        fs::copy(&other.certificate, &files.certificate).unwrap();
        assert!(matches!(tls.reload(), Err(TlsError::Pair { .. })));
        assert!(!tls.reload().unwrap(), "said once");
        assert!(Arc::ptr_eq(tls.keys().config(), first.config()), "the old one stays");

        fs::copy(&other.key, &files.key).unwrap();
        assert!(tls.reload().unwrap());
        assert!(!Arc::ptr_eq(tls.keys().config(), first.config()));

        fs::remove_file(&files.key).unwrap();
        assert!(matches!(tls.reload(), Err(TlsError::Read { .. })));
        assert!(!tls.reload().unwrap(), "said once");
        fs::copy(&other.key, &files.key).unwrap();
        assert!(tls.reload().unwrap(), "back again");
    }

    #[test]
    fn the_end_of_the_certificate_is_known() {
        let folder = TempDir::new().unwrap();
        let tls = Tls::open(write(&folder, "tls", &rcgen::PKCS_ED25519)).unwrap();
        let end = time::OffsetDateTime::from(tls.not_after().unwrap());
        assert_eq!(end.date(), time::macros::date!(2030 - 01 - 01));
    }
}
