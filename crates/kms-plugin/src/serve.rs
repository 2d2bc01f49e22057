//! From the configuration to a plug-in that serves, and back to an orderly end.
//!
//! The socket never waits for the key service: it is served at once, and what cannot be sealed yet is answered with
//! the cause.

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use kms_core::clock::{Clock, SystemClock};
use kms_core::crypto_module::CryptoModule;
use kms_daemon::admin::{self, Routes};
use kms_daemon::lifecycle::{Shutdown, watch_signals};
use kms_daemon::manager::Manager;
use kms_daemon::memory;
use kms_daemon::settings::Mistakes;
use kms_daemon::telemetry::{self, LogLevel};
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use crate::config::{self, Config, Health, Source};
use crate::grpc;
use crate::metrics::Metrics;
use crate::probe;
use crate::provider::guard::Tools;
use crate::random::Random;
use crate::ring::RingMaker;
use crate::sealer::Sealer;
use crate::socket::{self, SocketAddress, SocketError};

/// A server that fails at once is not started again faster than this, whatever is set.
const LEAST_DELAY: Duration = Duration::from_millis(100);
/// The client's preface and an empty SETTINGS frame (RFC 9113, 3.4): every HTTP/2 server answers with its SETTINGS.
const HTTP2_HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// The kubelet gives a probe one second.
const LIVENESS: Duration = Duration::from_millis(800);

/// Why the process ends other than by request.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The operator must change the configuration; every mistake was logged.
    #[error("the configuration is not valid")]
    Configuration(Mistakes),
    /// The operating system refused what every process may have.
    #[error("the process cannot run: {0}")]
    Process(#[from] io::Error),
}

/// Everything that lives as long as the process.
struct Plugin {
    source: Source,
    config: Config,
    sealer: Arc<Sealer>,
    rings: RingMaker,
    tools: Tools,
    registry: Registry,
    log: telemetry::Handle,
    shutdown: Shutdown,
    reload: Arc<Notify>,
}

/// What the process was started with: a socket, if it is bound already, and who waits for news of it.
struct Place {
    inherited: Option<UnixListener>,
    manager: Manager,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// See [`Failure`].
pub fn run(source: Source) -> Result<(), Failure> {
    let inherited = socket::inherited(&source.environment);
    let clock = Arc::new(SystemClock::new());
    let (config, log) = start_log(&source, clock.clone())?;
    let inherited = inherited.map_err(io::Error::other)?;
    let manager = Manager::new(source.environment.get("NOTIFY_SOCKET").map(String::as_str));
    let locked = memory::protect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let plugin = Plugin::assemble(source, config, log, clock)?;
        watch_signals(plugin.shutdown.clone(), plugin.reload.clone())?;
        plugin.remark();
        if let Err(cause) = locked {
            cause.warn();
        }
        plugin.serve(Place { inherited, manager }).await;
        Ok(())
    })
}

/// What `--check-config` does: everything that a start would do with the configuration, short of connecting.
///
/// # Errors
/// Every mistake.
pub fn check(source: &Source) -> Result<(), Mistakes> {
    let config = source.read()?;
    let clock = Arc::new(SystemClock::new());
    let tools = Tools { clock, random: Random::system(), metrics: Metrics::unregistered() };
    RingMaker::new(tools).ring(&config).map(drop)
}

impl Plugin {
    fn assemble(
        source: Source,
        config: Config,
        log: telemetry::Handle,
        clock: Arc<dyn Clock>,
    ) -> Result<Plugin, Failure> {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry, &config.server.region);
        let tools = Tools { clock, random: Random::system(), metrics };
        let rings = RingMaker::new(tools.clone());
        let ring = rings.ring(&config).map_err(refuse)?;
        let sealer = Arc::new(Sealer::new(ring, config.server.policy, tools.clone()));
        let (shutdown, reload) = (Shutdown::new(), Arc::new(Notify::new()));
        Ok(Plugin { source, config, sealer, rings, tools, registry, log, shutdown, reload })
    }

    fn remark(&self) {
        tracing::info!("Cryptography is done by {}.", CryptoModule::linked());
        if let Some(doubt) = self.config.doubt() {
            tracing::warn!("{doubt}");
        }
        let names = self.config.overridden.join(", ");
        if !names.is_empty() {
            tracing::info!("Taken from the environment instead of the file: {names}");
        }
    }

    async fn serve(self, place: Place) {
        let Plugin { source, config, sealer, rings, tools, registry, log, shutdown, reload } = self;
        let server = &config.server;
        tokio::spawn(probe::run(sealer.clone(), server.probe_interval, shutdown.clone()));
        let routes =
            routes(&server.health, &server.socket.address, &sealer, &tools.metrics, registry);
        open_health(&server.health, server.restart_delay, routes, shutdown.clone()).await;
        let take_over = {
            let sealer = sealer.clone();
            move |old: &Config, new: &Config| take_over(old, new, &sealer, &rings, &log)
        };
        let metrics = tools.metrics.clone();
        tokio::spawn(config::watch(
            source,
            config.clone(),
            reload,
            shutdown.clone(),
            metrics,
            take_over,
        ));
        serve_grpc(&config, &place, sealer, shutdown).await;
    }
}

