//! Any bytes as a configuration file: settings or a list of mistakes, never a panic.
#![no_main]

use kms_daemon::settings::{Environment, Settings};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(mut settings) = Settings::parse(text, Environment::new()) else { return };
    settings.section("SERVER_CONFIG", |section| {
        (section.text("REGION"), section.flag("NEW_DEK", false), section.number("MAX_RETRIES", 0..=20, 0))
    });
    let _ = settings.finish();
});
