//! Pages that a guest gives back.
//!
//! Promised: a page of the guest's is what it was, or has been given back and is all zeroes; used rings are all
//! that is written; after a reset the balloon works.

use tern_vmm::memory::GuestRam;
use tern_vmm::virtio::balloon::Balloon;
use tern_vmm::virtio::{Context, Device};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{BUFFERS, Guest, WRITE};
use crate::input::{Input, Program};

const QUEUES: u8 = 3;
const PAGE: u64 = 4096;
/// What lies behind the rings in the guest's first two regions.
const PAGES: std::ops::Range<u64> = QUEUES as u64..32;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let event_idx = input.flag();
    let mut guest = Guest::new(QUEUES);
    for page in PAGES {
        guest.put(page * PAGE + 8, &[page as u8]);
    }
    let queues = guest.queues(event_idx);
    let mut cx = Context::detached(guest.ram.clone(), queues, 0).unwrap();
    let mut balloon = Balloon::default();
    balloon.start(&mut cx).unwrap();
    while let Some(step) = input.step() {
        match step % 8 {
            5..=7 => {
                let before = pages(&guest.ram);
                balloon.on_queue(&mut cx, usize::from(input.byte() % QUEUES));
                for (before, after) in before.iter().zip(pages(&guest.ram)) {
                    assert!(after == *before || after.iter().all(|byte| *byte == 0));
                }
            }
            step => guest.step(step, &mut input),
        }
    }
    balloon.stop(&mut cx);
    balloon.reset();
    guest.clear_ring(0);
    cx.queues[0] = guest.queue(0, false);
    guest.put(BUFFERS, &9_u32.to_le_bytes());
    guest.put(9 * PAGE, &[1]);
    guest.put(10 * PAGE, &[2]);
    guest.descriptor(0, 0, BUFFERS, 4, 0, 0);
    guest.offer(0, 0);
    balloon.on_queue(&mut cx, 0);
    assert_eq!(guest.take_used(0), [(0, 0)]);
    assert_eq!((guest.get(9 * PAGE), guest.get(10 * PAGE)), ([0], [2]));
}

fn pages(ram: &GuestRam) -> Vec<[u8; PAGE as usize]> {
    let page = |number| {
        let mut bytes = [0; PAGE as usize];
        ram.read_slice(&mut bytes, GuestAddress(number * PAGE))
            .unwrap();
        bytes
    };
    PAGES.map(page).collect()
}

pub fn seeds() -> Vec<Vec<u8>> {
    let at = BUFFERS as u16;
    let inflate = |queue: u8, numbers: &[u32]| {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        Program::default()
            .byte(0)
            .memory(at, &bytes)
            .descriptor(queue, 0, at, bytes.len() as u16, 0, 0)
            .offer(queue, 0)
            .bytes(&[5, queue])
            .0
    };
    let report = |address: u16, len: u16| {
        Program::default()
            .byte(1)
            .descriptor(2, 0, address, len, WRITE, 0)
            .offer(2, 0)
            .bytes(&[5, 2])
            .0
    };
    vec![
        inflate(0, &[12, 11, 10]),
        inflate(0, &[u32::MAX, 0, 1 << 20]),
        inflate(1, &[12]),
        report(0x9000, 0x3000),
        report(0x9001, 0x1ffe),
        report(0, 0xffff),
    ]
}
