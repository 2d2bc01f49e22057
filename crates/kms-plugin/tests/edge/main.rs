//! What kube-apiserver meets: the socket, the `:authority` adapter, both gRPC services; over real sockets, with the
//! key service's double from the sealing tests behind.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adapter;
#[path = "../sealing/double.rs"]
#[expect(dead_code, reason = "shared with the sealing tests, which use the rest")]
mod double;
mod forms;
mod serving;
mod socket;
mod wire;
