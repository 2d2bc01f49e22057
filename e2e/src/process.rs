//! Child processes that never outlive their purpose.
//!
//! Each server gets its own process group, a log file and a kill on drop. The kernel kills it as well when this
//! process dies in any other way (`setpriv --pdeathsig`), so a crashed test or a SIGKILLed demo leaves nothing
//! behind. Only a process started as [`Lifetime::Detached`] and then released stays: the demo's `--keep`.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use rustix::process::{Pid, Signal};

use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::wait;

/// How long a process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// Ends with the process that started it, however that one ends.
    WithParent,
    /// In its own session; ends on drop unless [`Process::release`] is called.
    Detached,
}

/// What to start: program, arguments, environment, where its output goes. Of the caller's environment only PATH is
/// handed on: kmsplugin takes settings from variables with names as common as REGION.
#[derive(Debug, Clone)]
pub struct Spec {
    pub name: String,
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub envs: Vec<(String, OsString)>,
    pub log: PathBuf,
    pub lifetime: Lifetime,
    /// Files into which the process writes its number before it becomes the program: see [`Cgroup`].
    groups: Vec<PathBuf>,
}

impl Spec {
    /// A process called `name` whose output is appended to `dir/name.log`.
    pub fn new(name: &str, program: &Path, dir: &Path, lifetime: Lifetime) -> Self {
        Self {
            name: name.to_owned(),
            program: program.to_owned(),
            args: Vec::new(),
            envs: Vec::new(),
            log: dir.join(format!("{name}.log")),
            lifetime,
            groups: Vec::new(),
        }
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.envs.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// From the next start on, the process and its children belong to `group`.
    pub fn confine(&mut self, group: &Cgroup) {
        self.groups = group.members();
    }

    fn command(&self) -> Result<Command> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(Error::machine(format!("open {}", self.log.display())))?;
        let stderr = log.try_clone().map_err(Error::machine("share the log file"))?;
        let mut command = match self.lifetime {
            Lifetime::WithParent => {
                let mut setpriv = Command::new("setpriv");
                setpriv.args(["--pdeathsig", "KILL", "--"]).process_group(0);
                setpriv
            }
            // setsid makes a session and with it a process group; it must not lead one before.
            Lifetime::Detached => Command::new("setsid"),
        };
        if !self.groups.is_empty() {
            command.args(["/bin/sh", "-c", ENTER_AND_EXEC]).arg(&self.program);
            command.args(&self.groups).arg("--");
        } else {
            command.arg(&self.program);
        }
        command
            .args(&self.args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .envs(self.envs.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(stderr);
        Ok(command)
    }
}

/// `$0` is the program, the control groups' files end with `--`, its arguments follow. The number stays the same.
const ENTER_AND_EXEC: &str =
    r#"while [ "$1" != -- ]; do echo $$ > "$1" || exit 1; shift; done; shift; exec "$0" "$@""#;

/// A running server.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    pid: Pid,
    child: Mutex<Child>,
    released: bool,
}

impl Process {
    /// Starts what `spec` says.
    ///
    /// # Errors
    /// When the program is missing or the machine refuses.
    pub fn start(spec: &Spec) -> Result<Self> {
        if !spec.program.is_file() {
            return Err(Error::Missing {
                what: spec.program.display().to_string(),
                remedy: format!("{} cannot be started without it", spec.name),
            });
        }
        let child = spawn(spec.command()?, &spec.name)?;
        let pid = pid_of(&child);
        Ok(Self {
            name: spec.name.clone(),
            log: spec.log.clone(),
            pid,
            child: Mutex::new(child),
            released: false,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The last `lines` lines of the log.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        let skip = text.lines().count().saturating_sub(lines);
        text.lines().skip(skip).collect::<Vec<_>>().join("\n")
    }

    /// How the process ended, if it did.
    pub fn ended(&self) -> Option<ExitStatus> {
        lock(&self.child).try_wait().ok().flatten()
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        rustix::process::kill_process(self.pid, signal)
            .map_err(|error| Error::machine(format!("signal {}", self.name))(error.into()))
    }

    /// SIGKILL, and waits until the process is gone.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill(self) -> Result<()> {
        self.end(Signal::KILL, Duration::from_secs(10)).map(drop)
    }

    /// SIGTERM, and waits until the process is gone.
    ///
    /// # Errors
    /// When it does not end `within` the time; it is killed then.
    pub fn stop(self, within: Duration) -> Result<ExitStatus> {
        self.end(Signal::TERM, within)
    }

    /// Leaves a detached process running after the end of this one.
    pub fn release(mut self) -> i32 {
        self.released = true;
        lock(alive()).remove(&self.pid);
        self.pid()
    }

    /// The most memory that was resident at once (VmHWM), in bytes.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn peak_memory(&self) -> Result<u64> {
        peak_memory(self.pid())
    }

