//! The plug-in is replaced again and again while kube-apiserver is used: no call of its API fails.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use keelson_e2e::apiserver::Proxy;
use keelson_e2e::assets::{Kubernetes, Programs};
use keelson_e2e::chain::{Chain, SecretsThrough, fresh_folder, run_folder};
use keelson_e2e::plugin::Plugin;
use keelson_e2e::process::Lifetime;
use keelson_e2e::{Error, Result, ports, wait};

const UPGRADES: usize = 6;
const WRITERS: usize = 4;
/// API calls before and after each step of an upgrade.
const CALLS: usize = 40;
const SECRETS: &str = "/api/v1/namespaces/default/secrets";
const CONFIGMAPS: &str = "/api/v1/namespaces/default/configmaps";

/// Each write of a secret is an Encrypt (KMS v1); configmaps go through KMS v2 over a connection of their own.
#[test]
fn no_api_call_fails_while_the_plug_in_is_replaced() -> Result<()> {
    let mut chain = Chain::for_test("upgrade", Some(Kubernetes::V1_37), SecretsThrough::V1, |c| {
        c.more.push(("TAKE_OVER_SOCKET", "true".to_owned()));
    })?;
    let dir = run_folder("e2e/upgrade");
    let proxy = chain.kubectl()?.proxy(&dir, Lifetime::WithParent)?;
    let (calls, end) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let (proxy, calls, end) = (&proxy, &calls, &end);
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| scope.spawn(move || write_and_read(proxy, writer, calls, end)))
            .collect();
        let upgraded = upgrade_repeatedly(&mut chain, calls);
        end.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().map_err(|_| Error::answer("a writer", "it panicked"))??;
        }
        upgraded
    })?;
    println!("{} API calls, {UPGRADES} upgrades, none failed", calls.into_inner());
    Ok(())
}

fn upgrade_repeatedly(chain: &mut Chain, calls: &AtomicUsize) -> Result<()> {
    let program = Programs::find()?.kmsplugin;
    for number in 0..UPGRADES {
        goes_on(calls)?;
        let dir = run_folder(&format!("e2e/upgrade/plug-in-{number}"));
        fresh_folder(&dir)?;
        let mut config = chain.plugin.config.clone();
        config.health_port = ports::free()?;
        let mut new = Plugin::prepare(&program, &dir, config, Lifetime::WithParent)?;
        new.start()?;
        goes_on(calls)?;
        chain.plugin.server.stop()?;
        chain.plugin = new;
    }
    goes_on(calls)
}

/// Returns once some more calls were answered.
fn goes_on(calls: &AtomicUsize) -> Result<()> {
    let until = calls.load(Ordering::Relaxed) + CALLS;
    wait::until("more API calls", Duration::from_secs(60), &[], || {
        match calls.load(Ordering::Relaxed) {
            seen if seen >= until => Ok(()),
            seen => Err(format!("{seen} of {until} calls")),
        }
    })
}

fn write_and_read(
    proxy: &Proxy,
    writer: usize,
    calls: &AtomicUsize,
    end: &AtomicBool,
) -> Result<()> {
    let mut number = 0;
    while !end.load(Ordering::Relaxed) {
        let name = format!("upgrade-{writer}-{number}");
        let object = |kind: &str, data: &str| {
            format!(
                r#"{{"kind":"{kind}","apiVersion":"v1","metadata":{{"name":"{name}"}},{data}}}"#
            )
        };
        proxy.create(SECRETS, &object("Secret", r#""stringData":{"k":"v"}"#))?;
        proxy.create(CONFIGMAPS, &object("ConfigMap", r#""data":{"k":"v"}"#))?;
        proxy.read(&format!("{SECRETS}/{name}"))?;
        proxy.read(&format!("{CONFIGMAPS}/{name}"))?;
        calls.fetch_add(4, Ordering::Relaxed);
        number += 1;
    }
    Ok(())
}
