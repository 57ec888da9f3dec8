//! Sees the first request to a guest that wakes, and the first reply.
//!
//! A *request* is a TCP segment with payload on a connection on which the peer speaks first; the *reply* is the
//! guest's first segment with payload on such a connection. Where the guest speaks first it is a client itself (of
//! a database, say, between the request and its reply), and nothing on that connection counts. "First" is since the
//! wake: a connection from before may go on, and who spoke on it then is not known, nor who opened it.
//!
//! What is missed by that: where a server greets (SSH, SMTP), it is taken for a client; and the first reply under TLS is
//! its handshake's. UDP does not count: a datagram need not be meant to be answered (logs, announcements, a tunnel's
//! keepalive), and each such would be waited for. All this decides only when stock is taken of the
//! pages of a wake, and what its trace tells; a guest or a peer that deceives it gains nothing.

use std::net::SocketAddr;
use std::sync::Arc;

use super::segment::{HEAD_BYTES, Segment};
use super::tap::VNET_HEADER_BYTES;
use crate::virtio::chain::Buffers;
use crate::wake::SharedWake;

/// Looks at a card's frames until the guest has replied, or the wake is over; then it is gone, and a frame costs
/// one branch.
#[derive(Debug, Default)]
pub struct FirstReply(Option<Watch>);

#[derive(Debug)]
struct Watch {
    wake: Arc<SharedWake>,
    connections: Vec<Connection>,
}

/// A connection, and who has spoken first on it.
#[derive(Debug)]
struct Connection {
    guest: SocketAddr,
    peer: SocketAddr,
    first: Speaker,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speaker {
    Guest,
    Peer,
}

/// A guest that has more of them before it has replied to one is a client with many, and the others do not count.
const MAX_CONNECTIONS: usize = 64;

impl FirstReply {
    /// Looks for the first reply of a guest's `wake`.
    pub fn of(wake: Arc<SharedWake>) -> Self {
        let connections = Vec::new();
        Self(Some(Watch { wake, connections }))
    }

    /// The guest has been given this frame, its virtio header first.
    pub fn received(&mut self, frame: &[u8]) {
        if self.watches()
            && let Some(watch) = &mut self.0
        {
            let head = frame.get(VNET_HEADER_BYTES..).unwrap_or_default();
            watch.received(head);
        }
    }

    /// The host has been given this frame, its virtio header first. Its memory is still the guest's: what is read
    /// now need not be what was sent, but for the same guest that makes no difference.
    pub fn sent(&mut self, frame: &Buffers<'_>) {
        if !self.watches() {
            return;
        }
        let mut head = [0; HEAD_BYTES];
        let len = frame.read(VNET_HEADER_BYTES, &mut head);
        self.0.take_if(|watch| watch.sent(&head[..len]));
    }

    /// Whether the next frame is looked at.
    #[cfg(test)]
    pub fn is_looked_for(&self) -> bool {
        self.0.is_some()
    }

    /// Whether there is something to look for yet.
    fn watches(&mut self) -> bool {
        if let Some(watch) = &self.0
            && watch.wake.ends_at().is_none()
        {
            self.0 = None;
        }
        self.0.is_some()
    }
}

impl Watch {
    fn received(&mut self, head: &[u8]) {
        let Some(segment) = Segment::parse(head) else {
            return;
        };
        let (guest, peer) = (segment.destination, segment.source);
        if self.first_speaker(guest, peer, Speaker::Peer) == Some(Speaker::Peer) {
            self.wake.asked();
        }
    }

    /// Whether this is the first reply.
    fn sent(&mut self, head: &[u8]) -> bool {
        let Some(segment) = Segment::parse(head) else {
            return false;
        };
        let (guest, peer) = (segment.source, segment.destination);
        let replied = self.first_speaker(guest, peer, Speaker::Guest) == Some(Speaker::Peer);
        if replied {
            self.wake.answered();
        }
        replied
    }

