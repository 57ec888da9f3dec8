//! A hostile guest: memory, rings, and the steps of a program that fills them.
//!
//! Memory has three regions: two side by side, so that buffers cross a border, and one behind a gap, so
//! that others do not. Around each call of a device, [`Guest::around`] compares all of it with what it
//! was: only used rings and buffers that were offered for writing may differ.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use tern_vmm::memory::GuestRam;
use tern_vmm::virtio::queue::VirtQueue;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use crate::input::{Input, Program};

/// Entries of every ring.
pub const RING: u16 = 16;
pub const WRITE: u16 = 2;
pub const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// Around calls with larger tables of descriptors nothing is compared: it would take all the time.
const MOST_INDIRECT: u32 = 64;
const PAGE: usize = 4096;
const REGION: usize = 64 << 10;
const HIGH: u64 = 4 << 30;
const STARTS: [u64; 3] = [0, REGION as u64, HIGH];
/// Each queue has a page: descriptors, available ring, used ring.
const QUEUE_BYTES: u64 = 0x1000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
/// Where seeds keep their buffers.
pub const BUFFERS: u64 = 0x8000;

thread_local! {
    /// Mapped once: mapping costs more than most inputs.
    static RAM: Arc<GuestRam> = Arc::new(
        GuestRam::from_ranges(&STARTS.map(|start| (GuestAddress(start), REGION))).unwrap(),
    );
    /// Memory before a device was called, and after.
    static IMAGES: RefCell<(Vec<u8>, Vec<u8>)> = RefCell::default();
}

/// The guest.
pub struct Guest {
    pub ram: Arc<GuestRam>,
    queues: u8,
    /// How many chains were offered on each queue, as far as the guest plays by the rules.
    offered: Vec<u16>,
    taken: Vec<u16>,
    /// Whether it has written where it pleased, or had a device do so: its rings may then say anything.
    pub wild: bool,
}

impl Guest {
    /// A guest with empty memory and rings for `queues` queues.
    pub fn new(queues: u8) -> Self {
        let ram = RAM.with(Arc::clone);
        for start in STARTS {
            ram.write_slice(&[0; REGION], GuestAddress(start)).unwrap();
        }
        Self {
            ram,
            queues,
            offered: vec![0; queues.into()],
            taken: vec![0; queues.into()],
            wild: false,
        }
    }

    /// A device's end of ring `index`.
    pub fn queue(&self, index: u8, event_idx: bool) -> VirtQueue {
        let base = base(index) as u32;
        let mut queue = VirtQueue::new(RING).unwrap();
        let registers = queue.registers();
        registers.set_desc_table_address(Some(base), Some(0));
        registers.set_avail_ring_address(Some(base + AVAIL as u32), Some(0));
        registers.set_used_ring_address(Some(base + USED as u32), Some(0));
        registers.set_event_idx(event_idx);
        registers.set_ready(true);
        queue
    }

    pub fn queues(&self, event_idx: bool) -> Vec<VirtQueue> {
        (0..self.queues)
            .map(|index| self.queue(index, event_idx))
            .collect()
    }

    /// Forgets ring `index`, as a driver does that resets its device.
    pub fn clear_ring(&mut self, index: u8) {
        let zeroes = [0; QUEUE_BYTES as usize];
        self.put(base(index), &zeroes);
        (
            self.offered[usize::from(index)],
            self.taken[usize::from(index)],
        ) = (0, 0);
    }

    /// One of the steps that all guests know: `step` modulo 5.
    pub fn step(&mut self, step: u8, input: &mut Input<'_>) {
        match step % 5 {
            0 => {
                let (queue, slot) = (self.pick(input), u16::from(input.byte()) % RING);
                let (address, len) = (address(input), length(input));
                let (flags, next) = (u16::from(input.byte()) & 7, u16::from(input.byte()) % 32);
                self.descriptor(queue, slot, address, len, flags, next);
            }
            1 => {
                let queue = self.pick(input);
                let head = u16::from(input.byte()) % 32;
                self.wild |= head >= RING;
                self.offer(queue, head);
            }
            2 => {
                let (to, count) = (address(input), input.byte());
                let bytes = input.bytes(count.into());
                self.wild |= to < u64::from(self.queues) * QUEUE_BYTES;
                let _ = self.ram.write_slice(bytes, GuestAddress(to));
            }
            3 => {
                let (queue, idx) = (self.pick(input), input.u16());
                self.wild = true;
                self.offered[usize::from(queue)] = idx;
                self.put(base(queue) + AVAIL + 2, &idx.to_le_bytes());
            }
            _ => {
                let (queue, event) = (self.pick(input), input.u16());
                let used_event = base(queue) + AVAIL + 4 + 2 * u64::from(RING);
                self.put(used_event, &event.to_le_bytes());
            }
        }
    }

    fn pick(&self, input: &mut Input<'_>) -> u8 {
        input.byte() % self.queues
    }

    pub fn descriptor(&self, queue: u8, slot: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(base(queue) + 16 * u64::from(slot % RING), &bytes);
    }

    pub fn offer(&mut self, queue: u8, head: u16) {
        let offered = &mut self.offered[usize::from(queue)];
        let entry = base(queue) + AVAIL + 4 + 2 * u64::from(*offered % RING);
        *offered = offered.wrapping_add(1);
        let idx = *offered;
        self.put(entry, &head.to_le_bytes());
        self.put(base(queue) + AVAIL + 2, &idx.to_le_bytes());
    }

