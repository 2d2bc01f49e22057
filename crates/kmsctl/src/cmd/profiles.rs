//! `kmsctl profiles`: whose tokens of another issuer, such as a Kubernetes cluster, speak for a service ID.

use kms_api::rest::{NewProfile, Profile};

use crate::connection::Access;
use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl profiles list
  kmsctl profiles create node --service-id ServiceId-… --issuer https://kubernetes.default.svc \\
      --namespace kube-system --service-account kmsplugin
  kmsctl profiles create anna --service-id ServiceId-… --issuer https://login.example.com --subject 8f2c…
  kmsctl profiles delete Profile-…";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    access: Access,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show every profile that this API key may see
    List,
    /// Trust the tokens of one subject of one issuer
    Create(Create),
    /// Trust them no longer, and at once make useless every token that was got with them
    Delete {
        /// The id, as `list` shows it
        id: String,
    },
}

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("who").required(true))]
struct Create {
    /// What a login calls it
    name: String,
    /// For whom it speaks
    #[arg(long, value_name = "ID")]
    service_id: String,
    /// The issuer, as ISSUERS in the server's configuration names it
    #[arg(long, value_name = "URL")]
    issuer: String,
    /// The subject of the tokens
    #[arg(long, group = "who")]
    subject: Option<String>,
    /// The namespace of the Kubernetes service account whose tokens they are
    #[arg(long, requires = "service_account")]
    namespace: Option<String>,
    /// The name of that service account
    #[arg(long, group = "who", requires = "namespace", value_name = "NAME")]
    service_account: Option<String>,
}

pub(crate) async fn run(args: Args, output: &mut Output<'_>) -> Result<(), Error> {
    let (management, call) = (args.access.management()?, args.access.call());
    match args.verb {
        Verb::List => show(management.profiles(call).await?, output),
        Verb::Create(asked) => {
            let Create { name, service_id, issuer, subject, namespace, service_account } = asked;
            let new = NewProfile { name, service_id, issuer, subject, namespace, service_account };
            let made = management.create_profile(&new, call).await?;
            let members = [
                ("id", Some(made.id.clone())),
                ("name", Some(made.name.clone())),
                ("service id", Some(made.service_id.clone())),
                ("issuer", Some(made.issuer.clone())),
                ("subject", Some(made.subject.clone())),
            ];
            output.thing(&members, &made)
        }
        Verb::Delete { id } => {
            management.delete_profile(&id, call).await?;
            output.thing(&[("deleted", Some(id.clone()))], &serde_json::json!({"deleted": id}))
        }
    }
}

fn show(profiles: Vec<Profile>, output: &mut Output<'_>) -> Result<(), Error> {
    let row = |one: &Profile| {
        [&one.id, &one.name, &one.service_id, &one.issuer, &one.subject].map(String::clone)
    };
    let rows = profiles.iter().map(row).collect();
    output.list(["ID", "NAME", "SERVICE ID", "ISSUER", "SUBJECT"], rows, &profiles)
}
