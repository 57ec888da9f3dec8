//! The whole device between a driver's rings and host programs' sockets.

use super::connection::BUFFER_BYTES;
use super::packet::{Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::*;
use crate::virtio::testing::{Descriptor, Driver, READ, Rings, WRITE};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use tempfile::TempDir;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

const CID: u32 = 7;
const GUEST_PORT: u32 = 10_000;
const TX_BUFFER: u64 = 0x20_0000;
const RX_BUFFERS: u64 = 0x30_0000;
const RX_BYTES: u32 = 4096;

/// A guest's driver, played by hand: no thread, each step is a call.
struct Guest {
    dir: TempDir,
    vsock: Vsock,
    cx: Context,
    receive: Rings,
    transmit: Rings,
    event: Rings,
    rx_next: u64,
}

impl Guest {
    fn new() -> Self {
        Self::with(|config| Vsock::new(config).unwrap())
    }

    fn with(make: impl FnOnce(&VsockConfig) -> Vsock) -> Self {
        let dir = TempDir::new().unwrap();
        let config = VsockConfig {
            cid: CID,
            path: dir.path().join("v"),
        };
        let driver = Driver::new(16);
        let (receive, one) = Rings::new(driver.ram.clone(), 0x2_0000, 64);
        let (transmit, two) = Rings::new(driver.ram.clone(), 0x4_0000, 64);
        let (event, three) = Rings::new(driver.ram.clone(), 0x6_0000, 16);
        let mut cx = Context::for_test(driver.ram, vec![one, two, three], 0);
        let mut vsock = make(&config);
        vsock.start(&mut cx).unwrap();
        Self {
            dir,
            vsock,
            cx,
            receive,
            transmit,
            event,
            rx_next: 0,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    fn offer_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let at = RX_BUFFERS + self.rx_next % 64 * u64::from(RX_BYTES);
            self.receive.offer(&[Descriptor::at(at, RX_BYTES, WRITE)]);
            self.rx_next += 1;
        }
        self.vsock.on_queue(&mut self.cx, RECEIVE);
    }

    /// Lets the device see to its sockets, as its worker would.
    fn poll(&mut self) {
        let mut events = [vmm_sys_util::epoll::EpollEvent::default(); 64];
        for _ in 0..20 {
            let count = self.cx.poll_for_test(&mut events);
            for event in &events[..count] {
                self.vsock
                    .on_io(&mut self.cx, event.data(), event.event_set().into());
            }
        }
    }

    /// The packets the guest has received since the last call.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.receive
            .take_used()
            .into_iter()
            .map(|(head, len)| {
                // Heads count up with the buffers, modulo the ring.
                let at = RX_BUFFERS + u64::from(head % 64) * u64::from(RX_BYTES);
                let mut bytes = vec![0; len as usize];
                self.cx
                    .ram
                    .read_slice(&mut bytes, GuestAddress(at))
                    .unwrap();
                let (header, payload) = bytes.split_first_chunk().unwrap();
                let header = Header::parse(header);
                assert_eq!(header.len as usize, payload.len());
                assert_eq!((header.src_cid, header.dst_cid), (2, u64::from(CID)));
                (header, payload.to_vec())
            })
            .collect()
    }

    fn assert_told_of_the_end(&mut self) {
        let packets = self.packets();
        let told: Vec<_> = packets.iter().map(|(h, _)| (h.op, h.flags)).collect();
        let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
        assert_eq!(told, [(Op::Shutdown.number(), both)]);
    }

    fn send_raw(&mut self, header: &Header, payload: &[u8]) {
        self.cx
            .ram
            .write_slice(&header.encode(), GuestAddress(TX_BUFFER))
            .unwrap();
        self.cx
            .ram
            .write_slice(payload, GuestAddress(TX_BUFFER + 0x1000))
            .unwrap();
        let mut chain = vec![Descriptor::at(TX_BUFFER, HEADER_BYTES as u32, READ)];
        if !payload.is_empty() {
            chain.push(Descriptor::at(
                TX_BUFFER + 0x1000,
                payload.len() as u32,
                READ,
            ));
        }
        self.transmit.offer(&chain);
        self.vsock.on_queue(&mut self.cx, TRANSMIT);
    }

    /// Answers `to` with `op`.
    fn send(&mut self, to: &Header, op: Op, flags: u32, payload: &[u8]) {
        let header = Header {
            flags,
            len: payload.len() as u32,
            ..Self::answer(to, op)
        };
        self.send_raw(&header, payload);
    }

    /// A header of an answer to `to`.
    fn answer(to: &Header, op: Op) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: 2,
            src_port: to.dst_port,
            dst_port: to.src_port,
            len: 0,
            kind: TYPE_STREAM,
            op: op.number(),
            flags: 0,
            buf_alloc: 1 << 18,
            fwd_cnt: 0,
        }
    }

    /// A host program connects, and the guest accepts.
    fn connected(&mut self) -> (UnixStream, Header) {
        let mut host = UnixStream::connect(self.path()).unwrap();
        host.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes())
            .unwrap();
        self.poll();
        let packets = self.packets();
        assert_eq!(packets.len(), 1);
        let request = packets[0].0;
        assert_eq!(
            (request.op, request.dst_port),
            (Op::Request.number(), GUEST_PORT)
        );
        self.send(&request, Op::Response, 0, &[]);
        let mut line = vec![0; format!("OK {}\n", request.src_port).len()];
        host.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", request.src_port).into_bytes());
        host.set_nonblocking(true).unwrap();
        (host, request)
    }
}

