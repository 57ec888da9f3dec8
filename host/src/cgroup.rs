//! One cgroup v2 per Machine: what its monitor, and so its guest, may take of the host.
//!
//! `<mount>/tern/<machine>/`, made anew before a monitor starts, which joins it by itself before it
//! allocates anything, and removed with the Machine. It is not below the agent's own group: what ends
//! with that (a service manager's stop, a user's session) must not end the Machines. A host without a
//! writable cgroup v2 runs Machines without limits, and says so once. Files are those of
//! <https://docs.kernel.org/admin-guide/cgroup-v2.html>.
//!
//! `io.max` has the limits that each disk of a Machine has in its monitor: what the monitor itself reads and writes
//! (its guest's memory from and to a snapshot) passes through no device of the guest's. Not every host
//! has the `io` controller, or a single disk under the data directory; the other limits are there without.
//!
//! Joining a group, and every new virtual machine (KVM has a kernel thread join its process's groups), waits
//! for all processors to have passed a quiet state, which takes a resting host some hundred milliseconds of
//! each wake. The hierarchy's mount option `favordynmods` (Linux 6.0) keeps that ready at the price of a
//! little time per fork and exit; it is set for the whole host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use tern_catalog::Guest;

use crate::block_device;
use crate::config::RateLimits;
use crate::dir::absent_is_fine;

/// Where the groups of this host's Machines are.
#[derive(Debug)]
pub(crate) struct Groups {
    root: Option<PathBuf>,
    /// What each group's `io.max` is to be.
    io_max: Option<String>,
}

impl Groups {
    /// Makes the group of all groups, for Machines whose disks are below `data`; a warning where that cannot
    /// be.
    pub(crate) fn open(data: &Path, rates: &RateLimits) -> Self {
        let root = Path::new(MOUNT).join("tern");
        match prepare(&root) {
            Ok(()) => {
                if let Err(error) = enable_io(&root) {
                    tracing::info!(%error, "cgroup v2 without io: Machines share the host's disk as it comes");
                }
                match favor_dynmods() {
                    Ok(true) => tracing::info!("cgroup v2 is mounted with favordynmods now"),
                    Ok(false) => {}
                    // An older kernel, or a container: wakes take longer, that is all.
                    Err(error) => tracing::info!(%error, "cgroup v2 is left without favordynmods"),
                }
                let io_max = io_max(&root, data, rates).unwrap_or_else(|error| {
                    tracing::warn!(
                        %error,
                        "a Machine's use of the host's disk is not limited by cgroup v2 (io.max)"
                    );
                    None
                });
                Self {
                    root: Some(root),
                    io_max,
                }
            }
            Err(error) => {
                tracing::warn!(
                    path = %root.display(), %error,
                    "no writable cgroup v2 with cpu, memory and pids: Machines run without limits on the host"
                );
                Self {
                    root: None,
                    io_max: None,
                }
            }
        }
    }

    /// Where the group of a Machine is, if there are any.
    pub(crate) fn path(&self, machine: &str) -> Option<PathBuf> {
        Some(self.root.as_ref()?.join(machine))
    }

    /// Makes the group of a Machine whose monitor is about to start: empty, with nothing counted yet.
    pub(crate) fn make(&self, machine: &str, guest: &Guest) -> io::Result<()> {
        let Some(path) = self.path(machine) else {
            return Ok(());
        };
        self.remove(machine)?;
        fs::create_dir(&path)?;
        for (file, value) in limits(guest) {
            fs::write(path.join(file), value)?;
        }
        // Of its own memory nothing is moved to the host's swap: it would be everybody's disk that pays. Not every
        // host counts swap.
        absent_is_fine(set(&path.join("memory.swap.max"), "0"))?;
        absent_is_fine(set(&path.join("memory.oom.group"), "1"))?;
        // Without the controller, or a scheduler or cost model that shares a disk by weight, there is none.
        absent_is_fine(set(&path.join("io.weight"), &weight(guest)))?;
        match &self.io_max {
            Some(limit) => set(&path.join("io.max"), limit),
            None => Ok(()),
        }
    }

    /// Removes the group of a Machine whose monitor has ended.
    pub(crate) fn remove(&self, machine: &str) -> io::Result<()> {
        match self.path(machine) {
            Some(path) => absent_is_fine(fs::remove_dir(path)),
            None => Ok(()),
        }
    }

