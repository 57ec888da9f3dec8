//! `/dev/vhost-net`: the kernel moves the frames of one pair of queues (`linux/vhost.h`).
//!
//! What is here is the kernel's interface and nothing of the device: each method is one `ioctl`, or two that
//! make no sense without each other.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::virtio::queue::VirtQueue;

/// One open `/dev/vhost-net`.
#[derive(Debug)]
pub struct Vhost {
    // Before the memory: who closes it waits until the kernel is done with that.
    file: File,
    /// The memory that the kernel was told of, which must stay where it is.
    ram: Option<Arc<GuestRam>>,
}

/// The event that KVM writes, those that the kernel is to write.
#[derive(Debug, Clone, Copy)]
pub struct Events<'a> {
    /// The driver has put something into the queue.
    pub kick: &'a EventFd,
    /// There is something for the driver.
    pub call: &'a EventFd,
    /// The queue cannot be used as the driver left it.
    pub error: BorrowedFd<'a>,
}

const DEVICE: &str = "/dev/vhost-net";
/// Ranges of guest memory: below the gap, and above.
const MAX_REGIONS: usize = 2;

/// `struct vhost_vring_state`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RingState {
    index: u32,
    number: u32,
}

/// `struct vhost_vring_file`; -1 is none.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RingFile {
    index: u32,
    fd: i32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RingAddresses {
    index: u32,
    flags: u32,
    desc_table: u64,
    used_ring: u64,
    avail_ring: u64,
    log: u64,
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Region {
    guest_address: u64,
    bytes: u64,
    host_address: u64,
    flags: u64,
}

/// `struct vhost_memory` with room for as many regions as there may be.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Regions {
    count: u32,
    padding: u32,
    regions: [Region; MAX_REGIONS],
}

mod ioctl {
    use super::{Regions, RingAddresses, RingFile, RingState};

    const VHOST: u8 = 0xaf;
    /// `struct vhost_memory` before its regions, which is what the number counts.
    const REGIONS_HEAD: usize = 8;

    nix::ioctl_read!(get_features, VHOST, 0x00, u64);
    nix::ioctl_write_ptr!(set_features, VHOST, 0x00, u64);
    nix::ioctl_none!(set_owner, VHOST, 0x01);
    nix::ioctl_write_ptr_bad!(
        set_memory,
        nix::request_code_write!(VHOST, 0x03, REGIONS_HEAD),
        Regions
    );
    nix::ioctl_write_ptr!(set_size, VHOST, 0x10, RingState);
    nix::ioctl_write_ptr!(set_addresses, VHOST, 0x11, RingAddresses);
    nix::ioctl_write_ptr!(set_position, VHOST, 0x12, RingState);
    nix::ioctl_readwrite!(get_position, VHOST, 0x12, RingState);
    nix::ioctl_write_ptr!(set_kick, VHOST, 0x20, RingFile);
    nix::ioctl_write_ptr!(set_call, VHOST, 0x21, RingFile);
    nix::ioctl_write_ptr!(set_error, VHOST, 0x22, RingFile);
    nix::ioctl_write_ptr!(set_backend, VHOST, 0x30, RingFile);
}

