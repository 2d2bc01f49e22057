//! `kmsctl completion`: a script that teaches a shell this command line.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl completion bash > /etc/bash_completion.d/kmsctl
  kmsctl completion fish > ~/.config/fish/completions/kmsctl.fish";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    shell: Shell,
}

pub(crate) fn run(args: &Args, output: &mut Output<'_>) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "kmsctl", &mut script);
    output.raw(&script)
}
