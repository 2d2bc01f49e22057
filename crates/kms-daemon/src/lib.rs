//! What both daemons need of their process: settings, log lines, signals and drain, probes and metrics,
//! memory that stays private, and the service manager.
//!
//! Nothing here knows of keys, and nothing here reads a clock that was not passed in.

pub mod admin;
pub mod lifecycle;
pub mod manager;
pub mod memory;
#[cfg(any(test, feature = "monitoring"))]
pub mod monitoring;
pub mod settings;
pub mod telemetry;
