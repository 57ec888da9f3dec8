//! What becomes of each packet and each datagram: WireGuard for many peers, without I/O.
//!
//! Datagrams, inner packets and the time go in; datagrams and inner packets come out through a
//! [`Sink`], and [`Engine::timeout`] says when to call [`Engine::handle_timeout`].
//!
//! The cryptography and the timers of one session are boringtun's `Tunn`. Around it stand the parts
//! that a server with strangers at its door needs: the [`gate`](crate::gate), sessions only for
//! peers that have proved their key, and the `policy`.
//!
//! One thing is not virtual: `Tunn` reads the clock itself. The time given here drives all the rest.

mod peer;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, TunnResult};
use boringtun::x25519;
use slab::Slab;
use tern_catalog::{HostId, PrivateAddress};
use tracing::subscriber::{NoSubscriber, with_default};

pub use self::peer::{Path, PeerStatus};
use self::peer::{Peer, Session};
use crate::counters::Counters;
use crate::gate::{Gate, Pace, Rate, Stop};
use crate::icmp::{Unreachable, unreachable};
use crate::packet::Header;
use crate::peers::is_private;
use crate::prefix::Table;
use crate::{Grant, MTU, MeshKey, PrivateKey, PublicKey, policy};

/// `Tunn` wants to be asked for its timers about this often.
const TICK: Duration = Duration::from_millis(250);
/// Enough for any datagram.
const BUFFER: usize = 1 << 16;
/// Session indices have 24 bits for the peer. Half of them in use keeps a free one quick to find.
const MOST_SESSIONS: usize = 1 << 23;
/// A session ends before its message counter does (section 6.5 of the WireGuard paper).
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Inner packets are padded to this, so that their length tells less (section 5.4.6).
const PADDING: usize = 16;
/// Errors that are reported to senders: a scan of absent addresses is not worth more.
const UNREACHABLE: Rate = Rate::new(Duration::from_millis(10), 50);

/// Receives what the engine sends.
pub trait Sink {
    /// A datagram for the outer network.
    fn send(&mut self, path: Path, datagram: &[u8]);
    /// A packet for the kernel.
    fn deliver(&mut self, packet: &[u8]);
}

/// WireGuard for many peers.
pub struct Engine {
    key: PrivateKey,
    public_key: x25519::PublicKey,
    host: HostId,
    peers: Slab<Peer>,
    by_key: HashMap<PublicKey, usize>,
    by_address: Table<usize>,
    by_index: HashMap<u32, usize>,
    /// Peers with timers: those with a session, and all hosts.
    awake: BTreeSet<usize>,
    gate: Gate,
    /// For `Tunn`, which insists on one: the gate has already judged.
    open_limiter: Arc<RateLimiter>,
    reports: Pace,
    next_tick: Option<Instant>,
    buffer: Box<[u8]>,
    plain: Box<[u8]>,
    counters: Counters,
}

/// The four messages of WireGuard (section 5.4), by type and length.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Initiation,
    Response,
    CookieReply,
    Data,
}

impl Engine {
    /// An engine for host `host` without peers.
    pub fn new(key: &MeshKey, host: HostId, now: Instant) -> Self {
        let key = key.private_key().clone();
        let public_key = x25519::PublicKey::from(key.secret());
        Self {
            gate: Gate::new(&public_key, now),
            open_limiter: Arc::new(RateLimiter::new(&public_key, u64::MAX)),
            key,
            public_key,
            host,
            peers: Slab::new(),
            by_key: HashMap::new(),
            by_address: Table::new(),
            by_index: HashMap::new(),
            awake: BTreeSet::new(),
            reports: Pace::default(),
            next_tick: None,
            buffer: vec![0; BUFFER].into(),
            plain: vec![0; BUFFER].into(),
            counters: Counters::default(),
        }
    }