#[test]
fn a_host_program_talks_to_the_guest() {
    let mut guest = Guest::new();
    guest.offer_buffers(8);
    let (mut host, request) = guest.connected();
    host.write_all(b"question").unwrap();
    guest.poll();
    let packets = guest.packets();
    assert_eq!(packets[0].0.op, Op::ReadWrite.number());
    assert_eq!(packets[0].1, b"question");
    guest.send(&request, Op::ReadWrite, 0, b"answer");
    let mut answer = [0; 6];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    guest.send(
        &request,
        Op::Shutdown,
        SHUTDOWN_SEND | SHUTDOWN_RECEIVE,
        &[],
    );
    assert_eq!(host.read(&mut answer).unwrap(), 0);
    assert_eq!(guest.packets()[0].0.op, Op::Reset.number());
}

#[test]
fn bytes_behind_the_greeting_are_the_guests() {
    let mut guest = Guest::new();
    guest.offer_buffers(8);
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONN").unwrap();
    guest.poll();
    host.write_all(b"ECT 5\nfirst").unwrap();
    guest.poll();
    let request = guest.packets()[0].0;
    guest.send(&request, Op::Response, 0, &[]);
    guest.poll();
    assert_eq!(guest.packets()[0].1, b"first");
}

#[test]
fn what_is_no_greeting_is_hung_up_on() {
    for text in [
        &b"HELLO 5\n"[..],
        b"CONNECT x\n",
        b"CONNECT 99999999999\n",
        &[b'1'; 64],
        b"\n",
    ] {
        let mut guest = Guest::new();
        guest.offer_buffers(2);
        let mut host = UnixStream::connect(guest.path()).unwrap();
        host.write_all(text).unwrap();
        guest.poll();
        // A reset where bytes were left unread, the end of the stream else.
        let ended = host.read(&mut [0; 8]);
        assert!(matches!(ended, Ok(0) | Err(_)), "{text:?}");
        assert!(guest.packets().is_empty());
    }
}

