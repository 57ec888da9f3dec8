//! Guest memory of a request that is carried out elsewhere while its device goes on.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use super::chain::Buffers;
use crate::memory::GuestRam;

/// Pieces of guest memory, in order, that stay mapped as long as this lives. They are read and written by the
/// kernel, or byte by byte, never through a Rust reference: the guest may change them at any time.
#[derive(Debug)]
pub struct Held {
    iovecs: Vec<libc::iovec>,
    /// The iovec that comes next: those before have been moved.
    next: usize,
    /// Keeps what the pointers point to.
    _ram: Arc<GuestRam>,
}

// SAFETY: the pointers are into memory that `_ram` keeps mapped, whichever thread holds them, and that is
// shared with the guest's processors anyway.
unsafe impl Send for Held {}

impl Buffers<'_> {
    /// Holds these pieces of `ram`.
    ///
    /// # Safety
    ///
    /// They must have been mapped from that very memory.
    pub unsafe fn hold(&self, ram: &Arc<GuestRam>) -> Held {
        Held {
            iovecs: self.iovecs(),
            next: 0,
            _ram: ram.clone(),
        }
    }
}

impl Held {
    /// What is left, as the kernel takes it. It stays where it is until the next [`Held::advance`].
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs[self.next..]
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.iovecs().is_empty()
    }

    /// Leaves out what has been moved.
    pub fn advance(&mut self, mut moved: usize) {
        while let Some(iovec) = self.iovecs.get_mut(self.next) {
            if moved < iovec.iov_len {
                iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(moved).cast();
                iovec.iov_len -= moved;
                return;
            }
            moved -= iovec.iov_len;
            self.next += 1;
        }
    }

    /// Writes the first byte, if there is one.
    pub fn put(&self, byte: u8) {
        if let Some(iovec) = self.iovecs().first() {
            // SAFETY: an iovec of `Buffers` has at least one byte, in memory that is mapped for writing as
            // long as `self` lives.
            unsafe { iovec.iov_base.cast::<u8>().write_volatile(byte) };
        }
    }

    /// One `preadv`.
    pub fn read_from(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (iovecs, at) = (self.iovecs(), file_offset(offset)?);
        // SAFETY: the iovecs describe mapped guest memory, which the kernel writes.
        check(unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, at) })
    }

    /// One `pwritev`.
    pub fn write_to(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (iovecs, at) = (self.iovecs(), file_offset(offset)?);
        // SAFETY: the iovecs describe mapped guest memory, which the kernel reads.
        check(unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, at) })
    }
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use crate::virtio::chain::Chain;
    use crate::virtio::testing::{Descriptor, Driver, WRITE};
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsFd;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn what_is_held_is_moved_piece_by_piece() {
        let mut driver = Driver::new(16);
        driver.offer(&[
            Descriptor::at(0x8000, 3, WRITE),
            Descriptor::at(0x9000, 5, WRITE),
        ]);
        let ram = driver.ram.clone();
        let chain = Chain::map(&ram, driver.queue.pop(&ram).unwrap()).unwrap();
        // SAFETY: mapped from `ram`.
        let mut held = unsafe { chain.writable.hold(&ram) };
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        assert_eq!(held.read_from(file.as_fd(), 1).unwrap(), 8);
        let mut bytes = [0; 5];
        ram.read_slice(&mut bytes, GuestAddress(0x9000)).unwrap();
        assert_eq!(&bytes, b"45678");
        held.advance(2);
        held.put(b'X');
        held.advance(1);
        assert_eq!(held.write_to(file.as_fd(), 0).unwrap(), 5);
        held.advance(4);
        assert_eq!((held.iovecs().len(), held.is_empty()), (1, false));
        held.advance(1);
        assert!(held.is_empty());
        held.put(b'?'); // nowhere
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "4567856789");
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x8002)).unwrap(), b'X');
        assert!(held.read_from(file.as_fd(), u64::MAX).is_err());
    }
}
