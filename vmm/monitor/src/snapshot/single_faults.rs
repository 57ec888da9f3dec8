//! Faults that map their own page only, while it is found out which pages a guest touches.
//!
//! A read fault in a mapped file maps up to 16 pages that are in the page cache, those around the one that was asked
//! for; the page map then shows them all. Of a wake that is two thirds too many, and each would be mapped into the
//! guest before it runs the next time. The kernel leaves the others out in a mapping that is registered with a
//! `userfaultfd` for write protection (`uffd_disable_fault_around`), of whatever kind since Linux 6.7
//! (`UFFD_FEATURE_WP_ASYNC`, <https://docs.kernel.org/admin-guide/mm/userfaultfd.html>). Nothing is ever protected, so
//! nothing ever waits for this process. Where a file system keeps a file in folios of 2 MiB, one of them is mapped as before,
//! at once, and costs as much as a page.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::memory::Memory;

/// Ends when it is dropped; KVM then drops what it has mapped into the guest, to be asked for again.
#[derive(Debug)]
pub struct SingleFaults {
    /// The kernel forgets the registration with it.
    _registered: OwnedFd,
}

impl SingleFaults {
    /// For all of `memory`. Only where this process still has its rights.
    pub fn of(memory: &Memory) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = ioctl::Api {
            api: ioctl::VERSION,
            features: ioctl::FEATURE_WP_ASYNC,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes this one structure.
        unsafe { ioctl::api(fd.as_raw_fd(), &mut api)? };
        for (range, host) in memory.mappings() {
            let mut register = ioctl::Register {
                start: host as u64,
                len: range.len,
                mode: ioctl::MODE_WP,
                ioctls: 0,
            };
            // SAFETY: the kernel reads and writes this one structure. The range is guest memory's, in which a fault
            // goes on as before, but for the pages around it.
            unsafe { ioctl::register(fd.as_raw_fd(), &mut register)? };
        }
        Ok(Self { _registered: fd })
    }
}

/// `linux/userfaultfd.h`.
mod ioctl {
    pub const VERSION: u64 = 0xaa;
    pub const FEATURE_WP_ASYNC: u64 = 1 << 15;
    pub const MODE_WP: u64 = 1 << 1;

    /// `struct uffdio_api`.
    #[repr(C)]
    pub struct Api {
        pub api: u64,
        pub features: u64,
        pub ioctls: u64,
    }

    /// `struct uffdio_register`, whose first two are a `struct uffdio_range`.
    #[repr(C)]
    pub struct Register {
        pub start: u64,
        pub len: u64,
        pub mode: u64,
        pub ioctls: u64,
    }

    nix::ioctl_readwrite!(api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PAGE_SIZE;
    use crate::snapshot::WorkingSet;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn a_read_brings_in_its_own_page_until_they_end() {
        let bytes = 4 << 20;
        // On a file system that keeps its files in large folios a fault may map all of one.
        let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all(&vec![1; bytes]).unwrap();
        let memory = Memory::from_file(file, bytes as u64).unwrap();
        let touch = |page: usize| {
            let at = GuestAddress((page * PAGE_SIZE) as u64);
            assert_eq!(memory.ram().read_obj::<u8>(at).unwrap(), 1);
            WorkingSet::observe(&memory, None).unwrap().pages()
        };
        let singly = match SingleFaults::of(&memory) {
            Ok(singly) => singly,
            Err(error) => {
                let needs = "this test needs root with CAP_SYS_PTRACE";
                assert_ne!(error.raw_os_error(), Some(libc::EPERM), "{needs}");
                let kernel = nix::sys::utsname::uname().unwrap();
                let kernel = kernel.release().to_string_lossy().into_owned();
                let mut numbers = kernel.split(['.', '-']).map(|n| n.parse().unwrap_or(0));
                let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
                assert!(version < (6, 7), "Linux {kernel} can: {error}");
                assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
                return;
            }
        };
        assert_eq!((touch(40), touch(45), touch(300)), (1, 2, 3));
        drop(singly);
        assert!(touch(600) > 3 + 1, "the pages around it too");
    }
}
