//! Disk requests.
//!
//! Promised: every request is answered once; the file keeps its length, and a read-only one its content; nothing but what was offered
//! is written in the guest; after a reset the disk works.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use tern_vmm::config::DiskConfig;
use tern_vmm::virtio::block::{Block, Way};
use tern_vmm::virtio::{Context, Device};

use crate::guest::{BUFFERS, Guest, NEXT, WRITE};
use crate::input::{Input, Program};

const SECTORS: usize = 8;
const CONTENT: [u8; SECTORS * 512] = [0x5a; SECTORS * 512];

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (read_only, event_idx) = (input.flag(), input.flag());
    let file = std::fs::File::from(memfd_create("disk", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all_at(&CONTENT, 0).unwrap();
    let config = DiskConfig {
        path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        read_only,
        rate_limit: None,
        engine: None,
    };
    let mut block = Block::open_by(&config, 0, Way::Inline).unwrap();
    let mut guest = Guest::new(1);
    let queues = guest.queues(event_idx);
    let mut cx = Context::detached(guest.ram.clone(), queues, 0).unwrap();
    block.start(&mut cx).unwrap();
    while let Some(step) = input.step() {
        match step % 8 {
            5..=7 => guest.around(|| block.on_queue(&mut cx, 0)),
            step => guest.step(step, &mut input),
        }
    }
    // Whatever was asked is answered, and once.
    for _ in 0..2 {
        guest.around(|| block.on_queue(&mut cx, 0));
        while cx.queues[0].kick().read().is_ok() {
            guest.around(|| block.on_queue(&mut cx, 0));
        }
    }
    if let Some(offered) = guest.offered(0) {
        assert_eq!(guest.take_used(0).len(), offered);
    }
    block.stop(&mut cx);
    block.reset();
    guest.clear_ring(0);
    cx.queues[0] = guest.queue(0, false);
    guest.put(BUFFERS, &[0; 16]);
    guest.descriptor(0, 0, BUFFERS, 16, NEXT, 1);
    guest.descriptor(0, 1, BUFFERS + 0x1000, 512, WRITE | NEXT, 2);
    guest.descriptor(0, 2, BUFFERS + 0x2000, 1, WRITE, 0);
    guest.offer(0, 0);
    guest.around(|| block.on_queue(&mut cx, 0));
    assert_eq!(guest.take_used(0), [(0, 513)]);
    assert_eq!(guest.get(BUFFERS + 0x2000), [0], "status");
    let mut content = Vec::new();
    let mut file = file;
    file.read_to_end(&mut content).unwrap();
    assert_eq!(content.len(), CONTENT.len());
    assert_eq!(guest.get::<512>(BUFFERS + 0x1000), content[..512]);
    assert!(
        !read_only || content == CONTENT,
        "a read-only disk was written"
    );
}

pub fn seeds() -> Vec<Vec<u8>> {
    let at = BUFFERS as u16;
    let request = |read_only: u8, kind: u32, sector: u64, len: u16, flags: u16| {
        let header = Program::default().u32(kind).u32(0).u64(sector);
        Program::default()
            .bytes(&[read_only, 0])
            .memory(at, &header.0)
            .descriptor(0, 0, at, 16, NEXT, 1)
            .descriptor(0, 1, at + 0x1000, len, NEXT | flags, 2)
            .descriptor(0, 2, at + 0x800, 1, WRITE, 0)
            .offer(0, 0)
            .byte(5)
            .0
    };
    vec![
        request(0, 0, 1, 1024, WRITE),
        request(0, 1, 2, 512, 0),
        request(1, 1, 2, 512, 0),
        request(0, 4, 0, 512, 0),
        request(0, 8, 0, 20, WRITE),
        request(0, 0, u64::MAX / 512, 512, WRITE),
        request(0, 11, 0, 16, 0),
        request(0, 13, 0, 32, 0),
    ]
}
