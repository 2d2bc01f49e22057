//! Waiting for a condition: polled, bounded, and with the reason when it does not come true.

use std::time::Duration;

use kms_core::clock::{Clock, SystemClock};

use crate::error::{Error, Result};
use crate::process::{Process, describe};

/// For what must answer "at once": far below kube-apiserver's deadline of 3 s, far above a busy machine's delays.
const AT_ONCE: Duration = Duration::from_millis(500);
const ATTEMPTS: usize = 5;

/// What one of a few calls answers within half a second: other work on the machine only ever makes it later.
///
/// # Errors
/// What `call` fails with, and when all were later.
pub fn at_once<T>(what: &str, call: impl Fn() -> Result<T>) -> Result<T> {
    let mut seen = Vec::new();
    while seen.len() < ATTEMPTS {
        let clock = SystemClock::new();
        let answer = call()?;
        let took = clock.now();
        if took < AT_ONCE {
            return Ok(answer);
        }
        seen.push(took);
    }
    Err(Error::answer(what, format!("nothing at once: it took {seen:?}")))
}

/// Calls `probe` until it succeeds. Its error says what was seen instead.
///
/// # Errors
/// When time is up, or at once when one of the `watched` processes ends; both with the last log lines.
pub fn until<T>(
    what: &str,
    within: Duration,
    watched: &[&Process],
    mut probe: impl FnMut() -> std::result::Result<T, String>,
) -> Result<T> {
    let clock = SystemClock::new();
    let deadline = clock.now() + within;
    loop {
        let last = match probe() {
            Ok(value) => return Ok(value),
            Err(seen) => seen,
        };
        if let Some((process, status)) = watched.iter().find_map(|p| Some((p, p.ended()?))) {
            return Err(Error::Ended {
                name: process.name().to_owned(),
                status: describe(status),
                waiting_for: what.to_owned(),
                log: process.log().to_owned(),
                tail: process.log_tail(TAIL_LINES),
            });
        }
        if clock.now() >= deadline {
            return Err(Error::TimedOut {
                what: what.to_owned(),
                within,
                last,
                tails: tails(watched),
            });
        }
        std::thread::sleep(PAUSE);
    }
}

/// Between two looks at a condition; short against everything that is waited for.
const PAUSE: Duration = Duration::from_millis(50);
const TAIL_LINES: usize = 15;

fn tails(watched: &[&Process]) -> String {
    watched
        .iter()
        .map(|p| format!("\nlast lines of {}:\n{}", p.log().display(), p.log_tail(TAIL_LINES)))
        .collect()
}
