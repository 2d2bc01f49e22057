//! `cargo xtask demo`: the main job through real parts, in front of the reader's eyes.

mod kept;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;

use keelson_e2e::assets::{Assets, Kubernetes, Programs};
use keelson_e2e::chain::{Chain, Options, SecretsThrough, fresh_folder, run_folder};
use keelson_e2e::process::Lifetime;
use keelson_e2e::{Result, assets};

use crate::{cargo, envtest, packages};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave everything running and write target/demo/env.sh, to be sourced.
    #[arg(long, conflicts_with = "stop")]
    keep: bool,
    /// End what an earlier --keep left running.
    #[arg(long)]
    stop: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if args.stop {
        kept::stop()?;
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "Keelson demo: a Kubernetes secret, encrypted at rest with a key that lives in an HSM.\n"
    );
    kept::stop_earlier()?;
    let assets = real_programs()?;
    step("build the workspace (release)");
    cargo::build_release()?;
    let dir = run_folder("demo");
    fresh_folder(&dir)?;
    let chain = Chain::start(
        Options {
            dir: &dir,
            programs: Programs::find()?,
            assets,
            secrets: SecretsThrough::V1,
            usual_ports: true,
            lifetime: if args.keep { Lifetime::Detached } else { Lifetime::WithParent },
            configure: |_| (),
        },
        &mut step,
    )?;
    println!();
    match chain.cluster {
        Some(_) => show::with_kubernetes(&chain)?,
        None => show::without_kubernetes(&chain)?,
    }
    if args.keep {
        return kept::release(chain, &folder()).map(|()| ExitCode::SUCCESS);
    }
    drop(chain);
    kept::remove_files()?;
    println!(
        "\nEverything is stopped and its files are removed. `cargo xtask demo --keep` leaves it running for you \
         to try."
    );
    Ok(ExitCode::SUCCESS)
}

/// SoftHSM2 must be there. kube-apiserver may be left out, but only where nothing could provide it: one that is
/// given and broken, or does not build, is a failure.
fn real_programs() -> Result<Option<Assets>> {
    step("SoftHSM2 (Debian package softhsm2)");
    packages::for_the_chain()?;
    step("kube-apiserver, kubectl and etcd");
    if envtest::is_possible() {
        return envtest::ensure(Kubernetes::V1_37).map(Some);
    }
    println!(
        "   left out: there is no Go to build them with, and KUBEBUILDER_ASSETS does not name a folder that has \
         them. The rest of the chain is shown, driven as kube-apiserver drives it."
    );
    Ok(None)
}

/// What a reader finds of the demo: `env.sh` and, where the path is short enough, everything else.
fn folder() -> PathBuf {
    assets::target_folder().join("demo")
}

fn step(what: &str) {
    println!("-> {what}");
}
