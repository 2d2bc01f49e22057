//! The `:authority` adapter, from the bytes of one header block to the real server on a real socket.

mod adapter;
mod server;
mod wire;
