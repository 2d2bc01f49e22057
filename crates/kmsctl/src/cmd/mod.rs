//! The commands, one file each: its arguments, what it does, how it shows the outcome.

pub(crate) mod api_keys;
pub(crate) mod audit;
pub(crate) mod bench;
pub(crate) mod completion;
pub(crate) mod conformance;
pub(crate) mod inspect;
pub(crate) mod instances;
pub(crate) mod keys;
pub(crate) mod policies;
pub(crate) mod profiles;
pub(crate) mod service_ids;
pub(crate) mod verify;

use std::future::Future;

use crate::cli::{Cli, Command};
use crate::error::Error;
use crate::output::{self, Output};

/// Does what the command line says.
pub(crate) fn run(cli: Cli) -> Result<(), Error> {
    let mut to = output::standard();
    let output = &mut Output::new(cli.output, &mut to);
    match cli.command {
        Command::Keys(args) => wait(keys::run(args, output))?,
        Command::ServiceIds(args) => wait(service_ids::run(args, output))?,
        Command::Policies(args) => wait(policies::run(args, output))?,
        Command::Profiles(args) => wait(profiles::run(args, output))?,
        Command::ApiKeys(args) => wait(api_keys::run(args, output))?,
        Command::Instances(args) => wait(instances::run(args, output))?,
        Command::Inspect(args) => inspect::run(&args, output),
        Command::Verify(args) => wait(verify::run(args, output))?,
        Command::Audit(args) => wait(audit::run(args, output))?,
        Command::Bench(args) => wait(bench::run(args, output))?,
        Command::Conformance(args) => wait(conformance::run(args, output))?,
        Command::Completion(args) => completion::run(&args, output),
    }
}

/// Runs a command that waits for others, on this thread.
fn wait<F: Future>(command: F) -> Result<F::Output, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(Error::Runtime)?.block_on(command))
}
