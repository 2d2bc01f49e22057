//! The real binary: its command line, log lines, signals, probes and settings, with a key service over real TLS.

mod lines;
mod lifecycle;
mod plugin;
mod reload;
mod sealing;
mod service;
