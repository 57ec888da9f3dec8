//! Terminals for programs.
//!
//! Both ends are close-on-exec from their first moment: another program that is started just then
//! would inherit them, and could read what is typed, or keep the terminal from ending.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::pty::{posix_openpt, unlockpt};
use tern_guest::message::TerminalSize;

/// A new terminal: our end, and the program's.
pub fn open() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let ours = posix_openpt(flags)?;
    unlockpt(&ours)?;
    // By descriptor (Linux 4.13), since a path would lead to whatever the image has there.
    // SAFETY: the call takes no pointers.
    let theirs = unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, flags.bits()) };
    if theirs < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok((ours.into(), unsafe { OwnedFd::from_raw_fd(theirs) }))
}

/// Tells a terminal, and who runs in it, how large its window is.
pub fn resize(terminal: &OwnedFd, size: TerminalSize) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads the size, which outlives the call.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::children::ONE_FAMILY_AT_A_TIME;
    use std::process::{Command, Stdio};
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Over<'a>(&'a AtomicBool);

    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn no_other_program_inherits_a_terminal() {
        let _alone = ONE_FAMILY_AT_A_TIME.lock();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    drop(open().unwrap());
                }
            });
            // Also when something below fails: the other thread is waited for.
            let _over = Over(&over);
            let mut inherited = String::new();
            for _ in 0..300 {
                let mut list = Command::new("ls");
                list.args(["-l", "/proc/self/fd"]).stdin(Stdio::null());
                let output = list.stderr(Stdio::null()).output().unwrap();
                let output = String::from_utf8(output.stdout).unwrap();
                let terminals = output.lines().filter(|line| line.contains("-> /dev/pt"));
                inherited.extend(terminals);
            }
            assert_eq!(inherited, "");
        });
    }
}
