//! The audit log's disk, which hangs when told to: the clock that its times are taken from stops whoever writes, before the
//! sync begins.

use kms_core::clock::{Clock, ManualClock};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime};

#[derive(Debug)]
pub(crate) struct Disk {
    clock: Arc<ManualClock>,
    hangs: Mutex<bool>,
    goes_on: Condvar,
}

impl Disk {
    pub(crate) fn new(clock: Arc<ManualClock>) -> Disk {
        Disk { clock, hangs: Mutex::new(false), goes_on: Condvar::new() }
    }

    pub(crate) fn hang(&self, hangs: bool) {
        *self.hangs.lock().unwrap() = hangs;
        self.goes_on.notify_all();
    }
}

impl Clock for Disk {
    fn now(&self) -> Duration {
        if std::thread::current().name() == Some("audit") {
            drop(self.goes_on.wait_while(self.hangs.lock().unwrap(), |hangs| *hangs).unwrap());
        }
        self.clock.now()
    }

    fn wall(&self) -> SystemTime {
        self.clock.wall()
    }
}
