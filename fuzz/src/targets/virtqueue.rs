//! Rings and descriptors, by the code that all devices share ([`VirtQueue`], [`Chain`]).
//!
//! Promised: mapping ends; what it yields has the length it says and lies inside guest memory; a round
//! is bounded by the ring; a queue that was reset works.

use tern_vmm::virtio::chain::{Chain, MAX_SEGMENTS};
use tern_vmm::virtio::queue::VirtQueue;

use crate::guest::{BUFFERS, Guest, NEXT, RING, WRITE};
use crate::input::{Input, Program};

/// Longer buffers are moved in part: the point is where, not how much.
const MOST: usize = 4 << 10;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut guest = Guest::new(1);
    let mut queue = guest.queue(0, input.flag());
    while let Some(step) = input.step() {
        match step % 8 {
            5 | 6 => work(&mut guest, &mut queue, step),
            7 => {
                let saved = queue.save();
                queue = VirtQueue::restore(RING, &saved).unwrap();
            }
            step => guest.step(step, &mut input),
        }
    }
    // Whatever happened, a driver that begins anew is served.
    guest.clear_ring(0);
    queue.reset();
    queue = guest.queue(0, false);
    guest.descriptor(0, 3, BUFFERS, 8, WRITE, 0);
    guest.offer(0, 3);
    work(&mut guest, &mut queue, 5);
    assert_eq!(guest.take_used(0), [(3, 8)]);
}

/// One round of a device that fills what it is given.
fn work(guest: &mut Guest, queue: &mut VirtQueue, step: u8) {
    let ram = guest.ram.clone();
    guest.around(|| {
        queue.mute(&ram);
        for round in 0..=u32::from(queue.size()) {
            assert!(round < 1 << 16, "a round without end");
            let Some(descriptors) = queue.pop(&ram) else {
                break;
            };
            let head = descriptors.head_index();
            if step & 0x10 != 0 {
                queue.undo_pop();
                queue.notify_of_next(&ram);
                break;
            }
            let written = Chain::map(&ram, descriptors).map_or(0, |chain| fill(&chain));
            queue.push(&ram, head, written);
        }
        queue.needs_interrupt(&ram);
        queue.unmute(&ram);
    });
}

fn fill(chain: &Chain<'_>) -> u32 {
    let (readable, writable) = (chain.readable.len(), chain.writable.len());
    // Chains have less than 4 GiB, by the specification.
    assert!(readable + writable <= MAX_SEGMENTS * u32::MAX as usize);
    let mut buffer = vec![0; readable.min(MOST)];
    assert_eq!(chain.readable.read(0, &mut buffer), buffer.len());
    assert_eq!(chain.readable.read(readable, &mut [0]), 0);
    let half = chain.readable.part(readable / 2, MOST);
    assert_eq!(half.len(), (readable - readable / 2).min(MOST));
    let source = vec![0xa5; writable.min(MOST)];
    assert_eq!(chain.writable.write(0, &source), source.len());
    assert_eq!(chain.writable.write(writable, &[1]), 0);
    source.len() as u32
}

pub fn seeds() -> Vec<Vec<u8>> {
    let at = BUFFERS as u16;
    let simple = Program::default()
        .byte(0)
        .descriptor(0, 0, at, 64, NEXT, 1)
        .descriptor(0, 1, at + 0x100, 64, WRITE, 0)
        .offer(0, 0)
        .byte(5);
    let event_idx = Program::default()
        .byte(1)
        .descriptor(0, 0, at, 64, WRITE, 0)
        .offer(0, 0)
        .byte(5)
        .bytes(&[4, 0, 1, 0])
        .offer(0, 0)
        .byte(6)
        .byte(7)
        .byte(0x15);
    // A table of two entries at BUFFERS, and a loop.
    let entry = |address: u64, len: u32, flags: u16, next: u16| {
        let entry = Program::default().u64(address).u32(len);
        entry.u16(flags).u16(next).0
    };
    let indirect = Program::default()
        .byte(0)
        .memory(at, &entry(0xffc0, 0x80, NEXT, 1))
        .memory(at + 16, &entry(4 << 30, 32, WRITE, 0))
        .descriptor(0, 0, at, 32, 4, 0)
        .offer(0, 0)
        .byte(5);
    let looped = Program::default()
        .byte(0)
        .descriptor(0, 0, at, 8, NEXT, 0)
        .offer(0, 0)
        .byte(5)
        .bytes(&[3, 0, 0xff, 0xff, 5]);
    [simple, event_idx, indirect, looped].map(|p| p.0).into()
}
