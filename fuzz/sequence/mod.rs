//! Sequences of requests to one key service, and what must hold of their answers.

#[path = "../../crates/kms-server/tests/server/harness/canary.rs"]
#[allow(dead_code)]
mod canary;
pub mod grammar;
mod request;
mod rules;
mod trail;
mod world;

use crate::asked::Asked;
use canary::assert_clean;
use grammar::{Before, LogIn, Step};
use kms_core::clock::{Clock, SystemClock};
use kms_daemon::telemetry::{Log, LogLevel, Settings};
use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use world::World;

/// Takes the steps one after the other, in instances that nobody has used before.
pub fn run(service: &Asked, steps: impl Iterator<Item = Step>) {
    let log = Written::of_this_process();
    let mut world = World::new(service);
    for Step { before, ask } in steps {
        match before.0 {
            None => {}
            Some(Before::LogIn(login)) => log_in(&mut world, &login),
            Some(Before::Wait { time, log_in }) => {
                service.clock.advance(time.length());
                if log_in {
                    world.forget_tokens();
                }
            }
        }
        let asked = ask.request(&mut world);
        rules::ask(&mut world, &asked);
    }
    rules::check_all_opens(&world);
    world.trail.read();
    assert_clean(&world.canaries, "the audit log", &world.trail.text);
    assert_clean(&world.canaries, "the log", &log.take());
}

fn log_in(world: &mut World<'_>, login: &LogIn) {
    let caller = usize::from(login.whose) % world.callers.len();
    match login.bend {
        Some(at) => world.log_in_with_none(caller, at),
        None => world.log_in(caller),
    }
}

/// The log, with all values shown that a setting can show.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Written {
    fn of_this_process() -> &'static Written {
        static WRITTEN: OnceLock<Written> = OnceLock::new();
        WRITTEN.get_or_init(|| {
            let written = Written::default();
            let settings = Settings { level: LogLevel::Debug, log_all_values: true };
            let clock = SystemClock::new();
            let out = Box::new(written.clone());
            let (log, _) = Log::new(settings, Arc::new(move || clock.wall()), out);
            tracing::subscriber::set_global_default(log).expect("the only log");
            written
        })
    }

    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
