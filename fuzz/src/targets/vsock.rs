//! The vsock device between a hostile guest and host programs that come and go.
//!
//! Promised: packets for the guest are whole and make sense, and never more than it has room for; nothing but what was offered is written in the guest; after a reset
//! a host program reaches the guest again.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tern_vmm::config::VsockConfig;
use tern_vmm::virtio::vsock::Vsock;
use tern_vmm::virtio::{Context, Device};

use crate::guest::{Guest, RING, WRITE};
use crate::input::{Input, Program};

const RECEIVE: u8 = 0;
const TRANSMIT: u8 = 1;
const EVENT: u8 = 2;
const CID: u32 = 7;
const HEADER: u32 = 44;
/// Ports at which host programs listen.
const LISTENED: [u32; 2] = [1, 2];
/// The first port the device gives to a host program.
const FIRST_PORT: u32 = 1 << 30;
const MOST_PROGRAMS: usize = 8;
/// Where packets to the device lie, and where those from it go.
const OUT: u64 = 0x4000;
const IN: u64 = 0x1_0000;
const IN_BYTES: u32 = 0x800;

thread_local! {
    static PLACE: Place = Place::new();
}

/// A directory with the sockets of host programs that listen.
struct Place {
    dir: tempfile::TempDir,
    listeners: Vec<UnixListener>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listeners = LISTENED
            .map(|port| {
                let listener = UnixListener::bind(dir.path().join(format!("v_{port}"))).unwrap();
                listener.set_nonblocking(true).unwrap();
                listener
            })
            .into();
        Self { dir, listeners }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }
}

struct World<'a> {
    place: &'a Place,
    guest: Guest,
    vsock: Vsock,
    cx: Context,
    programs: Vec<UnixStream>,
    next_slot: u16,
    next_in: u16,
    now: Instant,
    event_idx: bool,
    /// By the host's and the guest's port.
    windows: HashMap<(u32, u32), Window>,
}

/// What the guest said of its room last, and what it was sent since the connection began.
#[derive(Default)]
struct Window {
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
}

pub fn run(bytes: &[u8]) {
    PLACE.with(|place| {
        let mut input = Input::new(bytes);
        let flags = input.byte();
        let config = VsockConfig {
            cid: CID,
            path: place.path(),
        };
        let restored = flags & 2 != 0;
        let vsock = if restored {
            Vsock::restore(&config)
        } else {
            Vsock::new(&config)
        };
        let guest = Guest::new(3);
        let event_idx = flags & 1 != 0;
        let queues = guest.queues(event_idx);
        let mut world = World {
            place,
            cx: Context::detached(guest.ram.clone(), queues, 0).unwrap(),
            guest,
            vsock: vsock.unwrap(),
            programs: Vec::new(),
            next_slot: 0,
            next_in: 0,
            now: Instant::now(),
            event_idx,
            windows: HashMap::new(),
        };
        world.vsock.start(&mut world.cx).unwrap();
        while let Some(step) = input.step() {
            world.step(step, &mut input);
        }
        world.begin_anew();
        while place.listeners.iter().any(|l| l.accept().is_ok()) {}
    });
}

