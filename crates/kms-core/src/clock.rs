//! Time as an argument, so that expiry, backoff and probes can be tested without waiting.
//!
//! The only place in the workspace where the system's clocks are read.

use std::fmt::Debug;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime};

pub trait Clock: Send + Sync + Debug {
    /// Time since an arbitrary start. Never goes back.
    fn now(&self) -> Duration;

    /// The time of day. May jump; only for stamps and for times that others have set.
    fn wall(&self) -> SystemTime;
}

/// The system's own clocks.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the Clock that everybody else takes")]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    #[expect(clippy::disallowed_methods, reason = "this is the Clock that everybody else takes")]
    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// A clock that moves only when told to. For tests of every crate.
#[derive(Debug)]
pub struct ManualClock {
    start: SystemTime,
    elapsed: Mutex<Duration>,
}

impl ManualClock {
    /// Stands still at `wall` until [`advance`](Self::advance) is called.
    #[must_use]
    pub fn at(wall: SystemTime) -> Self {
        Self { start: wall, elapsed: Mutex::new(Duration::ZERO) }
    }

    /// 2023-11-14T22:13:20Z.
    #[must_use]
    pub fn new() -> Self {
        Self::at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000))
    }

    /// Moves both times on.
    pub fn advance(&self, by: Duration) {
        *self.elapsed.lock().unwrap_or_else(PoisonError::into_inner) += by;
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        *self.elapsed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wall(&self) -> SystemTime {
        self.start + self.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_both_times_and_only_when_told() {
        let clock = ManualClock::at(SystemTime::UNIX_EPOCH);
        assert_eq!(clock.now(), Duration::ZERO);
        clock.advance(Duration::from_secs(90));
        assert_eq!(clock.now(), Duration::from_secs(90));
        assert_eq!(clock.wall(), SystemTime::UNIX_EPOCH + Duration::from_secs(90));
    }

    #[test]
    fn the_system_clock_never_goes_back() {
        let clock = SystemClock::new();
        let first = clock.now();
        assert!(clock.now() >= first);
    }
}