    /// Who spoke first on a connection: `now`, if nobody has yet. `None` if there are too many.
    fn first_speaker(
        &mut self,
        guest: SocketAddr,
        peer: SocketAddr,
        now: Speaker,
    ) -> Option<Speaker> {
        let mut connections = self.connections.iter();
        if let Some(known) = connections.find(|c| (c.guest, c.peer) == (guest, peer)) {
            return Some(known.first);
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            return None;
        }
        self.connections.push(Connection {
            guest,
            peer,
            first: now,
        });
        Some(now)
    }
}

#[cfg(test)]
mod tests {
    use super::super::segment::tests::Frame;
    use super::*;
    use crate::virtio::testing::trace;

    const GUEST: &str = "192.0.2.2:80";
    const PEER: &str = "192.0.2.1:50000";

    struct Seen {
        watch: Watch,
        wake: Arc<SharedWake>,
        trace: Arc<crate::trace::Trace>,
    }

    impl Seen {
        fn new() -> Self {
            let trace = trace();
            let wake = Arc::new(SharedWake::new(trace.clone(), Box::new(|| ())));
            let watch = FirstReply::of(wake.clone()).0.unwrap();
            Self { watch, wake, trace }
        }

        fn from(&mut self, peer: &str, guest: &str) {
            self.watch.received(&Frame::new(peer, guest, 5).bytes());
        }

        fn to(&mut self, peer: &str, guest: &str) -> bool {
            self.watch.sent(&Frame::new(guest, peer, 5).bytes())
        }

        fn marks(&self) -> Vec<&'static str> {
            self.trace.phases().iter().map(|phase| phase.0).collect()
        }
    }

    #[test]
    fn a_reply_is_to_a_request() {
        let mut seen = Seen::new();
        assert!(!seen.watch.sent(&Frame::new(GUEST, PEER, 0).bytes()));
        seen.watch.received(&Frame::new(PEER, GUEST, 0).bytes());
        assert!(seen.marks().is_empty(), "a handshake is nothing");
        let quiet = seen.wake.ends_at();
        seen.from(PEER, GUEST);
        assert_eq!(seen.marks(), ["first_request_in"]);
        let asked = seen.wake.ends_at();
        assert!(asked > quiet);
        assert!(!seen.watch.sent(&Frame::new(GUEST, PEER, 0).bytes()), "ACK");
        assert!(seen.to(PEER, GUEST));
        assert_eq!(seen.marks(), ["first_request_in", "first_reply_out"]);
        assert!(seen.wake.ends_at() < asked);
    }

    #[test]
    fn what_the_guest_asks_others_is_no_reply() {
        let mut seen = Seen::new();
        let (own, database) = ("192.0.2.2:40000", "192.0.2.9:5432");
        // A pool looks after its connections first of all.
        assert!(!seen.to(database, own));
        seen.from(database, own);
        assert!(!seen.to(database, own));
        assert!(seen.marks().is_empty());
        seen.from(PEER, GUEST);
        assert!(!seen.to(database, own));
        seen.from(database, own);
        assert!(!seen.to("192.0.2.9:53", own), "another port");
        assert_eq!(seen.marks(), ["first_request_in"]);
        assert!(seen.to(PEER, GUEST));
    }

    #[test]
    fn the_first_request_need_not_be_answered_first() {
        let mut seen = Seen::new();
        seen.from("192.0.2.1:50000", GUEST);
        seen.from("192.0.2.1:50001", GUEST);
        assert!(seen.to("192.0.2.1:50001", GUEST));
    }

    #[test]
    fn only_so_many_connections_are_kept() {
        let mut seen = Seen::new();
        for port in 1000..2000 {
            assert!(!seen.to(&format!("192.0.2.9:{port}"), GUEST));
        }
        assert_eq!(seen.watch.connections.len(), MAX_CONNECTIONS);
        seen.from(PEER, GUEST);
        assert!(!seen.to(PEER, GUEST));
        assert!(seen.marks().is_empty());
    }
}
