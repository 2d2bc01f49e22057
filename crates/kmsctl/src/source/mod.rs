//! Where stored values come from, and what is configured about them.

pub mod encryption_config;
pub(crate) mod etcd;
pub mod input;
pub(crate) mod registry;
