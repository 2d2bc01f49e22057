//! What keeps keys inside the memory of a process: no core dump, no debugger of the same user, no swap.

use std::io;

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

/// Why the memory may be swapped out.
#[derive(Debug, thiserror::Error)]
pub enum NotLocked {
    /// The operator may allow it.
    #[error("RLIMIT_MEMLOCK is {} KiB, and only an unlimited one allows it (systemd: LimitMEMLOCK=infinity)", .0 / 1024)]
    Limited(u64),
    #[error("{0}")]
    Refused(#[from] io::Error),
}

/// From now on neither a core dump nor a debugger of the same user shows this process's memory.
///
/// # Errors
/// The operating system refuses.
pub fn keep_private() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// From now on no page of this process is swapped out. Pages that are never touched take no memory.
///
/// # Errors
/// See [`NotLocked`]; nothing is locked then.
pub fn lock() -> Result<(), NotLocked> {
    // Root may raise the limit; for everybody else it stays as it is.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
    // Future pages count too: under a limit an allocation would fail later, and take the process down with it.
    if let Some(limit) = getrlimit(Resource::Memlock).current {
        return Err(NotLocked::Limited(limit));
    }
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    mlockall(all).map_err(|errno| NotLocked::Refused(errno.into()))
}
