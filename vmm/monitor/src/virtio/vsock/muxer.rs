//! All connections of one guest: who they belong to, who has something to say next.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, socket,
};

use super::connection::{Connection, MAX_PAYLOAD, PATIENCE};
use super::packet::{HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM};
use crate::virtio::Context;
use crate::virtio::worker::{FIRST_DEVICE_TOKEN, Ready};

/// The host's side of a guest's vsock.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    path: PathBuf,
    listener: UnixListener,
    accepting: Accepting,
    clients: HashMap<u64, Client>,
    by_ports: HashMap<(u32, u32), u64>,
    /// Clients that may have a packet for the guest, each at most once.
    ready: VecDeque<u64>,
    /// Answers to packets that belong to no connection.
    resets: VecDeque<Header>,
    /// Those of all clients, one each at most: a guest decides how often a wait begins.
    deadlines: BTreeSet<(Instant, u64)>,
    next_id: u64,
    next_port: u32,
    buffer: Box<[u8]>,
}

/// Whether the listener is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Accepting {
    Yes,
    /// Not before [`Muxer::start`], or, with too many connections, before one ends.
    No,
    /// Not before this instant, or before a connection ends: the host could not give a descriptor.
    NotBefore(Instant),
}

#[derive(Debug)]
struct Client {
    stage: Stage,
    queued: bool,
    /// When it has waited too long, if it waits.
    deadline: Option<Instant>,
    /// What its socket is watched for; `None` while it is not watched at all.
    watched: Option<(bool, bool)>,
}

#[derive(Debug)]
enum Stage {
    /// A host program that has not said yet which port it wants.
    Greeting {
        stream: UnixStream,
        line: Vec<u8>,
    },
    Connected(Connection),
}

/// Bounds the descriptors and memory one guest's connections take; more wait in the listener's backlog.
const MAX_CLIENTS: usize = 512;
/// A guest that sends nonsense and takes no answers is not listened to beyond this.
const MAX_RESETS: usize = 256;
/// `CONNECT 4294967295\n` has 19 bytes.
const MAX_GREETING: usize = 32;
/// Ports for host programs start where Linux takes none for its own sockets.
const FIRST_PORT: u32 = 1 << 30;
const LISTENER: u64 = FIRST_DEVICE_TOKEN;
const ACCEPTS_PER_ROUND: usize = 64;
/// A host that was short of descriptors or memory is asked again soon; until then, clients wait in the backlog.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

