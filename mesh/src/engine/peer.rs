//! One peer: who it is, where it is, and its session if it has one.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use boringtun::noise::Tunn;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519;

use crate::{PrivateKey, PublicKey};

/// Keeps the way to other hosts open through state-keeping firewalls, and tells soon when one is
/// gone. Laptops do this for themselves.
const HOST_KEEPALIVE_SECONDS: u16 = 25;

/// Both ends of a way through the outer network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Path {
    /// The other end.
    pub remote: SocketAddr,
    /// Our end, where it matters: an answer comes from the address that was asked.
    pub local: Option<IpAddr>,
}

/// What is known of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// Its key.
    pub key: PublicKey,
    /// Where it was last heard from, or else where the catalog says it is.
    pub endpoint: Option<SocketAddr>,
    /// Time since the last handshake, while there is a session.
    pub last_handshake: Option<Duration>,
    /// Bytes of inner packets received in this session.
    pub received: u64,
    /// Bytes of inner packets sent in this session.
    pub sent: u64,
}

pub(super) struct Peer {
    pub(super) key: PublicKey,
    pub(super) is_host: bool,
    /// Where the catalog says it is.
    configured: Option<SocketAddr>,
    /// Where it was last heard from.
    heard: Option<Path>,
    pub(super) session: Option<Session>,
}

/// What is kept only for peers that are in touch.
pub(super) struct Session {
    pub(super) tunn: Box<Tunn>,
    /// The high 24 bits of the session indices that our messages carry.
    pub(super) index: u32,
    /// Packets wait in `tunn` for a session.
    pub(super) waiting: bool,
}

impl Path {
    /// The way to an address, from whichever of ours the kernel chooses.
    pub fn to(remote: SocketAddr) -> Self {
        let local = None;
        Self { remote, local }
    }
}

impl Peer {
    pub(super) fn new(key: PublicKey) -> Self {
        Self {
            key,
            is_host: false,
            configured: None,
            heard: None,
            session: None,
        }
    }

    /// Takes over what the catalog says; a host that moved is looked for at its new place.
    pub(super) fn configure(&mut self, is_host: bool, configured: Option<SocketAddr>) {
        self.is_host = is_host;
        if self.configured != configured {
            self.configured = configured;
            self.heard = None;
        }
    }

    /// The way to it.
    pub(super) fn path(&self) -> Option<Path> {
        self.heard.or(self.configured.map(Path::to))
    }

    /// An authentic message came this way.
    pub(super) fn heard_from(&mut self, path: Path) {
        self.heard = Some(path);
    }

    /// Ends the session, and forgets where the peer was: that address may be somebody else's by now.
    pub(super) fn close(&mut self) -> Option<Session> {
        self.heard = None;
        self.session.take()
    }

    pub(super) fn status(&self) -> PeerStatus {
        let stats = self.session.as_ref().map(|s| s.tunn.stats());
        let (last_handshake, sent, received, _, _) = stats.unwrap_or_default();
        PeerStatus {
            key: self.key,
            endpoint: self.path().map(|path| path.remote),
            last_handshake,
            received: received as u64,
            sent: sent as u64,
        }
    }
}

impl Session {
    /// A session that has yet to begin; `None` for a key that everybody could speak for.
    pub(super) fn new(
        ours: &PrivateKey,
        peer: &Peer,
        index: u32,
        limiter: &Arc<RateLimiter>,
    ) -> Option<Self> {
        let theirs = x25519::PublicKey::from(*peer.key.as_bytes());
        // A point of small order: its secrets are the same with everyone (RFC 7748 section 6.1).
        if !ours.secret().diffie_hellman(&theirs).was_contributory() {
            return None;
        }
        let keepalive = peer.is_host.then_some(HOST_KEEPALIVE_SECONDS);
        let limiter = Some(Arc::clone(limiter));
        let tunn = Tunn::new(
            ours.secret().clone(),
            theirs,
            None,
            keepalive,
            index,
            limiter,
        );
        Some(Self {
            tunn: Box::new(tunn),
            index,
            waiting: false,
        })
    }
}
