//! The sealer with a key service that can be told how to fail, and a clock that stands still: what each setting
//! does, what an outage and a refusal do, and that Status and Encrypt agree.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly, as tests do")]

mod double;
mod failures;
mod interleavings;
mod log;
mod policy;
mod refresh;
mod reload;
mod restored;
mod rotation;
mod settings;