impl Muxer {
    /// Listens at `path`, in place of whatever was there.
    pub fn bind(guest_cid: u32, path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        // Whoever may write to this socket can reach every port of the guest.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            guest_cid: guest_cid.into(),
            path: path.to_owned(),
            listener,
            accepting: Accepting::No,
            clients: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
            next_id: LISTENER + 1,
            next_port: FIRST_PORT,
            buffer: vec![0; MAX_PAYLOAD].into_boxed_slice(),
        })
    }

    /// Exchanges what it accepts from.
    #[cfg(test)]
    pub fn swap_listener(&mut self, listener: &mut UnixListener) {
        std::mem::swap(&mut self.listener, listener);
    }

    /// The guest's context id.
    pub fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Begins or goes on to be told of its sockets.
    pub fn start(&mut self, cx: &Context) -> io::Result<()> {
        cx.watch(&self.listener, LISTENER, true, false)?;
        self.accepting = Accepting::Yes;
        for client in self.clients.values_mut() {
            client.watched = None;
        }
        let ids: Vec<u64> = self.clients.keys().copied().collect();
        for id in ids {
            self.settle(cx, id);
        }
        Ok(())
    }

    /// Drops every connection: the guest has forgotten them.
    pub fn clear(&mut self) {
        self.clients.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
        self.deadlines.clear();
    }

    /// When somebody's patience ends, or there is something to try again.
    pub fn deadline(&self) -> Option<Instant> {
        let patience = self.deadlines.first().map(|(at, _)| *at);
        match self.accepting {
            Accepting::NotBefore(at) => Some(patience.map_or(at, |patience| patience.min(at))),
            Accepting::Yes | Accepting::No => patience,
        }
    }

    /// Whether there may be something for the guest.
    pub fn has_output(&self) -> bool {
        !self.ready.is_empty() || !self.resets.is_empty()
    }

    /// Whether the guest must take answers before it is heard again.
    pub fn is_congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// One of the sockets is ready.
    pub fn on_io(&mut self, cx: &Context, token: u64, ready: Ready) {
        if token == LISTENER {
            return self.accept(cx);
        }
        let Some(client) = self.clients.get_mut(&token) else {
            return; // closed by an event before this one
        };
        match &mut client.stage {
            Stage::Greeting { .. } => self.read_greeting(cx, token),
            Stage::Connected(connection) => {
                if ready.write {
                    connection.flush();
                }
                if ready.hang_up {
                    connection.on_host_gone();
                }
                if ready.read || ready.hang_up {
                    self.enqueue(token);
                }
                self.settle(cx, token);
            }
        }
    }

    /// Ends what has waited too long, and tries again what failed.
    pub fn on_deadline(&mut self, cx: &Context, now: Instant) {
        if matches!(self.accepting, Accepting::NotBefore(at) if at <= now) {
            self.accept_again(cx);
        }
        while let Some((at, id)) = self.deadlines.first().copied() {
            if at > now {
                break;
            }
            self.deadlines.pop_first();
            let Some(client) = self.clients.get_mut(&id) else {
                continue;
            };
            match &mut client.stage {
                Stage::Greeting { .. } => self.remove(cx, id),
                Stage::Connected(connection) => {
                    connection.give_up();
                    self.settle(cx, id);
                }
            }
        }
    }

    fn accept(&mut self, cx: &Context) {
        for _ in 0..ACCEPTS_PER_ROUND {
            if self.clients.len() >= MAX_CLIENTS {
                return self.stop_accepting(cx, Accepting::No);
            }
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if stream.set_nonblocking(true).is_ok() {
                        self.add(
                            cx,
                            Stage::Greeting {
                                stream,
                                line: Vec::new(),
                            },
                        );
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if crate::virtio::may_log() {
                        tracing::warn!(%error, "cannot accept a vsock client");
                    }
                    let later = Instant::now() + ACCEPT_AGAIN;
                    return self.stop_accepting(cx, Accepting::NotBefore(later));
                }
            }
        }
    }

    fn stop_accepting(&mut self, cx: &Context, until: Accepting) {
        cx.unwatch(&self.listener);
        self.accepting = until;
    }

    fn accept_again(&mut self, cx: &Context) {
        if self.accepting == Accepting::Yes {
            return;
        }
        self.accepting = match cx.watch(&self.listener, LISTENER, true, false) {
            Ok(()) => Accepting::Yes,
            Err(_) => Accepting::NotBefore(Instant::now() + ACCEPT_AGAIN),
        };
    }

    fn add(&mut self, cx: &Context, stage: Stage) {
        let id = self.next_id;
        self.next_id += 1;
        if let Stage::Connected(connection) = &stage {
            self.by_ports
                .insert((connection.host_port, connection.guest_port), id);
        }
        self.clients.insert(
            id,
            Client {
                stage,
                queued: false,
                deadline: None,
                watched: None,
            },
        );
        self.settle(cx, id);
    }

    fn remove(&mut self, cx: &Context, id: u64) {
        if let Some(client) = self.clients.remove(&id) {
            if let Some(at) = client.deadline {
                self.deadlines.remove(&(at, id));
            }
            match &client.stage {
                Stage::Greeting { stream, .. } => cx.unwatch(stream),
                Stage::Connected(connection) => {
                    cx.unwatch(&connection.stream);
                    let key = (connection.host_port, connection.guest_port);
                    if self.by_ports.get(&key) == Some(&id) {
                        self.by_ports.remove(&key); // not a successor's
                    }
                }
            }
        }
        self.accept_again(cx);
    }

    /// Brings watch, queue, deadline and table into line with what a client is now.
    fn settle(&mut self, cx: &Context, id: u64) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let (stream, wanted, patience) = match &client.stage {
            Stage::Greeting { stream, .. } => (stream, Some((true, false)), Some(PATIENCE)),
            Stage::Connected(connection) => {
                if connection.is_gone() {
                    return self.remove(cx, id);
                }
                // A socket whose other end is gone would be reported ready for ever.
                let watch = !connection.host_is_gone();
                let read = connection.wants_read() && !client.queued;
                let wanted = watch.then(|| (read, connection.wants_write()));
                (&connection.stream, wanted, connection.patience())
            }
        };
        if patience.is_some() != client.deadline.is_some() {
            if let Some(at) = client.deadline {
                self.deadlines.remove(&(at, id));
            }
            client.deadline = patience.map(|patience| Instant::now() + patience);
            self.deadlines.extend(client.deadline.map(|at| (at, id)));
        }
        if client.watched != wanted {
            let changed = match (client.watched, wanted) {
                (None, Some((read, write))) => cx.watch(stream, id, read, write),
                (Some(_), Some((read, write))) => cx.rewatch(stream, id, read, write),
                (_, None) => {
                    cx.unwatch(stream);
                    Ok(())
                }
            };
            if let Err(error) = changed {
                tracing::warn!(%error, "cannot watch a vsock client");
                return self.remove(cx, id);
            }
            client.watched = wanted;
        }
        if let Stage::Connected(connection) = &client.stage
            && (connection.has_pending() || connection.host_is_gone() && connection.wants_read())
        {
            self.enqueue(id);
        }
    }

    fn enqueue(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id)
            && !client.queued
        {
            client.queued = true;
            self.ready.push_back(id);
        }
    }

    fn read_greeting(&mut self, cx: &Context, id: u64) {
        let Some(Client {
            stage: Stage::Greeting { stream, line },
            ..
        }) = self.clients.get_mut(&id)
        else {
            return;
        };
        let port = match greeting(stream, line) {
            Ok(Some(port)) => port,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "a vsock client did not say CONNECT <port>");
                return self.remove(cx, id);
            }
        };
        let Some(host_port) = self.free_port(port) else {
            return self.remove(cx, id);
        };
        if let Some(Client {
            stage: Stage::Greeting { stream, .. },
            watched,
            deadline,
            ..
        }) = self.clients.remove(&id)
        {
            if let Some(at) = deadline {
                self.deadlines.remove(&(at, id));
            }
            let stage = Stage::Connected(Connection::from_host(stream, host_port, port));
            let client = Client {
                stage,
                queued: false,
                deadline: None,
                watched,
            };
            self.clients.insert(id, client);
            self.by_ports.insert((host_port, port), id);
            self.settle(cx, id);
        }
    }

    fn free_port(&mut self, guest_port: u32) -> Option<u32> {
        (0..=MAX_CLIENTS).find_map(|_| {
            let port = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            (!self.by_ports.contains_key(&(port, guest_port))).then_some(port)
        })
    }

    /// Handles a packet of the guest's.
    pub fn on_packet(&mut self, cx: &Context, header: &Header, payload: &[u8]) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return; // not from this guest, or not for this host
        }
        let op = Op::from_number(header.op).filter(|_| header.kind == TYPE_STREAM);
        let key = (header.dst_port, header.src_port);
        let Some(op) = op else {
            return self.refuse(header);
        };
        match self.by_ports.get(&key).copied() {
            Some(id) => {
                if let Some(Client {
                    stage: Stage::Connected(connection),
                    ..
                }) = self.clients.get_mut(&id)
                {
                    connection.on_packet(op, header, payload);
                    if connection.is_over_for_guest() {
                        // The guest may use the ports anew before the host program has taken everything.
                        self.by_ports.remove(&key);
                    }
                    self.settle(cx, id);
                }
            }
            None if op == Op::Request => match self.connect_out(cx, header) {
                Ok(()) => {}
                Err(error) => {
                    tracing::debug!(port = header.dst_port, %error, "guest's connection refused");
                    self.refuse(header);
                }
            },
            None => self.refuse(header),
        }
    }

    /// Answers a packet that belongs nowhere with a reset; a reset is not answered.
    fn refuse(&mut self, header: &Header) {
        if header.op == Op::Reset.number() {
            return;
        }
        self.resets.push_back(Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: TYPE_STREAM,
            op: Op::Reset.number(),
            ..Header::default()
        });
    }

    /// A guest program calls: some host program must listen at `<path>_<port>`.
    fn connect_out(&mut self, cx: &Context, header: &Header) -> io::Result<()> {
        if self.clients.len() >= MAX_CLIENTS {
            return Err(io::Error::other("too many connections"));
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", header.dst_port));
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path.as_os_str())?)?;
        self.add(
            cx,
            Stage::Connected(Connection::from_guest(UnixStream::from(fd), header)),
        );
        Ok(())
    }

    /// Writes the next packet for the guest into `write`, which takes header and payload, and returns
    /// whether there was one. `room` is what the guest's buffer has for the payload.
    pub fn next_packet(
        &mut self,
        cx: &Context,
        room: usize,
        write: impl FnOnce(&[u8; HEADER_BYTES], &[u8]),
    ) -> bool {
        if let Some(reset) = self.resets.pop_front() {
            write(&reset.encode(), &[]);
            return true;
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(client) = self.clients.get_mut(&id) else {
                continue;
            };
            client.queued = false;
            let Stage::Connected(connection) = &mut client.stage else {
                continue;
            };
            let room = room.min(self.buffer.len());
            let Some(packet) = connection.next_packet(&mut self.buffer[..room]) else {
                self.settle(cx, id);
                continue;
            };
            let mut header = Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                len: packet.len as u32, // at most MAX_PAYLOAD
                kind: TYPE_STREAM,
                op: packet.op.number(),
                flags: packet.flags,
                ..Header::default()
            };
            connection.stamp(&mut header);
            write(&header.encode(), &self.buffer[..packet.len]);
            // It may have more; the others come first.
            if !connection.is_gone() && packet.op == Op::ReadWrite {
                self.enqueue(id);
            }
            self.settle(cx, id);
            return true;
        }
        false
    }
}

/// Reads `CONNECT <port>\n`, and not a byte more: what follows is for the guest program. `line` is
/// what has come so far; `None` if that is not all.
fn greeting(stream: &UnixStream, line: &mut Vec<u8>) -> io::Result<Option<u32>> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let fd = stream.as_fd().as_raw_fd();
    let mut bytes = [0; MAX_GREETING];
    let len = match recv(fd, &mut bytes, MsgFlags::MSG_PEEK) {
        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(len) => len,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let end = bytes[..len].iter().position(|byte| *byte == b'\n');
    let taken = recv(
        fd,
        &mut bytes[..end.map_or(len, |at| at + 1)],
        MsgFlags::empty(),
    )?;
    line.extend_from_slice(&bytes[..taken]);
    if line.len() > MAX_GREETING {
        return Err(invalid());
    }
    let Some(line) = line.strip_suffix(b"\n") else {
        return Ok(None);
    };
    std::str::from_utf8(line)
        .ok()
        .and_then(|line| line.strip_prefix("CONNECT "))
        .and_then(|port| port.parse().ok())
        .map(Some)
        .ok_or_else(invalid)
}