impl World<'_> {
    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        match step % 16 {
            0..5 => {
                // From here on the rings are the guest's own affair.
                self.guest.wild = true;
                self.guest.step(step % 16, input);
            }
            5 | 6 => self.send(input),
            7 => self.offer_buffers(input.byte() % 17),
            8 => self.connect(input),
            9 => {
                let count = input.u16();
                if let Some(program) = self.pick(input) {
                    let _ = program.write(&vec![step; count.into()]);
                }
            }
            10 => {
                if let Some(program) = self.pick(input) {
                    let _ = program.read(&mut [0; 4096]);
                }
            }
            11 => {
                if !self.programs.is_empty() {
                    let index = usize::from(input.byte()) % self.programs.len();
                    self.programs.swap_remove(index);
                }
            }
            12 => self.poll(),
            13 => {
                self.now += Duration::from_secs(11);
                let now = self.now;
                let Self {
                    guest, vsock, cx, ..
                } = self;
                guest.around(|| vsock.on_deadline(cx, now));
            }
            14 => {
                let index = usize::from(input.byte() % 3);
                self.notify(index as u8);
            }
            _ => self.pause(),
        }
        self.check_packets();
    }

    fn notify(&mut self, queue: u8) {
        let Self {
            guest, vsock, cx, ..
        } = self;
        guest.around(|| vsock.on_queue(cx, queue.into()));
    }

    /// A packet of the guest's, most of it plausible.
    fn send(&mut self, input: &mut Input<'_>) {
        let (op, ports, flags) = (input.byte(), input.byte(), input.byte());
        let (buf_alloc, fwd_cnt, len) = (input.u32(), input.u32(), input.u16());
        let host_port = match ports % 8 {
            0..4 => FIRST_PORT + u32::from(ports % 4),
            4 => 1,
            5 => 2,
            _ => input.u32(),
        };
        let guest_port = u32::from(ports >> 3);
        // The payload is as long as it says, but for one packet in 32.
        let said = if op >> 3 == 31 {
            input.u32()
        } else {
            len.into()
        };
        let kind = if flags & 0x80 == 0 { 1 } else { 2 };
        let packet = Program::default()
            .u64(CID.into())
            .u64(if flags & 0x40 == 0 { 2 } else { 3 })
            .u32(guest_port)
            .u32(host_port)
            .u32(said)
            .u16(kind)
            .u16(u16::from(op % 8))
            .u32(u32::from(flags & 3))
            .u32(buf_alloc)
            .u32(fwd_cnt);
        // Whatever reaches a connection tells of room, whether it makes sense there or not.
        if kind == 1 && flags & 0x40 == 0 && said <= len.into() && op % 8 != 0 {
            let window = self.windows.entry((host_port, guest_port)).or_default();
            (window.buf_alloc, window.fwd_cnt) = (buf_alloc, fwd_cnt);
        }
        self.guest.put(OUT, &packet.0);
        let slot = self.next_slot % RING;
        self.next_slot += 1;
        let bytes = HEADER + u32::from(len);
        self.guest.descriptor(TRANSMIT, slot, OUT, bytes, 0, 0);
        self.guest.offer(TRANSMIT, slot);
        self.notify(TRANSMIT);
    }

    fn offer_buffers(&mut self, count: u8) {
        for _ in 0..count {
            let slot = self.next_in % RING;
            self.next_in += 1;
            let at = IN + u64::from(slot) * u64::from(IN_BYTES);
            self.guest.descriptor(RECEIVE, slot, at, IN_BYTES, WRITE, 0);
            self.guest.offer(RECEIVE, slot);
        }
        self.guest.descriptor(EVENT, 0, IN + 0xf000, 4, WRITE, 0);
        self.guest.offer(EVENT, 0);
        self.notify(RECEIVE);
        self.notify(EVENT);
    }

    fn connect(&mut self, input: &mut Input<'_>) {
        let (what, port) = (input.byte(), input.byte() % 32);
        if self.programs.len() >= MOST_PROGRAMS {
            return;
        }
        let Ok(mut stream) = UnixStream::connect(self.place.path()) else {
            return;
        };
        stream.set_nonblocking(true).unwrap();
        let greeting = format!("CONNECT {port}\n");
        let bytes = match what % 4 {
            0 => input.bytes((what >> 2).into()),
            1 => &greeting.as_bytes()[..greeting.len() / 2],
            _ => greeting.as_bytes(),
        };
        let _ = stream.write(bytes);
        self.programs.push(stream);
        self.poll();
    }

    fn pick(&mut self, input: &mut Input<'_>) -> Option<&mut UnixStream> {
        for listener in &self.place.listeners {
            if self.programs.len() < MOST_PROGRAMS
                && let Ok((stream, _)) = listener.accept()
            {
                stream.set_nonblocking(true).unwrap();
                self.programs.push(stream);
            }
        }
        let index = usize::from(input.byte()).checked_rem(self.programs.len())?;
        self.programs.get_mut(index)
    }

    /// What the device's worker would do now.
    fn poll(&mut self) {
        for _ in 0..4 {
            let events = self.cx.poll_detached().unwrap();
            if events.is_empty() {
                break;
            }
            for (token, ready) in events {
                let Self {
                    guest, vsock, cx, ..
                } = self;
                guest.around(|| vsock.on_io(cx, token, ready));
            }
        }
    }

    /// A pause and what comes after: another worker, the same device and queues.
    fn pause(&mut self) {
        self.vsock.stop(&mut self.cx);
        let queues = std::mem::take(&mut self.cx.queues);
        self.cx = Context::detached(self.guest.ram.clone(), queues, 0).unwrap();
        self.vsock.start(&mut self.cx).unwrap();
        (0..3).for_each(|queue| self.notify(queue));
    }

    /// What the guest has been sent, as long as its own rings can be believed.
    fn check_packets(&mut self) {
        if self.guest.wild {
            return;
        }
        for (slot, len) in self.guest.take_used(RECEIVE) {
            assert!((HEADER..=IN_BYTES).contains(&len), "{len} bytes");
            let at = IN + u64::from(slot) * u64::from(IN_BYTES);
            let word = |offset| u32::from_le_bytes(self.guest.get(at + offset));
            assert_eq!((word(0), word(4), word(8), word(12)), (2, 0, CID, 0));
            assert_eq!(word(24), len - HEADER, "length of the payload");
            let (kind, op) = (word(28) & 0xffff, word(28) >> 16);
            assert_eq!(kind, 1);
            assert!((1..8).contains(&op), "operation {op}");
            assert!(op == 5 || len == HEADER, "payload in operation {op}");
            let window = self.windows.entry((word(16), word(20))).or_default();
            match op {
                1 | 2 => window.sent = 0,
                5 => {
                    window.sent = window.sent.wrapping_add(len - HEADER);
                    let in_flight = window.sent.wrapping_sub(window.fwd_cnt);
                    let room = window.buf_alloc;
                    assert!(in_flight <= room, "{in_flight} bytes, room for {room}");
                }
                _ => {}
            }
        }
    }

    /// The guest's driver resets the device, and a host program calls.
    fn begin_anew(mut self) {
        self.vsock.stop(&mut self.cx);
        self.vsock.reset();
        (0..3).for_each(|queue| self.guest.clear_ring(queue));
        self.programs.clear();
        let queues = self.guest.queues(self.event_idx);
        self.cx = Context::detached(self.guest.ram.clone(), queues, 0).unwrap();
        self.vsock.start(&mut self.cx).unwrap();
        self.guest.wild = false;
        self.next_in = 0;
        // Programs that had not been accepted yet come first: enough buffers for all.
        self.poll();
        self.connect(&mut Input::new(&[2, 9]));
        self.poll();
        self.offer_buffers(16);
        self.poll();
        let packets = self.guest.take_used(RECEIVE);
        assert!(!packets.is_empty(), "nobody is told of a connection");
        let last = packets.last().unwrap().0;
        let at = IN + u64::from(last) * u64::from(IN_BYTES);
        let word = |offset| u32::from_le_bytes(self.guest.get(at + offset));
        assert_eq!((word(20), word(28) >> 16), (9, 1), "port and operation");
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let packet = |program: Program, op: u8, ports: u8, len: u16| {
        let program = program.bytes(&[5, op, ports, 3]).u32(1 << 16).u32(0);
        program.u16(len)
    };
    // A host program calls port 9; the guest accepts, both talk, the guest shuts down.
    let greeted = Program::default().bytes(&[0, 7, 16, 8, 2, 9, 12, 12]);
    let open = packet(greeted, 2, 9 << 3, 0);
    let talk = packet(open, 5, 9 << 3, 100).bytes(&[10, 0, 9, 200, 0, 0, 12, 14, 0]);
    let down = packet(talk.clone(), 4, 9 << 3, 0).bytes(&[12, 13]);
    // A guest program calls port 1, and nobody is at port 3.
    let call = packet(Program::default().bytes(&[1, 7, 16]), 1, 4 | 5 << 3, 0);
    let sent = packet(call, 5, 4 | 5 << 3, 60).bytes(&[10, 0, 9, 50, 0, 0, 12, 11, 0, 12]);
    let gone = packet(Program::default().bytes(&[2, 7, 16, 15]), 1, 6, 0).u32(3);
    [talk.bytes(&[15, 12]), down, sent, gone]
        .map(|program| program.0)
        .into()
}
