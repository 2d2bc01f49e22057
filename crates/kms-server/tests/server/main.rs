//! The whole server over real sockets, one file for each thing that is promised about it. One binary, because linking
//! it takes longer than running it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

mod access;
mod administrators;
mod api_keys;
mod audit;
mod audit_disk;
mod client;
mod crashes;
mod drill;
mod forged_tokens;
mod harness;
mod hsm;
mod hsm_codes;
mod keys;
mod kills;
mod limits;
mod logins;
mod monitoring;
mod nodes;
mod operations;
mod pins;
mod pitfalls;
mod policies;
mod purge;
mod rates;
mod redstone;
mod refused_tokens;
mod replicas;
mod restore;
mod rotation;
mod secrets;
mod signers;
mod startup;
mod states;
mod store;
mod tokens;
mod uses;