impl Vhost {
    /// Opens the device, which needs the rights that a monitor has before its jail.
    pub fn open() -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|error| {
                let missing = [libc::ENOENT, libc::ENODEV, libc::ENXIO];
                let is_missing = error.raw_os_error().is_some_and(|e| missing.contains(&e));
                let hint = if is_missing {
                    " (as root: modprobe vhost_net)"
                } else {
                    ""
                };
                io::Error::new(error.kind(), format!("cannot open {DEVICE}: {error}{hint}"))
            })?;
        Ok(Self { file, ram: None })
    }

    /// What this kernel's vhost-net can do.
    pub fn features(&self) -> io::Result<u64> {
        let mut features = 0;
        // SAFETY: the kernel writes a `u64` at this address.
        unsafe { ioctl::get_features(self.fd(), &raw mut features) }?;
        Ok(features)
    }

    /// Has a thread of the kernel's work on `ram`, the memory of this process; from the second call on nothing
    /// is left to do.
    ///
    /// By a thread that is confined already: newer kernels give theirs what its maker has, user and limits.
    pub fn claim(&mut self, ram: &Arc<GuestRam>) -> io::Result<()> {
        if self.ram.is_some() {
            return Ok(());
        }
        let table = regions(ram)?;
        // SAFETY: no argument. It may fail halfway to a table, and is tried again then: EBUSY is ours.
        match unsafe { ioctl::set_owner(self.fd()) } {
            Ok(_) | Err(nix::errno::Errno::EBUSY) => {}
            Err(error) => return Err(error.into()),
        }
        // SAFETY: the kernel reads the head and `count` regions, and there are as many. It will write to what
        // they tell of, as the guest may: `ram` is kept mapped for as long as the device is open.
        unsafe { ioctl::set_memory(self.fd(), &raw const table) }?;
        self.ram = Some(ram.clone());
        Ok(())
    }

    /// What the driver has accepted of [`Self::features`].
    pub fn set_features(&self, features: u64) -> io::Result<()> {
        // SAFETY: the kernel reads a `u64` at this address.
        unsafe { ioctl::set_features(self.fd(), &raw const features) }?;
        Ok(())
    }

    /// Tells of a queue that nobody works on, and where to go on in it.
    pub fn set_up(&self, index: u32, queue: &VirtQueue, events: Events<'_>) -> io::Result<()> {
        let ram = self.ram.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let rings = queue.host_rings(ram)?;
        let state = |number: u16| RingState {
            index,
            number: number.into(),
        };
        let addresses = RingAddresses {
            index,
            flags: 0,
            desc_table: rings.desc_table,
            used_ring: rings.used_ring,
            avail_ring: rings.avail_ring,
            log: 0,
        };
        let file = |fd: &dyn AsRawFd| RingFile {
            index,
            fd: fd.as_raw_fd(),
        };
        let (size, position) = (state(queue.size()), state(queue.next_avail()));
        let kick = file(events.kick);
        let call = file(events.call);
        let error = file(&events.error);
        // SAFETY: each address is that of the struct which the call's number is for, and lives as long as the
        // call. The rings are whole in the memory that `claim` told of. The kernel holds the events by
        // itself, however long they are open here.
        unsafe {
            ioctl::set_size(self.fd(), &raw const size)?;
            ioctl::set_position(self.fd(), &raw const position)?;
            ioctl::set_addresses(self.fd(), &raw const addresses)?;
            ioctl::set_kick(self.fd(), &raw const kick)?;
            ioctl::set_call(self.fd(), &raw const call)?;
            ioctl::set_error(self.fd(), &raw const error)?;
        }
        Ok(())
    }

    /// Has the kernel move the queue's frames to or from `tap`; without one it stops, and what it had begun is
    /// finished when this returns.
    pub fn set_backend(&self, index: u32, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let fd = tap.map_or(-1, |tap| tap.as_raw_fd());
        let file = RingFile { index, fd };
        // SAFETY: the kernel reads this struct, and holds the TAP by itself.
        unsafe { ioctl::set_backend(self.fd(), &raw const file) }?;
        Ok(())
    }

    /// How far a stopped queue's available ring has been worked on.
    pub fn position(&self, index: u32) -> io::Result<u16> {
        let mut state = RingState { index, number: 0 };
        // SAFETY: the kernel reads and writes this struct.
        unsafe { ioctl::get_position(self.fd(), &raw mut state) }?;
        Ok(state.number as u16) // rings of the split kind count in 16 bits
    }

    fn fd(&self) -> i32 {
        self.file.as_fd().as_raw_fd()
    }
}

/// Guest memory as `VHOST_SET_MEM_TABLE` takes it.
fn regions(ram: &GuestRam) -> io::Result<Regions> {
    let mut table = Regions::default();
    for region in ram.iter() {
        let place = table
            .regions
            .get_mut(table.count as usize)
            .ok_or_else(|| io::Error::other("guest memory has more ranges than expected"))?;
        *place = Region {
            guest_address: region.start_addr().0,
            bytes: region.len(),
            host_address: region.as_ptr() as u64,
            flags: 0,
        };
        table.count += 1;
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    #[test]
    fn every_range_of_memory_is_told() {
        let memory = Memory::anonymous(4 << 30).unwrap();
        let table = regions(memory.ram()).unwrap();
        assert_eq!(table.count, 2);
        for ((range, host), told) in memory.mappings().zip(table.regions) {
            let expected = (range.start, range.len, host as u64);
            let told = (told.guest_address, told.bytes, told.host_address);
            assert_eq!(told, expected);
        }
    }

    #[test]
    fn the_filter_allows_the_calls_that_are_made() {
        use std::mem::size_of;
        const VHOST: u8 = 0xaf;
        let made = [
            nix::request_code_write!(VHOST, 0x00, size_of::<u64>()),
            nix::request_code_none!(VHOST, 0x01),
            nix::request_code_write!(VHOST, 0x03, 8),
            nix::request_code_write!(VHOST, 0x10, size_of::<RingState>()),
            nix::request_code_write!(VHOST, 0x11, size_of::<RingAddresses>()),
            nix::request_code_write!(VHOST, 0x12, size_of::<RingState>()),
            nix::request_code_readwrite!(VHOST, 0x12, size_of::<RingState>()),
            nix::request_code_write!(VHOST, 0x20, size_of::<RingFile>()),
            nix::request_code_write!(VHOST, 0x21, size_of::<RingFile>()),
            nix::request_code_write!(VHOST, 0x22, size_of::<RingFile>()),
            nix::request_code_write!(VHOST, 0x30, size_of::<RingFile>()),
        ];
        let allowed = crate::jail::filters::VHOST_CALLS;
        assert_eq!(made.map(|call| call as u32).as_slice(), allowed);
    }

    #[test]
    fn structs_have_the_kernels_sizes() {
        let sizes = [
            size_of::<RingState>(),
            size_of::<RingFile>(),
            size_of::<RingAddresses>(),
            size_of::<Region>(),
        ];
        assert_eq!(sizes, [8, 8, 40, 32]);
    }
}
