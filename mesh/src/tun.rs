//! A TUN device: a network interface whose packets this process reads and writes.
//!
//! See the kernel's `Documentation/networking/tuntap.rst`. The device, its addresses and its routes
//! vanish when the file is closed, however this process ends. One queue and one packet a call; the
//! place for several queues (`IFF_MULTI_QUEUE`) and for segments of up to 64 KiB (`IFF_VNET_HDR`,
//! `TUNSETOFFLOAD`) is here, and `Worker` already works in batches.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF as libc::Ioctl, libc::ifreq);

/// An open TUN device.
#[derive(Debug)]
pub(crate) struct Tun {
    file: File,
}

impl Tun {
    /// Makes the device. Its name must be free.
    pub(crate) fn create(name: &str) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        // SAFETY: `ifreq` is plain data, of which all zeroes is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero: the kernel reads a C string.
        if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains(['/', '%']) {
            let problem = format!("{name:?} is no name of a network interface");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_TUN_EXCL) as libc::c_short;
        // SAFETY: the descriptor is open, and `request` lives and is initialized through the call.
        unsafe { tun_set_iff(file.as_raw_fd(), &request) }?;
        Ok(Self { file })
    }

    /// Reads one packet; `WouldBlock` when there is none.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Hands one packet to the kernel.
    pub(crate) fn write(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
