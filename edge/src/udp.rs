//! Services that speak UDP: datagrams of one client's address and port are one session with one Machine.
//!
//! ```text
//! door: a thread's socket ─► session by the client's address ─► gate: a place ─► a socket of its own ─► the Machine
//!                    ▲                                                                                      │
//!                    └────────────────────────────────── its answers ◄──────────────────────────────────────┘
//! ```
//!
//! Nothing says that a session is over, so it lives as long as its Machine does and is heard of, and holds its place so
//! long. What comes after that begins a new one, at a Machine that runs. The kernel has all datagrams of a client come
//! to the same thread's socket.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use tern_catalog::ServiceProtocol;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::gate::Admission;
use crate::site::Target;
use crate::worker::Worker;

/// A socket of one thread.
pub struct UdpDoor {
    /// The port, as apps name it.
    pub port: u16,
    pub socket: std::net::UdpSocket,
    /// Set when it is to be closed, and its sessions end.
    pub closed: CancellationToken,
}

/// A session without an answer for so long ends, whatever its client sends: nobody may be there any more. What keeps a
/// NAT's mapping alive (WireGuard: 25 s, RFC 8085 section 3.5: 15 s) keeps this too.
const IDLE: Duration = Duration::from_secs(60);
/// How often a session looks whether its Machine is still the one it was given.
const LOOK: Duration = Duration::from_secs(3);
/// Sessions of one socket. A spoofed address costs one.
const MAX_SESSIONS: usize = 8192;
/// Datagrams that wait for a Machine's start, or its socket's room; more are lost, as UDP may lose them.
const WAITING: usize = 32;
/// Bytes of datagrams that wait so, of all clients of a socket.
const WAITING_BYTES: usize = 16 << 20;
/// What the kernel keeps for us while a thread is busy; the usual default holds some 150 datagrams.
const BUFFER: usize = 4 << 20;
/// Datagrams that one call may bring.
const BATCH: usize = 8;
const LARGEST: usize = 64 << 10;

/// A socket that tells to which of the host's addresses a datagram came, and answers from there.
struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
}

/// Who asks, and at which of the host's addresses: one that asks at two has its answers from both.
type Client = (SocketAddr, Option<IpAddr>);

/// One client's datagrams on their way in.
struct Inward {
    datagrams: mpsc::Sender<Waiting>,
    /// Tells it from a later one of the same client.
    number: u64,
}

/// A datagram on its way in, counted until it is dropped.
struct Waiting {
    datagram: Bytes,
    bytes: Rc<Cell<usize>>,
}

impl Waiting {
    fn new(datagram: Bytes, bytes: &Rc<Cell<usize>>) -> Self {
        bytes.set(bytes.get() + datagram.len());
        Self {
            datagram,
            bytes: Rc::clone(bytes),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.bytes.set(self.bytes.get() - self.datagram.len());
    }
}

/// Serves a port until it is closed, or the edge is to end.
pub async fn serve(door: UdpDoor, worker: Rc<Worker>, running: TaskTracker) {
    let port = door.port;
    let socket = match Socket::new(door.socket) {
        Ok(socket) => Rc::new(socket),
        Err(error) => {
            tracing::error!(%error, port, "a UDP port cannot be served");
            return;
        }
    };
    let mut sessions = Sessions {
        port,
        socket: Rc::clone(&socket),
        known: Rc::default(),
        bytes: Rc::default(),
        next: 0,
        closed: door.closed,
        worker,
        running,
    };
    let (closed, ending) = (sessions.closed.clone(), sessions.worker.ending.clone());
    loop {
        let received = tokio::select! {
            received = socket.receive(|meta, datagram| sessions.take(meta, datagram)) => received,
            () = closed.cancelled() => return,
            () = ending.cancelled() => return,
        };
        if let Err(error) = received {
            tracing::debug!(%error, port, "a datagram could not be received");
        }
    }
}

/// The clients of one socket.
struct Sessions {
    port: u16,
    socket: Rc<Socket>,
    known: Rc<RefCell<HashMap<Client, Inward>>>,
    /// What waits, of all of them.
    bytes: Rc<Cell<usize>>,
    next: u64,
    closed: CancellationToken,
    worker: Rc<Worker>,
    running: TaskTracker,
}

impl Sessions {
    /// Gives a datagram to its client's session, or begins one. What there is no room for is lost.
    fn take(&mut self, meta: &RecvMeta, datagram: &[u8]) {
        if self.bytes.get() + datagram.len() > WAITING_BYTES {
            return;
        }
        let client = (meta.addr, meta.dst_ip);
        let datagram = Waiting::new(Bytes::copy_from_slice(datagram), &self.bytes);
        let mut known = self.known.borrow_mut();
        let datagram = match known.get(&client) {
            None => datagram,
            Some(session) => match session.datagrams.try_send(datagram) {
                Ok(()) | Err(TrySendError::Full(_)) => return,
                // It has ended.
                Err(TrySendError::Closed(unsent)) => unsent,
            },
        };
        if known.len() >= MAX_SESSIONS {
            return;
        }
        let Some(target) = self.worker.datagrams(self.port) else {
            return;
        };
        let Some(place) = self.worker.udp_places.try_take(meta.addr.ip()) else {
            return;
        };
        let (datagrams, incoming) = mpsc::channel(WAITING);
        // It has room for one.
        let _ = datagrams.try_send(datagram);
        let number = self.next;
        self.next += 1;
        known.insert(client, Inward { datagrams, number });
        let entry = Entry {
            known: Rc::clone(&self.known),
            client,
            number,
        };
        let session = Session {
            socket: Rc::clone(&self.socket),
            client: meta.addr,
            local: meta.dst_ip,
            port: self.port,
            target,
        };
        let (worker, closed) = (Rc::clone(&self.worker), self.closed.clone());
        self.running.spawn_local(async move {
            tokio::select! {
                () = session.run(incoming, &worker) => {}
                () = closed.cancelled() => {}
                () = worker.ended.cancelled() => {}
            }
            drop((entry, place));
        });
    }
}

/// A session's place in the table, until it is dropped.
struct Entry {
    known: Rc<RefCell<HashMap<Client, Inward>>>,
    client: Client,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut known = self.known.borrow_mut();
        if known
            .get(&self.client)
            .is_some_and(|s| s.number == self.number)
        {
            known.remove(&self.client);
        }
    }
}

