//! The driver's side of a virtqueue, for the devices' tests: a well-behaved one and a hostile one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::queue::VirtQueue;
use crate::memory::{GuestRam, Memory};
use crate::trace::Trace;

pub const READ: u16 = 0;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const RAM_BYTES: u64 = 32 << 20;

/// A buffer the driver offers.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
}

impl Descriptor {
    pub fn at(address: u64, len: u32, flags: u16) -> Self {
        Self {
            address,
            len,
            flags,
        }
    }
}

/// One queue in its own guest memory.
#[derive(Debug)]
pub struct Driver {
    pub ram: Arc<GuestRam>,
    pub queue: VirtQueue,
    rings: Rings,
}

/// The driver's half, once the queue itself has been given to a device.
#[derive(Debug, Clone)]
pub struct Rings {
    ram: Arc<GuestRam>,
    base: u64,
    size: u16,
    next_descriptor: u16,
    offered: u16,
    taken: u16,
}

impl Driver {
    pub fn new(size: u16) -> Self {
        let ram = Memory::anonymous(RAM_BYTES).unwrap().ram().clone();
        let (rings, queue) = Rings::new(ram.clone(), 0x1_0000, size);
        Self { ram, queue, rings }
    }

    pub fn offer(&mut self, descriptors: &[Descriptor]) -> u16 {
        self.rings.offer(descriptors)
    }

    pub fn offer_raw(&mut self, table: &[(u64, u32, u16, u16)]) {
        self.rings.offer_raw(table);
    }

    pub fn wait_used(&mut self, count: usize) -> Vec<(u16, u32)> {
        self.rings.wait_used(count)
    }
}

impl VirtQueue {
    /// Descriptor table, available ring, used ring.
    pub fn save_addresses(&self) -> (u64, u64, u64) {
        let value = serde_json::to_value(self.save()).unwrap();
        let at = |key: &str| value[key].as_u64().unwrap();
        (at("desc_table"), at("avail_ring"), at("used_ring"))
    }
}

impl Rings {
    /// Rings of `size` entries in the 64 KiB from `base` on.
    pub fn new(ram: Arc<GuestRam>, base: u64, size: u16) -> (Self, VirtQueue) {
        let rings = Self {
            ram,
            base,
            size,
            next_descriptor: 0,
            offered: 0,
            taken: 0,
        };
        let mut queue = VirtQueue::new(size).unwrap();
        let registers = queue.registers();
        registers.set_desc_table_address(Some(base as u32), Some(0));
        registers.set_avail_ring_address(Some(rings.avail() as u32), Some(0));
        registers.set_used_ring_address(Some(rings.used() as u32), Some(0));
        registers.set_ready(true);
        (rings, queue)
    }

    fn avail(&self) -> u64 {
        self.base + 0x4000
    }

    fn used(&self) -> u64 {
        self.base + 0x8000
    }

    /// Offers one chain and returns its head.
    pub fn offer(&mut self, descriptors: &[Descriptor]) -> u16 {
        let head = self.next_descriptor;
        for (index, descriptor) in descriptors.iter().enumerate() {
            let slot = self.next_descriptor;
            self.next_descriptor = (slot + 1) % self.size;
            let more = index + 1 < descriptors.len();
            let flags = descriptor.flags | if more { NEXT } else { 0 };
            self.write(
                slot,
                (
                    descriptor.address,
                    descriptor.len,
                    flags,
                    self.next_descriptor,
                ),
            );
        }
        self.publish(head);
        head
    }

    /// Fills the descriptor table with anything, and offers its first entry.
    pub fn offer_raw(&mut self, table: &[(u64, u32, u16, u16)]) {
        for (slot, descriptor) in table.iter().enumerate() {
            self.write(slot as u16, *descriptor);
        }
        self.publish(0);
    }

    fn write(&self, slot: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let at = self.base + 16 * u64::from(slot);
        self.ram.write_obj(address, GuestAddress(at)).unwrap();
        self.ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn publish(&mut self, head: u16) {
        let entry = self.avail() + 4 + 2 * u64::from(self.offered % self.size);
        self.ram.write_obj(head, GuestAddress(entry)).unwrap();
        self.offered = self.offered.wrapping_add(1);
        self.ram
            .store(
                self.offered,
                GuestAddress(self.avail() + 2),
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
    }

    /// The chains given back since the last call: head and length.
    pub fn take_used(&mut self) -> Vec<(u16, u32)> {
        let idx: u16 = self
            .ram
            .load(
                GuestAddress(self.used() + 2),
                std::sync::atomic::Ordering::Acquire,
            )
            .unwrap();
        let mut taken = Vec::new();
        while self.taken != idx {
            let at = self.used() + 4 + 8 * u64::from(self.taken % self.size);
            let head: u32 = self.ram.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.ram.read_obj(GuestAddress(at + 4)).unwrap();
            taken.push((head as u16, len));
            self.taken = self.taken.wrapping_add(1);
        }
        taken
    }

    /// Waits for `count` chains from a device in another thread.
    pub fn wait_used(&mut self, count: usize) -> Vec<(u16, u32)> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut taken = Vec::new();
        while taken.len() < count {
            assert!(
                Instant::now() < deadline,
                "the device answered only {taken:?}"
            );
            std::thread::yield_now();
            taken.extend(self.take_used());
        }
        taken
    }
}

pub fn trace() -> Arc<Trace> {
    Arc::new(Trace::new(Instant::now()))
}
