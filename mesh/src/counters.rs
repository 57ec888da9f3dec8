//! What the data path did and refused, for operators.

use crate::packet::Unreadable;
use crate::policy::Refusal;

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that came through the tunnel and were handed to the kernel.
    pub packets_in: u64,
    /// Packets from the kernel that were encrypted and sent, or wait for a handshake.
    pub packets_out: u64,
    /// Datagrams that are no WireGuard message at all.
    pub not_wireguard: u64,
    /// Handshakes without proof that the sender knows this server's public key.
    pub bad_mac: u64,
    /// Handshakes answered with a cookie, because there were many.
    pub cookies: u64,
    /// Handshakes dropped, because there were too many.
    pub too_many_handshakes: u64,
    /// Messages of no known peer or session.
    pub unknown_peer: u64,
    /// Messages of a known peer that were forged, replayed or out of place.
    pub not_authentic: u64,
    /// Inner packets that are IPv4.
    pub ipv4: u64,
    /// Inner packets that are no IP packets, or of a wrong length.
    pub malformed: u64,
    /// Inner packets whose source belongs to somebody else than the sender.
    pub spoofed: u64,
    /// Inner packets not from and to the private network.
    pub foreign: u64,
    /// Inner packets from one network to another.
    pub other_network: u64,
    /// Inner packets to a port that the resolver's address does not offer.
    pub service: u64,
    /// Inner packets from elsewhere to elsewhere.
    pub transit: u64,
    /// Packets from the kernel to an address that no peer owns.
    pub no_route: u64,
    /// Packets from the kernel to a peer that nobody knows the whereabouts of.
    pub no_endpoint: u64,
}

impl Counters {
    pub(crate) fn unreadable(&mut self, why: Unreadable) {
        match why {
            Unreadable::Ipv4 => self.ipv4 += 1,
            Unreadable::Malformed => self.malformed += 1,
        }
    }

    pub(crate) fn refused(&mut self, why: Refusal) {
        match why {
            Refusal::Foreign => self.foreign += 1,
            Refusal::OtherNetwork => self.other_network += 1,
            Refusal::Service => self.service += 1,
            Refusal::Transit => self.transit += 1,
        }
    }
}
