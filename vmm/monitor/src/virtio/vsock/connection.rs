//! One connection between a host program and a guest program.
//!
//! ```text
//!  host connects ─► Requested ──RESPONSE──► Open ──SHUTDOWN both ways──► Closing ──RST──► gone
//!  guest connects ────────────────────────► Open            any ──RST, time out──► gone
//!        Open, the guest's last bytes not passed on yet ──RST──► Draining ──passed on──► gone
//! ```
//!
//! A guest that has said "send no more" and then resets, as Linux does 8 seconds after a close that nobody
//! confirmed, is done with the connection; what it sent before belongs to the host program all the same.
//!
//! Both directions have a window (virtio 1.2, 5.10.6.3). Towards the guest, no more is read from the
//! host's socket than the guest has room for; from the guest, what the host's socket does not take yet
//! is kept here, never more than [`BUFFER_BYTES`], and a guest that sends more is reset.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// A connection's state; the muxer owns it.
#[derive(Debug)]
pub struct Connection {
    /// The host's end. It never blocks.
    pub stream: UnixStream,
    /// The host's port.
    pub host_port: u32,
    /// The guest's port.
    pub guest_port: u32,
    state: State,
    /// What the guest can hold, and what it has consumed of what it was sent.
    peer_buf_alloc: u32,
    peer_fwd_cnt: Wrapping<u32>,
    sent: Wrapping<u32>,
    /// Bytes passed on to the host program, and what of that the guest knows.
    fwd_cnt: Wrapping<u32>,
    told_fwd_cnt: Wrapping<u32>,
    received: Wrapping<u32>,
    /// What the host program has not taken yet: first `greeting` bytes of our own, then the guest's.
    outbox: VecDeque<u8>,
    greeting: usize,
    /// The host program will send no more.
    host_finished: bool,
    /// The host program is gone altogether.
    host_gone: bool,
    /// The guest will send no more; its last bytes may still be in the outbox.
    guest_finished: bool,
    /// The guest will receive no more.
    guest_deaf: bool,
    /// What the guest has been told about the host program's end.
    told_shutdown: u32,
    /// What to tell the guest next.
    pending: Pending,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Requested,
    Open,
    /// Both directions have ended; the guest's RST is awaited.
    Closing,
    /// Over for the guest; the host program still has to take what is in the outbox.
    Draining,
    Gone,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Pending {
    request: bool,
    response: bool,
    reset: bool,
    shutdown: u32,
    credit: bool,
}

/// What one connection can hold of what the guest sent.
pub const BUFFER_BYTES: u32 = 64 << 10;
/// For a guest to answer a request or to confirm an end, and for a host program to name its port.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// For a guest to make room for what a host program left behind. Until it does, its program cannot be told
/// that nobody is there; but one that reads on is given everything, so this is a long time, as TCP's is. And for
/// a host program to take the last of what a guest sent that has gone: a guest could fill the table with such.
const ROOM_PATIENCE: Duration = Duration::from_secs(60);
/// The most payload of one packet: what Linux's driver has buffers for.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// A packet for the guest; cids are the muxer's to fill in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outgoing {
    /// What it is for.
    pub op: Op,
    /// With [`Op::Shutdown`].
    pub flags: u32,
    /// Payload, already in the buffer.
    pub len: usize,
}

impl Connection {
    /// A host program wants to reach the guest's port.
    pub fn from_host(stream: UnixStream, host_port: u32, guest_port: u32) -> Self {
        let mut connection = Self::new(stream, host_port, guest_port, State::Requested);
        connection.pending.request = true;
        connection
    }

    /// A guest program's request (`header`) was accepted by a host program.
    pub fn from_guest(stream: UnixStream, header: &Header) -> Self {
        let mut connection = Self::new(stream, header.dst_port, header.src_port, State::Open);
        connection.take_credit(header);
        connection.pending.response = true;
        connection
    }

