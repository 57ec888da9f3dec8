//! One cgroup v2 per Machine: what its monitor, and so its guest, may take of the host.
//!
//! `<mount>/tern/<machine>/`, made anew before a monitor starts, which joins it by itself before it
//! allocates anything, and removed with the Machine. It is not below the agent's own group: what ends
//! with that (a service manager's stop, a user's session) must not end the Machines. A host without a
//! writable cgroup v2 runs Machines without limits, and says so once. Files are those of
//! <https://docs.kernel.org/admin-guide/cgroup-v2.html>.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::dir::absent_is_fine;

/// Where the groups of this host's Machines are.
#[derive(Debug)]
pub(crate) struct Groups {
    root: Option<PathBuf>,
}

impl Groups {
    /// Makes the group of all groups; a warning where that cannot be.
    pub(crate) fn open() -> Self {
        let root = Path::new(MOUNT).join("tern");
        match prepare(&root) {
            Ok(()) => Self { root: Some(root) },
            Err(error) => {
                tracing::warn!(
                    path = %root.display(), %error,
                    "no writable cgroup v2 with cpu, memory and pids: Machines run without limits on the host"
                );
                Self { root: None }
            }
        }
    }

    /// Where the group of a Machine is, if there are any.
    pub(crate) fn path(&self, machine: &str) -> Option<PathBuf> {
        Some(self.root.as_ref()?.join(machine))
    }

    /// Makes the group of a Machine whose monitor is about to start: empty, with nothing counted yet.
    pub(crate) fn make(&self, machine: &str, cpus: u32, memory_mib: u32) -> io::Result<()> {
        let Some(path) = self.path(machine) else {
            return Ok(());
        };
        self.remove(machine)?;
        fs::create_dir(&path)?;
        for (file, value) in limits(cpus, memory_mib) {
            fs::write(path.join(file), value)?;
        }
        Ok(())
    }

    /// Removes the group of a Machine whose monitor has ended.
    pub(crate) fn remove(&self, machine: &str) -> io::Result<()> {
        match self.path(machine) {
            Some(path) => absent_is_fine(fs::remove_dir(path)),
            None => Ok(()),
        }
    }

    /// Whether the kernel killed its monitor for taking more memory than it may.
    pub(crate) fn out_of_memory(&self, machine: &str) -> bool {
        let events = self
            .path(machine)
            .and_then(|path| fs::read_to_string(path.join("memory.events")).ok());
        events.is_some_and(|events| kills(&events) > 0)
    }
}

fn prepare(root: &Path) -> io::Result<()> {
    match fs::create_dir(root) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // A plain directory takes files of any name; a cgroup has its own.
    fs::OpenOptions::new()
        .write(true)
        .open(root.join("cgroup.subtree_control"))
        .and_then(|mut file| io::Write::write_all(&mut file, b"+cpu +memory +pids"))
}

fn limits(cpus: u32, memory_mib: u32) -> [(&'static str, String); 4] {
    // One processor more than the guest's, for its devices' threads and a snapshot.
    let quota = (cpus + 1) * CPU_PERIOD_US;
    // Twice the guest's memory, because a snapshot passes through the page cache, which counts.
    let memory = u64::from(memory_mib) * 2 + OVERHEAD_MIB;
    [
        ("cpu.max", format!("{quota} {CPU_PERIOD_US}")),
        ("cpu.weight", (cpus * CPU_WEIGHT).min(10_000).to_string()),
        ("memory.max", (memory << 20).to_string()),
        ("pids.max", (cpus + THREADS).to_string()),
    ]
}

/// `oom_kill` of `memory.events`.
fn kills(events: &str) -> u64 {
    let count = events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// Where every distribution mounts it.
const MOUNT: &str = "/sys/fs/cgroup";
/// The kernel's default, 100 ms.
const CPU_PERIOD_US: u32 = 100_000;
/// The kernel's default for a group, here for each processor.
const CPU_WEIGHT: u32 = 100;
/// The monitor itself takes some MiB; its disk's page cache wants room too.
const OVERHEAD_MIB: u64 = 128;
/// Main, control, starter, and one per device of at most 8 disks, 8 network cards, vsock and randomness.
const THREADS: u32 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_follow_from_the_guest() {
        let limits = limits(2, 256);
        assert_eq!(limits[0], ("cpu.max", "300000 100000".to_owned()));
        assert_eq!(limits[1], ("cpu.weight", "200".to_owned()));
        assert_eq!(limits[2], ("memory.max", (640_u64 << 20).to_string()));
        assert_eq!(limits[3], ("pids.max", "34".to_owned()));
    }

    #[test]
    fn kills_are_read_from_the_kernels_own_words() {
        let events = "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(kills(events), 1);
        assert_eq!(kills("oom 3\noom_kill 0\n"), 0);
        assert_eq!(kills(""), 0);
    }
}