    /// How many chains a guest that played by the rules has offered; `None` if it did not, or if there
    /// were more than the ring holds, and earlier ones may be overwritten.
    pub fn offered(&self, queue: u8) -> Option<usize> {
        let offered = self.offered[usize::from(queue)];
        (!self.wild && offered <= RING).then_some(offered.into())
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// The chains given back since the last call: head and length.
    pub fn take_used(&mut self, queue: u8) -> Vec<(u32, u32)> {
        let used = base(queue) + USED;
        let idx = u16::from_le_bytes(self.get(used + 2));
        let taken = &mut self.taken[usize::from(queue)];
        let fresh = idx.wrapping_sub(*taken).min(RING);
        let first = idx.wrapping_sub(fresh);
        *taken = idx;
        (0..fresh)
            .map(|n| {
                let at = used + 4 + 8 * u64::from(first.wrapping_add(n) % RING);
                let at = |offset| u32::from_le_bytes(self.get(at + offset));
                (at(0), at(4))
            })
            .collect()
    }

    /// Calls a device, and looks whether it has written where it may not.
    pub fn around<T>(&mut self, call: impl FnOnce() -> T) -> T {
        IMAGES.with_borrow_mut(|(before, after)| {
            self.image(before);
            let Some(allowed) = self.writable(before) else {
                self.wild = true;
                return call();
            };
            let result = call();
            self.image(after);
            // Pages first: most are as they were.
            let pages = before.chunks(PAGE).zip(after.chunks(PAGE)).enumerate();
            for (page, (old, new)) in pages.filter(|(_, (old, new))| old != new) {
                let start = STARTS[page * PAGE / REGION] + (page * PAGE % REGION) as u64;
                for (offset, (old, new)) in old.iter().zip(new).enumerate() {
                    let at = start + offset as u64;
                    let fine = old == new || allowed.iter().any(|range| range.contains(&at));
                    assert!(fine, "the device wrote to {at:#x}, which nobody offered");
                }
            }
            result
        })
    }

    /// All of memory, region behind region.
    fn image(&self, into: &mut Vec<u8>) {
        into.resize(STARTS.len() * REGION, 0);
        for (start, part) in STARTS.iter().zip(into.chunks_mut(REGION)) {
            self.ram.read_slice(part, GuestAddress(*start)).unwrap();
        }
    }

    /// Where a device may write: used rings, and buffers that any descriptor says are for writing.
    /// `None` if those lie over rings or tables, which then change under the device's hands.
    fn writable(&self, image: &[u8]) -> Option<Vec<Range<u64>>> {
        let (mut buffers, mut tables, mut used) = (Vec::new(), Vec::new(), Vec::new());
        for queue in 0..self.queues {
            let base = base(queue);
            tables.push(base..base + QUEUE_BYTES);
            used.push(base + USED..base + USED + 6 + 8 * u64::from(RING));
            for slot in 0..RING {
                let Some((address, len, flags)) = read(image, base + 16 * u64::from(slot)) else {
                    continue;
                };
                if flags & INDIRECT == 0 {
                    buffers.extend((flags & WRITE != 0).then(|| range(address, len)));
                    continue;
                }
                tables.push(range(address, len));
                if len > MOST_INDIRECT * 16 {
                    return None;
                }
                let entries = (0..u64::from(len)).step_by(16);
                for entry in entries.filter_map(|at| read(image, address.checked_add(at)?)) {
                    let (address, len, flags) = entry;
                    buffers.extend((flags & WRITE != 0).then(|| range(address, len)));
                }
            }
        }
        let overlap = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        if buffers
            .iter()
            .any(|buffer| tables.iter().any(|table| overlap(buffer, table)))
        {
            return None;
        }
        buffers.append(&mut used);
        Some(buffers)
    }
}

/// A descriptor of a memory image: address, length, flags.
fn read(image: &[u8], at: u64) -> Option<(u64, u32, u16)> {
    let low = 2 * REGION as u64;
    let offset = match at {
        at if at < low => at,
        at => at.checked_sub(HIGH)?.checked_add(low)?,
    };
    let bytes = image
        .get(usize::try_from(offset).ok()?..)?
        .first_chunk::<16>()?;
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, _, _] = *bytes;
    Some((
        u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        u32::from_le_bytes([i, j, k, l]),
        u16::from_le_bytes([m, n]),
    ))
}

fn base(queue: u8) -> u64 {
    u64::from(queue) * QUEUE_BYTES
}

fn range(address: u64, len: u32) -> Range<u64> {
    address..address.saturating_add(len.into())
}

/// Near the rings and buffers most of the time, and anywhere.
fn address(input: &mut Input<'_>) -> u64 {
    match input.byte() % 4 {
        0 => input.u16().into(),
        1 => REGION as u64 + u64::from(input.u16()),
        2 => HIGH + u64::from(input.u16()),
        _ => input.u64(),
    }
}

fn length(input: &mut Input<'_>) -> u32 {
    match input.byte() % 2 {
        0 => input.u16().into(),
        _ => input.u32(),
    }
}

/// Steps for seeds, as [`Guest::step`] reads them.
impl Program {
    pub fn descriptor(
        self,
        queue: u8,
        slot: u8,
        address: u16,
        len: u16,
        flags: u16,
        next: u8,
    ) -> Self {
        let program = self.bytes(&[0, queue, slot, 0]).u16(address).byte(0);
        program.u16(len).bytes(&[flags as u8, next])
    }

    pub fn offer(self, queue: u8, head: u8) -> Self {
        self.bytes(&[1, queue, head])
    }

    pub fn memory(self, address: u16, bytes: &[u8]) -> Self {
        let program = self.bytes(&[2, 0]).u16(address).byte(bytes.len() as u8);
        program.bytes(bytes)
    }
}
