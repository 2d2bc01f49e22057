//! kmsctl, the operator's tool: what is encrypted, with which key, and how to change it. It acts only where its
//! command line says so, and prints a secret only where that is what was asked for.

mod cli;
mod cmd;
mod connection;
mod error;
mod output;
pub mod source;

pub use cmd::conformance::hpack;

use std::process::ExitCode;

use clap::Parser;

/// Parses the command line, does what it says, and reports a failure on standard error.
pub fn run() -> ExitCode {
    let cli = cli::Cli::parse();
    match cmd::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}