    /// CPU time so far: by the scheduler's own count of the living threads, or by the coarse one of the whole process,
    /// which forgets none that has ended and which every kernel keeps.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        let process = format!("/proc/{}", self.pid());
        let path = format!("{process}/stat");
        let stat = fs::read_to_string(&path).map_err(Error::machine(format!("read {path}")))?;
        let ticks = ticks(&stat).ok_or_else(|| Error::answer(&path, stat))?;
        Ok(ticks.max(scheduled(&process).unwrap_or_default()))
    }

    fn end(self, signal: Signal, within: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.ended() {
            return Ok(status);
        }
        self.signal(signal)?;
        let what = format!("the end of {} after {signal:?}", self.name);
        wait::until(&what, within, &[], || self.ended().ok_or_else(|| "it still runs".to_owned()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        kill(self.pid);
        drop(lock(&self.child).wait());
        lock(alive()).remove(&self.pid);
    }
}

/// `None` where the kernel does not count, or a thread has just ended.
fn scheduled(process: &str) -> Option<Duration> {
    let mut sum = Duration::ZERO;
    for task in fs::read_dir(format!("{process}/task")).ok()? {
        let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        sum += Duration::from_nanos(text.split_whitespace().next()?.parse().ok()?);
    }
    Some(sum)
}

/// User and system time, in hundredths of a second. The second field is the program's name, which may hold anything.
fn ticks(stat: &str) -> Option<Duration> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(Duration::from_millis(10 * (user + system)))
}

/// Runs `command` to its end and returns what it printed.
///
/// # Errors
/// When it cannot be started. A failure of the command itself is in the answer.
pub fn output(mut command: Command, stdin: &[u8]) -> Result<Output> {
    let name = program_name(&command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = spawn(command, &name)?;
    let pid = pid_of(&child);
    let input = child.stdin.take();
    let output = std::thread::scope(|scope| {
        // A command may end without reading its input (EPIPE): its exit status tells, not the write.
        scope.spawn(move || input.map(|mut pipe| pipe.write_all(stdin)));
        child.wait_with_output()
    });
    lock(alive()).remove(&pid);
    output.map_err(Error::machine(format!("read the output of {name}")))
}

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// When it cannot be started or fails; the text then holds all that it printed.
pub fn stdout(command: Command, stdin: &[u8]) -> Result<Vec<u8>> {
    let text = words(&command);
    let output = output(command, stdin)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let mut printed = String::from_utf8_lossy(&output.stdout).into_owned();
    printed.push_str(&String::from_utf8_lossy(&output.stderr));
    Err(Error::Command {
        command: text,
        status: describe(output.status),
        output: printed.trim_end().to_owned(),
    })
}

/// Starts `command` in its own process group, remembered until [`forget`] or [`kill_all`].
///
/// # Errors
/// When it cannot be started.
pub fn spawn(command: Command, name: &str) -> Result<Child> {
    if is_interrupted() {
        return Err(Error::answer(name, "not started, because an interrupt was received"));
    }
    let program = program_name(&command);
    let (reply, answer) = mpsc::channel();
    let gone = || std::io::Error::other("the spawning thread is gone");
    let started = spawner()
        .send((command, reply))
        .map_err(|_| gone())
        .and_then(|()| answer.recv().map_err(|_| gone())?);
    match started {
        Ok(child) => Ok(child),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Err(Error::Missing {
            what: program,
            remedy: format!("it is needed to start {name}; install it or put it into PATH"),
        }),
        Err(source) => Err(Error::Machine { action: format!("start {name}"), source }),
    }
}

/// A child that was waited for: [`kill_all`] leaves its number alone from now on.
pub fn forget(child: &Child) {
    lock(alive()).remove(&pid_of(child));
}

/// Kills every process that this one has started and not released, and lets no new one start.
pub fn kill_all() {
    INTERRUPTED.store(true, Ordering::SeqCst);
    lock(alive()).iter().copied().for_each(kill);
}

/// Whether [`kill_all`] was called: what fails from then on fails because of it.
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// An exit status in words.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".to_owned(),
    }
}

/// VmHWM of process `pid`.
fn peak_memory(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).map_err(Error::machine(format!("read {path}")))?;
    status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse().ok()
        })
        .map(|kib: u64| kib * 1024)
        .ok_or_else(|| Error::answer(path, "no VmHWM line"))
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn alive() -> &'static Mutex<HashSet<Pid>> {
    static ALIVE: OnceLock<Mutex<HashSet<Pid>>> = OnceLock::new();
    ALIVE.get_or_init(Mutex::default)
}

