//! Control groups (v2): all processes of one command, wherever they forked to.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long to wait for killed leftovers to be gone. They are dead already; this is for a process
/// that hangs in the kernel, which must not hang its successor.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(5);
/// Control groups for commands, one each, below a directory of this agent's own.
#[derive(Debug)]
pub struct Groups {
    root: PathBuf,
    next: AtomicU64,
}

impl Groups {
    /// Makes the directory.
    pub fn new(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root).with_context(|| {
            format!(
                "cannot make the control group {} (is cgroup v2 mounted?)",
                root.display()
            )
        })?;
        Ok(Self {
            root,
            next: AtomicU64::new(1),
        })
    }

    /// Makes one more group.
    pub fn make(&self) -> io::Result<Group> {
        let path = self
            .root
            .join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir(&path)?;
        Ok(Group { path })
    }
}

/// The group of one command.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// Where a process writes `0` to become a member.
    pub fn entrance(&self) -> io::Result<File> {
        File::options()
            .write(true)
            .open(self.path.join("cgroup.procs"))
    }

    /// Kills every member, those included that fork meanwhile.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Waits until no process is left, or patience is.
    pub fn wait_empty(&self) -> io::Result<()> {
        let deadline = Instant::now() + LEFTOVER_PATIENCE;
        let mut events = File::open(self.path.join("cgroup.events"))?;
        loop {
            let mut text = String::new();
            io::Seek::rewind(&mut events)?;
            events.read_to_string(&mut text)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if text.contains("populated 0") || left.is_zero() {
                return Ok(());
            }
            // The kernel flags the file each time the group becomes empty or not empty.
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            poll(
                &mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)],
                timeout,
            )?;
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Not empty when processes were to live on: then it stays with them.
        let _ = fs::remove_dir(&self.path);
    }
}
