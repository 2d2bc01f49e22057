//! What is known of the parts that this server cannot work without: each by its name, so that whoever is called at
//! night knows where to look.

use kms_core::clock::Clock;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

/// Replicas, and the clients that read `exp`, may differ by this much; a step that is larger was not a clock that is
/// kept by NTP.
pub(crate) const TOLERANCE: Duration = Duration::from_secs(5);
/// How long a step of the clock is shown: long enough for every scrape and every load balancer to see it.
const SHOWN: Duration = Duration::from_secs(60);

/// What the last look at each part has found: `Err` says what is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    pub database: Result<(), String>,
    pub hsm: Result<(), String>,
    pub audit: Result<(), String>,
    pub clock: Result<(), String>,
}

impl Parts {
    /// In the order in which they are shown.
    pub fn named(&self) -> [(&'static str, &Result<(), String>); 4] {
        [
            ("database", &self.database),
            ("HSM", &self.hsm),
            ("audit", &self.audit),
            ("clock", &self.clock),
        ]
    }

    #[must_use]
    pub fn all_good(&self) -> bool {
        self.named().iter().all(|(_, found)| found.is_ok())
    }
}

/// What the last probe found.
#[derive(Debug)]
pub struct Health(RwLock<Parts>);

impl Health {
    /// Not ready until the first probe has answered.
    #[must_use]
    pub fn unknown() -> Health {
        let unknown = || Err("the first check has not been made yet".to_owned());
        Health(RwLock::new(Parts {
            database: unknown(),
            hsm: unknown(),
            audit: unknown(),
            clock: unknown(),
        }))
    }

    pub(crate) fn set(&self, found: Parts) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = found;
    }

    #[must_use]
    pub fn last(&self) -> Parts {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Watches the time of day, from which tokens, expiry dates and audit records take theirs: against a clock that never
/// jumps, and against what was written before this process began.
#[derive(Debug)]
pub struct ClockWatch {
    clock: Arc<dyn Clock>,
    /// The latest time in the records of before, and where it stands.
    written: Option<(SystemTime, &'static str)>,
    state: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    wall: SystemTime,
    now: Duration,
    step: Option<(Duration, String)>,
}

impl ClockWatch {
    /// `written`: times that were written down before now, and what they are the times of.
    pub fn new(
        clock: Arc<dyn Clock>,
        written: impl IntoIterator<Item = (SystemTime, &'static str)>,
    ) -> ClockWatch {
        let state = Mutex::new(Seen { wall: clock.wall(), now: clock.now(), step: None });
        ClockWatch { clock, written: written.into_iter().max(), state }
    }

    /// # Errors
    /// The clock is behind what it has written, or has jumped a moment ago.
    pub fn check(&self) -> Result<(), String> {
        let (wall, now) = (self.clock.wall(), self.clock.now());
        let mut seen = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(step) = step(seen.wall, seen.now, wall, now) {
            seen.step = Some((now, step));
        }
        (seen.wall, seen.now) = (wall, now);
        if let Some((written, what)) = self.written
            && let Ok(behind) = written.duration_since(wall)
            && behind > TOLERANCE
        {
            let behind = behind.as_secs();
            return Err(format!(
                "{behind} s behind the time of {what}: set the clock of this host. If it is right and was ahead then, stop \
                 the servers on this database and run `kms-server renew-key tokens`"
            ));
        }
        match &seen.step {
            Some((at, step)) if now.saturating_sub(*at) < SHOWN => Err(step.clone()),
            _ => Ok(()),
        }
    }
}

fn step(
    wall_before: SystemTime,
    now_before: Duration,
    wall: SystemTime,
    now: Duration,
) -> Option<String> {
    let expected = wall_before.checked_add(now.saturating_sub(now_before))?;
    let (by, direction) = match wall.duration_since(expected) {
        Ok(forward) => (forward, "forward"),
        Err(back) => (back.duration(), "back"),
    };
    (by > TOLERANCE).then(|| {
        format!(
            "has jumped {direction} by {} s: look at the time service of this host",
            by.as_secs()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whose time of day somebody sets.
    #[derive(Debug)]
    struct Set(Mutex<(SystemTime, Duration)>);

    impl Set {
        fn new() -> Arc<Set> {
            let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
            Arc::new(Set(Mutex::new((wall, Duration::ZERO))))
        }

        fn run(&self, seconds: u64) {
            let by = Duration::from_secs(seconds);
            let mut both = self.0.lock().unwrap();
            *both = (both.0 + by, both.1 + by);
        }

        fn set(&self, wall: SystemTime) {
            self.0.lock().unwrap().0 = wall;
        }
    }

    impl Clock for Set {
        fn now(&self) -> Duration {
            self.0.lock().unwrap().1
        }

        fn wall(&self) -> SystemTime {
            self.0.lock().unwrap().0
        }
    }

    #[test]
    fn a_clock_that_runs_is_good_and_one_that_jumps_is_shown_for_a_minute() {
        let clock = Set::new();
        let watch = ClockWatch::new(clock.clone(), []);
        for _ in 0..3 {
            clock.run(3600);
            assert_eq!(watch.check(), Ok(()));
        }
        clock.set(clock.wall() + Duration::from_secs(90));
        assert!(watch.check().unwrap_err().starts_with("has jumped forward by 90 s"));
        clock.run(59);
        assert!(watch.check().is_err(), "every load balancer has seen it");
        clock.run(1);
        assert_eq!(watch.check(), Ok(()));
        clock.set(clock.wall() - Duration::from_secs(3600));
        assert!(watch.check().unwrap_err().starts_with("has jumped back by 3600 s"));
        clock.run(60);
        clock.set(clock.wall() + Duration::from_secs(4));
        assert_eq!(watch.check(), Ok(()), "what NTP corrects is no jump");
    }

    #[test]
    fn a_clock_behind_its_own_records_is_not_believed_until_it_has_passed_them() {
        let clock = Set::new();
        let at = |seconds| clock.wall() + Duration::from_secs(seconds);
        let records = [(at(60), "the last audit record"), (at(2), "the newest signing key")];
        let watch = ClockWatch::new(clock.clone(), records);
        assert_eq!(
            watch.check().unwrap_err(),
            "60 s behind the time of the last audit record: set the clock of this host. If it is right and was ahead \
             then, stop the servers on this database and run `kms-server renew-key tokens`"
        );
        clock.run(55);
        assert_eq!(watch.check(), Ok(()));
    }
}
