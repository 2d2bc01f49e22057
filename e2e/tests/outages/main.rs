//! The rows of `docs/outages.md`, one test each, with the real kube-apiserver. Every test asserts every column and
//! leaves the chain whole. What the columns are is in `columns`.

mod access;
mod columns;
mod key_service;
mod network;
mod service_account;
mod time;

use keelson_e2e::assets::Kubernetes;
use keelson_e2e::chain::{Chain, SecretsThrough, Shared, run_folder};
use keelson_e2e::plugin::Config;

const NAME: &str = "outages";

static CHAIN: Shared =
    Shared::new(|| Chain::for_test(NAME, Some(Kubernetes::V1_37), SecretsThrough::V1, probe_often));

fn probe_often(config: &mut Config) {
    config.more.push(("PROBE_INTERVAL_IN_SECONDS", "1".to_owned()));
}

fn folder() -> std::path::PathBuf {
    run_folder(&format!("e2e/{NAME}"))
}
