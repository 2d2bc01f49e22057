//! `kmsctl service-ids`: the identities that plug-ins and operators use, each with the policies that say what it may do where.

use kms_api::rest::{NewServiceId, Policy, ServiceId};

use super::policies::scope;
use crate::connection::Access;
use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl service-ids list
  kmsctl service-ids create node-plugin --role Viewer --instance 5f0c2a4e-…
  kmsctl service-ids create operations --role Administrator --every-instance
  kmsctl service-ids delete ServiceId-…";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    access: Access,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show every service ID
    List,
    /// Make a service ID; it can do nothing until it has an API key
    Create(Create),
    /// End a service ID with its policies, API keys and profiles, and at once every token that was got with them
    Delete {
        /// The id, as `list` shows it
        id: String,
    },
}

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("where").required(true))]
struct Create {
    /// What people call it
    name: String,
    /// Viewer wraps and unwraps (a plug-in needs no more), Editor also creates and lists keys, Administrator also
    /// rotates and deletes them and manages service IDs; Reader, Writer and Manager are the cloud service's names
    #[arg(long)]
    role: String,
    /// The one instance in which the role holds
    #[arg(long, group = "where", value_name = "UUID")]
    instance: Option<String>,
    /// The one key of that instance for which the role holds
    #[arg(long, requires = "instance", value_name = "UUID")]
    key: Option<String>,
    /// The role holds in every instance, also in those to come
    #[arg(long, group = "where")]
    every_instance: bool,
    /// What it is for
    #[arg(long)]
    description: Option<String>,
}

pub(crate) async fn run(args: Args, output: &mut Output<'_>) -> Result<(), Error> {
    let (management, call) = (args.access.management()?, args.access.call());
    match args.verb {
        Verb::List => show(management.service_ids(call).await?, output),
        Verb::Create(Create { name, role, instance, key, description, .. }) => {
            let new = NewServiceId { name, description, role, instance_id: instance, key_id: key };
            let made = management.create_service_id(&new, call).await?;
            let members = [
                ("id", Some(made.id.clone())),
                ("name", Some(made.name.clone())),
                ("policies", Some(policies(&made))),
                ("description", made.description.clone()),
            ];
            output.thing(&members, &made)
        }
        Verb::Delete { id } => {
            management.delete_service_id(&id, call).await?;
            output.thing(&[("deleted", Some(id.clone()))], &serde_json::json!({"deleted": id}))
        }
    }
}

fn show(service_ids: Vec<ServiceId>, output: &mut Output<'_>) -> Result<(), Error> {
    let row =
        |one: &ServiceId| [one.id.clone(), one.name.clone(), policies(one), one.created_at.clone()];
    let rows = service_ids.iter().map(row).collect();
    output.list(["ID", "NAME", "POLICIES", "CREATED"], rows, &service_ids)
}

fn policies(service_id: &ServiceId) -> String {
    let one = |policy: &Policy| format!("{} in {}", policy.role, scope(policy));
    let all: Vec<String> = service_id.policies.iter().map(one).collect();
    if all.is_empty() { "(none)".to_owned() } else { all.join(", ") }
}