    fn new(stream: UnixStream, host_port: u32, guest_port: u32, state: State) -> Self {
        Self {
            stream,
            host_port,
            guest_port,
            state,
            peer_buf_alloc: 0,
            peer_fwd_cnt: Wrapping(0),
            sent: Wrapping(0),
            fwd_cnt: Wrapping(0),
            told_fwd_cnt: Wrapping(0),
            received: Wrapping(0),
            outbox: VecDeque::new(),
            greeting: 0,
            host_finished: false,
            host_gone: false,
            guest_finished: false,
            guest_deaf: false,
            told_shutdown: 0,
            pending: Pending::default(),
        }
    }

    /// Whether the host program has closed its socket. What it sent before may still be there.
    pub fn host_is_gone(&self) -> bool {
        self.host_gone
    }

    /// Whether nothing is left to be done; the muxer drops it then.
    pub fn is_gone(&self) -> bool {
        match self.state {
            State::Gone => true,
            State::Draining => self.outbox.is_empty(),
            State::Requested | State::Open | State::Closing => false,
        }
    }

    /// Whether the guest has forgotten it: its ports are free, and no packet is about it.
    pub fn is_over_for_guest(&self) -> bool {
        matches!(self.state, State::Draining | State::Gone)
    }

    /// How long it waits for somebody to get on, if it waits.
    pub fn patience(&self) -> Option<Duration> {
        match self.state {
            State::Requested | State::Closing => Some(PATIENCE),
            State::Open => {
                (self.host_gone && self.has_more() && self.credit() == 0).then_some(ROOM_PATIENCE)
            }
            State::Draining => Some(ROOM_PATIENCE),
            State::Gone => None,
        }
    }

    /// Its patience is over.
    pub fn give_up(&mut self) {
        if self.state == State::Draining {
            self.state = State::Gone;
        } else {
            self.reset();
        }
    }

    /// Whether there is a packet for the guest that needs nothing of the host program.
    pub fn has_pending(&self) -> bool {
        self.pending != Pending::default()
    }

    /// Whether the host's socket is worth reading: there is room in the guest.
    pub fn wants_read(&self) -> bool {
        self.has_more() && self.credit() > 0
    }

    /// Whether there may be something for the guest in the host's socket.
    fn has_more(&self) -> bool {
        self.state == State::Open && !self.host_finished && !self.guest_deaf
    }

    /// Whether the host's socket is behind.
    pub fn wants_write(&self) -> bool {
        !self.outbox.is_empty() && !self.host_gone
    }

    /// How many bytes the guest can take. What it says may make no sense; then there is no room.
    fn credit(&self) -> usize {
        let in_flight = (self.sent - self.peer_fwd_cnt).0;
        self.peer_buf_alloc.saturating_sub(in_flight) as usize
    }