    /// Makes exactly these the peers. Those that stay keep their sessions. A key that is given
    /// several times may speak for all that was granted to it: whoever names somebody else's key
    /// takes nothing from its owner.
    pub fn set_peers(&mut self, now: Instant, grants: &[(PublicKey, Grant)]) {
        let ours = PublicKey::from(self.public_key);
        let mut wanted: BTreeMap<PublicKey, Vec<Grant>> = BTreeMap::new();
        for (key, grant) in grants.iter().filter(|(key, _)| *key != ours) {
            wanted.entry(*key).or_default().push(*grant);
        }
        let gone: Vec<_> = self
            .by_key
            .keys()
            .filter(|k| !wanted.contains_key(k))
            .copied()
            .collect();
        for key in gone {
            if let Some(slot) = self.by_key.remove(&key) {
                self.close(slot);
                self.awake.remove(&slot);
                self.peers.remove(slot);
            }
        }
        self.by_address = Table::new();
        for (key, grants) in wanted {
            let slot =
                *(self.by_key.entry(key)).or_insert_with(|| self.peers.insert(Peer::new(key)));
            let endpoints = grants.iter().filter_map(|grant| match grant {
                Grant::Host { endpoint, .. } => Some(*endpoint),
                Grant::Laptop { .. } => None,
            });
            let endpoint = endpoints.clone().find(reachable);
            let is_host = endpoints.count() > 0;
            let peer = &mut self.peers[slot];
            if peer.is_host != is_host {
                self.close(slot); // its keepalive is decided when a session is made
            }
            self.peers[slot].configure(is_host, endpoint);
            if is_host || self.peers[slot].session.is_some() {
                self.awake.insert(slot);
            } else {
                self.awake.remove(&slot);
            }
            for grant in grants {
                self.by_address.insert(grant.prefix(self.host), slot);
            }
        }
        self.wake(now);
    }

