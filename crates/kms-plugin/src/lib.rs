//! kmsplugin, read from the outside in: `serve` starts everything, `socket` and `authority` take the
//! connection, `grpc` takes the message, `sealer` decides, `provider` asks the key service.
//!
//! A plain DEK lives in `dek_cache` and `sealer` only; nothing outside them can name one.

pub mod authority;
pub mod config;
#[cfg(feature = "pkcs11")]
pub mod crk_version;
pub mod dek_cache;
pub mod flight;
pub mod grpc;
pub mod keys;
pub mod metrics;
pub mod probe;
pub mod provider;
pub mod random;
mod restored;
pub mod ring;
pub mod sealer;
pub mod serve;
pub mod socket;
