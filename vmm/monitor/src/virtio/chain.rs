//! A descriptor chain, checked and mapped: the host memory behind one request of the guest.
//!
//! This is where a descriptor's address and length turn into host memory. What comes out lies inside
//! guest memory, has at most [`MAX_SEGMENTS`] pieces, all that the device reads before all that it
//! writes, and is read or written by copying or by the kernel (`readv` and the like), never through a
//! Rust reference: the guest may change it at any time.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::memory::{self, GuestRam};

/// One request's buffers.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Names the chain when it is given back.
    pub head: u16,
    /// What the guest wrote for the device.
    pub readable: Buffers<'m>,
    /// Where the device writes its answer.
    pub writable: Buffers<'m>,
}

/// Pieces of guest memory, in order, seen as one run of bytes.
#[derive(Debug, Clone, Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

/// `IOV_MAX`: more pieces than this cannot be handed to the kernel in one call.
pub const MAX_SEGMENTS: usize = 1024;

/// What is wrong with a chain. The guest gets it back unanswered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor points outside guest memory.
    #[error("a descriptor points outside guest memory ({len} bytes at {address:#x})")]
    OutOfBounds {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        len: u32,
    },
    /// More pieces than any driver needs.
    #[error("a chain of more than {MAX_SEGMENTS} pieces")]
    TooLong,
    /// The device's part must follow the driver's (virtio 1.2, 2.7.4.2).
    #[error("a readable descriptor behind a writable one")]
    Order,
}

