//! The provider `pkcs11`: its rules over a vault in memory, and the real binary over a SoftHSM2 token.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail loudly, as tests do")]

mod binary;
mod configuration;
#[path = "../process/plugin.rs"]
#[expect(dead_code, reason = "the tests over a key service use the rest")]
mod plugin;
#[path = "../sealing/policy.rs"]
mod policy;
mod rules;
#[path = "../process/service.rs"]
#[expect(dead_code, reason = "the tests over a key service use it")]
mod service;
mod token;
