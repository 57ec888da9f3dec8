//! A monitor as a process: started, adopted, waited for, killed.
//!
//! A monitor outlives its agent. It is put into a process group of its own, so that a terminal's
//! Ctrl-C stops at the agent, and nothing ties its life to its parent's. While it lives it holds a
//! lock on its pid file; by that lock, and not by a number that may have been given to another
//! process, the next agent knows it again.
//!
//! A jailed monitor is the first process of a PID namespace of its own. For that the thread that starts it
//! unshares: the next process of that thread, and nothing else of the agent, is in the new namespace. It is
//! a child of the agent like any other, with a number of the host's, and no fork comes between. (Signals that
//! such a process raises itself, and does not handle, are lost: one that aborts ends by SIGSEGV.)

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};
use tokio::runtime::Handle;

/// A monitor process.
#[derive(Debug)]
pub(crate) struct Monitor {
    pid: Pid,
    process: AsyncFd<OwnedFd>,
    /// Present unless it was adopted: whoever starts a process reaps it.
    child: tokio::sync::Mutex<Option<Child>>,
}

/// What to start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start<'a> {
    /// The monitor's program.
    pub(crate) binary: &'a Path,
    /// Its `vm.json`.
    pub(crate) config: &'a Path,
    /// Its own log.
    pub(crate) log: &'a Path,
    /// Whether it resumes from its snapshot.
    pub(crate) restore: bool,
    /// Whether it gets a PID namespace of its own, which takes root.
    pub(crate) own_pids: bool,
}

impl Monitor {
    /// Starts one.
    pub(crate) fn spawn(start: Start<'_>) -> io::Result<Self> {
        make_way(start.log)?;
        let log = File::options().create(true).append(true).open(start.log)?;
        let mut command = Command::new(start.binary);
        command.arg("run").arg("--config").arg(start.config);
        if start.restore {
            command.arg("--restore");
        }
        // A process group can be asked for without code between fork and exec, which lets the
        // kernel skip copying the agent's page tables: wakes are short.
        command.process_group(0).kill_on_drop(false);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = if start.own_pids {
            spawn_in_own_pids(&mut command)
        } else {
            command.spawn()
        };
        let child = child
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", start.binary.display())))?;
        let pid = child
            .id()
            .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
            .ok_or_else(|| io::Error::other("the monitor ended before it began"))?;
        // Not reaped yet, so the number is still its own.
        Self::of(pid, Some(child)).inspect_err(|_| {
            // Nobody would look after it, and its snapshot may be taken for one that nobody resumed.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        })
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

    /// How many bytes it has written so far (proc(5), `wchar`); 0 where that cannot be told.
    pub(crate) fn written(&self) -> u64 {
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.pid())).unwrap_or_default();
        let count = io.lines().find_map(|line| line.strip_prefix("wchar: "));
        count.and_then(|count| count.parse().ok()).unwrap_or(0)
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

/// Puts a log that has grown long aside, in place of the one before it.
fn make_way(log: &Path) -> io::Result<()> {
    if std::fs::metadata(log).is_ok_and(|log| log.is_file() && log.len() > LONG_LOG) {
        let mut before = log.as_os_str().to_owned();
        before.push(".1");
        std::fs::rename(log, before)?;
    }
    Ok(())
}

/// A monitor says some lines in its life.
const LONG_LOG: u64 = 1 << 20;

/// Starts `command` as the first process of a new PID namespace.
///
/// From a thread of its own, which then ends: the namespace of a thread's children cannot be taken back.
fn spawn_in_own_pids(command: &mut Command) -> io::Result<Child> {
    // The child's end is watched by the runtime of whoever asks.
    let runtime = Handle::try_current().map_err(io::Error::other)?;
    let spawn = || {
        let _inside = runtime.enter();
        unshare(CloneFlags::CLONE_NEWPID).map_err(|e| {
            io::Error::new(io::Error::from(e).kind(), format!("a PID namespace: {e}"))
        })?;
        command.spawn()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("spawn".to_owned())
            .spawn_scoped(scope, spawn)?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
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

    #[test]
    fn a_long_log_makes_way_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let (log, before) = (dir.path().join("vmm.log"), dir.path().join("vmm.log.1"));
        make_way(&log).unwrap();
        std::fs::write(&log, "short").unwrap();
        make_way(&log).unwrap();
        assert!(log.exists() && !before.exists());
        for text in [b'a', b'b'] {
            std::fs::write(&log, vec![text; LONG_LOG as usize + 1]).unwrap();
            make_way(&log).unwrap();
            assert!(!log.exists());
            assert_eq!(std::fs::read(&before).unwrap()[0], text);
        }
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
        let start = Start {
            binary: &script,
            config: Path::new("/c"),
            log: &log,
            restore: true,
            own_pids: false,
        };
        let monitor = Monitor::spawn(start).unwrap();
        let group = nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(monitor.pid()))).unwrap();
        assert_eq!(group.as_raw(), monitor.pid(), "it has a group of its own");
        monitor.kill();
        assert_eq!(monitor.ended().await, Some(9));
        let missing = Monitor::spawn(Start {
            binary: Path::new("/nonexistent"),
            ..start
        });
        assert!(missing.unwrap_err().to_string().contains("/nonexistent"));
    }
}
