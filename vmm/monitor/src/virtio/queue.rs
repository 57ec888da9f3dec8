//! One virtqueue as a device uses it: take chains, give them back, tell the driver.
//!
//! A thin layer over `virtio-queue` that adds what a hostile driver calls for: a ring whose indices make
//! no sense is *broken*, and stays silent until the driver resets the device.

use std::io;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;

/// A queue with its notification.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    kick: EventFd,
    broken: bool,
}

/// Where in this process a queue's rings are, for a kernel that works on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostRings {
    /// The descriptor table.
    pub desc_table: u64,
    /// The available ring.
    pub avail_ring: u64,
    /// The used ring.
    pub used_ring: u64,
}

/// Bytes of a descriptor, and of an entry of each ring (virtio 1.2, 2.7).
const DESCRIPTOR_BYTES: usize = 16;
const AVAIL_BYTES: usize = 2;
const USED_BYTES: usize = 8;
/// Flags, index and event of either ring.
const RING_HEAD_BYTES: usize = 6;

/// A queue's part of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtQueueState {
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
    pub(super) event_idx: bool,
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) desc_table: u64,
    pub(super) avail_ring: u64,
    pub(super) used_ring: u64,
}

impl VirtQueue {
    /// An unconfigured queue of at most `max_size` entries.
    pub fn new(max_size: u16) -> io::Result<Self> {
        let queue = Queue::new(max_size).map_err(io::Error::other)?;
        let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self {
            queue,
            kick,
            broken: false,
        })
    }

    /// A queue as it was when `state` was saved. Fails if no driver could have brought it there; like a
    /// driver's, its rings may still lie anywhere (see [`VirtQueue::is_usable`]).
    pub fn restore(max_size: u16, state: &VirtQueueState) -> io::Result<Self> {
        let state = QueueState {
            max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        };
        let queue = Queue::try_from(state).map_err(io::Error::other)?;
        let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self {
            queue,
            kick,
            broken: false,
        })
    }

    /// For a snapshot.
    pub fn save(&self) -> VirtQueueState {
        let state = self.queue.state();
        VirtQueueState {
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }

    /// The rings' registers, for the transport while the device is at rest.
    pub fn registers(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// The event by which KVM tells of a driver's notification.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Whether the driver has set it up within guest memory. One that it left alone is fine too: it
    /// never holds anything.
    pub fn is_usable(&self, ram: &GuestRam) -> bool {
        !self.queue.ready() || self.queue.is_valid(ram)
    }

    /// Whether the driver has set it up.
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// The number of chains taken so far, modulo 2^16.
    pub fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Its rings, each whole in one range of `ram`.
    pub fn host_rings(&self, ram: &GuestRam) -> io::Result<HostRings> {
        let size = usize::from(self.queue.size());
        let at = |address: u64, bytes: usize| {
            let slice = ram.get_slice(GuestAddress(address), bytes);
            let slice = slice.map_err(io::Error::other)?;
            Ok::<_, io::Error>(slice.ptr_guard().as_ptr() as u64)
        };
        Ok(HostRings {
            desc_table: at(self.queue.desc_table(), DESCRIPTOR_BYTES * size)?,
            avail_ring: at(
                self.queue.avail_ring(),
                RING_HEAD_BYTES + AVAIL_BYTES * size,
            )?,
            used_ring: at(self.queue.used_ring(), RING_HEAD_BYTES + USED_BYTES * size)?,
        })
    }

    /// Goes on after somebody else who worked on the rings and has come to `next_avail`; what was given back
    /// says the used ring.
    pub fn go_on_at(&mut self, ram: &GuestRam, next_avail: u16) {
        match self.queue.used_idx(ram, Ordering::Acquire) {
            Ok(used) => {
                self.queue.set_next_avail(next_avail);
                self.queue.set_next_used(used.0);
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Takes the next chain the driver offers.
    pub fn pop<'m>(&mut self, ram: &'m GuestRam) -> Option<DescriptorChain<&'m GuestRam>> {
        if self.broken || !self.queue.ready() {
            return None;
        }
        match self.queue.iter(ram) {
            Ok(mut chains) => chains.next(),
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    /// Puts the chain taken last back, to be taken again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with the number of bytes written into it.
    pub fn push(&mut self, ram: &GuestRam, head: u16, written: u32) {
        if let Err(error) = self.queue.add_used(ram, head, written) {
            self.fail(&error);
        }
    }

    /// Whether the driver wants an interrupt for what was pushed since it was asked last.
    pub fn needs_interrupt(&mut self, ram: &GuestRam) -> bool {
        if self.broken || !self.queue.ready() {
            return false;
        }
        self.queue.needs_notification(ram).unwrap_or_else(|error| {
            self.fail(&error);
            false
        })
    }

    /// Asks the driver not to notify while the queue is being worked on.
    pub fn mute(&mut self, ram: &GuestRam) {
        if self.queue.ready()
            && !self.broken
            && let Err(error) = self.queue.disable_notification(ram)
        {
            self.fail(&error);
        }
    }

    /// Asks the driver to notify again; true if it has offered more in the meantime.
    pub fn unmute(&mut self, ram: &GuestRam) -> bool {
        if !self.queue.ready() || self.broken {
            return false;
        }
        self.queue.enable_notification(ram).unwrap_or_else(|error| {
            self.fail(&error);
            false
        })
    }

    /// Asks the driver to notify of the next chain it offers, though older ones have not been taken.
    pub fn notify_of_next(&mut self, ram: &GuestRam) {
        let here = self.queue.next_avail();
        let Ok(end) = self.queue.avail_idx(ram, Ordering::Acquire) else {
            return;
        };
        self.queue.set_next_avail(end.0);
        self.unmute(ram);
        self.queue.set_next_avail(here);
    }

    /// The number of entries, which bounds what one round of work takes.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Back to how it was made.
    pub fn reset(&mut self) {
        self.queue.reset();
        self.broken = false;
        let _ = self.kick.read(); // a notification of the former driver; EAGAIN if there is none
    }

    fn fail(&mut self, error: &dyn std::fmt::Display) {
        if !self.broken && super::may_log() {
            tracing::warn!(%error, "the guest broke a virtqueue; ignored until it resets the device");
        }
        self.broken = true;
    }
}
