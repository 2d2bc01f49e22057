//! Root keys behind a wall: everything that touches a key that must never be seen.
//!
//! The rest of the product knows the [`Vault`] trait only: it names a CRK version and hands over
//! what is to be wrapped. [`pkcs11`] keeps the keys in an HSM, [`process`] does so from another process; `memory` (feature `memory`) keeps
//! them in this process, with fault switches, for tests of what stands above.
//!
//! What never happens here: a root key leaves the HSM, a policy is decided, a database is asked.

mod check;
#[cfg(feature = "memory")]
pub mod memory;
pub mod pkcs11;
pub mod process;
mod statistics;
mod vault;

pub use statistics::{BOUNDS, Statistics, Times};
pub use vault::{
    CheckValue, Circuit, MAX_PLAINTEXT, MAX_RANDOM, RsaPublic, Sealed, Vault, VaultError, Wrapped,
};