    /// The same for a Machine of no agent.
    pub(crate) fn forget(machine: &str) -> io::Result<()> {
        absent_is_fine(fs::remove_dir(Path::new(MOUNT).join("tern").join(machine)))
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
    set(&root.join(CONTROL), "+cpu +memory +pids")
}

/// Hands the `io` controller out to the groups below `root`. Service managers hand it out only where one of
/// their own services asks for it.
fn enable_io(root: &Path) -> io::Result<()> {
    set(&Path::new(MOUNT).join(CONTROL), "+io").and_then(|()| set(&root.join(CONTROL), "+io"))
}

/// Writes to a file that must be there: a plain directory takes files of any name, a cgroup has its own.
fn set(file: &Path, value: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(file)?;
    io::Write::write_all(&mut file, value.as_bytes())
}

/// What `io.max` of a Machine's group is to be, if anything.
fn io_max(root: &Path, data: &Path, rates: &RateLimits) -> io::Result<Option<String>> {
    let Some(rates) = io_rates(rates) else {
        return Ok(None);
    };
    let disk = block_device::holding(data)?.ok_or_else(|| {
        io::Error::other(format!("{} is on no single block device", data.display()))
    })?;
    // Said once, here, rather than by every start that fails.
    set(&root.join("io.max"), &format!("{disk} rbps=max"))?;
    Ok(Some(format!("{disk} {rates}")))
}

fn io_rates(rates: &RateLimits) -> Option<String> {
    let limit = |keys: [&str; 2], rate: Option<u64>| {
        let rate = rate?;
        Some(keys.map(|key| format!("{key}={rate}")).join(" "))
    };
    let limits = [
        limit(["rbps", "wbps"], rates.disk_bytes),
        limit(["riops", "wiops"], rates.disk_operations),
    ];
    let limits: Vec<_> = limits.into_iter().flatten().collect();
    (!limits.is_empty()).then(|| limits.join(" "))
}

/// Adds `favordynmods` to the options that the hierarchy is mounted with. Returns whether that was needed.
fn favor_dynmods() -> io::Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let Some(now) = Mounted::find(&mounts, MOUNT) else {
        return Err(io::Error::other(format!("no cgroup v2 at {MOUNT}")));
    };
    if now.options.split(',').any(|option| option == FAVOR) {
        return Ok(false);
    }
    let (flags, options) = now.with(FAVOR);
    let none = None::<&str>;
    mount(
        none,
        MOUNT,
        none,
        MsFlags::MS_REMOUNT | flags,
        Some(options.as_str()),
    )?;
    Ok(true)
}

/// How a file system is mounted: a remount resets whatever it is not told again.
#[derive(Debug, PartialEq, Eq)]
struct Mounted<'a> {
    /// As in `rw,nosuid,nodev`.
    flags: &'a str,
    /// The file system's own, as in `rw,nsdelegate`.
    options: &'a str,
}

impl<'a> Mounted<'a> {
    /// The cgroup v2 at `point`, of the text of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
    fn find(mounts: &'a str, point: &str) -> Option<Self> {
        mounts.lines().find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut mount = mount.split(' ').skip(4);
            let (at, flags) = (mount.next()?, mount.next()?);
            let mut file_system = file_system.split(' ');
            let (kind, options) = (file_system.next()?, file_system.nth(1)?);
            (at == point && kind == "cgroup2").then_some(Self { flags, options })
        })
    }

    /// The same with one more option.
    fn with(&self, more: &str) -> (MsFlags, String) {
        let flags = self.flags.split(',').map(|flag| match flag {
            "ro" => MsFlags::MS_RDONLY,
            "nosuid" => MsFlags::MS_NOSUID,
            "nodev" => MsFlags::MS_NODEV,
            "noexec" => MsFlags::MS_NOEXEC,
            "noatime" => MsFlags::MS_NOATIME,
            "relatime" => MsFlags::MS_RELATIME,
            _ => MsFlags::empty(),
        });
        let kept = self
            .options
            .split(',')
            .filter(|o| !matches!(*o, "rw" | "ro"));
        let options: Vec<_> = kept.chain([more]).collect();
        (flags.collect(), options.join(","))
    }
}

