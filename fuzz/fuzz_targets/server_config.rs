//! Any text as kms-server's configuration: a configuration within its limits or a list of mistakes, never a panic.
#![no_main]

use kms_server::config::Config;
use libfuzzer_sys::fuzz_target;
use std::time::Duration;

fuzz_target!(|text: &str| {
    // What it reads, a fuzzer must not choose.
    if text.contains("PIN_FILE") {
        return;
    }
    match Config::parse(text) {
        Ok(config) => {
            assert!((1..=64).contains(&config.hsm.sessions));
            let operations = config.operations;
            assert!(operations.token_lifetime <= Duration::from_secs(86_400));
            let limits = operations.limits;
            assert!((1..=limits.connections).contains(&limits.connections_per_address));
        }
        Err(mistakes) => assert!(!mistakes.0.is_empty()),
    }
});
