//! `kmsctl audit`: read the audit logs of kms-server, and prove that they are whole. Works on files alone: no server,
//! no HSM, no secret is needed.

mod lines;
mod progress;
mod query;
mod show;
mod tail;
mod verify;

use clap::Subcommand;

use crate::error::Error;
use crate::output::Output;

pub(crate) const EXAMPLES: &str = "\
Examples:
  kmsctl audit verify /var/log/keelson/audit.jsonl* --key /etc/keelson/audit.pem --anchor /backup/audit.anchor
  kmsctl audit query /var/log/keelson/audit.jsonl --since 2h --action unwrap --outcome refused
  kmsctl audit tail -f /var/log/keelson/audit.jsonl";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prove that nothing was changed, removed, moved or inserted; say where, if it was
    #[command(after_help = verify::EXAMPLES)]
    Verify(verify::Args),
    /// Show the last records, and with -f those that come
    #[command(after_help = tail::EXAMPLES)]
    Tail(tail::Args),
    /// Find records by time, caller, key, action, uid, peer or outcome
    #[command(after_help = query::EXAMPLES)]
    Query(query::Args),
}

pub(crate) async fn run(args: Args, output: &mut Output<'_>) -> Result<(), Error> {
    match args.command {
        Command::Verify(args) => verify::run(&args, output),
        Command::Tail(args) => tail::run(&args, output).await,
        Command::Query(args) => query::run(&args, output),
    }
}
