//! The running server: its three listeners, and the look at its parts that readiness comes from.

use crate::app::App;
use crate::audit::anchors::Anchors;
use crate::health::{ClockWatch, Parts};
use crate::http;
use crate::listen;
use crate::metrics::Snapshot;
use crate::tls::Tls;
use kms_daemon::admin;
use kms_daemon::lifecycle::Shutdown;
use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::time::timeout;

/// How often database, HSM, audit log and clock are looked at.
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// A part that has not answered by then counts as lost. Readiness is never older than this and the interval together.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);
/// How often the versions of keys are counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(60);
/// How often the certificate's files are looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// The sockets that the server answers on, already bound.
#[derive(Debug)]
pub struct Listeners {
    pub keys: TcpListener,
    pub tokens: TcpListener,
    pub health: TcpListener,
}

/// Serves until the shutdown is requested and what ran then has been answered; the audit log gets its last anchor and the store is closed then.
pub async fn serve(app: Arc<App>, listeners: Listeners, tls: Tls, shutdown: Shutdown) {
    let tls = Arc::new(tls);
    let clock = clock(&app).await;
    let keys = {
        let app = app.clone();
        move |request| http::keys(app.clone(), request)
    };
    let tokens = {
        let app = app.clone();
        move |request| http::tokens(app.clone(), request)
    };
    let mut anchors = Anchors::new(&app);
    tokio::join!(
        listen::serve(listeners.keys, || tls.keys(), &app.limits, keys, shutdown.clone()),
        listen::serve(listeners.tokens, || tls.tokens(), &app.limits, tokens, shutdown.clone()),
        admin::serve(listeners.health, health_routes(&app, &tls), shutdown.clone()),
        watch_health(&app, &clock, &shutdown),
        watch_certificate(&app, &tls, &shutdown),
        watch_capacity(&app, &shutdown),
        anchors.keep(&shutdown),
    );
    // What was answered while the listeners closed is covered too.
    anchors.anchor().await;
    app.store.close().await;
}

fn health_routes(app: &Arc<App>, tls: &Arc<Tls>) -> admin::Routes {
    let (metrics, tls) = (app.clone(), tls.clone());
    let ready = app.clone();
    admin::Routes::new(move || metrics.metrics.render(&snapshot(&metrics, &tls)))
        // Alive means that this process answers. A restart does not bring back an HSM.
        .check("/livez", || async { Ok(()) })
        .parts("/readyz", move || {
            let last = ready.health.last();
            last.named().map(|(name, found)| (name, found.clone())).into()
        })
}

fn snapshot(app: &App, tls: &Tls) -> Snapshot {
    Snapshot {
        connections: app.limits.connections(),
        requests: app.limits.requests(),
        limits: app.limits.settings(),
        refused: app.limits.refused(),
        audit_syncs: app.audit.syncs(),
        certificate_ends: tls.not_after(),
    }
}

/// The clock, and what it must not be behind.
async fn clock(app: &App) -> ClockWatch {
    // Where it cannot be read, readiness says so anyway.
    let newest = app.store.signing_key().await.ok().flatten();
    let newest = newest.map(|key| (SystemTime::from(key.created_at), "the newest signing key"));
    let last = app.audit.last().map(|at| (SystemTime::from(at), "the last audit record"));
    ClockWatch::new(app.clock.clone(), newest.into_iter().chain(last))
}

/// How full the HSM is. Keys come and go slowly, and a large database takes a moment to count them.
async fn watch_capacity(app: &App, shutdown: &Shutdown) {
    loop {
        match app.store.known_versions().await {
            Ok(versions) => app.metrics.versions(versions.len()),
            Err(error) => tracing::debug!("the versions of keys cannot be counted: {error}"),
        }
        tokio::select! {
            () = shutdown.requested() => return,
            () = tokio::time::sleep(COUNT_INTERVAL) => {}
        }
    }
}

async fn watch_certificate(app: &App, tls: &Tls, shutdown: &Shutdown) {
    loop {
        tokio::select! {
            () = shutdown.requested() => return,
            () = tokio::time::sleep(RELOAD_INTERVAL) => {}
        }
        match tls.reload() {
            Ok(false) => {}
            Ok(true) => {
                app.metrics.certificate_reloaded(true);
                tracing::info!("The TLS certificate was read again; new connections have it.");
            }
            Err(error) => {
                app.metrics.certificate_reloaded(false);
                tracing::error!("The TLS certificate before stays in use: {error}");
            }
        }
    }
}

async fn watch_health(app: &Arc<App>, clock: &ClockWatch, shutdown: &Shutdown) {
    loop {
        let (before, found) = (app.health.last(), check(app, clock).await);
        app.metrics.ready(&found);
        let counted = timeout(PROBE_PATIENCE, app.vault.statistics()).await;
        app.metrics.hsm(counted.ok().flatten());
        log_change(&before, &found);
        app.health.set(found);
        tokio::select! {
            () = shutdown.requested() => return,
            () = tokio::time::sleep(PROBE_INTERVAL) => {}
        }
    }
}

async fn check(app: &App, clock: &ClockWatch) -> Parts {
    // The audit log is asked whatever the others say: it writes down that it goes on as soon as it can.
    let (database, hsm, audit) = tokio::join!(
        in_time(app.store.probe()),
        in_time(app.vault.probe()),
        in_time(app.audit.probe()),
    );
    Parts { database, hsm, audit, clock: clock.check() }
}

async fn in_time<E: Display>(probe: impl Future<Output = Result<(), E>>) -> Result<(), String> {
    match timeout(PROBE_PATIENCE, probe).await {
        Ok(found) => found.map_err(|error| error.to_string()),
        Err(_) => Err(format!("has not answered within {} s", PROBE_PATIENCE.as_secs())),
    }
}

fn log_change(before: &Parts, now: &Parts) {
    for ((name, before), (_, now)) in before.named().into_iter().zip(now.named()) {
        match (before, now) {
            (_, Err(cause)) if before != now => tracing::warn!("Not ready: {name}: {cause}"),
            _ => {}
        }
    }
    if now.all_good() && !before.all_good() {
        tracing::info!("Ready: database, HSM, audit log and clock are good.");
    }
}
