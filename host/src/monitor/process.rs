//! A monitor as a process: started, adopted, waited for, killed.
//!
//! A monitor outlives its agent. It is put into a process group of its own, so that a terminal's
//! Ctrl-C stops at the agent, and nothing ties its life to its parent's. While it lives it holds a
//! lock on its pid file; by that lock, and not by a number that may have been given to another
//! process, the next agent knows it again.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};

/// A monitor process.
#[derive(Debug)]
pub(crate) struct Monitor {
    pid: Pid,
    process: AsyncFd<OwnedFd>,
    /// Present unless it was adopted: whoever starts a process reaps it.
    child: tokio::sync::Mutex<Option<Child>>,
}

impl Monitor {
    /// Starts one; `restore` from its snapshot.
    pub(crate) fn spawn(
        binary: &Path,
        config: &Path,
        log: &Path,
        restore: bool,
    ) -> io::Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let mut command = Command::new(binary);
        command.arg("run").arg("--config").arg(config);
        if restore {
            command.arg("--restore");
        }
        // A process group can be asked for without code between fork and exec, which lets the
        // kernel skip copying the agent's page tables: wakes are short.
        command.process_group(0).kill_on_drop(false);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", binary.display())))?;
        let pid = child
            .id()
            .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
            .ok_or_else(|| io::Error::other("the monitor ended before it began"))?;
        // Not reaped yet, so the number is still its own.
        Self::of(pid, Some(child))
    }

    /// The monitor that holds the lock on this pid file, if one does.
    pub(crate) fn adopt(pid_file: &Path) -> io::Result<Option<Self>> {
        let Some(pid) = locked(pid_file)? else {
            return Ok(None);
        };
        let monitor = match Self::of(pid, None) {
            Ok(monitor) => monitor,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Still locked now that the process is held: the number was its own all the time.
        Ok((locked(pid_file)? == Some(pid)).then_some(monitor))
    }

    fn of(pid: Pid, child: Option<Child>) -> io::Result<Self> {
        let process = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        // SAFETY: an `OwnedFd` is one open descriptor, always the same, until it is dropped.
        let process = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) };
        Ok(Self {
            pid,
            process: process.map_err(io::Error::from)?,
            child: tokio::sync::Mutex::new(child),
        })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Waits until it has ended. Returns the signal that ended it, where that is known.
    pub(crate) async fn ended(&self) -> Option<i32> {
        if let Err(error) = self.process.readable().await {
            // Without this the runtime itself is going away.
            tracing::error!(pid = self.pid(), %error, "a monitor cannot be waited for");
            return None;
        }
        let status = match self.child.lock().await.as_mut() {
            Some(child) => child.wait().await.ok(),
            None => None,
        };
        status.and_then(|s| s.signal())
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut fds = [PollFd::new(
            self.process.get_ref().as_fd(),
            PollFlags::POLLIN,
        )];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }

    /// Ends it at once.
    pub(crate) fn kill(&self) {
        match pidfd_send_signal(self.process.get_ref().as_fd(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => {
                tracing::error!(pid = self.pid(), %error, "a monitor cannot be killed");
            }
        }
    }
}

/// The process id in a pid file that its process holds locked.
fn locked(pid_file: &Path) -> io::Result<Option<Pid>> {
    let mut file = match File::open(pid_file) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => return Ok(None),
        Err(rustix::io::Errno::WOULDBLOCK) => {}
        Err(error) => return Err(error.into()),
    }
    let mut text = String::new();
    file.by_ref().take(32).read_to_string(&mut text)?;
    Ok(text.trim().parse().ok().and_then(Pid::from_raw))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A process that locks its pid file and waits, as a monitor does.
    fn stand_in(dir: &Path) -> std::process::Child {
        let pid_file = dir.join("vmm.pid");
        let script = "exec 9>>\"$0\" && flock -x 9 && echo $$ > \"$0\" && echo ready && exec cat";
        let mut child = std::process::Command::new("sh")
            .args(["-c", script])
            .arg(&pid_file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut ready)
            .unwrap();
        child
    }

    #[tokio::test]
    async fn a_living_monitor_is_adopted_by_its_lock_and_its_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("vmm.pid");
        assert!(Monitor::adopt(&pid_file).unwrap().is_none(), "no file");
        let mut child = stand_in(dir.path());
        let monitor = Monitor::adopt(&pid_file).unwrap().unwrap();
        assert_eq!(monitor.pid(), i32::try_from(child.id()).unwrap());
        assert!(!monitor.has_ended());
        let waiting = tokio::time::timeout(Duration::from_millis(20), monitor.ended());
        assert!(waiting.await.is_err(), "it lives");
        monitor.kill();
        assert_eq!(monitor.ended().await, None);
        assert!(monitor.has_ended());
        child.wait().unwrap();
        monitor.kill();
        assert!(Monitor::adopt(&pid_file).unwrap().is_none(), "stale file");
    }

    #[tokio::test]
    async fn a_child_is_reaped_and_tells_its_signal() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = dir.path().join("vmm");
        std::fs::write(&script, "#!/bin/sh\necho \"$@\"\nexec sleep 1000\n").unwrap();
        std::os::unix::fs::chown(&script, None, None).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let monitor = Monitor::spawn(&script, Path::new("/c"), &log, true).unwrap();
        let group = nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(monitor.pid()))).unwrap();
        assert_eq!(group.as_raw(), monitor.pid(), "it has a group of its own");
        monitor.kill();
        assert_eq!(monitor.ended().await, Some(9));
        let missing = Monitor::spawn(Path::new("/nonexistent"), Path::new("/c"), &log, false);
        assert!(missing.unwrap_err().to_string().contains("/nonexistent"));
    }
}
