//! Child processes that do not outlive this one.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid, getppid};

/// Starts `command`; the kernel sends it `signal` when this process ends, however it ends.
///
/// More exactly when the calling *thread* ends (prctl(2)), so this is for the main thread.
pub fn spawn_bound(command: &mut Command, signal: Signal) -> io::Result<Child> {
    let parent: Pid = getpid();
    // SAFETY: between fork and exec this makes two system calls and nothing else.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(signal)?;
            // The parent may have ended before the line above: then no signal would ever come.
            if getppid() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    command.spawn()
}
