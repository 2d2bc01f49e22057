//! The key service as the sealer sees it: it makes DEKs and unwraps WDEKs. What stands behind it (a REST
//! service, a token in this node) and how it is asked is below this trait.
//!
//! A WDEK is opaque here; only a provider that makes them itself looks inside one.

pub mod guard;
pub mod keyprotect;
#[cfg(feature = "pkcs11")]
pub mod pkcs11;

use std::fmt::{self, Debug, Display};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kms_core::secret::Dek;

use crate::sealer::{Call, Refusal, SealerError};

/// Who is asked, for messages: whoever is on call must look there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    KeyService,
    Hsm,
}

/// One CRK of a key service.
#[async_trait]
pub trait KeyService: Send + Sync + Debug {
    /// What stands behind this trait.
    fn backend(&self) -> Backend {
        Backend::KeyService
    }

    /// A new DEK, made by the service and wrapped by the CRK version that is active now.
    async fn wrap_new(&self, call: &Call) -> Result<NewDek, Error>;

    /// The DEK inside `wdek`, whichever version of the CRK wrapped it.
    async fn unwrap(&self, wdek: &[u8], call: &Call) -> Result<Unwrapped, Error>;

    /// The CRK version that wraps, where not the service chooses it but the configuration.
    fn named_version(&self) -> Option<&str> {
        None
    }

    /// How long the token that the service is asked with is still used, where there is such a thing.
    fn token_life_left(&self) -> Option<Duration> {
        None
    }
}

#[derive(Debug, Clone)]
pub struct NewDek {
    pub dek: Dek,
    pub wdek: Arc<[u8]>,
    /// The CRK version that wrapped it.
    pub version: String,
}

#[derive(Debug, Clone)]
pub struct Unwrapped {
    pub dek: Dek,
    /// The CRK version that is active now, if the service says that it is not the one of this WDEK.
    pub active_version: Option<String>,
}

/// Why there is no DEK, by what follows for the DEKs that are held.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It said no. Unless only the request was wrong, DEKs of this CRK are dropped at once.
    #[error("{text}")]
    Refused { refusal: Refusal, text: String },
    /// The WDEK is not one of this CRK.
    #[error("this wrapped DEK is not one of this CRK")]
    NotAuthentic,
    /// No connection: the only failure that is tried again within a call.
    #[error("{text}")]
    Unreachable { text: String },
    #[error("the {0} did not answer in time")]
    TimedOut(Backend),
    /// It answered, and the answer is of no use: a 5xx, a proxy's page.
    #[error("{text}")]
    Unusable { text: String },
    #[error("{text}")]
    Overloaded { backend: Backend, text: String },
}

/// What a refusal ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withdrawn {
    /// An expired CRK still opens what it sealed, also in an outage of its service.
    Sealing,
    Both,
}

impl Display for Withdrawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Withdrawn::Sealing => "the DEK that seals is",
            Withdrawn::Both => "its DEKs are",
        })
    }
}

impl Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::KeyService => "key service",
            Backend::Hsm => "HSM",
        })
    }
}

impl Error {
    /// What access to the CRK was withdrawn, so that held DEKs must go.
    pub fn withdrawn(&self) -> Option<Withdrawn> {
        let Error::Refused { refusal, .. } = self else { return None };
        match refusal {
            Refusal::Request | Refusal::Replaced => None,
            Refusal::NoWrap => Some(Withdrawn::Sealing),
            Refusal::Access | Refusal::NoSuchKey | Refusal::KeyState => Some(Withdrawn::Both),
        }
    }

    /// Nothing was said about the CRK: held DEKs live until they expire.
    pub fn is_outage(&self) -> bool {
        !matches!(self, Error::Refused { .. } | Error::NotAuthentic)
    }

    /// It says something of the CRK or its service, and not only of what was asked.
    pub fn is_about_crk(&self) -> bool {
        let only_the_request =
            matches!(self, Error::NotAuthentic | Error::Refused { refusal: Refusal::Request, .. });
        !only_the_request
    }

    /// The label of this failure in the metrics.
    pub fn outcome(&self) -> &'static str {
        match self {
            Error::Refused { .. } => "refused",
            Error::NotAuthentic => "not_authentic",
            Error::Unreachable { .. } => "unreachable",
            Error::TimedOut(_) => "timed_out",
            Error::Unusable { .. } => "unusable",
            Error::Overloaded { .. } => "overloaded",
        }
    }
}

impl From<Error> for SealerError {
    fn from(error: Error) -> SealerError {
        match error {
            Error::Refused { refusal, text } => SealerError::Refused { refusal, text },
            Error::NotAuthentic => SealerError::NotAuthentic,
            Error::Unreachable { text } | Error::Unusable { text } => {
                SealerError::Unavailable { text }
            }
            Error::TimedOut(backend) => SealerError::TimedOut(backend),
            Error::Overloaded { backend, .. } => SealerError::Overloaded(backend),
        }
    }
}
