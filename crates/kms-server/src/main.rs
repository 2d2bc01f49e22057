//! `kms-server`: configuration, log, HSM, database, listeners, serve, drain.

use clap::{Parser, Subcommand, ValueEnum};
use kms_core::clock::{Clock, SystemClock};
use kms_core::crypto_module::{self, CryptoModule};
use kms_daemon::lifecycle::{Shutdown, watch_signals};
use kms_daemon::memory;
use kms_daemon::telemetry;
use kms_server::adopt::Adopt;
use kms_server::app::{App, Foundation};
use kms_server::audit::{Audit, Record, node};
use kms_server::backup::{backup, manifest_of};
use kms_server::config::{Config, Server};
use kms_server::guard::Guarded;
use kms_server::hsm;
use kms_server::init;
use kms_server::reconcile::{Comparison, compare};
use kms_server::renew_key::{self, Signs};
use kms_server::serve::{self, Listeners};
use kms_server::store::{SigningKey, SqliteStore, Store};
use kms_server::tls::Tls;
use kms_server::{adopt, report, restore};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use uuid::Uuid;

/// The key management service of Keelson.
#[derive(Debug, Parser)]
#[command(version = crypto_module::VERSION.as_str())]
struct Cli {
    /// The configuration file.
    #[arg(long, global = true, default_value = "/etc/kms-server/kms-server.yaml")]
    config: PathBuf,
    /// Check the configuration and the files it names, and exit.
    #[arg(long)]
    check_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prepare token and database, and print the first API keys, once.
    Init {
        /// How to print them.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Compare the HSM with the database, key by key; change nothing. Ends with 0: the same; 3: something is left over
    /// that nothing uses; 4: keys are missing or are others; 1: they could not be compared.
    Check {
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Copy the database while the server runs, with a manifest beside the copy.
    Backup {
        /// The file to make; nothing is overwritten.
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
    /// Compare a backup with the HSM, key by key, and put it where DATABASE_URL says. Ends as `check` does.
    Restore {
        /// A backup.
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
        /// Only compare.
        #[arg(long)]
        check: bool,
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Make a new key pair in the place of one that the HSM has lost and no backup holds. Stop every server on this
    /// database first. One that is good is left as it is.
    RenewKey {
        /// What the lost key signs.
        #[arg(value_enum)]
        signs: Signs,
    },
    /// Give a version that the HSM holds and a restored database does not know (`extra`), or knows as one that is being
    /// made (`unfinished`), back to its key, so that what it wrapped opens again. It never wraps. Stop the server that writes this audit log first.
    Adopt {
        /// The key that it belonged to; the audit log says so.
        #[arg(long, value_name = "UUID")]
        key: Uuid,
        #[arg(long, value_name = "UUID")]
        version: Uuid,
        /// A file with a wrapped DEK of this version, as the key service gave it: the proof.
        #[arg(long, value_name = "FILE")]
        wdek: PathBuf,
        /// The associated data that it was wrapped with, in that order.
        #[arg(long)]
        aad: Vec<String>,
    },
    /// The process that has the HSM's library in it. The service starts it itself.
    #[command(name = hsm::WORKER, hide = true)]
    HsmWorker {
        log_level: String,
        #[arg(action = clap::ArgAction::Set)]
        log_all_values: bool,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Text,
    Json,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        Some(Command::HsmWorker { log_level, log_all_values }) => {
            hsm::work(log_level, *log_all_values).map(|()| ExitCode::SUCCESS).map_err(Failure::from)
        }
        _ => run(&cli),
    };
    match done {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("kms-server: {failure}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(cli: &Cli) -> Result<ExitCode, Failure> {
    match &cli.command {
        _ if cli.check_config => check_config(cli)?,
        Some(Command::Init { output }) => initialise(cli, *output).await?,
        Some(Command::Check { output }) => return check(cli, *output).await,
        Some(Command::Backup { to }) => back_up(cli, to).await?,
        Some(Command::Restore { from, check, output }) => {
            return restore(cli, from, *check, *output).await;
        }
        Some(Command::RenewKey { signs }) => renew(cli, *signs).await?,
        Some(Command::Adopt { key, version, wdek, aad }) => {
            let ciphertext = std::fs::read_to_string(wdek)
                .map_err(|error| format!("{}: {error}", wdek.display()))?;
            let ciphertext = ciphertext.trim().to_owned();
            let asked = Adopt { key: *key, version: *version, ciphertext, aad: aad.clone() };
            adopt(cli, asked).await?;
        }
        _ => serve(cli).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn check_config(cli: &Cli) -> Result<(), Failure> {
    let config = Config::load(&cli.config)?;
    Tls::open(config.server.tls)?;
    println!("{} is good.", cli.config.display());
    Ok(())
}

async fn initialise(cli: &Cli, output: Output) -> Result<(), Failure> {
    let config = Config::load(&cli.config)?;
    let clock = clock(&config)?;
    let tell = |made: &init::Made| {
        let text = match output {
            Output::Text => made.text(),
            Output::Json => made.json(),
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{text}").and_then(|()| out.flush())
    };
    Ok(init::init(&config, clock, tell).await?)
}

async fn check(cli: &Cli, output: Output) -> Result<ExitCode, Failure> {
    let config = Config::load(&cli.config)?;
    clock(&config)?;
    let store = SqliteStore::open_to_read(&config.server.database).await?;
    let vault = hsm::open(&config, &config.hsm.remembered_pin())?;
    let found = compare(&*vault, &store).await?;
    Ok(show(&found, output))
}

async fn back_up(cli: &Cli, to: &Path) -> Result<(), Failure> {
    let config = Config::load(&cli.config)?;
    let clock = clock(&config)?;
    backup(&config.server.database, to, clock.wall().into()).await?;
    println!("{} and {} are written.", to.display(), manifest_of(to).display());
    Ok(())
}

async fn restore(cli: &Cli, from: &Path, check: bool, output: Output) -> Result<ExitCode, Failure> {
    let config = Config::load(&cli.config)?;
    let clock = clock(&config)?;
    let vault = hsm::open(&config, &config.hsm.remembered_pin())?;
    let restored = restore::restore(&*vault, from, &config.server.database, check).await?;
    let is_there = !check && restored.found.verdict().is_ok();
    if is_there {
        eprintln!("{} is restored.", config.server.database.display());
    }
    eprint!("{}", restored.notes());
    let shown = show(&restored.found, output);
    if is_there {
        let recorded = record_restore(&config, clock, restored.record()).await;
        recorded
            .map_err(|error| format!("the restore is done but not in the audit log: {error}"))?;
    }
    Ok(shown)
}

async fn record_restore(
    config: &Config,
    clock: Arc<dyn Clock>,
    record: Record,
) -> Result<(), Failure> {
    let (store, _) = store(config).await?;
    let recorded = async { Ok(audit(config, &*store, clock).await?.record(record).await?) }.await;
    store.close().await;
    recorded
}

fn show(found: &Comparison, output: Output) -> ExitCode {
    match output {
        Output::Text => print!("{}", report::text(found)),
        Output::Json => println!("{}", report::json(found)),
    }
    ExitCode::from(report::ending(found).code())
}

async fn renew(cli: &Cli, signs: Signs) -> Result<(), Failure> {
    let config = Config::load(&cli.config)?;
    let clock = clock(&config)?;
    let (store, _) = store(&config).await?;
    let audit = audit(&config, &*store, clock.clone()).await?;
    let vault = hsm::open(&config, &config.hsm.remembered_pin())?;
    let done = renew_key::renew(&*vault, &*store, &audit, signs, clock.wall().into()).await;
    store.close().await;
    let done = done?;
    println!("{} is in the place of {}.", done.new, done.old);
    println!("{} is what the old key is checked with: keep it.", done.old_public.display());
    Ok(())
}

async fn adopt(cli: &Cli, asked: Adopt) -> Result<(), Failure> {
    let config = Config::load(&cli.config)?;
    let clock = clock(&config)?;
    let (store, _) = store(&config).await?;
    let audit = audit(&config, &*store, clock.clone()).await?;
    let vault = hsm::open(&config, &config.hsm.remembered_pin())?;
    let (key, version) = (asked.key, asked.version);
    let done = adopt::adopt(&*vault, &*store, &audit, asked, clock.wall().into()).await;
    store.close().await;
    done?;
    println!(
        "What version {version} of key {key} has wrapped can be unwrapped. Nothing wraps with it: rotate the key \
         (`kmsctl keys rotate {key}`), before plug-ins that sealed under it reach the server."
    );
    Ok(())
}

async fn serve(cli: &Cli) -> Result<(), Failure> {
    let config = Config::load(&cli.config)?;
    let clock = clock(&config)?;
    tracing::info!("Cryptography is done by {}.", CryptoModule::linked());
    if let Err(cause) = memory::protect() {
        cause.warn();
    }
    let tls = Tls::open(config.server.tls.clone())?;
    let (store, signing_key) = store(&config).await?;
    let pin = config.hsm.remembered_pin();
    let vault = Arc::new(Guarded::new(hsm::open(&config, &pin)?, store.clone()));
    let audit = audit(&config, &*store, clock.clone()).await?;
    let app = App::new(Foundation { clock, store, vault, audit, signing_key }, config.operations)?;
    app.metrics.capacity(config.hsm.key_capacity);
    let listeners = bind(&config.server).await?;
    let shutdown = Shutdown::new();
    watch_signals(shutdown.clone(), Arc::new(Notify::new()))?;
    tracing::info!("The key service is started on {}.", config.server.keys_address);
    tracing::info!("The token service is started on {}.", config.server.tokens_address);
    if let Some(file) = config.hsm.pin_file {
        tokio::spawn(hsm::watch_pin(pin, file, shutdown.clone()));
    }
    serve::serve(Arc::new(app), listeners, tls, shutdown).await;
    Ok(())
}

/// The store, and the proof that somebody can be authenticated: without it nothing is served.
async fn store(config: &Config) -> Result<(Arc<dyn Store>, SigningKey), Failure> {
    if !config.server.database.exists() {
        return Err(not_initialised(config));
    }
    let store = SqliteStore::open(&config.server.database, false).await?;
    let signing_key = store.signing_key().await?.ok_or_else(|| not_initialised(config))?;
    Ok((Arc::new(store), signing_key))
}

/// The log, going on from where the database knows it to have been.
async fn audit(
    config: &Config,
    store: &dyn Store,
    clock: Arc<dyn Clock>,
) -> Result<Audit, Failure> {
    let file = &config.server.audit_file;
    let node = node::name(config.server.node_id.as_deref(), file)?;
    let known = store.audit_head(&node).await?;
    Ok(Audit::open(file, &node, known, clock)?)
}

/// Starts the log as well: nothing may be logged before its settings are known.
fn clock(config: &Config) -> Result<Arc<dyn Clock>, Failure> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let wall = clock.clone();
    telemetry::init(config.log, Arc::new(move || wall.wall()))?;
    Ok(clock)
}

async fn bind(server: &Server) -> Result<Listeners, Failure> {
    Ok(Listeners {
        keys: listen(server.keys_address, "KEYS_ADDRESS").await?,
        tokens: listen(server.tokens_address, "TOKENS_ADDRESS").await?,
        health: listen(server.health_address, "HEALTH_ADDRESS").await?,
    })
}

async fn listen(address: SocketAddr, name: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind(address)
        .await
        .map_err(|e| format!("cannot listen on {name} {address}: {e}").into())
}

fn not_initialised(config: &Config) -> Failure {
    format!(
        "no authentication is configured: {} holds no service IDs and no signing key. Run `kms-server init --config \
         FILE` first",
        config.server.database.display()
    )
    .into()
}
