//! A process that can be ended and started again with the same arguments.

use std::ffi::OsString;
use std::time::Duration;

use rustix::process::Signal;

use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::process::{Process, Spec};

/// What to start, and the process while it runs.
#[derive(Debug)]
pub struct Server {
    spec: Spec,
    process: Option<Process>,
}

impl Server {
    /// Nothing runs yet.
    pub fn new(spec: Spec) -> Self {
        Self { spec, process: None }
    }

    /// From the next start on it runs within the limits of `group`.
    pub fn confine(&mut self, group: &Cgroup) {
        self.spec.confine(group);
    }

    /// Changes with what it is started the next time.
    pub fn change(&mut self, change: impl FnOnce(&mut Spec)) {
        change(&mut self.spec);
    }

    /// Adds to the environment of the next start.
    pub fn add_env(&mut self, envs: impl IntoIterator<Item = (&'static str, OsString)>) {
        self.spec.envs.extend(envs.into_iter().map(|(name, value)| (name.to_owned(), value)));
    }

    /// Starts the process; one that still runs is killed first.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&mut self) -> Result<()> {
        self.process = None;
        self.process = Some(Process::start(&self.spec)?);
        Ok(())
    }

    /// The running process.
    ///
    /// # Errors
    /// When it does not run.
    pub fn running(&self) -> Result<&Process> {
        self.process.as_ref().ok_or_else(|| self.not_running())
    }

    /// SIGKILL, as a crash would.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.take()?.kill()
    }

    /// SIGTERM, and waits until it has ended.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub fn stop(&mut self) -> Result<()> {
        self.take()?.stop(Duration::from_secs(20)).map(drop)
    }

    /// SIGSTOP: connections stay open and hang.
    ///
    /// # Errors
    /// When it does not run.
    pub fn freeze(&self) -> Result<()> {
        self.running()?.signal(Signal::STOP)
    }

    /// SIGCONT after [`freeze`](Self::freeze).
    ///
    /// # Errors
    /// When it does not run.
    pub fn thaw(&self) -> Result<()> {
        self.running()?.signal(Signal::CONT)
    }

    /// Leaves it running after the end of this process; returns its process id.
    ///
    /// # Errors
    /// When it does not run.
    pub fn release(mut self) -> Result<i32> {
        self.take().map(Process::release)
    }

    fn take(&mut self) -> Result<Process> {
        self.process.take().ok_or_else(|| self.not_running())
    }

    fn not_running(&self) -> Error {
        Error::answer(&self.spec.name, "it does not run")
    }
}
