//! `kms-server`: configuration, log, HSM, database, listeners, serve, drain.

use clap::{Parser, Subcommand, ValueEnum};
use kms_core::clock::{Clock, SystemClock};
use kms_daemon::lifecycle::{Shutdown, watch_signals};
use kms_daemon::memory;
use kms_daemon::telemetry;
use kms_hsm::Vault;
use kms_server::app::App;
use kms_server::audit::Audit;
use kms_server::config::Config;
use kms_server::health::Health;
use kms_server::metrics::Metrics;
use kms_server::serve::{self, Listeners};
use kms_server::store::{SigningKey, SqliteStore, Store};
use kms_server::token::Issuer;
use kms_server::{init, tls};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::Notify;

/// The key management service of Keelson.
#[derive(Debug, Parser)]
#[command(version)]
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
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Text,
    Json,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        _ if cli.check_config => check(&cli),
        Some(Command::Init { output }) => initialise(&cli, *output).await,
        None => serve(&cli).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("kms-server: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn check(cli: &Cli) -> Result<(), Failure> {
    let config = Config::load(&cli.config)?;
    tls::acceptor(&config.server.tls_cert_file, &config.server.tls_key_file)?;
    println!("{} is good.", cli.config.display());
    Ok(())
}

async fn initialise(cli: &Cli, output: Output) -> Result<(), Failure> {
    let config = Config::load(&cli.config)?;
    let clock = clock(&config)?;
    let made = init::init(&config, clock).await?;
    match output {
        Output::Text => println!("{}", made.text()),
        Output::Json => println!("{}", made.json()),
    }
    Ok(())
}

async fn serve(cli: &Cli) -> Result<(), Failure> {
    let config = Config::load(&cli.config)?;
    let clock = clock(&config)?;
    if let Err(cause) = memory::protect() {
        tracing::warn!("Keys may be swapped out, because memory cannot be locked: {cause}");
    }
    let tls = tls::acceptor(&config.server.tls_cert_file, &config.server.tls_key_file)?;
    let (store, signing_key) = store(&config).await?;
    let vault: Arc<dyn Vault> = Arc::new(init::open_vault(&config.hsm)?);
    let app = Arc::new(assemble(&config, clock, store, vault, signing_key)?);
    let listeners = bind(&config).await?;
    let shutdown = Shutdown::new();
    watch_signals(shutdown.clone(), Arc::new(Notify::new()))?;
    tracing::info!("The key service is started on {}.", config.server.keys_address);
    tracing::info!("The token service is started on {}.", config.server.tokens_address);
    serve::serve(app, listeners, tls, shutdown).await;
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

/// Starts the log as well: nothing may be logged before its settings are known.
fn clock(config: &Config) -> Result<Arc<dyn Clock>, Failure> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let wall = clock.clone();
    telemetry::init(config.log, Arc::new(move || wall.wall()))?;
    Ok(clock)
}

fn assemble(
    config: &Config,
    clock: Arc<dyn Clock>,
    store: Arc<dyn Store>,
    vault: Arc<dyn Vault>,
    signing_key: SigningKey,
) -> Result<App, Failure> {
    let issuer = Issuer::new(
        config.server.issuer_url.clone(),
        config.server.token_lifetime,
        signing_key,
        clock.clone(),
    );
    Ok(App {
        vault,
        store,
        audit: Audit::open(&config.server.audit_file, clock.clone())?,
        issuer,
        clock,
        settings: config.operations,
        metrics: Metrics::new(),
        health: Health::unknown(),
    })
}

async fn bind(config: &Config) -> Result<Listeners, Failure> {
    Ok(Listeners {
        keys: listen(config.server.keys_address, "KEYS_ADDRESS").await?,
        tokens: listen(config.server.tokens_address, "TOKENS_ADDRESS").await?,
        health: listen(config.server.health_address, "HEALTH_ADDRESS").await?,
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