struct Session {
    socket: Rc<Socket>,
    client: SocketAddr,
    /// The host's address that the client knows.
    local: Option<IpAddr>,
    /// The public port.
    port: u16,
    target: Target,
}

impl Session {
    async fn run(self, mut incoming: mpsc::Receiver<Waiting>, worker: &Worker) {
        let (app, port) = (&self.target.app, self.target.internal_port);
        let place = match worker.gate.admit(app, port, ServiceProtocol::Udp).await {
            Ok(place) => place,
            Err(refused) => {
                tracing::debug!(%app, %refused, client = %self.client, "datagrams were refused");
                return;
            }
        };
        worker.metrics.udp_sessions.add();
        // An app that listens on all addresses of either family is found by IPv4.
        let ipv4 = worker.gate.control().ipv4(&place.machine);
        let ipv4 = ipv4.map(|ip| SocketAddr::new(ip.into(), port));
        let first = ipv4.unwrap_or(place.address);
        let other = ipv4.map(|_| place.address);
        tokio::select! {
            outcome = self.relay(&mut incoming, first, other) => if let Err(error) = outcome {
                tracing::debug!(%error, %app, client = %self.client, "a UDP session ended");
            },
            () = self.outdated(&place, worker) => {
                tracing::debug!(%app, client = %self.client, "a UDP session's Machine is another now");
            }
        }
    }

    /// Ends when the Machine has left, or the port leads elsewhere. Its address may be somebody else's soon.
    async fn outdated(&self, place: &Admission, worker: &Worker) {
        loop {
            tokio::time::sleep(LOOK).await;
            if !place.is_current() || worker.datagrams(self.port).as_ref() != Some(&self.target) {
                return;
            }
        }
    }

    async fn relay(
        &self,
        incoming: &mut mpsc::Receiver<Waiting>,
        first: SocketAddr,
        mut other: Option<SocketAddr>,
    ) -> io::Result<()> {
        let mut app = connected(first).await?;
        let mut end = Instant::now() + IDLE;
        // The last that was sent, while nobody has answered: nobody may listen there.
        let mut unheard = None;
        loop {
            tokio::select! {
                waiting = incoming.recv() => {
                    let Some(waiting) = waiting else { return Ok(()) };
                    let datagram = waiting.datagram.clone();
                    // A refusal told now is of one before it, and has taken that one's place.
                    if let Err(error) = app.send(&datagram).await {
                        refused(error)?;
                        turn(&mut app, &mut other, &mut unheard).await?;
                        let _ = app.try_send(&datagram);
                    }
                    unheard = other.is_some().then_some(datagram);
                }
                ready = app.ready(Interest::READABLE | Interest::ERROR) => {
                    match if ready?.is_error() { told(&app) } else { receive(&app) } {
                        Ok(datagram) => {
                            end = Instant::now() + IDLE;
                            (other, unheard) = (None, None);
                            self.socket.send(&datagram, self.client, self.local).await;
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => {
                            refused(error)?;
                            turn(&mut app, &mut other, &mut unheard).await?;
                        }
                    }
                }
                () = sleep_until(end) => return Ok(()),
            }
        }
    }
}

/// Somebody may listen later: a client's next datagram finds out. Other errors end a session.
fn refused(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::ConnectionRefused {
        Ok(())
    } else {
        Err(error)
    }
}

/// Turns to the Machine's other address, where nobody listens at the first, with what nobody has heard.
async fn turn(
    app: &mut UdpSocket,
    other: &mut Option<SocketAddr>,
    unheard: &mut Option<Bytes>,
) -> io::Result<()> {
    let Some(address) = other.take() else {
        return Ok(());
    };
    *app = connected(address).await?;
    if let Some(datagram) = unheard.take() {
        app.send(&datagram).await?;
    }
    Ok(())
}

/// An error that the kernel has heard of (ICMP). It is no datagram, and wakes nobody who waits for one.
fn told(app: &UdpSocket) -> io::Result<Vec<u8>> {
    match app.take_error()? {
        Some(error) => Err(error),
        // It was told of before: from now on the next one counts.
        None => app.try_io(Interest::ERROR, || Err(io::ErrorKind::WouldBlock.into())),
    }
}

/// A datagram that is there.
fn receive(app: &UdpSocket) -> io::Result<Vec<u8>> {
    thread_local! {
        static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; LARGEST].into());
    }
    BUFFER.with_borrow_mut(|buffer| {
        let length = app.try_recv(buffer)?;
        Ok(buffer[..length].to_vec())
    })
}

