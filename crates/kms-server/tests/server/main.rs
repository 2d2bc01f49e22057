//! The whole server over real sockets, one file for each thing that is promised about it. One binary, because linking
//! it takes longer than running it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

mod access;
mod api_keys;
mod audit;
mod client;
mod crashes;
mod drill;
mod forged_tokens;
mod harness;
mod keys;
mod kills;
mod logins;
mod monitoring;
mod operations;
mod pitfalls;
mod policies;
mod redstone;
mod secrets;
mod startup;
mod states;
mod store;
mod tokens;