fn start_log(
    source: &Source,
    clock: Arc<SystemClock>,
) -> Result<(Config, telemetry::Handle), Failure> {
    let config = source.read();
    let quiet = telemetry::Settings { level: LogLevel::Info, log_all_values: false };
    let settings = config.as_ref().map_or(quiet, |config| config.logger);
    let log = telemetry::init(settings, Arc::new(move || clock.wall()));
    let config = config.map_err(refuse)?;
    let log = log.map_err(io::Error::other)?;
    Ok((config, log))
}

fn refuse(mistakes: Mistakes) -> Failure {
    for mistake in &mistakes.0 {
        tracing::error!("Configuration: {mistake}");
    }
    Failure::Configuration(mistakes)
}

/// A changed configuration: what can change while the process runs, does.
fn take_over(
    old: &Config,
    new: &Config,
    sealer: &Sealer,
    rings: &RingMaker,
    log: &telemetry::Handle,
) -> Result<(), Mistakes> {
    let installed = sealer.install(rings.ring(new)?, new.server.policy);
    installed.map_err(|error| Mistakes(vec![error.to_string()]))?;
    log.change(new.logger);
    if let Some(doubt) = new.doubt() {
        tracing::warn!("{doubt}");
    }
    let waiting = old.needing_restart(new);
    if !waiting.is_empty() {
        tracing::warn!("Changed, but in effect only after a restart: {}", waiting.join(", "));
    }
    Ok(())
}

fn routes(
    health: &Health,
    socket: &SocketAddress,
    sealer: &Arc<Sealer>,
    metrics: &Metrics,
    registry: Registry,
) -> Routes {
    let render = {
        let (sealer, metrics) = (sealer.clone(), metrics.clone());
        move || metrics.render(&registry, sealer.snapshot())
    };
    let live = {
        let socket = socket.clone();
        move || alive(socket.clone())
    };
    let ready = {
        let sealer = sealer.clone();
        move || std::future::ready(sealer.ready().map_err(|cause| cause.to_string()))
    };
    let path = &health.path;
    Routes::new(render)
        .check(path.clone(), live.clone())
        .check(format!("{path}/liveness"), live)
        .check(format!("{path}/readiness"), ready)
}

/// Opens the health port before anything is served. If it is taken, it is tried again in the background: sealing does
/// not depend on it.
async fn open_health(health: &Health, delay: Duration, routes: Routes, shutdown: Shutdown) {
    let first = TcpListener::bind(&*health.addresses).await;
    let (addresses, delay) = (health.addresses.clone(), delay.max(Duration::from_secs(1)));
    tokio::spawn(async move {
        let mut listener = first;
        loop {
            match listener {
                Ok(listener) => return admin::serve(listener, routes, shutdown).await,
                Err(error) => tracing::error!(
                    "The health port {} cannot be opened, will try again: {error}",
                    addresses.first().map_or(0, SocketAddr::port)
                ),
            }
            sleep(delay).await;
            listener = TcpListener::bind(&*addresses).await;
        }
    });
}

/// Serves the socket; whenever that fails, again after RESTART_DELAY_IN_SECONDS.
async fn serve_grpc(config: &Config, place: &Place, sealer: Arc<Sealer>, shutdown: Shutdown) {
    let delay = config.server.restart_delay;
    while let Err(error) = serve_once(config, place, sealer.clone(), &shutdown).await {
        let seconds = delay.as_secs();
        tracing::error!("The Provider server failed and is started again in {seconds} s: {error}");
        tokio::select! {
            () = sleep(delay.max(LEAST_DELAY)) => {}
            () = shutdown.requested() => break,
        }
    }
    tracing::info!("The Provider server is stopped.");
}

async fn serve_once(
    config: &Config,
    place: &Place,
    sealer: Arc<Sealer>,
    shutdown: &Shutdown,
) -> Result<(), Failed> {
    let socket = &config.server.socket;
    let options = socket.options();
    let bound = match &place.inherited {
        Some(listener) => socket::adopt(listener, &socket.address, &options)?,
        None => socket::bind(&socket.address, &options)?,
    };
    tracing::info!("The Provider server is started.");
    place.manager.ready();
    let ending = async {
        shutdown.requested().await;
        place.manager.stopping();
    };
    Ok(grpc::serve(bound, sealer, socket.status_version, ending).await?)
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Bind(#[from] SocketError),
    #[error(transparent)]
    Serve(#[from] grpc::ServeError),
}

/// Alive: the socket is there, and whoever accepts on it answers. To be refused for one's uid is an answer, too.
async fn alive(socket: SocketAddress) -> Result<(), String> {
    match timeout(LIVENESS, hello(&socket)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!("the socket {socket} cannot be connected to: {error}")),
        Err(_) => Err(format!("nobody answers on the socket {socket}")),
    }
}

async fn hello(socket: &SocketAddress) -> io::Result<()> {
    let mut stream = match socket {
        SocketAddress::File(path) => UnixStream::connect(path).await?,
        // tokio takes a leading NUL for the abstract namespace.
        SocketAddress::Abstract(name) => UnixStream::connect(format!("\0{name}")).await?,
    };
    // A closed connection is an answer; what could not be sent or read tells no more than that.
    let _ = stream.write_all(HTTP2_HELLO).await;
    let _ = stream.read(&mut [0; 9]).await;
    Ok(())
}
