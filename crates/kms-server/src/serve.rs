//! The running server: its three listeners, and the look at its parts that readiness comes from.

use crate::app::App;
use crate::audit::anchors::Anchors;
use crate::failures;
use crate::health::{ClockWatch, Parts};
use crate::http;
use crate::limits::Port;
use crate::listen;
use crate::metrics::Snapshot;
use crate::ops::refused::record_rest;
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
/// How soon they are looked at again while one of them is missing: whoever waits for this server hears of it at once.
const SOON: Duration = Duration::from_millis(200);
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
        move |peer, request| http::keys(app.clone(), peer, request)
    };
    let tokens = {
        let app = app.clone();
        move |peer, request| http::tokens(app.clone(), peer, request)
    };
    app.audit.show_sync_times(app.metrics.audit_sync_seconds());
    let mut anchors = Anchors::new(&app);
    tokio::join!(
        listen::serve(
            listeners.keys,
            || tls.keys(),
            (&app.limits, Port::Keys),
            keys,
            shutdown.clone()
        ),
        listen::serve(
            listeners.tokens,
            || tls.tokens(),
            (&app.limits, Port::Tokens),
            tokens,
            shutdown.clone()
        ),
        admin::serve(listeners.health, health_routes(&app, &tls), shutdown.clone()),
        watch_health(&app, &clock, &shutdown),
        watch_certificate(&app, &tls, &shutdown),
        watch_capacity(&app, &shutdown),
        keep_failures(&app, &shutdown),
        anchors.keep(&shutdown),
    );
    record_rest(&app).await;
    // What was answered while the listeners closed is covered too.
    anchors.anchor().await;
    app.uses.give_back(&*app.store).await;
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
        audit: app.audit.lag(),
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

/// How full the HSM is, how far its versions are used up, and when the next key expires. Keys come and go slowly, and a large database takes a moment to count them.
async fn watch_capacity(app: &App, shutdown: &Shutdown) {
    loop {
        match app.store.known_versions().await {
            Ok(versions) => app.metrics.versions(versions.len()),
            Err(error) => tracing::debug!("the versions of keys cannot be counted: {error}"),
        }
        match app.store.most_gcm_uses().await {
            Ok(most) => app.metrics.gcm_uses(most),
            Err(error) => tracing::debug!("the uses of keys cannot be read: {error}"),
        }
        match app.store.next_expiry(app.now()).await {
            Ok(next) => app.metrics.next_expiry(next),
            Err(error) => tracing::debug!("the expiry of keys cannot be read: {error}"),
        }
        tokio::select! {
            () = shutdown.requested() => return,
            () = tokio::time::sleep(COUNT_INTERVAL) => {}
        }
    }
}

/// The records of logins and tokens that are refused over and over.
async fn keep_failures(app: &App, shutdown: &Shutdown) {
    loop {
        tokio::select! {
            () = shutdown.requested() => return,
            () = tokio::time::sleep(failures::PERIOD) => {}
        }
        record_rest(app).await;
    }
}

async fn watch_certificate(app: &App, tls: &Arc<Tls>, shutdown: &Shutdown) {
    loop {
        tokio::select! {
            () = shutdown.requested() => return,
            () = tokio::time::sleep(RELOAD_INTERVAL) => {}
        }
        let files = tls.clone();
        // On a thread of its own: a file system that hangs must not hold up the listeners beside this.
        match tokio::task::spawn_blocking(move || files.reload()).await {
            // The panic is in the log already.
            Ok(Ok(false)) | Err(_) => {}
            Ok(Ok(true)) => {
                app.metrics.certificate_reloaded(true);
                tracing::info!("The TLS certificate was read again; new connections have it.");
            }
            Ok(Err(error)) => {
                app.metrics.certificate_reloaded(false);
                tracing::error!("The TLS certificate before stays in use: {error}");
            }
        }
    }
}

async fn watch_health(app: &Arc<App>, clock: &ClockWatch, shutdown: &Shutdown) {
    loop {
        let before = app.health.last();
        // Side by side: a count that hangs with the HSM must not make the news of it late.
        let (found, counted) =
            tokio::join!(check(app, clock), timeout(PROBE_PATIENCE, app.vault.statistics()));
        app.metrics.ready(&found);
        app.metrics.hsm(app.vault.circuit(), counted.ok().flatten());
        log_change(&before, &found);
        let pause = if found.all_good() { PROBE_INTERVAL } else { SOON };
        app.health.set(found);
        tokio::select! {
            () = shutdown.requested() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn check(app: &App, clock: &ClockWatch) -> Parts {
    // The audit log is asked whatever the others say: it writes down that it goes on as soon as it can.
    let (database, hsm, audit) =
        tokio::join!(in_time(app.store.probe()), in_time(app.vault.probe()), in_time(audit(app)),);
    Parts { database, hsm, audit, clock: clock.check() }
}

/// A disk that hangs says nothing: whoever waits for it is what shows it.
async fn audit(app: &App) -> Result<(), String> {
    let waited = app.audit.lag().oldest;
    if waited >= PROBE_PATIENCE {
        return Err(format!("its disk has not taken a record for {} s", waited.as_secs()));
    }
    app.audit.probe().await.map_err(|error| error.to_string())
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
