//! Starting processes and burying them.
//!
//! PID 1 inherits every orphan of the guest, so one place waits for *all* children. Whoever starts a
//! process gets a [`Process`] to signal and poll, and its [`Exit`] to receive. Starting and reaping
//! exclude each other: a child cannot be buried before it is known, and the standard library, which
//! waits for a child whose program could not be run, finds it still there.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tern_guest::ExitStatus;

/// All children of this process.
#[derive(Default)]
pub struct Children {
    inner: Mutex<Inner>,
    buried: Condvar,
}

#[derive(Default)]
struct Inner {
    known: HashMap<i32, mpsc::Sender<ExitStatus>>,
    none_left: bool,
    closed: bool,
}

/// Where the end of a process is reported.
pub type Exit = mpsc::Receiver<ExitStatus>;

/// Waits for the end of a process.
pub fn wait(exit: &Exit) -> ExitStatus {
    // The reaper reports every process that it knows. Were it gone, nothing would be known of the
    // end, and that must not look like success.
    exit.recv().unwrap_or(ExitStatus {
        code: UNKNOWN,
        ..Default::default()
    })
}

/// A process that was started here. It stays this process, and never becomes another with the same
/// number, because it is held by descriptor.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends it a signal.
    pub fn signal(&self, signo: i32) -> io::Result<()> {
        let (fd, no_info, no_flags) = (self.pidfd.as_raw_fd(), std::ptr::null::<()>(), 0);
        // SAFETY: the call reads no memory of ours, since the info pointer is null.
        let result =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signo, no_info, no_flags) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Waits for its end, and says whether it came in time.
    pub fn wait(&self, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_zero() => return false,
                Ok(0) | Err(_) => {}
                Ok(_) => return true,
            }
        }
    }
}

impl AsFd for Process {
    /// Becomes readable when the process ends.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Children {
    /// Starts a process.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(Arc<Process>, Exit)> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(io::Error::other(
                "the Machine is ending, nothing starts any more",
            ));
        }
        let mut child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let pidfd = match open_pidfd(pid) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                child.kill()?;
                child.wait()?;
                return Err(error);
            }
        };
        let (report, exit) = mpsc::channel();
        inner.known.insert(pid, report);
        inner.none_left = false;
        Ok((Arc::new(Process { pid, pidfd }), exit))
    }

    /// Starts nothing from now on. What is being started has been when this returns, so that a signal
    /// to all processes reaches it.
    pub fn close(&self) {
        self.lock().closed = true;
    }

    /// Sends a signal to the process group that a process started here leads, unless the process has
    /// been buried: then its number may already be another's, even of a process started here.
    pub fn signal_group(&self, process: &Process, signo: i32) {
        // Nobody is buried meanwhile, and only a burial sets the number free.
        let _nobody_is_buried = self.lock();
        if process.signal(0).is_ok() {
            // SAFETY: `kill` takes no pointers.
            unsafe { libc::kill(-process.pid, signo) };
        }
    }

    /// Buries all that have ended. To be called on `SIGCHLD`.
    pub fn reap(&self) {
        let mut inner = self.lock();
        loop {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG | libc::__WALL) };
            if pid > 0 {
                if let Some(report) = inner.known.remove(&pid) {
                    // Nobody may be waiting any more.
                    let _ = report.send(exit_status(status));
                }
                continue;
            }
            let error = (pid < 0).then(io::Error::last_os_error);
            if error
                .as_ref()
                .is_some_and(|e| e.kind() == io::ErrorKind::Interrupted)
            {
                continue;
            }
            inner.none_left = error.is_some();
            break;
        }
        self.buried.notify_all();
    }

    /// Waits until there is no child left, and says whether that came in time.
    pub fn wait_none(&self, at_most: Duration) -> bool {
        self.reap();
        let deadline = Instant::now() + at_most;
        let mut inner = self.lock();
        while !inner.none_left {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.buried.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn exit_status(status: i32) -> ExitStatus {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        return ExitStatus {
            code: 128 + signal,
            signal: Some(signal),
            oom_killed: false,
        };
    }
    ExitStatus {
        code: libc::WEXITSTATUS(status),
        ..Default::default()
    }
}

/// What container engines return when they do not know better.
const UNKNOWN: i32 = 125;

/// To be held by every test that starts a process: `reap` takes all children of the whole process.
#[cfg(test)]
pub static ONE_FAMILY_AT_A_TIME: Mutex<()> = Mutex::new(());

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;

    #[test]
    fn children_are_started_signalled_and_buried() {
        let _alone = ONE_FAMILY_AT_A_TIME.lock();
        let children = Children::default();
        let run = |script: &str| children.spawn(Command::new("/bin/sh").args(["-c", script]));

        let (process, exit) = run("exit 7").unwrap();
        assert!(process.wait(Duration::from_secs(20)));
        children.reap();
        assert_eq!(
            exit.recv().unwrap(),
            ExitStatus {
                code: 7,
                ..Default::default()
            }
        );

        let (process, exit) = run("exec sleep 1000").unwrap();
        assert!(!process.wait(Duration::from_millis(1)));
        process.signal(libc::SIGKILL).unwrap();
        assert!(process.wait(Duration::from_secs(20)));
        children.reap();
        let killed = ExitStatus {
            code: 137,
            signal: Some(9),
            oom_killed: false,
        };
        assert_eq!(exit.recv().unwrap(), killed);
        assert!(
            process.signal(libc::SIGTERM).is_err(),
            "the number may be another's by now"
        );

        assert!(
            children
                .spawn(&mut Command::new("/no/such/program"))
                .is_err()
        );
        assert!(
            children.wait_none(Duration::from_secs(20)),
            "no child is left"
        );
    }

    #[test]
    fn the_group_of_a_buried_process_gets_no_signal_though_its_number_is_used_again() {
        let _alone = ONE_FAMILY_AT_A_TIME.lock();
        let children = Children::default();
        let (mut first, _) = children.spawn(&mut Command::new("true")).unwrap();
        assert!(first.wait(Duration::from_secs(20)));
        children.reap();
        let mut sleep = Command::new("sleep");
        let (second, exit) = children.spawn(sleep.arg("1000").process_group(0)).unwrap();

        Arc::get_mut(&mut first).unwrap().pid = second.pid();
        children.signal_group(&first, libc::SIGKILL);
        children.signal_group(&second, libc::SIGTERM);
        assert!(second.wait(Duration::from_secs(20)));
        children.reap();
        assert_eq!(exit.recv().unwrap().signal, Some(libc::SIGTERM));
    }
}
