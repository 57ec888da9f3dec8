//! What the kernel tells a waiter of. On a host of one processor, who looks every millisecond is in the way of what
//! is measured: this sleeps until there is something to see.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// A source of news.
#[derive(Debug)]
pub enum Told {
    /// Files of a directory appear or change (inotify(7)).
    Files(Inotify),
    /// A network device changes (rtnetlink(7)).
    Links(OwnedFd),
}

/// `RTMGRP_LINK` of linux/rtnetlink.h.
const LINK_GROUP: u32 = 1;

impl Told {
    /// Of the files in `directory`.
    pub fn of_files(directory: &Path) -> Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .context("cannot make an inotify instance")?;
        let changes = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MODIFY;
        inotify
            .add_watch(directory, changes)
            .with_context(|| format!("cannot watch {}", directory.display()))?;
        Ok(Self::Files(inotify))
    }

    /// Of network devices: among others, of a TAP's carrier once its queue is ready, too.
    pub fn of_links() -> Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let link = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            flags,
            SockProtocol::NetlinkRoute,
        )
        .context("cannot open a netlink socket")?;
        bind(link.as_raw_fd(), &NetlinkAddr::new(0, LINK_GROUP))
            .context("cannot listen to changes of network devices")?;
        Ok(Self::Links(link))
    }

    /// Sleeps until there is news, or `patience` is over, and takes all news there is.
    pub fn wait(&self, patience: Duration) -> Result<()> {
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        let mut ready = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, patience) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for news"),
        }
        let mut message = [0; 8192];
        loop {
            let more = match self {
                Self::Files(inotify) => inotify.read_events().map(drop),
                Self::Links(link) => {
                    recv(link.as_raw_fd(), &mut message, MsgFlags::empty()).map(drop)
                }
            };
            match more {
                Ok(()) => {}
                // Lost news is news, too: the waiter looks anyway.
                Err(Errno::EAGAIN | Errno::ENOBUFS) => return Ok(()),
                Err(error) => return Err(error).context("cannot read news"),
            }
        }
    }
}

impl AsFd for Told {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Files(inotify) => inotify.as_fd(),
            Self::Links(link) => link.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use nix::sys::socket::getsockname;

    use super::*;

    #[test]
    fn a_changed_file_ends_the_wait_and_no_change_does_not() {
        let directory = std::env::temp_dir().join(format!("told-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let told = Told::of_files(&directory).unwrap();
        fs::write(directory.join("file"), "x").unwrap();
        let started = Instant::now();
        told.wait(Duration::from_secs(60)).unwrap();
        assert!(started.elapsed() < Duration::from_secs(60));
        // All of it was taken: nothing is ready any more.
        let mut ready = [PollFd::new(told.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, PollTimeout::ZERO), Ok(0));
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn changes_of_network_devices_are_listened_to() {
        let told = Told::of_links().unwrap();
        told.wait(Duration::ZERO).unwrap();
        let bound: NetlinkAddr = getsockname(told.as_fd().as_raw_fd()).unwrap();
        assert_eq!(bound.groups(), nix::libc::RTMGRP_LINK.cast_unsigned());
    }
}