async fn connected(address: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(address).await?;
    Ok(socket)
}

impl Socket {
    fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        // As much of it as the host's limits allow (net.core.rmem_max).
        let _ = state.set_recv_buffer_size((&socket).into(), BUFFER);
        may_fragment(&socket)?;
        Ok(Self {
            io: UdpSocket::from_std(socket)?,
            state,
        })
    }

    /// Takes the next datagrams.
    async fn receive(&self, mut take: impl FnMut(&RecvMeta, &[u8])) -> io::Result<()> {
        thread_local! {
            static BUFFERS: RefCell<Vec<Box<[u8]>>> =
                RefCell::new((0..BATCH).map(|_| vec![0; LARGEST].into()).collect());
        }
        let received = self.io.async_io(Interest::READABLE, || {
            BUFFERS.with_borrow_mut(|buffers| {
                let mut metas = [RecvMeta::default(); BATCH];
                let mut slices: Vec<_> = buffers.iter_mut().map(|b| IoSliceMut::new(b)).collect();
                let count = self
                    .state
                    .recv((&self.io).into(), &mut slices, &mut metas)?;
                for (meta, buffer) in metas.iter().take(count).zip(&*buffers) {
                    let mut received = &buffer[..meta.len];
                    // Datagrams of one sender may come as one (GRO); one may be empty.
                    loop {
                        let (first, rest) = received.split_at(meta.stride.min(received.len()));
                        take(meta, first);
                        received = rest;
                        if received.is_empty() {
                            break;
                        }
                    }
                }
                Ok(())
            })
        });
        received.await
    }

    /// Sends a datagram, or loses it, as UDP may.
    async fn send(&self, contents: &[u8], to: SocketAddr, from: Option<IpAddr>) {
        let transmit = Transmit {
            destination: to,
            ecn: None,
            contents,
            segment_size: None,
            src_ip: from,
        };
        let sent = self.io.async_io(Interest::WRITABLE, || {
            self.state.try_send((&self.io).into(), &transmit)
        });
        if let Err(error) = sent.await {
            tracing::debug!(%error, client = %to, "a datagram was not sent");
        }
    }
}

/// Lets datagrams be longer than the path takes at once. `quinn-udp` forbids it: QUIC never needs that, others do.
fn may_fragment(socket: &std::net::UdpSocket) -> io::Result<()> {
    let of_ipv4 = (
        libc::IPPROTO_IP,
        libc::IP_MTU_DISCOVER,
        libc::IP_PMTUDISC_DONT,
    );
    if socket.local_addr()?.is_ipv4() {
        return set(socket, of_ipv4);
    }
    set(
        socket,
        (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DONT,
        ),
    )?;
    set(socket, (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 0))?;
    // It speaks IPv4 too, unless it was told not to.
    set(socket, of_ipv4)
}

fn set(
    socket: &std::net::UdpSocket,
    (level, option, value): (libc::c_int, libc::c_int, libc::c_int),
) -> io::Result<()> {
    // SAFETY: each of these options takes an `int` of this size, which outlives the call.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn datagrams_may_be_longer_than_the_path_takes_at_once() {
        let get = |socket: &std::net::UdpSocket, level, option| {
            let mut value: libc::c_int = -1;
            let mut length = size_of::<libc::c_int>() as libc::socklen_t;
            // SAFETY: the option is an `int`, and there is room for one.
            let outcome = unsafe {
                libc::getsockopt(
                    socket.as_raw_fd(),
                    level,
                    option,
                    (&raw mut value).cast(),
                    &raw mut length,
                )
            };
            assert_eq!(outcome, 0);
            value
        };
        for address in ["127.0.0.1:0", "[::]:0"] {
            let socket = std::net::UdpSocket::bind(address).unwrap();
            socket.set_nonblocking(true).unwrap();
            let door = Socket::new(socket.try_clone().unwrap());
            assert!(door.is_ok(), "{:?}", door.err());
            let discover = get(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER);
            assert_eq!(discover, libc::IP_PMTUDISC_DONT, "{address}");
            if address.starts_with('[') {
                let discover = get(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER);
                assert_eq!(discover, libc::IPV6_PMTUDISC_DONT);
                assert_eq!(get(&socket, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG), 0);
            }
        }
    }
}