type Request = (Command, mpsc::Sender<std::io::Result<Child>>);

/// One thread starts all children and never ends: the kernel sends the parent-death signal when the *thread*
/// that forked ends, and a test's thread ends long before the chain that it shares with the next test.
fn spawner() -> mpsc::Sender<Request> {
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    SPAWNER
        .get_or_init(|| {
            let (requests, inbox) = mpsc::channel::<Request>();
            std::thread::spawn(move || {
                for (mut command, reply) in inbox {
                    // Held while forking, so that kill_all sees the child or the child is never started.
                    let mut alive = lock(alive());
                    let child = if is_interrupted() {
                        Err(std::io::Error::from(std::io::ErrorKind::Interrupted))
                    } else {
                        command.spawn()
                    };
                    if let Ok(child) = &child {
                        alive.insert(pid_of(child));
                    }
                    drop(reply.send(child));
                }
            });
            requests
        })
        .clone()
}

/// The process and its group: setsid may not have made the group yet. Fails only when both are gone already.
fn kill(pid: Pid) {
    let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    let _ = rustix::process::kill_process(pid, Signal::KILL);
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn program_name(command: &Command) -> String {
    Path::new(command.get_program())
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// Program and arguments; the environment may hold an API key.
fn words(command: &Command) -> String {
    let args = command.get_args().map(|arg| arg.to_string_lossy().into_owned());
    std::iter::once(program_name(command)).chain(args).collect::<Vec<_>>().join(" ")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(dir: &Path, name: &str, script: &str) -> Spec {
        Spec::new(name, Path::new("/bin/sh"), dir, Lifetime::WithParent).arg("-c").arg(script)
    }

    fn is_gone(pid: Pid) -> std::result::Result<(), String> {
        match rustix::process::test_kill_process(pid) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn dropping_a_process_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let process = Process::start(&spec(dir.path(), "sleeper", "exec sleep 600")).unwrap();
        let pid = process.pid;
        assert!(process.ended().is_none());
        drop(process);
        is_gone(pid).unwrap();
    }

    #[test]
    fn a_detached_process_ends_with_its_handle_too_unless_released() {
        let dir = tempfile::tempdir().unwrap();
        let mut detached = spec(dir.path(), "detached", "exec sleep 600");
        detached.lifetime = Lifetime::Detached;
        let dropped = Process::start(&detached).unwrap();
        let pid = dropped.pid;
        drop(dropped);
        is_gone(pid).unwrap();

        let released = Process::start(&detached).unwrap().release();
        let released = Pid::from_raw(released).unwrap();
        assert!(is_gone(released).is_err());
        kill(released);
    }

    #[test]
    fn an_early_end_is_reported_with_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let script = "echo listening; echo 'no such token' >&2; exit 3";
        let process = Process::start(&spec(dir.path(), "server", script)).unwrap();
        let never = || Err::<(), _>("connection refused".to_owned());
        let error = wait::until("its readiness", Duration::from_secs(20), &[&process], never)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("server ended (exit code 3) while its readiness was awaited"),
            "{error}"
        );
        assert!(error.ends_with("listening\nno such token"), "{error}");
    }

    #[test]
    fn a_command_is_judged_by_its_status_and_fed_its_input() {
        let mut cat = Command::new("cat");
        cat.arg("-");
        assert_eq!(stdout(cat, b"payload").unwrap(), b"payload");
        let mut failing = Command::new("sh");
        failing.args(["-c", "echo out; echo err >&2; exit 4"]);
        let error = stdout(failing, b"").unwrap_err().to_string();
        assert_eq!(error, "sh -c echo out; echo err >&2; exit 4 failed (exit code 4):\nout\nerr");
        let error = stdout(Command::new("keelson-no-such-program"), b"").unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
    }

    #[test]
    fn a_confined_process_is_in_its_group_before_it_is_the_program() {
        let dir = tempfile::tempdir().unwrap();
        let (group, seen) = (dir.path().join("cgroup.procs"), dir.path().join("seen"));
        let script = format!("cat {} > {} && exec sleep 600", group.display(), seen.display());
        let mut confined = spec(dir.path(), "confined", &script);
        confined.groups = vec![group];
        let process = Process::start(&confined).unwrap();
        let own = process.pid().to_string();
        wait::until("its number", Duration::from_secs(20), &[&process], || {
            let text = fs::read_to_string(&seen).unwrap_or_default();
            if text.trim() == own { Ok(()) } else { Err(format!("{text:?} is not {own}")) }
        })
        .unwrap();
        assert!(process.cpu_time().unwrap() > Duration::ZERO);
    }

    #[test]
    fn the_peak_memory_of_a_process_can_be_read() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(peak_memory(own).unwrap() > 100 * 1024);
    }
}
