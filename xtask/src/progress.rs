//! Shows that a long step is alive: a spinner with the elapsed time on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use kms_core::clock::{Clock, SystemClock};

/// One step that takes a while.
pub(crate) struct Step {
    title: String,
    clock: SystemClock,
    spinner: Option<ProgressBar>,
    last_line: Duration,
}

impl Step {
    /// Says what is begun.
    pub(crate) fn begin(title: impl Into<String>) -> Self {
        let title = title.into();
        let spinner = std::io::stderr().is_terminal().then(|| {
            let spinner = ProgressBar::new_spinner().with_message(title.clone());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {wide_msg}") {
                spinner.set_style(style);
            }
            spinner.enable_steady_tick(Duration::from_millis(120));
            spinner
        });
        if spinner.is_none() {
            eprintln!("{title} ...");
        }
        Self { title, clock: SystemClock::new(), spinner, last_line: Duration::ZERO }
    }

    /// Says where the step is. May be called often.
    pub(crate) fn at(&mut self, detail: &str) {
        let elapsed = self.clock.now();
        match &self.spinner {
            Some(spinner) => spinner.set_message(format!("{}: {detail}", self.title)),
            None if elapsed >= self.last_line + LINE_EVERY => {
                eprintln!("{}: {} so far, at {detail}", self.title, seconds(elapsed));
                self.last_line = elapsed;
            }
            None => (),
        }
    }

    /// Says that the step is done and how long it took.
    pub(crate) fn done(self) {
        let text = format!("{}: done in {}", self.title, seconds(self.clock.now()));
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
        eprintln!("{text}");
    }
}

/// `42 s`, `3 min 07 s`.
pub(crate) fn seconds(duration: Duration) -> String {
    match (duration.as_secs() / 60, duration.as_secs() % 60) {
        (0, seconds) => format!("{seconds} s"),
        (minutes, seconds) => format!("{minutes} min {seconds:02} s"),
    }
}

const LINE_EVERY: Duration = Duration::from_secs(20);
