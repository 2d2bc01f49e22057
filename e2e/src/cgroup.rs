//! A control group with a CPU quota and a memory limit, as a container engine makes one for a pod.
//!
//! Version 2 of the kernel's interface or version 1, whichever is there and may be written. Where neither is, callers
//! say so and measure CPU time instead.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What a process in the group may use.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Thousandths of one CPU, counted in periods of 100 ms as Kubernetes does.
    pub millicores: u64,
    pub memory_bytes: u64,
}

impl Limits {
    /// The limits of the original's pod: `cpu: 12m`, `memory: 15Mi`.
    pub const POD: Limits = Limits { millicores: 12, memory_bytes: 15 * 1024 * 1024 };
}

/// A group that ends when dropped; what runs in it must have ended before.
#[derive(Debug)]
pub struct Cgroup {
    cpu: PathBuf,
    memory: PathBuf,
    version: u8,
}

/// What the kernel counted since the group was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub periods: u64,
    pub throttled_periods: u64,
    pub peak_memory: u64,
    pub out_of_memory_kills: u64,
}

impl Cgroup {
    /// Makes a group with these limits.
    ///
    /// # Errors
    /// When this machine lets nobody make one here: not root, or a container without the right to.
    pub fn create(limits: Limits) -> Result<Self> {
        let name = format!("keelson-{}", std::process::id());
        let root = Path::new("/sys/fs/cgroup");
        let group = if root.join("cgroup.controllers").is_file() {
            let folder = root.join(&name);
            Self { cpu: folder.clone(), memory: folder, version: 2 }
        } else {
            let folder = |controller: &str| root.join(controller).join(&name);
            Self { cpu: folder("cpu"), memory: folder("memory"), version: 1 }
        };
        for folder in group.folders() {
            fs::create_dir(folder).map_err(Error::machine(format!("make {}", folder.display())))?;
        }
        let quota = limits.millicores * PERIOD / 1000;
        let bytes = limits.memory_bytes.to_string();
        if group.version == 2 {
            write(&group.cpu.join("cpu.max"), &format!("{quota} {PERIOD}"))?;
            write(&group.memory.join("memory.max"), &bytes)?;
        } else {
            write(&group.cpu.join("cpu.cfs_period_us"), &PERIOD.to_string())?;
            write(&group.cpu.join("cpu.cfs_quota_us"), &quota.to_string())?;
            write(&group.memory.join("memory.limit_in_bytes"), &bytes)?;
        }
        Ok(group)
    }

    /// Version of the kernel's interface: 1 or 2.
    pub fn version(&self) -> u8 {
        self.version
    }

    /// The files that a process writes its number into in order to belong to the group.
    pub(crate) fn members(&self) -> Vec<PathBuf> {
        self.folders().map(|folder| folder.join("cgroup.procs")).collect()
    }

    /// # Errors
    /// When the kernel's files are not as documented.
    pub fn counts(&self) -> Result<Counts> {
        let cpu = read(&self.cpu.join("cpu.stat"))?;
        let (peak, events) = match self.version {
            2 => ("memory.peak", "memory.events"),
            _ => ("memory.max_usage_in_bytes", "memory.oom_control"),
        };
        let peak = read(&self.memory.join(peak))?;
        let peak_memory = peak.trim().parse().map_err(|_| unexpected("memory's peak", &peak))?;
        Ok(Counts {
            periods: field(&cpu, "nr_periods")?,
            throttled_periods: field(&cpu, "nr_throttled")?,
            peak_memory,
            out_of_memory_kills: field(&read(&self.memory.join(events))?, "oom_kill")?,
        })
    }

    fn folders(&self) -> impl Iterator<Item = &Path> {
        let memory = (self.memory != self.cpu).then_some(self.memory.as_path());
        std::iter::once(self.cpu.as_path()).chain(memory)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for folder in self.folders() {
            // Fails only if it was not made or somebody is still in it; then it is empty or theirs.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Kubernetes' own, in microseconds.
const PERIOD: u64 = 100_000;

fn field(stat: &str, name: &str) -> Result<u64> {
    let value = stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.ok_or_else(|| unexpected(name, stat))
}

fn unexpected(name: &str, text: &str) -> Error {
    Error::answer("the kernel's control groups", format!("no {name} in {text:?}"))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(Error::machine(format!("read {}", path.display())))
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).map_err(Error::machine(format!("write {value} to {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_found_by_its_whole_name() {
        let stat = "nr_periods 12\nnr_throttled 3\nthrottled_time 400\n";
        assert_eq!(field(stat, "nr_periods").unwrap(), 12);
        assert_eq!(field(stat, "nr_throttled").unwrap(), 3);
        assert!(field(stat, "throttled").is_err());
        assert_eq!(field("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", "oom_kill").unwrap(), 2);
    }
}
