//! What kube-apiserver meets: the socket, the `:authority` adapter, both gRPC services; over real sockets, with the
//! key service's double from the sealing tests behind.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

mod adapter;
mod apiserver;
mod calls;
#[path = "../sealing/double.rs"]
#[expect(dead_code, reason = "shared with the sealing tests, which use the rest")]
mod double;
mod forms;
#[path = "../sealing/policy.rs"]
mod policy;
mod serving;
mod simulation;
mod socket;
mod status;
mod values;
mod wire;
