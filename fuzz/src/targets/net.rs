//! The network card's rings, with a cable of datagrams in place of a TAP device.
//!
//! Promised: frames reach the host whole and within bounds; nothing but what was offered is written in
//! the guest; after a reset the card works. The guest wakes, so its card looks at every frame.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Instant;

use tern_vmm::config::MacAddr;
use tern_vmm::trace::Trace;
use tern_vmm::virtio::net::tap::{Offloads, VNET_HEADER_BYTES};
use tern_vmm::virtio::net::{Link, Net};
use tern_vmm::virtio::worker::Ready;
use tern_vmm::virtio::{Context, Device};
use tern_vmm::wake::SharedWake;

use crate::guest::{BUFFERS, Guest, NEXT, WRITE};
use crate::input::{Input, Program};

const MERGEABLE: u64 = 1 << 15;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The longest IP packet, Ethernet with a VLAN tag, and the virtio header.
const LONGEST: usize = 65535 + 18 + VNET_HEADER_BYTES;

#[derive(Debug)]
struct Cable(UnixDatagram);

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Link for Cable {
    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }
}

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let features = if input.flag() { MERGEABLE } else { 0 };
    let event_idx = input.flag();
    let (host, end) = UnixDatagram::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    end.set_nonblocking(true).unwrap();
    let wake = SharedWake::new(Arc::new(Trace::new(Instant::now())), Box::new(|| ()));
    let mut net = Net::new(Cable(end), MacAddr([2, 0, 0, 0, 0, 1])).waking(Arc::new(wake));
    let mut guest = Guest::new(2);
    let queues = guest.queues(event_idx);
    let mut cx = Context::detached(guest.ram.clone(), queues, features).unwrap();
    net.start(&mut cx).unwrap();
    let mut buffer = vec![0; LONGEST + 1];
    while let Some(step) = input.step() {
        match step % 8 {
            5 => guest.around(|| net.on_queue(&mut cx, TRANSMIT)),
            6 => guest.around(|| net.on_queue(&mut cx, RECEIVE)),
            7 => {
                // Long ones say nothing but what begins them.
                let len = input.u16().into();
                let count = input.byte().into();
                let mut frame = input.bytes(count).to_vec();
                frame.resize(len, step);
                let _ = host.send(&frame); // a full cable loses frames
                guest.around(|| net.on_io(&mut cx, 0, Ready::default()));
            }
            step => guest.step(step, &mut input),
        }
        while let Ok(len) = host.recv(&mut buffer) {
            assert!((VNET_HEADER_BYTES + 1..=LONGEST).contains(&len), "{len}");
        }
    }
    net.stop(&mut cx);
    net.reset();
    restarted(&host, net, guest);
}

/// A new driver: a frame each way.
fn restarted(host: &UnixDatagram, mut net: Net<Cable>, mut guest: Guest) {
    let mut queues = Vec::new();
    for index in 0..2 {
        guest.clear_ring(index);
        queues.push(guest.queue(index, false));
    }
    let mut cx = Context::detached(guest.ram.clone(), queues, 0).unwrap();
    // Frames that are still on their way get the first buffers: none is left after this.
    net.start(&mut cx).unwrap();
    guest.descriptor(1, 0, BUFFERS, 100, 0, 0);
    guest.offer(1, 0);
    guest.around(|| net.on_queue(&mut cx, TRANSMIT));
    assert_eq!(host.recv(&mut [0; 200]).unwrap(), 100);
    assert_eq!(guest.take_used(1), [(0, 0)]);
    guest.descriptor(0, 0, BUFFERS, 0x7000, WRITE, 0);
    guest.offer(0, 0);
    let _ = host.send(&[1; 60]);
    guest.around(|| net.on_io(&mut cx, 0, Ready::default()));
    assert_eq!(guest.take_used(0).len(), 1);
}

/// A TCP segment of three bytes from one host and port to another, its virtio header first.
fn segment([from, to]: [u8; 2]) -> Vec<u8> {
    let ethernet = [[2; 12].as_slice(), &[8, 0]].concat();
    let ip = [
        0x45, 0, 0, 43, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, from, 10, 0, 0, to,
    ];
    let tcp = [
        0, from, 0, to, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x18, 1, 1, 0, 0, 0, 0,
    ];
    [&[0; VNET_HEADER_BYTES], &ethernet[..], &ip, &tcp, b"GET"].concat()
}

pub fn seeds() -> Vec<Vec<u8>> {
    let at = BUFFERS as u16;
    let transmit = Program::default()
        .bytes(&[0, 0])
        .descriptor(1, 0, at, 12, NEXT, 1)
        .descriptor(1, 1, at + 0x100, 60, 0, 0)
        .offer(1, 0)
        .byte(5);
    let receive = |merge: u8, len: u16| {
        Program::default()
            .bytes(&[merge, 1])
            .descriptor(0, 0, at, 1526, WRITE, 0)
            .descriptor(0, 1, at + 0x800, 1526, WRITE, 0)
            .offer(0, 0)
            .offer(0, 1)
            .byte(7)
            .u16(len)
            .byte(0)
            .byte(6)
            .0
    };
    let (request, reply) = (segment([1, 2]), segment([2, 1]));
    let talk = Program::default()
        .bytes(&[0, 0])
        .descriptor(0, 0, at, 1526, WRITE, 0)
        .offer(0, 0)
        .byte(7)
        .u16(request.len() as u16)
        .byte(request.len() as u8)
        .bytes(&request)
        .memory(at + 0x800, &reply)
        .descriptor(1, 0, at + 0x800, reply.len() as u16, 0, 0)
        .offer(1, 0)
        .byte(5);
    vec![
        transmit.0,
        talk.0,
        receive(0, 72),
        receive(1, 2000),
        receive(0, 2000),
    ]
}
