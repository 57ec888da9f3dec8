//! What keeps a monitor, should its guest take it over, from everything that is not its Machine's.
//!
//! ```text
//!  as started ──► everything opened ──isolate──► own namespaces, root = its directory
//!                                       │ drop_privileges
//!                                       ▼
//!          own user, no capabilities ──► threads start, each under its system call filter ──► guest runs
//! ```
//!
//! What a monitor needs of its host it opens first: `/dev/kvm`, the TAP device, `/dev/vhost-net` for a card that
//! is to use it, disks, kernel, logs, its sockets. Then [`Jail::isolate`] leaves it without a network, without the host's files (its root is
//! [`JailConfig::root`], where it writes its snapshot and `exit.json`), without the host's names and
//! IPC objects; [`Jail::drop_privileges`] makes it a user of its own without any capability, and without
//! a way to get one. Both happen while the process has one thread, before a guest instruction runs or a
//! request is answered, so that every later thread is born so. Each thread then bolts its own door:
//! [`seccomp`] has the mechanism, [`filters`] the calls, and [`threads`] makes the devices' threads in time, since
//! no filter allows that.
//!
//! Namespaces and user need root and the `jail` key of `vm.json`; the filters are always there.
//! What stays shared with the host: its clock, its processors' caches, and KVM itself. A process cannot move
//! itself into a new PID namespace: the agent starts a jailed monitor as the first process of one.

pub mod filters;
pub mod seccomp;
mod shortcut;
pub mod threads;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid};

use crate::config::JailConfig;

/// The walls around one monitor.
#[derive(Debug, Default)]
pub struct Jail {
    config: Option<JailConfig>,
    isolated: AtomicBool,
}

/// Which step of confinement failed, and why. A monitor that cannot be confined does not run.
#[derive(Debug, thiserror::Error)]
#[error("cannot confine the monitor: {step}: {source}")]
pub struct JailError {
    step: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError {
        step,
        source: source.into(),
    }
}

impl Jail {
    /// The jail that `vm.json` asks for; without one the process keeps its user and its files.
    pub fn new(config: Option<JailConfig>) -> Self {
        Self {
            config,
            isolated: AtomicBool::new(false),
        }
    }

    /// Joins the Machine's control group: first of all, so that all memory counts.
    pub fn join_cgroup(&self) -> Result<(), JailError> {
        match self.config.as_ref().and_then(|c| c.cgroup.as_ref()) {
            // Zero is whoever writes it.
            Some(group) => {
                fs::write(group.join("cgroup.procs"), "0").map_err(failed("join its cgroup"))
            }
            None => Ok(()),
        }
    }

    /// Leaves the host's namespaces and files. Paths are those of [`Jail::inside`] from here on.
    ///
    /// Only for the calling thread and those it starts: other threads end before a guest runs.
    pub fn isolate(&self) -> Result<(), JailError> {
        // Without a jail too: no filter allows it later.
        crate::snapshot::prepare().map_err(failed("open what a snapshot needs"))?;
        let Some(JailConfig { root, .. }) = &self.config else {
            return Ok(());
        };
        unshare(
            CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWUTS
                | CloneFlags::CLONE_NEWCGROUP,
        )
        .map_err(failed("unshare (does it run as root?)"))?;
        let none = None::<&str>;
        // First, or every mount below would show up in the host too.
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .map_err(failed("make mounts private"))?;
        // A root must be a mount; and this one can be told what is not allowed in it.
        mount(Some(root), root, none, MsFlags::MS_BIND, none)
            .map_err(failed("bind its directory"))?;
        let strict = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        mount(none, root, none, remount | strict, none)
            .map_err(failed("restrict its directory"))?;
        chdir(root).map_err(failed("chdir"))?;
        // The old root is stacked over the new one, so that no directory is needed for it (pivot_root(2)).
        pivot_root(".", ".").map_err(failed("pivot_root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(failed("leave the host's root"))?;
        chdir("/").map_err(failed("chdir"))?;
        self.isolated.store(true, Ordering::Release);
        Ok(())
    }

    /// Becomes the Machine's own user, for good. The process must have one thread.
    pub fn drop_privileges(&self) -> Result<(), JailError> {
        let Some(JailConfig { uid, gid, .. }) = &self.config else {
            return Ok(());
        };
        nix::sys::prctl::set_no_new_privs().map_err(failed("no_new_privs"))?;
        for capability in 0..CAPABILITIES {
            // SAFETY: takes numbers only.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() == Some(libc::EINVAL) {
                    break; // beyond the last one that this kernel has
                }
                return Err(failed("drop capabilities")(error));
            }
        }
        let (uid, gid) = (Uid::from_raw(*uid), Gid::from_raw(*gid));
        setgroups(&[]).map_err(failed("setgroups"))?;
        setresgid(gid, gid, gid).map_err(failed("setresgid"))?;
        // Whose three ids all leave zero loses every capability (capabilities(7)).
        setresuid(uid, uid, uid).map_err(failed("setresuid"))?;
        Ok(())
    }

    /// What a path of `vm.json` is called now. Only those below the jail's root exist inside.
    pub fn inside(&self, path: &Path) -> PathBuf {
        match &self.config {
            Some(config) if self.isolated.load(Ordering::Acquire) => path
                .strip_prefix(&config.root)
                .map_or_else(|_| path.to_owned(), |rest| Path::new("/").join(rest)),
            _ => path.to_owned(),
        }
    }
}

/// Runs `work` with no effective capability in this thread.
pub(crate) fn without_capabilities<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    let had = capabilities()?;
    set_capabilities(had.map(|set| CapabilitySet {
        effective: 0,
        ..set
    }))?;
    let done = work();
    set_capabilities(had)?;
    Ok(done)
}

/// `struct __user_cap_data_struct`, of which version 3 has two: low and high capabilities (capget(2)).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct CapabilitySet {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `struct __user_cap_header_struct` of this thread, in `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_HEADER: [u32; 2] = [0x2008_0522, 0];

fn capabilities() -> io::Result<[CapabilitySet; 2]> {
    let mut header = CAPABILITY_HEADER;
    let mut sets = [CapabilitySet::default(); 2];
    // SAFETY: the kernel writes two sets, as the version in the header says.
    let done = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    nix::errno::Errno::result(done)?;
    Ok(sets)
}

fn set_capabilities(sets: [CapabilitySet; 2]) -> io::Result<()> {
    let mut header = CAPABILITY_HEADER;
    // SAFETY: the kernel reads two sets, as the version in the header says.
    let done = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()) };
    nix::errno::Errno::result(done)?;
    Ok(())
}

/// There are 41 today, and the kernel's sets have room for 64.
const CAPABILITIES: libc::c_ulong = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_change_once_inside() {
        let jail = Jail::new(Some(JailConfig {
            root: "/m/1/jail".into(),
            uid: 1_000_000,
            gid: 1_000_000,
            cgroup: None,
        }));
        let exit = Path::new("/m/1/jail/exit.json");
        assert_eq!(jail.inside(exit), exit);
        jail.isolated.store(true, Ordering::Release);
        assert_eq!(jail.inside(exit), Path::new("/exit.json"));
        assert_eq!(jail.inside(Path::new("/m/1/x")), Path::new("/m/1/x"));
        assert_eq!(Jail::default().inside(exit), exit);
    }
}
