//! How far the reading has come, for whoever waits at a terminal. Never on standard output, and not where a file or a
//! program reads the errors.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use super::lines::is_stdin;

/// Between two lines: a few in a second.
const STEP: u64 = 32 * MIB;
const MIB: u64 = 1024 * 1024;
/// Back to the first column, and the line is empty.
const CLEAR: &str = "\r\x1b[2K";

pub(super) struct Progress {
    /// `None`: nobody looks.
    to: Option<Box<dyn Write>>,
    /// `None` for standard input: nobody knows.
    total: Option<u64>,
    read: u64,
    shown: u64,
}

impl Progress {
    /// On standard error, where that is a terminal.
    pub(super) fn of(files: &[PathBuf]) -> Progress {
        let terminal = io::stderr().is_terminal();
        let to = terminal.then(|| -> Box<dyn Write> { Box::new(io::stderr()) });
        let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |file| file.len());
        let unknown = files.iter().any(|path| is_stdin(path));
        Progress::to(to, (!unknown).then(|| files.iter().map(size).sum()))
    }

    fn to(to: Option<Box<dyn Write>>, total: Option<u64>) -> Progress {
        Progress { to, total, read: 0, shown: 0 }
    }

    /// So many bytes more were read.
    pub(super) fn add(&mut self, bytes: u64) {
        self.read += bytes;
        if self.read - self.shown >= STEP {
            self.shown = self.read;
            self.show();
        }
    }

    fn show(&mut self) {
        let Some(to) = &mut self.to else { return };
        let read = self.read / MIB;
        let text = match self.total {
            Some(total) => format!("{CLEAR}kmsctl: {read} of {} MiB read", total / MIB),
            None => format!("{CLEAR}kmsctl: {read} MiB read"),
        };
        // Whoever has closed the terminal does not look.
        let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let (Some(to), 1..) = (&mut self.to, self.shown) {
            let _ = to.write_all(CLEAR.as_bytes()).and_then(|()| to.flush());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<u8>>>);

    impl Write for Seen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn shown(total: Option<u64>, lines: u64) -> String {
        let seen = Seen::default();
        let mut progress = Progress::to(Some(Box::new(seen.clone())), total);
        for _ in 0..lines {
            progress.add(MIB);
        }
        drop(progress);
        String::from_utf8(seen.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_line_is_written_over_and_gone_at_the_end() {
        let first = format!("{CLEAR}kmsctl: 32 of 100 MiB read");
        let second = format!("{CLEAR}kmsctl: 64 of 100 MiB read");
        assert_eq!(shown(Some(100 * MIB), 65), format!("{first}{second}{CLEAR}"));
        assert_eq!(shown(None, 32), format!("{CLEAR}kmsctl: 32 MiB read{CLEAR}"));
        assert_eq!(shown(Some(MIB), 1), "", "what is read at once needs no progress");
    }
}
