//! `kmsctl instances`: the groups that keys live in, one per tenant.

use kms_api::rest::{Instance, NewInstance};

use crate::connection::Access;
use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl instances list
  kmsctl instances create payments-cluster";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    access: Access,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show every instance that this API key may see
    List,
    /// Make an instance
    Create {
        /// What people call it
        name: String,
    },
}

pub(crate) async fn run(args: Args, output: &mut Output<'_>) -> Result<(), Error> {
    let (management, call) = (args.access.management()?, args.access.call());
    match args.verb {
        Verb::List => show(management.instances(call).await?, output),
        Verb::Create { name } => {
            let made = management.create_instance(&NewInstance { name }, call).await?;
            let members = [
                ("id", Some(made.id.clone())),
                ("name", Some(made.name.clone())),
                ("created", Some(made.created_at.clone())),
            ];
            output.thing(&members, &made)
        }
    }
}

fn show(instances: Vec<Instance>, output: &mut Output<'_>) -> Result<(), Error> {
    let row = |one: &Instance| [one.id.clone(), one.name.clone(), one.created_at.clone()];
    output.list(["ID", "NAME", "CREATED"], instances.iter().map(row).collect(), &instances)
}
