//! placeholder until kmsctl bench is there
use keelson_e2e::Result;
use std::process::ExitCode;
#[derive(clap::Subcommand)]
pub(crate) enum Verb {
    /// A KMS plug-in's socket, beside a bare tonic echo of the same messages.
    Plugin {
        #[arg(long)]
        socket: Option<std::path::PathBuf>,
    },
}
pub(crate) fn run(_verb: &Verb) -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
