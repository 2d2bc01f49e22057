//! The real binary: its command line, log lines, signals, probes and settings, with a key service over real TLS.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail loudly, as tests do")]

mod activation;
mod lifecycle;
mod lines;
mod load;
mod memory;
mod plugin;
mod reload;
mod sealing;
mod service;
mod upgrade;
