//! What Linux tells about the process at the other end of a socket: CPU time used and peak memory, from /proc.

use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::Duration;

/// The kernel's unit in /proc/<pid>/stat, the same on every architecture that Kubernetes runs on.
const TICKS_PER_SECOND: u64 = 100;

#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
}

#[derive(Debug)]
pub(super) struct Observed {
    /// Of all its threads.
    pub(super) cpu: Duration,
    pub(super) peak_memory_kib: Option<u64>,
}

/// The process that serves a socket. None if it lives in another PID namespace, where it has no number for us.
///
/// # Errors
/// Nobody accepts on the socket.
pub(super) fn behind(socket: &str) -> io::Result<Option<Process>> {
    let address = match socket.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let stream = UnixStream::connect_addr(&address)?;
    let peer = rustix::net::sockopt::socket_peercred(&stream);
    let pid = peer.ok().and_then(|peer| u32::try_from(peer.pid.as_raw_nonzero().get()).ok());
    Ok(pid.map(Process::new))
}

impl Process {
    pub(super) fn new(pid: u32) -> Self {
        Process { pid }
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// None once the process is gone.
    pub(super) fn observe(&self) -> Option<Observed> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let peak_memory_kib = peak_memory(&status);
        // The fine count forgets a thread when it ends, the coarse one does not: without it, a process whose threads
        // come and go would seem to give time back.
        let cpu = self.scheduled().max(self.ticks())?;
        Some(Observed { cpu, peak_memory_kib })
    }

    /// The scheduler's own count of all living threads, in nanoseconds; not every kernel keeps it.
    fn scheduled(&self) -> Option<Duration> {
        let mut sum = Duration::ZERO;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid)).ok()? {
            let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
            sum += on_cpu(&text)?;
        }
        Some(sum)
    }

    /// Of the whole process, ended threads included, in hundredths of a second.
    fn ticks(&self) -> Option<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        user_and_system(&stat)
    }
}

/// First number of a `schedstat` file.
fn on_cpu(schedstat: &str) -> Option<Duration> {
    schedstat.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

/// Fields 14 and 15 of a `stat` file. Field 2 is the program's name in parentheses and may hold anything.
fn user_and_system(stat: &str) -> Option<Duration> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let ticks = user.checked_add(system)?;
    Some(Duration::from_millis(ticks.checked_mul(1000 / TICKS_PER_SECOND)?))
}

/// `VmHWM:     8420 kB` of a `status` file.
fn peak_memory(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn this_process_can_be_observed() {
        let observe = || Process::new(std::process::id()).observe().unwrap();
        // Where the kernel keeps the coarse count alone, the first hundredth of a second takes its time.
        assert!((0..1_000_000).any(|_| observe().cpu > Duration::ZERO));
        assert!(observe().peak_memory_kib.unwrap() > 100);
        assert!(Process::new(u32::MAX).observe().is_none());
    }

    #[test]
    fn what_a_thread_used_stays_counted_when_it_ended() {
        let this = Process::new(std::process::id());
        let cpu = || this.observe().unwrap().cpu;
        let before = cpu();
        let worker = || {
            while cpu() < before + Duration::from_millis(300) {
                std::hint::spin_loop();
            }
        };
        std::thread::scope(|scope| scope.spawn(worker).join()).unwrap();
        assert!(cpu() >= before + Duration::from_millis(250));
    }

    #[test]
    fn a_program_named_like_fields_does_not_shift_them() {
        let stat = "42 (a) 9 (b) S 1 1 1 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 1 0 5 0 0";
        assert_eq!(user_and_system(stat), Some(Duration::from_secs(2)));
    }

    #[test]
    fn the_other_end_of_a_socket_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let found = behind(path.to_str().unwrap()).unwrap().unwrap();
        assert_eq!(found.pid(), std::process::id());
        assert!(behind("/nonexistent/socket").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _ = (on_cpu(&text), peak_memory(&text));
            if let Some(cpu) = user_and_system(&text) {
                prop_assert!(text.contains(')') && cpu < Duration::MAX);
            }
        }
    }
}
