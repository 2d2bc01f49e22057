//! What keeps keys inside the process while it lives, and that none is left behind in its memory.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;

use crate::plugin::{Plugin, Setup, command};
use crate::service::Service;

/// A key that is dropped is gone at once; what is waited for is the probe that holds one for a moment.
const SOON: Duration = Duration::from_secs(60);

/// The whole memory of the real process is searched for the bytes of every DEK that the service has given out.
#[tokio::test(flavor = "multi_thread")]
async fn a_dek_that_is_dropped_leaves_no_copy_in_memory() {
    let service = Service::start("canary-api-key-93ab").await;
    let setup = Setup::for_service(&service).with("PROBE_INTERVAL_IN_SECONDS", "3600");
    let plugin = setup.ready();
    let sealed = plugin.encrypt_v2(&[7; 32]).await.unwrap();
    plugin.decrypt_v2(&sealed).await.unwrap();
    let cipher = plugin.encrypt_v1(&[7; 32]).await.unwrap();
    plugin.decrypt_v1(&cipher).await.unwrap();
    match deks_in(&plugin, &service) {
        Ok(found) => assert!(found > 0, "the DEK that seals is held, and would be found"),
        // Not even the same user may look into the process.
        Err(error) => return assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}"),
    }
    setup.with("CACHE_TIMEOUT_IN_HOURS", "0").write_config();
    plugin.signal(Signal::HUP);
    plugin.line("The configuration was read again and is in use.");
    let gone = async {
        while deks_in(&plugin, &service).unwrap() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let left = tokio::time::timeout(SOON, gone).await;
    assert!(left.is_ok(), "{} copies are left", deks_in(&plugin, &service).unwrap());
    assert_eq!(plugin.decrypt_v2(&sealed).await.unwrap(), [7; 32], "it is asked for again");
}

/// Where this machine writes no core dumps, there is nothing to see. (Of a SIGSEGV from outside Rust's own handler makes
/// nothing.)
#[test]
fn a_crash_leaves_no_core_dump() {
    let with_dumps = |program: &str| {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", r#"ulimit -c unlimited 2>/dev/null; exec "$@""#, "sh", program]);
        shell
    };
    let folder = tempfile::tempdir().unwrap();
    let mut other = with_dumps("cat");
    let mut other = other
        .current_dir(folder.path())
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("a process that may be dumped");
    let pid = rustix::process::Pid::from_child(&other);
    rustix::process::kill_process(pid, Signal::ABORT).unwrap();
    if !other.wait().unwrap().core_dumped() {
        eprintln!("this machine writes no core dumps");
    }

    let setup = Setup::new();
    let mut dumped = with_dumps(command().get_program().to_str().unwrap());
    dumped.env_clear().current_dir(folder.path());
    let mut plugin = setup.start_by(dumped);
    plugin.line("The Provider server is started.");
    plugin.signal(Signal::ABORT);
    let end = plugin.wait();
    assert_eq!((end.signal(), end.core_dumped()), (Some(6), false), "{end:?}");
}

/// How often a DEK stands in the memory of the process.
fn deks_in(plugin: &Plugin, service: &Service) -> std::io::Result<usize> {
    let deks: Vec<_> = service.deks().iter().map(|dek| STANDARD.decode(dek).unwrap()).collect();
    let folder = format!("/proc/{}", plugin.pid());
    let memory = File::open(format!("{folder}/mem"))?;
    let mut found = 0;
    for line in std::fs::read_to_string(format!("{folder}/maps"))?.lines() {
        let mut words = line.split(' ');
        let (range, rights) = (words.next().unwrap(), words.next().unwrap());
        if !rights.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|end| u64::from_str_radix(end, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        // A mapping may have gone meanwhile.
        if memory.read_exact_at(&mut bytes, start).is_ok() {
            found += deks.iter().map(|dek| occurrences(&bytes, dek)).sum::<usize>();
        }
    }
    Ok(found)
}

fn occurrences(bytes: &[u8], dek: &[u8]) -> usize {
    bytes.windows(dek.len()).filter(|window| *window == dek).count()
}