#[test]
fn a_refused_connection_is_closed() {
    let mut guest = Guest::new();
    guest.offer_buffers(2);
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 9\n").unwrap();
    guest.poll();
    let request = guest.packets()[0].0;
    guest.send(&request, Op::Reset, 0, &[]);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn the_guest_reaches_only_who_listens() {
    let mut guest = Guest::new();
    guest.offer_buffers(8);
    let listener = UnixListener::bind(guest.dir.path().join("v_99")).unwrap();
    let call = |port| Header {
        src_port: port,
        dst_port: 1234,
        ..Header::default()
    };
    guest.send(&call(98), Op::Request, 0, &[]);
    let packets = guest.packets();
    assert_eq!(
        (packets[0].0.op, packets[0].0.src_port),
        (Op::Reset.number(), 98)
    );
    guest.send(&call(99), Op::Request, 0, &[]);
    let (mut host, _) = listener.accept().unwrap();
    assert_eq!(guest.packets()[0].0.op, Op::Response.number());
    guest.send(&call(99), Op::ReadWrite, 0, b"hello");
    let mut text = [0; 5];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
}

#[test]
fn a_guest_without_buffers_makes_everybody_wait() {
    let mut guest = Guest::new();
    guest.offer_buffers(1);
    let (mut host, _) = guest.connected();
    let mut sent = 0;
    while let Ok(len) = host.write(&[5; 4096]) {
        sent += len;
        guest.poll();
    }
    assert!(guest.packets().is_empty());
    let mut received = 0;
    while received < sent {
        guest.offer_buffers(4);
        guest.poll();
        let got: usize = guest
            .packets()
            .iter()
            .map(|(_, payload)| payload.len())
            .sum();
        assert!(got > 0, "stuck at {received} of {sent}");
        received += got;
    }
    assert_eq!(received, sent);
}

#[test]
fn ports_are_free_while_a_slow_host_program_takes_the_last_of_a_connection() {
    let mut guest = Guest::new();
    guest.offer_buffers(32);
    let listener = UnixListener::bind(guest.dir.path().join("v_99")).unwrap();
    let call = Header {
        src_port: 99,
        dst_port: 1234,
        ..Header::default()
    };
    guest.send(&call, Op::Request, 0, &[]);
    let (mut first, _) = listener.accept().unwrap();
    first.set_nonblocking(true).unwrap();
    let (mut sent, mut taken) = (0_u32, 0);
    while sent - taken + 4096 <= BUFFER_BYTES {
        guest.send(&call, Op::ReadWrite, 0, &[6; 4096]);
        sent += 4096;
        if let Some((last, _)) = guest.packets().last() {
            taken = last.fwd_cnt;
        }
    }
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    guest.send(&call, Op::Shutdown, both, &[]);
    guest.send(&call, Op::Reset, 0, &[]);
    guest.packets();
    guest.send(&call, Op::Request, 0, &[]);
    let (mut second, _) = listener.accept().unwrap();
    second.set_nonblocking(true).unwrap();
    assert_eq!(guest.packets()[0].0.op, Op::Response.number());
    let mut received = 0;
    let mut buffer = vec![0; 8192];
    loop {
        guest.poll();
        match first.read(&mut buffer).unwrap() {
            0 => break,
            len => received += len,
        }
    }
    assert_eq!(received, sent as usize);
    guest.send(&call, Op::ReadWrite, 0, b"hello");
    let mut text = [0; 5];
    second.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    assert!(guest.packets().is_empty());
}

#[test]
fn a_host_program_that_reads_no_more_ends_the_connection() {
    let mut guest = Guest::new();
    guest.offer_buffers(8);
    let (host, request) = guest.connected();
    host.shutdown(Shutdown::Read).unwrap();
    guest.send(&request, Op::ReadWrite, 0, b"nobody hears this");
    guest.poll();
    guest.assert_told_of_the_end();
}

#[test]
fn a_guest_that_only_sends_is_told_when_the_host_program_goes() {
    let mut guest = Guest::new();
    guest.offer_buffers(8);
    let (host, request) = guest.connected();
    host.shutdown(Shutdown::Write).unwrap();
    guest.poll();
    assert_eq!(guest.packets()[0].0.flags, SHUTDOWN_SEND);
    drop(host);
    // The guest's packet finds out before the hang-up has been noticed.
    guest.send(&request, Op::ReadWrite, 0, b"more");
    guest.poll();
    guest.assert_told_of_the_end();
}

#[test]
fn answers_to_nonsense_are_bounded() {
    let mut guest = Guest::new();
    for port in 0..2000 {
        let stray = Header {
            src_port: port,
            dst_port: 1,
            ..Header::default()
        };
        if guest.transmit.take_used().len() + 20 < 64 {
            guest.send(&stray, Op::ReadWrite, 0, &[]);
        }
    }
    assert!(guest.vsock.muxer.is_congested() || !guest.vsock.muxer.has_output());
    guest.offer_buffers(64);
    for (header, _) in guest.packets() {
        assert_eq!(header.op, Op::Reset.number());
    }
}

#[test]
fn after_a_restore_old_connections_are_ended_before_new_ones_begin() {
    let mut guest = Guest::with(|config| Vsock::restore(config).unwrap());
    guest.offer_buffers(8);
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 5\n").unwrap();
    guest.poll();
    guest.vsock.on_queue(&mut guest.cx, EVENT);
    assert!(
        guest.packets().is_empty(),
        "the driver has no event buffer yet"
    );
    guest.event.offer(&[Descriptor::at(0x9000, 4, WRITE)]);
    guest.vsock.on_queue(&mut guest.cx, EVENT);
    assert_eq!(guest.event.take_used(), [(0, 4)]);
    assert!(
        guest.packets().is_empty(),
        "the driver has not handled the event yet"
    );
    // It has when it gives the buffer back.
    guest.event.offer(&[Descriptor::at(0x9000, 4, WRITE)]);
    guest.vsock.on_queue(&mut guest.cx, EVENT);
    assert_eq!(guest.packets()[0].0.op, Op::Request.number());
}

#[test]
fn a_driver_that_confirms_at_once_is_heard() {
    const RINGS: u64 = 0x6_4000;
    let mut guest = Guest::with(|config| Vsock::restore(config).unwrap());
    // Both rings' indices are one word: what the device gives back is offered again in that instant.
    let registers = guest.cx.queues[EVENT].registers();
    registers.set_avail_ring_address(Some(RINGS as u32), None);
    registers.set_used_ring_address(Some(RINGS as u32), None);
    registers.set_event_idx(true);
    registers.set_next_used(1);
    guest.event.offer(&[Descriptor::at(0x9000, 4, WRITE)]);
    guest.vsock.on_queue(&mut guest.cx, EVENT);
    let word = |at| guest.cx.ram.read_obj::<u16>(GuestAddress(at)).unwrap();
    let offered = word(RINGS + 2);
    assert_eq!(offered, 2);
    // Linux's vring_need_event(), for the one buffer between 1 and `offered`.
    let avail_event = word(RINGS + 4 + 8 * 16);
    assert!(offered.wrapping_sub(avail_event).wrapping_sub(1) < offered - 1);
}

#[test]
fn an_event_buffer_offered_meanwhile_is_noticed() {
    let mut guest = Guest::with(|config| Vsock::restore(config).unwrap());
    // The word by which the device asks for notifications is the available ring's index: asking makes
    // it go from 65535 to 0, so a buffer comes in that instant.
    let registers = guest.cx.queues[EVENT].registers();
    registers.set_avail_ring_address(Some(0x6_4002), None);
    registers.set_used_ring_address(Some(0x6_4004), None);
    registers.set_next_avail(u16::MAX);
    let ram = guest.cx.ram.clone();
    ram.write_obj(u16::MAX, GuestAddress(0x6_4004)).unwrap();
    guest.vsock.on_queue(&mut guest.cx, EVENT);
    assert_eq!(guest.vsock.reset, Reset::Owed);
    assert_eq!(guest.cx.queues[EVENT].kick().read().unwrap(), 1);
    guest.vsock.on_queue(&mut guest.cx, EVENT);
    assert!(matches!(guest.vsock.reset, Reset::Sent(_)));
}

#[test]
fn a_guest_that_does_not_confirm_is_not_waited_for_for_ever() {
    let mut guest = Guest::with(|config| Vsock::restore(config).unwrap());
    guest.offer_buffers(8);
    guest.event.offer(&[Descriptor::at(0x9000, 4, WRITE)]);
    guest.vsock.on_queue(&mut guest.cx, EVENT);
    let deadline = guest.vsock.deadline().unwrap();
    guest.vsock.on_deadline(&mut guest.cx, deadline);
    guest.connected();
}

#[test]
fn a_guest_that_does_not_answer_costs_the_host_program_its_patience() {
    let mut guest = Guest::new();
    guest.offer_buffers(8);
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 5\n").unwrap();
    guest.poll();
    while let Some(deadline) = guest.vsock.deadline() {
        guest.vsock.on_deadline(&mut guest.cx, deadline);
    }
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    let ops: Vec<_> = guest
        .packets()
        .iter()
        .map(|(header, _)| header.op)
        .collect();
    assert_eq!(ops, [Op::Request.number(), Op::Reset.number()]);
}

#[test]
fn a_guest_that_makes_no_room_is_not_waited_for_once_the_host_is_gone() {
    let mut guest = Guest::new();
    guest.offer_buffers(8);
    let (mut host, request) = guest.connected();
    let room = |room, consumed| Header {
        buf_alloc: room,
        fwd_cnt: consumed,
        ..Guest::answer(&request, Op::CreditUpdate)
    };
    guest.send_raw(&room(10, 0), &[]);
    host.write_all(&[4; 35]).unwrap();
    guest.poll();
    assert_eq!(guest.packets()[0].1.len(), 10);
    assert_eq!(guest.vsock.deadline(), None, "the host program waits");
    drop(host);
    guest.poll();
    let first = guest.vsock.deadline().unwrap();
    // It gets on: what it has room for, and then another wait.
    guest.send_raw(&room(20, 10), &[]);
    assert_eq!(guest.packets()[0].1.len(), 20);
    let deadline = guest.vsock.deadline().unwrap();
    assert!(deadline > first);
    guest.vsock.on_deadline(&mut guest.cx, deadline);
    assert_eq!(guest.packets()[0].0.op, Op::Reset.number());
    assert_eq!(guest.vsock.deadline(), None);
}

#[test]
fn a_host_that_could_not_accept_is_asked_again() {
    // A socket that nobody can accept from, in the listener's place: no client comes, and none ends.
    let (broken, other) = UnixStream::pair().unwrap();
    let mut spare = UnixListener::from(OwnedFd::from(broken));
    let mut guest = Guest::with(|config| {
        let mut vsock = Vsock::new(config).unwrap();
        vsock.muxer.swap_listener(&mut spare);
        vsock
    });
    guest.offer_buffers(8);
    drop(other); // a hang-up, so that it is asked
    for _ in 0..3 {
        guest.poll();
        let deadline = guest.vsock.deadline().unwrap();
        guest.vsock.on_deadline(&mut guest.cx, deadline);
    }
    guest.poll();
    guest.vsock.muxer.swap_listener(&mut spare);
    let deadline = guest.vsock.deadline().unwrap();
    guest.vsock.on_deadline(&mut guest.cx, deadline);
    assert_eq!(guest.vsock.deadline(), None);
    guest.connected();
}

fn any_header() -> impl Strategy<Value = Header> {
    (
        prop_oneof![8 => Just(u64::from(CID)), 1 => any::<u64>()],
        prop_oneof![8 => Just(2_u64), 1 => any::<u64>()],
        prop_oneof![4 => Just(GUEST_PORT), 1 => any::<u32>()],
        prop_oneof![4 => Just(1_u32 << 30), 1 => Just(99_u32), 1 => any::<u32>()],
        prop_oneof![4 => 0..300_u32, 1 => any::<u32>()],
        prop_oneof![8 => Just(TYPE_STREAM), 1 => any::<u16>()],
        prop_oneof![8 => 0..9_u16, 1 => any::<u16>()],
        (any::<u32>(), any::<u32>(), any::<u32>()),
    )
        .prop_map(
            |(src_cid, dst_cid, src_port, dst_port, len, kind, op, rest)| Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len,
                kind,
                op,
                flags: rest.0,
                buf_alloc: rest.1,
                fwd_cnt: rest.2,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// Whatever packets a guest sends while a host program talks to it, nothing panics, nothing is kept
    /// without bound, and once it behaves the next host program is served.
    #[test]
    fn any_packets_are_survived(
        packets in prop::collection::vec((any_header(), 0..300_usize), 0..40),
    ) {
        let mut guest = Guest::new();
        let _listener = UnixListener::bind(guest.dir.path().join("v_99")).unwrap();
        guest.offer_buffers(4);
        let (mut host, _) = guest.connected();
        let _ = host.write(&[1; 1000]);
        for (header, payload) in packets {
            guest.send_raw(&header, &vec![3; payload]);
            guest.transmit.take_used();
            guest.poll();
            let used = guest.receive.take_used().len();
            guest.offer_buffers(used);
        }
        guest.vsock.reset();
        drop(host);
        let (receive, queue) = Rings::new(guest.cx.ram.clone(), 0x8_0000, 64);
        guest.receive = receive;
        guest.rx_next = 0;
        guest.cx.queues[RECEIVE] = queue;
        guest.offer_buffers(4);
        guest.connected();
    }

    /// Rings full of anything.
    #[test]
    fn any_rings_are_survived(
        table in prop::collection::vec(
            (prop_oneof![0x8000..0xa000_u64, any::<u64>()],
             prop_oneof![0..100_u32, any::<u32>()], 0..8_u16, 0..70_u16), 1..60),
    ) {
        let mut guest = Guest::new();
        guest.receive.offer_raw(&table);
        guest.transmit.offer_raw(&table);
        guest.event.offer_raw(&table[..table.len().min(14)]);
        for index in [TRANSMIT, RECEIVE, EVENT] {
            guest.vsock.on_queue(&mut guest.cx, index);
        }
        prop_assert_eq!(guest.transmit.take_used().len(), 1);
    }
}
