//! Which library does the cryptography of this build, as that library says itself: every hash, seal, signature check,
//! TLS record and random number of a program comes from the one that is linked into it.
//!
//! To use the FIPS module is a fact of the build. To be certified is one of paper, and nothing here claims it.

use std::fmt;
use std::sync::LazyLock;

use thiserror::Error;

/// The version of the program and of the module, for `--version`.
pub static VERSION: LazyLock<String> =
    LazyLock::new(|| format!("{} ({})", env!("CARGO_PKG_VERSION"), CryptoModule::linked()));

/// One cryptographic module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CryptoModule {
    pub version: &'static str,
    /// It is the FIPS module, and runs as such.
    pub fips: bool,
}

/// FIPS was required, and would not be had. For whoever built or configured the program.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NotFips {
    #[error(
        "this build does its cryptography with {0}, which is not a FIPS module; use the build that \
         `cargo xtask build --fips` makes"
    )]
    Module(CryptoModule),
    #[error(
        "TLS would offer what the FIPS module does not approve; the build is not one of `cargo xtask build --fips`"
    )]
    Tls,
}

impl CryptoModule {
    /// The module that is linked. The FIPS module has checked its integrity and tested itself before `main` began, and
    /// would have ended the process.
    pub fn linked() -> CryptoModule {
        static LINKED: LazyLock<CryptoModule> = LazyLock::new(|| CryptoModule {
            version: aws_lc_rs::awslc_version(),
            fips: aws_lc_rs::try_fips_mode().is_ok(),
        });
        *LINKED
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        if self.fips { "AWS-LC FIPS" } else { "AWS-LC" }
    }

    /// As the labels of a metric.
    #[must_use]
    pub fn labels(self) -> [(&'static str, &'static str); 3] {
        let fips = if self.fips { "true" } else { "false" };
        [("module", self.name()), ("version", self.version), ("fips", fips)]
    }

    /// What `FIPS_REQUIRED: true` asks of a build.
    ///
    /// # Errors
    /// [`NotFips::Module`].
    pub fn require_fips(self) -> Result<(), NotFips> {
        if self.fips { Ok(()) } else { Err(NotFips::Module(self)) }
    }

    /// Over the FIPS module there is no other TLS than the one that it approves, whether that is required or not: a
    /// build that enables half of it would else serve X25519 and ChaCha20 unnoticed.
    ///
    /// # Errors
    /// [`NotFips::Tls`].
    pub fn allow_tls(self, tls_is_fips: bool) -> Result<(), NotFips> {
        if self.fips && !tls_is_fips { Err(NotFips::Tls) } else { Ok(()) }
    }
}

/// `AWS-LC FIPS 4.2.0`
impl fmt::Display for CryptoModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name(), self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIPS: CryptoModule = CryptoModule { version: "4.2.0", fips: true };
    const ORDINARY: CryptoModule = CryptoModule { version: "5.12.0", fips: false };

    #[test]
    fn the_linked_module_passes_its_own_tests_and_has_a_version() {
        let module = CryptoModule::linked();
        assert!(module.version.split('.').count() >= 3, "{module}");
        assert_eq!(*VERSION, format!("{} ({module})", env!("CARGO_PKG_VERSION")));
        assert_eq!(aws_lc_rs::fips_version().is_some(), module.fips);
        aws_lc_rs::try_fips_self_test().unwrap();
    }

    #[test]
    fn only_the_fips_module_satisfies_who_requires_it() {
        assert_eq!(FIPS.require_fips(), Ok(()));
        let refused = ORDINARY.require_fips().unwrap_err();
        assert_eq!(refused, NotFips::Module(ORDINARY));
        assert!(refused.to_string().contains("AWS-LC 5.12.0"), "{refused}");
    }

    #[test]
    fn over_the_fips_module_there_is_no_other_tls() {
        assert_eq!(FIPS.allow_tls(true), Ok(()));
        assert_eq!(FIPS.allow_tls(false), Err(NotFips::Tls));
        assert_eq!(ORDINARY.allow_tls(false), Ok(()));
    }
}