    /// Takes a datagram from the outer network.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        path: Path,
        datagram: &[u8],
        sink: &mut impl Sink,
    ) {
        let kind = match Kind::of(datagram) {
            Some(kind) if !is_private(path.remote.ip()) => kind,
            _ => return self.counters.not_wireguard += 1,
        };
        match kind {
            Kind::Initiation => self.handle_initiation(now, path, datagram, sink),
            Kind::Response => {
                if self.admit(now, path, datagram, sink).is_some() {
                    self.handle_indexed(kind, word(datagram, 8), path, datagram, sink);
                }
            }
            Kind::CookieReply => {
                self.handle_indexed(kind, word(datagram, 4), path, datagram, sink);
            }
            Kind::Data => {
                let counter = u64::from(word(datagram, 8)) | u64::from(word(datagram, 12)) << 32;
                if counter >= REJECT_AFTER_MESSAGES {
                    return self.counters.not_authentic += 1;
                }
                self.handle_indexed(kind, word(datagram, 4), path, datagram, sink);
            }
        }
        self.wake(now);
    }

    /// Takes a packet from the kernel.
    pub fn handle_packet(&mut self, now: Instant, packet: &[u8], sink: &mut impl Sink) {
        let header = match Header::parse(packet) {
            Ok(header) => header,
            Err(why) => return self.counters.unreadable(why),
        };
        if !is_private(header.destination.into()) {
            // The kernel greets every new interface with multicast.
            return self.counters.foreign += 1;
        }
        let Some(slot) = self.by_address.longest_match(header.destination) else {
            self.counters.no_route += 1;
            return self.report(now, packet, &header, Unreachable::NoRoute, sink);
        };
        if let Err(why) = policy::outgoing(&header, self.host, self.peers[slot].is_host) {
            return self.counters.refused(why);
        }
        let Some(path) = self.peers[slot].path() else {
            self.counters.no_endpoint += 1;
            return self.report(now, packet, &header, Unreachable::Address, sink);
        };
        if self.open(slot) {
            self.counters.packets_out += 1;
            self.encrypt(slot, packet, path, sink);
        }
        self.wake(now);
    }

    /// When [`Self::handle_timeout`] has something to do.
    pub fn timeout(&self) -> Option<Instant> {
        self.next_tick
    }

    /// Does what is due: retries, renewals, keepalives, ends of sessions.
    pub fn handle_timeout(&mut self, now: Instant, sink: &mut impl Sink) {
        if self.next_tick.is_none_or(|due| now < due) {
            return;
        }
        self.next_tick = None;
        for slot in Vec::from_iter(self.awake.iter().copied()) {
            self.tick(slot, sink);
        }
        self.wake(now);
    }

    /// What was done and refused since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// What is known of the peers, by key.
    pub fn peers(&self) -> Vec<PeerStatus> {
        let mut all: Vec<_> = self.peers.iter().map(|(_, peer)| peer.status()).collect();
        all.sort_by_key(|status| status.key);
        all
    }

    /// A first message: its sender is inside it.
    fn handle_initiation(
        &mut self,
        now: Instant,
        path: Path,
        datagram: &[u8],
        sink: &mut impl Sink,
    ) {
        let Some(Packet::HandshakeInit(initiation)) = self.admit(now, path, datagram, sink) else {
            return;
        };
        let sender = parse_handshake_anon(self.key.secret(), &self.public_key, &initiation)
            .map(|half| PublicKey::from(half.peer_static_public));
        let Some(slot) = sender.ok().and_then(|key| self.by_key.get(&key).copied()) else {
            return self.counters.unknown_peer += 1;
        };
        let is_new = self.peers[slot].session.is_none();
        if self.open(slot) && !self.decrypt(slot, Kind::Initiation, path, datagram, sink) && is_new
        {
            // Anyone can name a known key; nothing is kept for who cannot prove it.
            self.close(slot);
        }
    }

    /// A message to one of our sessions.
    fn handle_indexed(
        &mut self,
        kind: Kind,
        index: u32,
        path: Path,
        datagram: &[u8],
        sink: &mut impl Sink,
    ) {
        match self.by_index.get(&(index >> 8)) {
            Some(&slot) => {
                self.decrypt(slot, kind, path, datagram, sink);
            }
            None => self.counters.unknown_peer += 1,
        }
    }

    /// Passes a handshake message through the gate.
    fn admit<'a>(
        &mut self,
        now: Instant,
        path: Path,
        datagram: &'a [u8],
        sink: &mut impl Sink,
    ) -> Option<Packet<'a>> {
        match self
            .gate
            .admit(now, path.remote.ip(), datagram, &mut self.buffer)
        {
            Ok(packet) => return Some(packet),
            Err(Stop::BadMac) => self.counters.bad_mac += 1,
            Err(Stop::TooMany) => self.counters.too_many_handshakes += 1,
            Err(Stop::Cookie(length)) => {
                self.counters.cookies += 1;
                sink.send(path, &self.buffer[..length]);
            }
        }
        None
    }

    /// Gives a message to its session. True when it was authentic.
    fn decrypt(
        &mut self,
        slot: usize,
        kind: Kind,
        path: Path,
        datagram: &[u8],
        sink: &mut impl Sink,
    ) -> bool {
        let peer = &mut self.peers[slot];
        let Some(session) = &mut peer.session else {
            return false;
        };
        match session.tunn.decapsulate(None, datagram, &mut self.buffer) {
            // A keepalive, or a cookie.
            TunnResult::Done => {}
            TunnResult::WriteToNetwork(answer) => sink.send(path, answer),
            TunnResult::WriteToTunnelV4(..) => self.counters.ipv4 += 1,
            // Authentic, but what is inside is no packet.
            TunnResult::Err(WireGuardError::InvalidPacket) => self.counters.malformed += 1,
            TunnResult::Err(_) => {
                self.counters.not_authentic += 1;
                return false;
            }
            TunnResult::WriteToTunnelV6(packet, _) => {
                match check(
                    packet,
                    slot,
                    peer.is_host,
                    &self.by_address,
                    &mut self.counters,
                ) {
                    true => sink.deliver(packet),
                    false => tracing::trace!(peer = %peer.key, "a packet was refused"),
                }
            }
        }
        // The way is learned from messages that nobody else can have sent now. A first message may
        // be an old one replayed; what confirms it comes next.
        if matches!(kind, Kind::Response | Kind::Data) {
            peer.heard_from(path);
            self.flush(slot, path, sink);
        }
        true
    }

    /// Sends what has waited for a session.
    fn flush(&mut self, slot: usize, path: Path, sink: &mut impl Sink) {
        let Some(session) = &mut self.peers[slot].session else {
            return;
        };
        while session.waiting {
            match session.tunn.decapsulate(None, &[], &mut self.buffer) {
                TunnResult::WriteToNetwork(datagram) => {
                    // No session yet after all: the packet is back in the queue.
                    session.waiting = Kind::of(datagram) == Some(Kind::Data);
                    sink.send(path, datagram);
                }
                _ => session.waiting = false,
            }
        }
    }

    fn encrypt(&mut self, slot: usize, packet: &[u8], path: Path, sink: &mut impl Sink) {
        let Some(session) = &mut self.peers[slot].session else {
            return;
        };
        let padded = packet
            .len()
            .next_multiple_of(PADDING)
            .min(usize::from(MTU))
            .max(packet.len());
        let Some(plain) = self.plain.get_mut(..padded) else {
            return self.counters.malformed += 1;
        };
        let (inner, padding) = plain.split_at_mut(packet.len());
        inner.copy_from_slice(packet);
        padding.fill(0);
        match session.tunn.encapsulate(plain, &mut self.buffer) {
            TunnResult::WriteToNetwork(datagram) => {
                session.waiting |= Kind::of(datagram) != Some(Kind::Data);
                sink.send(path, datagram);
            }
            _ => session.waiting = true,
        }
    }

    /// Makes sure that a peer can have a session.
    fn open(&mut self, slot: usize) -> bool {
        let peer = &mut self.peers[slot];
        if peer.session.is_some() {
            return true;
        }
        if self.by_index.len() >= MOST_SESSIONS {
            return false;
        }
        let index = loop {
            let index = rand::random::<u32>() >> 8;
            if !self.by_index.contains_key(&index) {
                break index;
            }
        };
        peer.session = Session::new(&self.key, peer, index, &self.open_limiter);
        if peer.session.is_none() {
            self.counters.unknown_peer += 1;
            return false;
        }
        self.by_index.insert(index, slot);
        self.awake.insert(slot);
        true
    }

    /// Ends a peer's session.
    fn close(&mut self, slot: usize) {
        let peer = &mut self.peers[slot];
        if let Some(session) = peer.close() {
            self.by_index.remove(&session.index);
        }
        if !peer.is_host {
            self.awake.remove(&slot);
        }
    }

    /// One peer's timers.
    fn tick(&mut self, slot: usize, sink: &mut impl Sink) {
        let path = self.peers[slot].path();
        let is_new = self.peers[slot].session.is_none();
        // A host's session is kept warm, so that nobody's first packet waits for it.
        if is_new && (path.is_none() || !self.open(slot)) {
            return;
        }
        let Some(session) = &mut self.peers[slot].session else {
            return;
        };
        let (tunn, buffer) = (&mut session.tunn, &mut self.buffer);
        let result = match is_new {
            true => tunn.format_handshake_initiation(buffer, false),
            // boringtun calls it an error when an idle session ends or a peer does not answer.
            false => with_default(NoSubscriber::new(), || tunn.update_timers(buffer)),
        };
        match (result, path) {
            (TunnResult::WriteToNetwork(datagram), Some(path)) => sink.send(path, datagram),
            (TunnResult::Err(WireGuardError::ConnectionExpired), _) => self.close(slot),
            _ => {}
        }
    }

    /// Tells the sender of a packet that it goes nowhere.
    fn report(
        &mut self,
        now: Instant,
        packet: &[u8],
        header: &Header,
        why: Unreachable,
        sink: &mut impl Sink,
    ) {
        let Some(source) = PrivateAddress::parse(header.source) else {
            return;
        };
        if !self.reports.take(now, UNREACHABLE) {
            return;
        }
        if let Some(error) = unreachable(packet, header, why, source.network.resolver()) {
            sink.deliver(&error);
        }
    }

    fn wake(&mut self, now: Instant) {
        if self.next_tick.is_none() && !self.awake.is_empty() {
            self.next_tick = Some(now + TICK);
        }
    }
}

