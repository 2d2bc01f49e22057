//! The whole server over real sockets, one file for each thing that is promised about it. One binary, because linking
//! it takes longer than running it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

mod access;
mod client;
mod crashes;
mod forged_tokens;
mod harness;
mod keys;
mod redstone;
mod secrets;
mod startup;
mod store;
mod tokens;
