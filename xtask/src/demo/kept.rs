//! A demo that stays: what runs is written down, so that `--stop` (or the next demo) ends exactly that.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use keelson_e2e::chain::{Chain, Cluster, run_folder};
use keelson_e2e::{Error, Result, assets, pki, wait};
use rustix::process::{Pid, Signal};

use crate::envtest;

/// Leaves `chain` running, writes `env.sh` and says what to try.
///
/// # Errors
/// When a file cannot be written; everything is ended then.
pub(super) fn release(chain: Chain, folder: &Path) -> Result<()> {
    let env = environment(&chain)?;
    fs::create_dir_all(folder).map_err(Error::machine(format!("make {}", folder.display())))?;
    let script = folder.join("env.sh");
    pki::write_private(&script, &env)?;
    pki::write_file(&record(), &running(&chain)?)?;
    let Chain { cluster, plugin, key_service, .. } = chain;
    plugin.server.release()?;
    key_service.server.release()?;
    println!("\nEverything is left running. To try it:\n\n  source {}", script.display());
    if let Some(Cluster { apiserver, etcd, .. }) = cluster {
        apiserver.server.release()?;
        etcd.process.release();
        println!("  kubectl get secret secret1 -o yaml");
        println!("  etcdctl get /registry/secrets/default/secret1 | kmsctl inspect -");
    }
    println!("  kmsctl keys list\n\n`cargo xtask demo --stop` ends it.");
    Ok(())
}

/// Ends what an earlier `--keep` left running.
///
/// # Errors
/// When a process does not end.
pub(super) fn stop() -> Result<()> {
    match end_recorded()? {
        0 => println!("no demo is running"),
        ended => println!("{ended} processes of the demo are ended"),
    }
    Ok(())
}

/// As [`stop`], silent when there is nothing to end.
///
/// # Errors
/// When a process does not end.
pub(super) fn stop_earlier() -> Result<()> {
    let ended = end_recorded()?;
    if ended > 0 {
        println!("-> ended an earlier demo ({ended} processes)");
    }
    Ok(())
}

/// Removes what an ended demo leaves: the HSM's token and its PIN are among it. After a failure it stays, for its logs.
///
/// # Errors
/// When a file cannot be removed.
pub(super) fn remove_files() -> Result<()> {
    for folder in [run_folder("demo"), super::folder()] {
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::machine(format!("remove {}", folder.display()))(error));
            }
            _ => (),
        }
    }
    Ok(())
}

/// One line per process: its number, when it started (in the kernel's ticks), its name.
fn record() -> PathBuf {
    assets::target_folder().join("demo-processes")
}

fn running(chain: &Chain) -> Result<String> {
    let mut processes = vec![chain.plugin.server.running()?, chain.key_service.server.running()?];
    if let Some(cluster) = &chain.cluster {
        processes.extend([cluster.apiserver.server.running()?, &cluster.etcd.process]);
    }
    Ok(processes
        .into_iter()
        .map(|p| format!("{} {} {}\n", p.pid(), start_time(p.pid()).unwrap_or_default(), p.name()))
        .collect())
}

fn end_recorded() -> Result<usize> {
    let Ok(text) = fs::read_to_string(record()) else { return Ok(0) };
    let alive: Vec<Pid> = text.lines().filter_map(still_the_same).collect();
    for pid in &alive {
        // It may have ended by itself in between.
        let _ = rustix::process::kill_process(*pid, Signal::TERM);
    }
    let ended = || alive.iter().all(|pid| start_time(pid.as_raw_nonzero().get()).is_none());
    let politely = wait::until("the end of the demo", POLITE, &[], || {
        if ended() { Ok(()) } else { Err("some still run".to_owned()) }
    });
    if politely.is_err() {
        // kube-apiserver waits for watching clients for over a minute; its data is only a demo's.
        for pid in &alive {
            let _ = rustix::process::kill_process(*pid, Signal::KILL);
        }
        wait::until("the end of the demo", POLITE, &[], || {
            if ended() { Ok(()) } else { Err("some still run after SIGKILL".to_owned()) }
        })?;
    }
    fs::remove_file(record()).map_err(Error::machine("forget the ended demo"))?;
    remove_files()?;
    Ok(alive.len())
}

/// A number may belong to another process by now: its start time tells.
fn still_the_same(line: &str) -> Option<Pid> {
    let mut words = line.split_whitespace();
    let pid: i32 = words.next()?.parse().ok()?;
    (start_time(pid)? == words.next()?).then(|| Pid::from_raw(pid))?
}

/// Field 22 of /proc/PID/stat; none for a process that is gone or only waits to be collected.
fn start_time(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit(')').next()?.split_whitespace();
    (fields.next()? != "Z").then(|| fields.nth(18).map(str::to_owned))?
}

const POLITE: Duration = Duration::from_secs(5);

fn environment(chain: &Chain) -> Result<String> {
    let mut variables: Vec<(&str, String)> = Vec::new();
    let mut folders = vec![assets::target_folder().join("release")];
    if let Some(cluster) = &chain.cluster {
        folders.push(assets::envtest_folder(keelson_e2e::assets::Kubernetes::V1_37));
        folders.extend(envtest::given_folder());
        variables.push(("KUBECONFIG", cluster.apiserver.kubectl.kubeconfig.display().to_string()));
        variables.push(("ETCDCTL_ENDPOINTS", cluster.etcd.url()));
    }
    variables.push(("KMS_SOCKET", chain.plugin.config.socket.display().to_string()));
    variables.push(("KMS_PLUGIN_PID", chain.plugin.server.running()?.pid().to_string()));
    variables.push(("KMS_SERVER_PID", chain.key_service.server.running()?.pid().to_string()));
    variables.push(("KMS_CRK_ID", chain.crk_id.clone()));
    variables.extend(chain.kmsctl.envs().iter().cloned());
    let mut text = String::from("# Written by `cargo xtask demo --keep`; to be sourced.\n");
    for (name, value) in variables {
        text.push_str(&format!("export {name}={}\n", quoted(&value)));
    }
    let path: Vec<String> =
        folders.iter().map(|folder| quoted(&folder.display().to_string())).collect();
    text.push_str(&format!("export PATH={}:\"$PATH\"\n", path.join(":")));
    Ok(text)
}

/// One word for any POSIX shell.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_value_stays_one_word() {
        assert_eq!(quoted("/tmp/a b"), "'/tmp/a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn only_the_very_process_that_was_started_counts() {
        let own = std::process::id();
        let started = start_time(i32::try_from(own).unwrap()).unwrap();
        assert!(still_the_same(&format!("{own} {started} kmsplugin")).is_some());
        assert!(still_the_same(&format!("{own} 1{started} kmsplugin")).is_none());
        assert!(still_the_same("").is_none());
    }
}