    fn take_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = Wrapping(header.fwd_cnt);
    }

    /// Handles a packet of the guest's; `payload` has the length the header says.
    pub fn on_packet(&mut self, op: Op, header: &Header, payload: &[u8]) {
        self.take_credit(header);
        match (op, self.state) {
            (_, State::Draining | State::Gone) => {}
            (Op::Reset, _) => self.on_reset(),
            (Op::Response, State::Requested) => {
                self.state = State::Open;
                let greeting = format!("OK {}\n", self.host_port);
                self.greeting = greeting.len();
                self.outbox.extend(greeting.as_bytes());
                self.flush();
            }
            (Op::ReadWrite, State::Open) if !self.guest_finished => self.take_payload(payload),
            (Op::Shutdown, State::Open) => self.on_shutdown(header.flags),
            // While we wait for the end of it, what the guest still had to say is dropped.
            (Op::CreditUpdate, _) | (Op::ReadWrite | Op::Shutdown, State::Closing) => {}
            (Op::CreditRequest, State::Open | State::Closing) => self.pending.credit = true,
            (Op::Request | Op::Response | Op::ReadWrite | Op::Shutdown | Op::CreditRequest, _) => {
                self.reset();
            }
        }
    }

    fn take_payload(&mut self, payload: &[u8]) {
        self.received += Wrapping(payload.len() as u32); // at most MAX_PAYLOAD
        let held = self.outbox.len() - self.greeting;
        if held + payload.len() > BUFFER_BYTES as usize {
            tracing::debug!(
                port = self.guest_port,
                "the guest sent more than it had room for"
            );
            return self.reset();
        }
        if self.host_gone {
            self.fwd_cnt += Wrapping(payload.len() as u32);
            return self.offer_credit();
        }
        self.outbox.extend(payload);
        self.flush();
    }

    fn on_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.guest_deaf = true;
            // The host program gets an error when it writes on, as on any socket.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_finished = true;
            self.flush();
        }
        self.offer_shutdown();
    }

    fn on_reset(&mut self) {
        self.pending = Pending::default();
        // Whoever had not finished breaks off; whoever had may rely on it that all of it arrives.
        self.state = if self.guest_finished {
            State::Draining
        } else {
            State::Gone
        };
        let _ = self.stream.shutdown(Shutdown::Read);
        self.flush();
    }

    /// Passes on what the host program takes now.
    pub fn flush(&mut self) {
        while !self.outbox.is_empty() && !self.host_gone {
            let (first, _) = self.outbox.as_slices();
            match self.stream.write(first) {
                Ok(0) => break,
                Ok(written) => {
                    self.outbox.drain(..written);
                    let ours = written.min(self.greeting);
                    self.greeting -= ours;
                    self.fwd_cnt += Wrapping((written - ours) as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.on_host_gone(),
            }
        }
        self.follow_up();
    }

    /// What follows from an outbox that has become shorter.
    fn follow_up(&mut self) {
        if self.is_over_for_guest() {
            return;
        }
        self.offer_credit();
        if self.outbox.is_empty() && self.guest_finished {
            let _ = self.stream.shutdown(Shutdown::Write);
            if self.guest_deaf {
                // The guest has closed its socket, and all it had to say has been passed on.
                self.reset();
            }
        }
    }

    /// Tells the guest of room before it runs out of what it knows of.
    fn offer_credit(&mut self) {
        let known_room = BUFFER_BYTES.saturating_sub((self.received - self.told_fwd_cnt).0);
        if known_room < BUFFER_BYTES / 2 && self.fwd_cnt != self.told_fwd_cnt {
            self.pending.credit = true;
        }
    }

    /// The host program has closed its socket, not only one direction of it.
    pub fn on_host_gone(&mut self) {
        if self.host_gone {
            return;
        }
        self.host_gone = true;
        self.fwd_cnt += Wrapping((self.outbox.len() - self.greeting) as u32);
        self.outbox.clear();
        self.greeting = 0;
        if self.state == State::Requested {
            return self.reset();
        }
        // Its socket is not watched any more, so nothing else may ever bring this up.
        self.follow_up();
        self.offer_shutdown();
    }

    /// Ends the connection, and tells the guest.
    pub fn reset(&mut self) {
        self.pending = Pending {
            reset: true,
            ..Pending::default()
        };
        self.host_finished = true;
        self.outbox.clear();
        self.greeting = 0;
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// The next packet for the guest, if there is one; its payload goes into `buffer`.
    pub fn next_packet(&mut self, buffer: &mut [u8]) -> Option<Outgoing> {
        let plain = |op| {
            Some(Outgoing {
                op,
                flags: 0,
                len: 0,
            })
        };
        if self.pending.reset {
            self.pending = Pending::default();
            self.state = State::Gone;
            return plain(Op::Reset);
        }
        if std::mem::take(&mut self.pending.request) {
            return plain(Op::Request);
        }
        if std::mem::take(&mut self.pending.response) {
            return plain(Op::Response);
        }
        if let Some(len) = self.read_host(buffer) {
            self.sent += Wrapping(len as u32); // at most MAX_PAYLOAD
            self.pending.credit = false; // every packet tells of our room
            return Some(Outgoing {
                op: Op::ReadWrite,
                flags: 0,
                len,
            });
        }
        if self.pending.reset {
            return self.next_packet(buffer); // reading failed
        }
        let shutdown = std::mem::take(&mut self.pending.shutdown);
        if shutdown != 0 {
            if shutdown == SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
                self.state = State::Closing;
            }
            return Some(Outgoing {
                op: Op::Shutdown,
                flags: shutdown,
                len: 0,
            });
        }
        if std::mem::take(&mut self.pending.credit) {
            return plain(Op::CreditUpdate);
        }
        None
    }

    fn read_host(&mut self, buffer: &mut [u8]) -> Option<usize> {
        if !self.wants_read() {
            self.offer_shutdown();
            return None;
        }
        let room = buffer.len().min(self.credit()).min(MAX_PAYLOAD);
        if room == 0 {
            return None;
        }
        match self.stream.read(&mut buffer[..room]) {
            Ok(0) => {
                self.host_finished = true;
                self.offer_shutdown();
                None
            }
            Ok(len) => Some(len),
            // It takes no more, and left nothing: where it has only shut its reading side, it has no answers to
            // wait for. Without this the end would be looked for again and again.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.host_gone => {
                self.host_finished = true;
                self.offer_shutdown();
                None
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                None
            }
            Err(_) => {
                self.reset();
                None
            }
        }
    }

    /// Tells the guest, once, what the host program will no longer do.
    fn offer_shutdown(&mut self) {
        if self.state != State::Open || self.pending.reset {
            return;
        }
        let mut ended = 0;
        if self.host_finished {
            ended |= SHUTDOWN_SEND;
        }
        // While the guest can still be sent what the host program left, only receiving has ended; but
        // Linux takes the two apart only if "send" comes first, so they go together then.
        if self.host_gone && (self.host_finished || self.guest_deaf) {
            ended |= SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
        }
        if ended & !self.told_shutdown != 0 {
            self.told_shutdown |= ended;
            self.pending.shutdown = ended;
        }
    }

    /// Fills in what every packet says about our side.
    pub fn stamp(&mut self, header: &mut Header) {
        header.src_port = self.host_port;
        header.dst_port = self.guest_port;
        header.buf_alloc = BUFFER_BYTES;
        header.fwd_cnt = self.fwd_cnt.0;
        self.told_fwd_cnt = self.fwd_cnt;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection the guest has accepted, the host program's end, and a header with `room`.
    fn open(room: u32) -> (Connection, UnixStream, Header) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut connection = Connection::from_host(ours, 77, 10_000);
        let header = Header {
            buf_alloc: room,
            ..Header::default()
        };
        assert_eq!(next(&mut connection).unwrap().op, Op::Request);
        connection.on_packet(Op::Response, &header, &[]);
        let mut greeting = [0; 6];
        (&theirs).read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"OK 77\n");
        (connection, theirs, header)
    }

    fn next(connection: &mut Connection) -> Option<Outgoing> {
        connection.next_packet(&mut [0; MAX_PAYLOAD])
    }

    fn shutdown(flags: u32) -> Option<Outgoing> {
        Some(Outgoing {
            op: Op::Shutdown,
            flags,
            len: 0,
        })
    }

    #[test]
    fn the_guest_is_never_sent_more_than_it_has_room_for() {
        let (mut connection, host, header) = open(10);
        (&host).write_all(&[1; 25]).unwrap();
        assert_eq!(next(&mut connection).unwrap().len, 10);
        assert_eq!(next(&mut connection), None);
        assert!(!connection.wants_read());
        connection.on_packet(
            Op::CreditUpdate,
            &Header {
                fwd_cnt: 4,
                ..header
            },
            &[],
        );
        assert_eq!(next(&mut connection).unwrap().len, 4);
        // A guest that claims to have consumed what it was never sent gets nothing.
        connection.on_packet(
            Op::CreditUpdate,
            &Header {
                fwd_cnt: 4000,
                ..header
            },
            &[],
        );
        assert_eq!(next(&mut connection), None);
    }

    #[test]
    fn a_slow_host_program_costs_the_guest_its_window_and_no_more() {
        let (mut connection, host, header) = open(1 << 16);
        let packet = [7; 4096];
        let mut sent = 0;
        // What the host's socket buffers, then what the connection does.
        while connection.outbox.len() < BUFFER_BYTES as usize {
            connection.on_packet(Op::ReadWrite, &header, &packet);
            sent += packet.len();
            assert!(!connection.pending.reset);
        }
        assert!(connection.wants_write());
        let mut taken = 0;
        let mut buffer = [0; 8192];
        while taken < sent {
            taken += (&host).read(&mut buffer).unwrap();
            connection.flush();
        }
        assert_eq!(connection.fwd_cnt.0 as usize, sent);
        let mut stamped = Header::default();
        assert_eq!(next(&mut connection).unwrap().op, Op::CreditUpdate);
        connection.stamp(&mut stamped);
        assert_eq!(
            (stamped.fwd_cnt as usize, stamped.buf_alloc),
            (sent, BUFFER_BYTES)
        );
    }

    #[test]
    fn a_guest_that_ignores_the_window_is_reset() {
        let (mut connection, _host, header) = open(1 << 16);
        while !connection.pending.reset {
            assert!(connection.outbox.len() <= BUFFER_BYTES as usize);
            connection.on_packet(Op::ReadWrite, &header, &[7; 4096]);
        }
        assert_eq!(next(&mut connection).unwrap().op, Op::Reset);
        assert!(connection.is_gone());
    }

    #[test]
    fn each_direction_ends_by_itself() {
        let (mut connection, host, header) = open(1 << 16);
        host.shutdown(Shutdown::Write).unwrap();
        assert_eq!(next(&mut connection), shutdown(SHUTDOWN_SEND));
        connection.on_packet(Op::ReadWrite, &header, b"still here");
        let mut text = [0; 10];
        (&host).read_exact(&mut text).unwrap();
        connection.on_packet(
            Op::Shutdown,
            &Header {
                flags: SHUTDOWN_SEND,
                ..header
            },
            &[],
        );
        assert_eq!(
            (&host).read(&mut text).unwrap(),
            0,
            "the host program sees the end"
        );
        connection.on_packet(
            Op::Shutdown,
            &Header {
                flags: SHUTDOWN_SEND | SHUTDOWN_RECEIVE,
                ..header
            },
            &[],
        );
        assert_eq!(next(&mut connection).unwrap().op, Op::Reset);
        assert!(connection.is_gone());
    }

    #[test]
    fn what_a_host_program_left_behind_still_reaches_the_guest() {
        let (mut connection, host, header) = open(4);
        (&host).write_all(b"12345678").unwrap();
        drop(host);
        connection.on_host_gone();
        assert_eq!(connection.patience(), None);
        assert_eq!(next(&mut connection).unwrap().len, 4);
        assert_eq!(next(&mut connection), None, "the guest has no room yet");
        assert_eq!(connection.patience(), Some(ROOM_PATIENCE));
        connection.on_packet(
            Op::CreditUpdate,
            &Header {
                fwd_cnt: 4,
                ..header
            },
            &[],
        );
        assert_eq!(next(&mut connection).unwrap().len, 4);
        connection.on_packet(
            Op::CreditUpdate,
            &Header {
                fwd_cnt: 8,
                ..header
            },
            &[],
        );
        assert_eq!(
            next(&mut connection),
            shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE)
        );
        assert_eq!(connection.patience(), Some(PATIENCE));
        connection.on_packet(Op::Reset, &header, &[]);
        assert!(connection.is_gone());
    }

    /// Has the guest send until the window is shut; returns how much.
    fn fill(connection: &mut Connection, header: &Header) -> usize {
        let mut sent = 0;
        while connection.outbox.len() < BUFFER_BYTES as usize {
            connection.on_packet(Op::ReadWrite, header, &[7; 4096]);
            sent += 4096;
        }
        sent
    }

    fn end(connection: &mut Connection, header: &Header, flags: u32) {
        connection.on_packet(Op::Shutdown, &Header { flags, ..*header }, &[]);
    }

    #[test]
    fn a_reset_after_the_guests_last_byte_loses_none() {
        for flags in [SHUTDOWN_SEND, SHUTDOWN_SEND | SHUTDOWN_RECEIVE] {
            let (mut connection, host, header) = open(1 << 16);
            let sent = fill(&mut connection, &header);
            end(&mut connection, &header, flags);
            connection.on_packet(Op::Reset, &header, &[]);
            assert!(connection.is_over_for_guest() && !connection.is_gone());
            assert!((&host).write(b"to nobody").is_err());
            let mut taken = 0;
            let mut buffer = [0; 8192];
            while !connection.is_gone() {
                assert!(connection.wants_write() && connection.patience().is_some());
                taken += (&host).read(&mut buffer).unwrap();
                connection.flush();
                assert!(!connection.has_pending(), "the guest has forgotten it");
                assert_eq!(next(&mut connection), None);
            }
            drop(connection);
            let mut rest = Vec::new();
            taken += (&host).read_to_end(&mut rest).unwrap();
            assert_eq!(taken, sent);
        }
    }

    #[test]
    fn what_nobody_will_take_is_not_kept_behind_a_reset() {
        let (mut connection, host, header) = open(1 << 16);
        fill(&mut connection, &header);
        end(&mut connection, &header, SHUTDOWN_SEND);
        connection.on_packet(Op::Reset, &header, &[]);
        drop(host);
        connection.on_host_gone();
        assert!(connection.is_gone());
        // Nor is it kept for a host program that never takes it.
        let (mut connection, _host, header) = open(1 << 16);
        fill(&mut connection, &header);
        end(&mut connection, &header, SHUTDOWN_SEND);
        connection.on_packet(Op::Reset, &header, &[]);
        assert!(!connection.is_gone() && connection.patience().is_some());
        connection.give_up();
        assert!(connection.is_gone());
        // Nor is what a guest sent that broke off in the middle.
        let (mut connection, _host, header) = open(1 << 16);
        fill(&mut connection, &header);
        connection.on_packet(Op::Reset, &header, &[]);
        assert!(connection.is_gone());
    }

    #[test]
    fn a_guest_that_receives_no_more_is_told_that_the_host_is_gone() {
        let both = shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
        let (mut connection, host, header) = open(1 << 16);
        end(&mut connection, &header, SHUTDOWN_RECEIVE);
        drop(host);
        connection.on_packet(Op::ReadWrite, &header, b"more");
        assert!(connection.has_pending());
        assert_eq!(next(&mut connection), both);
        // And the other way round, with something left that it has no room for.
        let (mut connection, host, header) = open(0);
        (&host).write_all(b"too late").unwrap();
        drop(host);
        connection.on_host_gone();
        assert_eq!(next(&mut connection), None);
        end(&mut connection, &header, SHUTDOWN_RECEIVE);
        assert!(connection.has_pending());
        assert_eq!(next(&mut connection), both);
    }

    #[test]
    fn a_blocked_guest_has_room_again_when_the_host_is_gone() {
        let (mut connection, host, header) = open(4);
        fill(&mut connection, &header);
        (&host).write_all(b"12345678").unwrap();
        while next(&mut connection).is_some() {
            connection.stamp(&mut Header::default());
        }
        drop(host);
        connection.on_host_gone();
        // It neither reads nor writes until it hears of this.
        for _ in 0..3 {
            assert_eq!(next(&mut connection).unwrap().op, Op::CreditUpdate);
            connection.stamp(&mut Header::default());
            assert_eq!(connection.told_fwd_cnt, connection.received);
            for _ in 0..BUFFER_BYTES / 4096 {
                connection.on_packet(Op::ReadWrite, &header, &[7; 4096]);
            }
        }
    }

    #[test]
    fn a_guest_that_has_closed_is_answered_when_the_host_is_gone() {
        let (mut connection, host, header) = open(1 << 16);
        fill(&mut connection, &header);
        end(&mut connection, &header, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
        drop(host);
        connection.on_host_gone();
        assert_eq!(next(&mut connection).unwrap().op, Op::Reset);
    }

    #[test]
    fn operations_out_of_place_reset() {
        let (mut connection, _host, header) = open(4);
        connection.on_packet(Op::Response, &header, &[]);
        assert_eq!(next(&mut connection).unwrap().op, Op::Reset);
    }
}