impl Kind {
    fn of(datagram: &[u8]) -> Option<Self> {
        let (kind, _) = datagram.split_first_chunk::<4>()?;
        // The type is one byte, and three are reserved and zero.
        match (u32::from_le_bytes(*kind), datagram.len()) {
            (1, 148) => Some(Self::Initiation),
            (2, 92) => Some(Self::Response),
            (3, 64) => Some(Self::CookieReply),
            (4, 32..) => Some(Self::Data),
            _ => None,
        }
    }
}

/// Whether a decrypted packet may go on, and counts it either way. Its source must belong to the
/// sender more than to anyone else: a match inside the sender's own, shorter prefix is not enough.
fn check(
    packet: &[u8],
    sender: usize,
    sender_is_host: bool,
    owners: &Table<usize>,
    counters: &mut Counters,
) -> bool {
    match Header::parse(packet) {
        Err(why) => counters.unreadable(why),
        Ok(header) if owners.longest_match(header.source) != Some(sender) => counters.spoofed += 1,
        Ok(header) => match policy::incoming(&header, sender_is_host) {
            Err(why) => counters.refused(why),
            Ok(()) => {
                counters.packets_in += 1;
                return true;
            }
        },
    }
    false
}

/// Whether a host's endpoint can be one. Inside the private network it would go round in the tunnel.
fn reachable(endpoint: &SocketAddr) -> bool {
    endpoint.port() != 0 && !endpoint.ip().is_unspecified() && !is_private(endpoint.ip())
}

fn word(datagram: &[u8], at: usize) -> u32 {
    let bytes = datagram[at..at + 4]
        .try_into()
        .expect("four bytes were cut");
    u32::from_le_bytes(bytes)
}
