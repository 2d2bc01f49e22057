//! How often each function was called, and how many sessions there are: a file of 64-bit numbers, mapped into the
//! memory of the one who counts and of the one who reads, so that both see the same at any time.

use crate::functions::Function;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::File;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};

const SLOTS: usize = 128;
const LEN: usize = SLOTS * size_of::<u64>();
const OPEN: usize = 100;
const MOST: usize = 101;

/// The counts of one file, never unmapped.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    slots: &'static [AtomicU64; SLOTS],
}

impl Counts {
    /// Maps the file at `path`, which is made if it is missing.
    ///
    /// # Errors
    /// Those of opening and mapping it.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let options =
            File::options().read(true).write(true).create(true).truncate(false).to_owned();
        let file = options.open(path)?;
        file.set_len(LEN as u64)?;
        // SAFETY: a new mapping of a file that is as long as the mapping.
        let start = unsafe {
            mmap(null_mut(), LEN, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        }?;
        // SAFETY: page-aligned, as long as the array, all bits are valid, and never unmapped.
        Ok(Self { slots: unsafe { &*start.cast::<[AtomicU64; SLOTS]>() } })
    }

    /// Counts that nobody else sees.
    pub(crate) fn private() -> Self {
        Self { slots: Box::leak(Box::new([const { AtomicU64::new(0) }; SLOTS])) }
    }

    /// How often `function` was called.
    #[must_use]
    pub fn of(&self, function: Function) -> u64 {
        self.slots[function as usize].load(Ordering::SeqCst)
    }

    /// All functions that were called, with how often.
    #[must_use]
    pub fn all(&self) -> Vec<(Function, u64)> {
        let counts = Function::ALL.iter().map(|&function| (function, self.of(function)));
        counts.filter(|(_, count)| *count > 0).collect()
    }

    /// What was called since `before` was read by [`Counts::all`].
    #[must_use]
    pub fn since(&self, before: &[(Function, u64)]) -> Vec<(Function, u64)> {
        let earlier = |function| {
            before.iter().find(|(known, _)| *known == function).map_or(0, |(_, count)| *count)
        };
        let now = self.all().into_iter();
        now.map(|(function, count)| (function, count - earlier(function)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// The sessions that are open in the real token.
    #[must_use]
    pub fn open_sessions(&self) -> u64 {
        self.slots[OPEN].load(Ordering::SeqCst)
    }

    /// The most that ever were.
    #[must_use]
    pub fn most_sessions(&self) -> u64 {
        self.slots[MOST].load(Ordering::SeqCst)
    }

    pub(crate) fn count(&self, function: Function) {
        self.slots[function as usize].fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn sessions(&self, open: usize) {
        let open = open as u64;
        self.slots[OPEN].store(open, Ordering::SeqCst);
        self.slots[MOST].fetch_max(open, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reader_sees_what_the_counter_counts() {
        assert!(Function::ALL.len() <= OPEN);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("counts");
        let (counter, reader) = (Counts::open(&path).unwrap(), Counts::open(&path).unwrap());
        counter.count(Function::C_Sign);
        let before = reader.all();
        assert_eq!(before, [(Function::C_Sign, 1)]);
        counter.count(Function::C_Sign);
        counter.count(Function::C_Login);
        assert_eq!(reader.since(&before).len(), 2);
        assert_eq!(reader.of(Function::C_Sign), 2);
        counter.sessions(3);
        counter.sessions(1);
        assert_eq!((reader.open_sessions(), reader.most_sessions()), (1, 3));
    }
}
