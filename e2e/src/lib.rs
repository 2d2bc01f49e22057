//! Starts the whole chain for real and drives it from outside: `cargo xtask demo` shows it, the tests in
//! `tests/` prove it.
//!
//! Everything here runs the built binaries and the unmodified kube-apiserver, etcd and SoftHSM2. No product
//! code is linked in to take the place of a process: what is proven is what an operator would run.

pub mod apiserver;
pub mod assets;
pub mod cgroup;
pub mod chain;
pub mod clock;
pub mod driver;
pub mod error;
pub mod etcd;
pub mod hexdump;
pub mod http;
pub mod key_service;
pub mod kmsctl;
pub mod on_hsm;
pub mod pki;
pub mod plugin;
pub mod ports;
pub mod process;
pub mod relay;
pub mod server;
pub mod service_account;
pub mod softhsm;
pub mod token;
pub mod wait;

pub use error::{Error, Result};