impl<'m> Chain<'m> {
    /// Walks `chain` once. Loops end where the chain has as many descriptors as its table.
    pub fn map(
        ram: &'m GuestRam,
        chain: DescriptorChain<&'m GuestRam>,
    ) -> Result<Self, ChainError> {
        let mut mapped = Self {
            head: chain.head_index(),
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        for descriptor in chain {
            let buffers = if descriptor.is_write_only() {
                &mut mapped.writable
            } else if mapped.writable.slices.is_empty() {
                &mut mapped.readable
            } else {
                return Err(ChainError::Order);
            };
            let outside = || ChainError::OutOfBounds {
                address: descriptor.addr().0,
                len: descriptor.len(),
            };
            if descriptor.len() == 0 {
                continue;
            }
            let slices = ram.get_slices(descriptor.addr(), descriptor.len() as usize);
            for slice in slices {
                buffers.push(slice.map_err(|_| outside())?);
            }
            if mapped.readable.slices.len() + mapped.writable.slices.len() > MAX_SEGMENTS {
                return Err(ChainError::TooLong);
            }
        }
        Ok(mapped)
    }
}

impl<'m> Buffers<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        // Cannot overflow: a chain has fewer than 2^32 bytes, virtio-queue sees to that.
        self.len += slice.len();
        self.slices.push(slice);
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part that starts at `offset` and has `len` bytes, or what of that there is.
    pub fn part(&self, offset: usize, len: usize) -> Buffers<'m> {
        let mut part = Buffers::default();
        let (mut skip, mut left) = (offset, len);
        for slice in &self.slices {
            if left == 0 {
                break;
            }
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            let take = left.min(slice.len() - skip);
            if let Ok(piece) = slice.subslice(skip, take) {
                part.push(piece);
            }
            skip = 0;
            left -= take;
        }
        part
    }

    /// Copies from `offset` on into `target`; returns how many bytes there were.
    pub fn read(&self, offset: usize, target: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.part(offset, target.len()).slices {
            done += slice.copy_to(&mut target[done..]);
        }
        done
    }

    /// Copies `source` to `offset` on; returns how many bytes fitted.
    pub fn write(&self, offset: usize, source: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.part(offset, source.len()).slices {
            let end = done + slice.len();
            slice.copy_from(&source[done..end]);
            done = end;
        }
        done
    }

    /// One `readv`: a packet, or what a stream has.
    pub fn readv(&self, from: BorrowedFd<'_>) -> io::Result<usize> {
        let iovecs = self.iovecs();
        // SAFETY: the iovecs describe guest memory that `self` borrows, which the kernel writes.
        check(unsafe { libc::readv(from.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) })
    }

    /// One `writev`: a packet, or what a stream takes.
    pub fn writev(&self, to: BorrowedFd<'_>) -> io::Result<usize> {
        let iovecs = self.iovecs();
        // SAFETY: the iovecs describe guest memory that `self` borrows, which the kernel reads.
        check(unsafe { libc::writev(to.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) })
    }

    /// Gives its whole pages back to the host.
    pub fn discard(&self) -> io::Result<()> {
        self.slices.iter().try_for_each(memory::give_back)
    }

    /// As the kernel takes them, at most [`MAX_SEGMENTS`].
    pub(super) fn iovecs(&self) -> Vec<libc::iovec> {
        let iovec = |slice: &VolatileSlice<'_>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        self.slices.iter().map(iovec).collect()
    }
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Descriptor, Driver, READ, WRITE};
    use proptest::prelude::*;

    fn error(descriptors: &[Descriptor]) -> ChainError {
        let mut driver = Driver::new(16);
        driver.offer(descriptors);
        let chain = driver.queue.pop(&driver.ram).unwrap();
        Chain::map(&driver.ram, chain).unwrap_err()
    }

    #[test]
    fn refuses_what_no_driver_may_do() {
        let end = crate::virtio::testing::RAM_BYTES;
        assert_eq!(
            error(&[Descriptor::at(end - 1, 2, READ)]),
            ChainError::OutOfBounds {
                address: end - 1,
                len: 2
            }
        );
        assert_eq!(
            error(&[Descriptor::at(u64::MAX, 2, READ)]),
            ChainError::OutOfBounds {
                address: u64::MAX,
                len: 2
            }
        );
        assert_eq!(
            error(&[
                Descriptor::at(0x1000, 8, WRITE),
                Descriptor::at(0x2000, 8, READ)
            ]),
            ChainError::Order
        );
    }

    #[test]
    fn a_loop_ends() {
        let mut driver = Driver::new(16);
        driver.offer_raw(&[(0x1000, 8, READ | crate::virtio::testing::NEXT, 0)]);
        let chain = driver.queue.pop(&driver.ram).unwrap();
        let mapped = Chain::map(&driver.ram, chain).unwrap();
        assert_eq!(mapped.readable.len(), 16 * 8);
    }

    #[test]
    fn parts_are_copied() {
        let mut driver = Driver::new(16);
        driver.offer(&[
            Descriptor::at(0x8000, 3, WRITE),
            Descriptor::at(0x9000, 5, WRITE),
        ]);
        let ram = driver.ram.clone();
        let chain = Chain::map(&ram, driver.queue.pop(&ram).unwrap()).unwrap();
        let buffers = chain.writable;
        assert_eq!(buffers.write(0, b"12345678"), 8);
        assert_eq!(buffers.write(2, b"XYZ"), 3);
        assert_eq!(buffers.write(7, b"ABC"), 1, "no room for more");
        let mut bytes = [0; 6];
        assert_eq!(buffers.part(1, 6).read(0, &mut bytes), 6);
        assert_eq!(&bytes, b"2XYZ67");
    }

    proptest! {
        /// Whatever the descriptors say, mapping ends, and what it yields is inside guest memory.
        #[test]
        fn any_descriptors_map_or_are_refused(
            table in prop::collection::vec(
                (
                    prop_oneof![any::<u64>(), 0..crate::virtio::testing::RAM_BYTES * 2],
                    prop_oneof![any::<u32>(), 0..0x3000_u32],
                    0..8_u16,
                    0..20_u16,
                ),
                1..16,
            )
        ) {
            let mut driver = Driver::new(16);
            driver.offer_raw(&table);
            let ram = driver.ram.clone();
            if let Some(chain) = driver.queue.pop(&ram)
                && let Ok(chain) = Chain::map(&ram, chain)
            {
                let len = chain.readable.len().min(1 << 16);
                let mut bytes = vec![0; len];
                prop_assert_eq!(chain.readable.read(0, &mut bytes), len);
                let len = chain.writable.len().min(1 << 16);
                prop_assert_eq!(chain.writable.write(0, &vec![7; len]), len);
            }
        }
    }
}
