//! What Keelson's programs agree on: secrets, key identities, the bytes in etcd, limits.
//!
//! Pure. Nothing here is async, opens a file or a socket, or draws a random number; time comes
//! only through [`clock::Clock`]. So every format can be tested and fuzzed without a world around it.

pub mod audit;
mod canonical;
pub mod cipher;
pub mod clock;
pub mod crypto_module;
pub mod etcd;
pub mod key_id;
pub mod limits;
pub mod secret;
pub mod wdek;
