//! `kmsctl policies`: what service IDs may do, and where: everywhere, in one instance, or with one key of it.

use kms_api::rest::{NewPolicy, Policy};

use crate::connection::Access;
use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl policies list
  kmsctl policies create ServiceId-… --role Viewer --instance 5f0c2a4e-…
  kmsctl policies create ServiceId-… --role Reader --instance 5f0c2a4e-… --key 7d2e61b0-…
  kmsctl policies delete Policy-…";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    access: Access,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show every policy that this API key may see
    List,
    /// Give a service ID one more role; it holds from the next call on
    Create(Create),
    /// Take a role away; the next call feels it
    Delete {
        /// The id, as `list` shows it
        id: String,
    },
}

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("where").required(true))]
struct Create {
    /// Who gets the role
    #[arg(value_name = "SERVICE ID")]
    service_id: String,
    /// Reader, ReaderPlus, Writer, Manager, KeyPurge, KmipAdapterManager, Viewer, Editor, Administrator or
    /// ClusterAdministrator
    #[arg(long)]
    role: String,
    /// The one instance in which it holds
    #[arg(long, group = "where", value_name = "UUID")]
    instance: Option<String>,
    /// The one key of that instance for which it holds
    #[arg(long, requires = "instance", value_name = "UUID")]
    key: Option<String>,
    /// It holds in every instance, also in those to come
    #[arg(long, group = "where")]
    every_instance: bool,
}

pub(crate) async fn run(args: Args, output: &mut Output<'_>) -> Result<(), Error> {
    let (management, call) = (args.access.management()?, args.access.call());
    match args.verb {
        Verb::List => show(management.policies(call).await?, output),
        Verb::Create(Create { service_id, role, instance, key, .. }) => {
            let new = NewPolicy { service_id, role, instance_id: instance, key_id: key };
            let made = management.create_policy(&new, call).await?;
            let members = [
                ("id", Some(made.id.clone())),
                ("service id", Some(made.service_id.clone())),
                ("role", Some(made.role.clone())),
                ("in", Some(scope(&made))),
            ];
            output.thing(&members, &made)
        }
        Verb::Delete { id } => {
            management.delete_policy(&id, call).await?;
            output.thing(&[("deleted", Some(id.clone()))], &serde_json::json!({"deleted": id}))
        }
    }
}

fn show(policies: Vec<Policy>, output: &mut Output<'_>) -> Result<(), Error> {
    let row = |one: &Policy| {
        [
            one.id.clone(),
            one.service_id.clone(),
            one.role.clone(),
            scope(one),
            one.created_at.clone(),
        ]
    };
    let rows = policies.iter().map(row).collect();
    output.list(["ID", "SERVICE ID", "ROLE", "IN", "CREATED"], rows, &policies)
}

/// Where a policy holds, in words.
pub(super) fn scope(policy: &Policy) -> String {
    match (&policy.instance_id, &policy.key_id) {
        (None, _) => "every instance".to_owned(),
        (Some(instance), None) => format!("instance {instance}"),
        (Some(instance), Some(key)) => format!("instance {instance}, key {key}"),
    }
}
