//! The key management service: Key Protect REST v2 and a token service in front of a vault, with a store that knows
//! which keys exist and an audit log that knows who used them.
//!
//! A request goes `http` → `policy` → `ops` → `store`, `kms_hsm::Vault`, `audit`, and back. Root keys are never in this
//! process, and no answer leaves before its audit record is on disk.

pub mod adopt;
pub mod app;
pub mod audit;
pub mod backup;
pub mod certificate;
pub mod config;
pub mod failures;
pub mod gate;
pub mod guard;
pub mod health;
pub mod hsm;
pub mod hsm_metrics;
pub mod http;
pub mod init;
pub mod issuers;
pub mod limits;
pub mod listen;
pub mod metrics;
pub mod ops;
mod patient;
pub mod policy;
pub mod reconcile;
pub mod renew_key;
pub mod report;
pub mod restore;
pub mod serve;
pub mod store;
pub mod tls;
pub mod token;
pub mod uses;