fn limits(guest: &Guest) -> [(&'static str, String); 4] {
    let (cpus, memory_mib) = (u32::from(guest.cpus), guest.memory_mb);
    // One processor more than the guest's, for its devices' threads and a snapshot.
    let quota = (cpus + 1) * CPU_PERIOD_US;
    // Twice the guest's memory, because a snapshot passes through the page cache, which counts.
    let memory = u64::from(memory_mib) * 2 + OVERHEAD_MIB;
    [
        ("cpu.max", format!("{quota} {CPU_PERIOD_US}")),
        ("cpu.weight", weight(guest)),
        ("memory.max", (memory << 20).to_string()),
        ("pids.max", (cpus + THREADS).to_string()),
    ]
}

/// Its share where Machines compete, by its processors: those that are shared are sixteen to one of those that are
/// not, as they are counted (see [`capacity`](crate::capacity)).
fn weight(guest: &Guest) -> String {
    let each = match guest.is_dedicated() {
        true => DEDICATED_WEIGHT,
        false => SHARED_WEIGHT,
    };
    (u32::from(guest.cpus) * each).min(10_000).to_string()
}

/// `oom_kill` of `memory.events`.
fn kills(events: &str) -> u64 {
    let count = events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

const FAVOR: &str = "favordynmods";
/// Where every distribution mounts it.
const MOUNT: &str = "/sys/fs/cgroup";
/// The kernel's default, 100 ms.
const CPU_PERIOD_US: u32 = 100_000;
/// The kernel's default for a group is 100, and 10000 the most: room for 8 processors of either kind.
const SHARED_WEIGHT: u32 = 50;
const DEDICATED_WEIGHT: u32 = 16 * SHARED_WEIGHT;
/// Where a group says which controllers its children have.
const CONTROL: &str = "cgroup.subtree_control";
/// The monitor itself takes some MiB; its disk's page cache wants room too.
const OVERHEAD_MIB: u64 = 128;
/// Main, control, and one per device of at most 8 disks, 8 network cards, vsock, randomness and
/// balloon, one that prefetches, with room to spare: 32. And the kernel's own threads for a disk's `io_uring`,
/// which count too: up to 4 for each of 8 disks (of each memory node, on a host with several).
const THREADS: u32 = 32 + 8 * 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(kind: &str) -> Guest {
        Guest {
            cpu_kind: kind.to_owned(),
            cpus: 2,
            memory_mb: 256,
        }
    }

    #[test]
    fn limits_follow_from_the_guest() {
        let limits = limits(&guest("shared"));
        assert_eq!(limits[0], ("cpu.max", "300000 100000".to_owned()));
        assert_eq!(limits[1], ("cpu.weight", "100".to_owned()));
        assert_eq!(weight(&guest("performance")), "1600");
        assert_eq!(limits[2], ("memory.max", (640_u64 << 20).to_string()));
        assert_eq!(limits[3], ("pids.max", "66".to_owned()));
    }

    #[test]
    fn the_limits_of_a_disk_are_those_of_the_group_too() {
        let rates = |disk_bytes, disk_operations| {
            io_rates(&RateLimits {
                disk_bytes,
                disk_operations,
                network_bytes: Some(1),
            })
        };
        assert_eq!(rates(None, None), None);
        assert_eq!(
            rates(Some(1 << 20), None).unwrap(),
            "rbps=1048576 wbps=1048576"
        );
        assert_eq!(
            rates(Some(4096), Some(50)).unwrap(),
            "rbps=4096 wbps=4096 riops=50 wiops=50"
        );
    }

    #[test]
    fn a_file_that_a_group_does_not_have_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("io.weight");
        assert_eq!(
            set(&file, "100").unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        assert!(!file.exists());
    }

    #[test]
    fn metal_a_group_has_the_limits_that_were_asked_for() {
        let rates = RateLimits {
            disk_bytes: Some(64 << 20),
            disk_operations: Some(1000),
            network_bytes: None,
        };
        let groups = Groups::open(Path::new("/var/lib/tern"), &rates);
        let name = format!("test-{}", std::process::id());
        groups.make(&name, &guest("shared")).unwrap();
        let group = groups.path(&name).unwrap();
        let read = |file: &str| fs::read_to_string(group.join(file)).unwrap();
        assert_eq!(read("memory.max").trim(), (640_u64 << 20).to_string());
        assert_eq!(read("pids.max").trim(), "66");
        assert_eq!(read("memory.oom.group").trim(), "1");
        let rates = "rbps=67108864 wbps=67108864 riops=1000 wiops=1000";
        assert!(read("io.max").contains(rates), "{}", read("io.max"));
        if group.join("io.weight").exists() {
            assert_eq!(read("io.weight").trim(), "default 100");
        }
        groups.remove(&name).unwrap();
        assert!(!group.exists());
    }

    #[test]
    fn a_remount_keeps_what_was_set() {
        let mounts = "25 1 0:23 / /sys rw,nosuid - sysfs sysfs rw\n\
                      31 25 0:27 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 \
                      rw,nsdelegate,memory_recursiveprot\n";
        let found = Mounted::find(mounts, MOUNT).unwrap();
        let (flags, options) = found.with(FAVOR);
        assert_eq!(options, "nsdelegate,memory_recursiveprot,favordynmods");
        let strict = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        assert_eq!(flags, strict | MsFlags::MS_RELATIME);
        assert_eq!(Mounted::find(mounts, "/sys"), None, "that is another kind");
    }

    #[test]
    fn kills_are_read_from_the_kernels_own_words() {
        let events = "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(kills(events), 1);
        assert_eq!(kills("oom 3\noom_kill 0\n"), 0);
        assert_eq!(kills(""), 0);
    }
}
