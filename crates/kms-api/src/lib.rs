//! The wire: every message that crosses a process boundary, and the clients that send them.
//!
//! `grpc` is what kube-apiserver and a plug-in say to each other, `rest` what a key service and a token service
//! answer, `client` and `token` how both services are asked, `etcd` how stored values are read, `trace` which trace a
//! call belongs to. No rule about keys lives here, nothing is retried beyond one lost connection, and no secret is
//! logged.

pub mod grpc;
pub mod rest;
pub mod trace;

#[cfg(feature = "rest-client")]
pub mod client;
#[cfg(feature = "etcd-client")]
pub mod etcd;
#[cfg(feature = "rest-client")]
pub mod token;
