//! What keeps keys inside the memory of a process: no core dump, no debugger of the same user, no swap.

use std::io;

use rustix::io::Errno;
use rustix::mm::{MlockAllFlags, mlockall, munlockall};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

/// Why the memory may be swapped out.
#[derive(Debug, thiserror::Error)]
pub enum NotLocked {
    /// The operator may allow it.
    #[error("RLIMIT_MEMLOCK is {} KiB; an unlimited one (systemd: LimitMEMLOCK=infinity) or CAP_IPC_LOCK allows it", .0 / 1024)]
    Limited(u64),
    #[error("{0}")]
    Refused(#[from] io::Error),
}

impl NotLocked {
    /// Says so in the log, once the start-up lines are out.
    pub fn warn(&self) {
        tracing::warn!("Keys may be swapped out, because memory cannot be locked: {self}");
    }
}

/// No core dump, no debugger of the same user and no swap shall see a key, a PIN or a token.
///
/// # Errors
/// Why pages may still be swapped out; the caller has it say so.
pub fn protect() -> Result<(), NotLocked> {
    if let Err(error) = keep_private() {
        tracing::warn!("Core dumps stay possible: {error}");
    }
    lock()
}

/// From now on neither a core dump nor a debugger of the same user shows this process's memory.
///
/// # Errors
/// The operating system refuses.
fn keep_private() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// From now on no page of this process is swapped out. Pages that are never touched take no memory.
///
/// # Errors
/// See [`NotLocked`]; nothing is locked then.
fn lock() -> Result<(), NotLocked> {
    // Root may raise the limit; for everybody else it stays as it is.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
    let limit = getrlimit(Resource::Memlock).current;
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    match (mlockall(all), limit) {
        (Ok(()), None) => Ok(()),
        (Ok(()), Some(limit)) => beyond(limit),
        (Err(Errno::NOMEM | Errno::PERM | Errno::AGAIN), Some(limit)) => {
            Err(NotLocked::Limited(limit))
        }
        (Err(errno), _) => Err(NotLocked::Refused(errno.into())),
    }
}

/// Pages of the future count too: where the limit is in force, some later allocation would fail and take the process
/// down with it. CAP_IPC_LOCK lifts the limit, but one inside a user namespace does not; so it is tried.
fn beyond(limit: u64) -> Result<(), NotLocked> {
    let mut more = Vec::<u8>::new();
    let length = usize::try_from(limit).unwrap_or(usize::MAX).saturating_add(1);
    let fits = more.try_reserve_exact(length).is_ok();
    // Never touched, so it takes no memory; but the compiler must not leave it out.
    std::hint::black_box(&more);
    if fits {
        return Ok(());
    }
    munlockall().map_err(io::Error::from)?;
    Err(NotLocked::Limited(limit))
}
