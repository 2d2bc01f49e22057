//! The command line: names, help and examples. What a command does is in `cmd`, one file each.

use clap::{Parser, Subcommand};
use kms_core::crypto_module;

use crate::cmd::{
    api_keys, audit, bench, completion, conformance, inspect, instances, keys, policies, profiles,
    service_ids, verify,
};
use crate::output::Format;

const AFTER_HELP: &str = "\
Where the services are can be said once, in the environment:
  KMS_URL          https://host:28674                 the key service
  KMS_TOKEN_URL    https://host:10443/oidc/token      the token service
  KMS_CA_FILE      the PEM file of the CA that signed both certificates
  KMS_INSTANCE_ID  the instance whose keys are meant
  KMS_API_KEY      the API key (or --api-key-file; never an argument, which every user of the machine could read)

Exit codes: 0 done, 1 failed, 2 wrong command line or settings; `verify --help` and `audit verify --help` have their own.";

#[derive(Debug, Parser)]
#[command(name = "kmsctl", version = crypto_module::VERSION.as_str(), about = "Manage and inspect the keys that protect Kubernetes secrets", after_help = AFTER_HELP)]
pub(crate) struct Cli {
    /// Print a table for people or JSON for programs
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List, create, import, show, rotate and delete keys
    #[command(after_help = keys::EXAMPLES)]
    Keys(keys::Args),
    /// List and create service IDs, for which API keys speak
    #[command(after_help = service_ids::EXAMPLES)]
    ServiceIds(service_ids::Args),
    /// List, create and delete policies: which service ID has which role where
    #[command(after_help = policies::EXAMPLES)]
    Policies(policies::Args),
    /// List, create and delete trusted profiles: whose tokens of another issuer are good for a service ID
    #[command(after_help = profiles::EXAMPLES)]
    Profiles(profiles::Args),
    /// List, create, lock, rotate and revoke API keys
    #[command(after_help = api_keys::EXAMPLES)]
    ApiKeys(api_keys::Args),
    /// List and create instances, the groups that keys live in
    #[command(after_help = instances::EXAMPLES)]
    Instances(instances::Args),
    /// Explain a value that etcd stores: who encrypted it, with which key
    #[command(after_help = inspect::EXAMPLES)]
    Inspect(inspect::Args),
    /// Count what etcd holds by who encrypted it, and say what is left to rewrite
    #[command(after_help = verify::EXAMPLES)]
    Verify(verify::Args),
    /// Read the key service's audit logs, and prove that they are whole
    #[command(after_help = audit::EXAMPLES)]
    Audit(audit::Args),
    /// Drive a KMS plug-in's socket and measure it
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::Args),
    /// Judge a KMS plug-in through its socket by what kube-apiserver demands
    #[command(after_help = conformance::EXAMPLES)]
    Conformance(conformance::Args),
    /// Print a completion script for a shell
    #[command(after_help = completion::EXAMPLES)]
    Completion(completion::Args),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_argument_takes_an_api_key() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                assert_ne!(argument.get_long(), Some("api-key"), "in {}", command.get_name());
                assert_ne!(argument.get_env(), Some("KMS_API_KEY".as_ref()));
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn each_command_shows_an_example() {
        for command in
            Cli::command().get_subcommands().filter(|command| command.get_name() != "help")
        {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("kmsctl"), "{} has no example", command.get_name());
        }
    }
}
