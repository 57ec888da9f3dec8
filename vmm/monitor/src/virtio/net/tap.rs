//! An existing TAP device, opened by name.
//!
//! Frames go with a `virtio_net_hdr` before them (`IFF_VNET_HDR`), in the very form the guest's driver
//! uses: checksum and segmentation offloads pass through without being looked at.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

/// One queue of a TAP device. Reads and writes never block.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

/// `struct virtio_net_hdr_v1`.
pub const VNET_HEADER_BYTES: usize = 12;

/// What the kernel may leave undone in frames for the guest, because its driver can do it
/// (`linux/if_tun.h`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// Segmentation of TCP over IPv4.
    pub tso4: bool,
    /// Segmentation of TCP over IPv6.
    pub tso6: bool,
}

mod ioctl {
    nix::ioctl_write_int!(set_iff, b'T', 202);
    nix::ioctl_write_int!(set_offload, b'T', 208);
    nix::ioctl_write_ptr!(set_vnet_header_size, b'T', 216, libc::c_int);
}

impl Tap {
    /// Attaches to the TAP device `name`, which must exist.
    pub fn open(name: &str) -> io::Result<Self> {
        if nix::net::if_::if_nametoindex(name).is_err() {
            // TUNSETIFF would make one, which nobody would route to or remove.
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "no such network device",
            ));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        // SAFETY: all zeroes is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The configuration allows 15 ASCII bytes, so the terminating zero stays.
        for (to, from) in request
            .ifr_name
            .iter_mut()
            .zip(name.bytes().take(libc::IFNAMSIZ - 1))
        {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the kernel reads an `ifreq` at this address, which outlives the call.
        unsafe { ioctl::set_iff(file.as_raw_fd(), std::ptr::from_ref(&request) as u64) }?;
        let tap = Self { file };
        let size = VNET_HEADER_BYTES as libc::c_int;
        // SAFETY: the kernel reads an int at this address.
        unsafe { ioctl::set_vnet_header_size(tap.file.as_raw_fd(), &size) }?;
        tap.set_offloads(Offloads::default())?;
        Ok(tap)
    }

    /// Says what the guest's driver can do.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let Offloads {
            checksum,
            tso4,
            tso6,
        } = offloads;
        let flag = |on, bit| if on { bit } else { 0 };
        let flags = flag(checksum, libc::TUN_F_CSUM)
            | flag(checksum && tso4, libc::TUN_F_TSO4)
            | flag(checksum && tso6, libc::TUN_F_TSO6);
        // SAFETY: the argument is a number.
        unsafe { ioctl::set_offload(self.file.as_raw_fd(), flags.into()) }?;
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
