//! A clock that is wrong, for one process: libfaketime between it and the system's clock.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::pki::write_file;

/// The clock of one process; it goes right until it is set.
#[derive(Debug)]
pub struct WrongClock {
    library: PathBuf,
    offset: PathBuf,
}

/// Which clocks are wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// The time of day, as when an administrator or NTP sets it.
    TimeOfDay,
    /// Timers too: more time has passed for the process than for everybody else.
    Everything,
}

impl WrongClock {
    /// In `dir`, for the process `name`.
    ///
    /// # Errors
    /// When libfaketime is not installed or a file cannot be written.
    pub fn create(dir: &Path, name: &str) -> Result<Self> {
        let library = library().ok_or_else(|| Error::Missing {
            what: "libfaketime.so.1".to_owned(),
            remedy: "install the Debian package libfaketime, or run `cargo xtask packages`"
                .to_owned(),
        })?;
        let clock = Self { library, offset: dir.join(format!("{name}.clock")) };
        clock.set("+0")?;
        Ok(clock)
    }

    /// Sets it, against the right time: `+3600`, `-1d`, `+80y`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set(&self, offset: &str) -> Result<()> {
        // Renamed into place: the process reads it at any time.
        let next = self.offset.with_extension("next");
        write_file(&next, offset)?;
        std::fs::rename(&next, &self.offset).map_err(Error::machine("set a clock"))
    }

    /// What the process must be started with.
    pub fn envs(&self, wrong: Wrong) -> Vec<(&'static str, OsString)> {
        let right_timers = if wrong == Wrong::TimeOfDay { "1" } else { "0" };
        vec![
            ("LD_PRELOAD", self.library.clone().into()),
            ("FAKETIME_TIMESTAMP_FILE", self.offset.clone().into()),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", right_timers.into()),
        ]
    }
}

/// Where the distribution put the library that is preloaded.
pub fn library() -> Option<PathBuf> {
    LIBRARIES.iter().map(PathBuf::from).find(|path| path.is_file())
}

const LIBRARIES: &[&str] = &[
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib64/faketime/libfaketime.so.1",
];
