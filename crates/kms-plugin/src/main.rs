//! kmsplugin: reads its configuration and serves, or says what is wrong with it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use kms_core::crypto_module;
use kms_daemon::settings::{Environment, Mistakes};
use kms_plugin::config::Source;
use kms_plugin::serve;

/// The caller's mistake (sysexits.h, EX_USAGE): starting again changes nothing.
const BAD_CONFIGURATION: u8 = 64;

/// Encrypts what kube-apiserver stores in etcd, with keys that never leave an HSM.
#[derive(Debug, Parser)]
#[command(name = "kmsplugin", version = crypto_module::VERSION.as_str())]
struct Arguments {
    /// The configuration file (kmsplugin-config.yaml); without it the environment variable config_file names it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Says whether the configuration is valid, and ends.
    #[arg(long)]
    check_config: bool,
    /// Makes a CRK version in the HSM of the section PKCS11, prints its name for PKCS11.CRK_VERSION, and ends.
    #[cfg(feature = "pkcs11")]
    #[arg(long, conflicts_with = "check_config")]
    new_crk_version: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let source = Source::new(arguments.config, environment());
    if arguments.check_config {
        return check(&source);
    }
    #[cfg(feature = "pkcs11")]
    if arguments.new_crk_version {
        return new_crk_version(&source);
    }
    match serve::run(source) {
        Ok(()) => ExitCode::SUCCESS,
        Err(serve::Failure::Configuration(_)) => ExitCode::from(BAD_CONFIGURATION),
        Err(failure @ serve::Failure::Process(_)) => {
            tracing::error!("It ends, because {failure}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the answer to --check-config")]
fn check(source: &Source) -> ExitCode {
    match serve::check(source) {
        Ok(()) => {
            println!("The configuration is valid.");
            ExitCode::SUCCESS
        }
        Err(Mistakes(mistakes)) => {
            mistakes.iter().for_each(|mistake| eprintln!("{mistake}"));
            ExitCode::from(BAD_CONFIGURATION)
        }
    }
}

#[cfg(feature = "pkcs11")]
#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the answer to --new-crk-version")]
fn new_crk_version(source: &Source) -> ExitCode {
    use kms_plugin::crk_version::{self, Failure};
    let failure = match crk_version::make(source) {
        Ok(id) => {
            println!("{id}");
            return ExitCode::SUCCESS;
        }
        Err(failure) => failure,
    };
    eprintln!("{failure}");
    match failure {
        Failure::Configuration(_) => ExitCode::from(BAD_CONFIGURATION),
        Failure::Hsm(_) | Failure::Process(_) => ExitCode::FAILURE,
    }
}

/// Variables that are not UTF-8 cannot be settings of ours.
fn environment() -> Environment {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}
