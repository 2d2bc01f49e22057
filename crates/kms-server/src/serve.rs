//! The running server: its three listeners, and the look at its parts that readiness comes from.

use crate::app::App;
use crate::http;
use crate::reconcile;
use crate::store::StoreError;
use crate::tls;
use kms_daemon::admin;
use kms_daemon::lifecycle::Shutdown;
use kms_hsm::VaultError;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// How often HSM and database are asked whether they are there. Readiness is never older than this.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);

/// The sockets that the server answers on, already bound.
#[derive(Debug)]
pub struct Listeners {
    pub keys: TcpListener,
    pub tokens: TcpListener,
    pub health: TcpListener,
}

/// Serves until the shutdown is requested and what ran then has been answered; the store is closed then.
pub async fn serve(app: Arc<App>, listeners: Listeners, tls: TlsAcceptor, shutdown: Shutdown) {
    let keys = {
        let app = app.clone();
        move |request| http::keys(app.clone(), request)
    };
    let tokens = {
        let app = app.clone();
        move |request| http::tokens(app.clone(), request)
    };
    tokio::join!(
        tls::serve(listeners.keys, tls.clone(), keys, shutdown.clone()),
        tls::serve(listeners.tokens, tls, tokens, shutdown.clone()),
        admin::serve(listeners.health, health_routes(&app), shutdown.clone()),
        watch_health(&app, &shutdown),
    );
    app.store.close().await;
}

fn health_routes(app: &Arc<App>) -> admin::Routes {
    let metrics = app.clone();
    let ready = app.clone();
    admin::Routes::new(move || metrics.metrics.render())
        // Alive means that this process answers. A restart does not bring back an HSM.
        .check("/livez", || async { Ok(()) })
        .check("/readyz", move || {
            let last = ready.health.last();
            async move { last }
        })
}

async fn watch_health(app: &App, shutdown: &Shutdown) {
    loop {
        let (before, found) = (app.health.last(), check(app).await);
        app.metrics.ready(found.is_ok());
        log_change(&before, &found);
        let back = before.is_err() && found.is_ok();
        app.health.set(found);
        if back {
            compare(app).await;
        }
        tokio::select! {
            () = shutdown.requested() => return,
            () = tokio::time::sleep(PROBE_INTERVAL) => {}
        }
    }
}

/// At the start, and whenever the HSM was away: it may have come back with other keys in it.
async fn compare(app: &App) {
    match reconcile::differences(&*app.vault, &*app.store).await {
        Ok(found) => reconcile::report(&found),
        Err(error) => tracing::warn!("HSM and database cannot be compared: {error}"),
    }
}

async fn check(app: &App) -> Result<(), String> {
    let store = app.store.probe().await.map_err(|e: StoreError| format!("database: {e}"));
    let vault = app.vault.probe().await.map_err(|e: VaultError| format!("HSM: {e}"));
    store.and(vault)
}

fn log_change(before: &Result<(), String>, now: &Result<(), String>) {
    match (before, now) {
        (_, Err(cause)) if before != now => tracing::warn!("Not ready: {cause}"),
        (Err(_), Ok(())) => tracing::info!("Ready: HSM and database answer."),
        _ => {}
    }
}
