//! "Destination unreachable" (RFC 4443 section 3.1): who calls what is not there learns it at once
//! instead of waiting for a timeout.

use std::net::Ipv6Addr;

use crate::packet::{HEADER, Header, ICMPV6};

/// An error repeats the packet as far as it fits into the smallest IPv6 MTU.
const LARGEST: usize = 1280;
const HOP_LIMIT: u8 = 64;
const DESTINATION_UNREACHABLE: u8 = 1;
/// ICMPv6 types below are errors; an error is never answered with another.
const FIRST_INFORMATIONAL: u8 = 128;

/// Why it cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unreachable {
    /// Nobody has this address.
    NoRoute = 0,
    /// Its owner is not there.
    Address = 3,
}

/// The error for a packet, from `reporter` to its sender; `None` where none may be sent.
pub(crate) fn unreachable(
    packet: &[u8],
    header: &Header,
    why: Unreachable,
    reporter: Ipv6Addr,
) -> Option<Vec<u8>> {
    let is_error = header.next == ICMPV6
        && (packet.get(HEADER)).is_none_or(|kind| *kind < FIRST_INFORMATIONAL);
    if is_error || header.source.is_multicast() || header.destination.is_multicast() {
        return None;
    }
    let quoted = &packet[..packet.len().min(LARGEST - HEADER - 8)];
    let mut error = Vec::with_capacity(HEADER + 8 + quoted.len());
    error.extend([0x60, 0, 0, 0]);
    error.extend(((8 + quoted.len()) as u16).to_be_bytes());
    error.extend([ICMPV6, HOP_LIMIT]);
    error.extend(reporter.octets());
    error.extend(header.source.octets());
    error.extend([DESTINATION_UNREACHABLE, why as u8, 0, 0, 0, 0, 0, 0]);
    error.extend(quoted);
    let sum = checksum(&error);
    error[HEADER + 2..HEADER + 4].copy_from_slice(&sum.to_be_bytes());
    Some(error)
}

/// The checksum of a packet whose checksum field is zero (RFC 8200 section 8.1).
fn checksum(packet: &[u8]) -> u16 {
    let payload = &packet[HEADER..];
    let pseudo = payload.len() as u32 + u32::from(ICMPV6);
    let words = |bytes: &[u8]| -> u32 {
        let word = |w: &[u8]| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0));
        bytes.chunks(2).map(word).sum()
    };
    let mut sum = pseudo + words(&packet[8..HEADER]) + words(payload);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{TCP, build};

    fn error_for(packet: &[u8]) -> Option<Vec<u8>> {
        let header = Header::parse(packet).unwrap();
        unreachable(
            packet,
            &header,
            Unreachable::NoRoute,
            "fdaa:0:1::3".parse().unwrap(),
        )
    }

    #[test]
    fn an_error_goes_to_the_sender_and_quotes_its_packet() {
        let (a, b) = (
            "fdaa:0:1:0:1:0:5:2".parse().unwrap(),
            "fdaa:0:1:0:1:0:6:2".parse().unwrap(),
        );
        for length in [0, 1, 20, 1380] {
            let packet = build(a, b, TCP, &vec![7; length]);
            let error = error_for(&packet).unwrap();
            let header = Header::parse(&error).unwrap();
            assert_eq!((header.destination, header.next), (a, ICMPV6));
            assert!(error.len() <= LARGEST);
            assert_eq!(error[HEADER..HEADER + 2], [1, 0]);
            assert!(packet.starts_with(&error[HEADER + 8..]));
            assert_eq!(checksum(&error), 0, "a right checksum sums up to nothing");
        }
    }

    #[test]
    fn errors_and_multicast_are_not_answered() {
        let (a, all) = (
            "fdaa:0:1:0:1:0:5:2".parse().unwrap(),
            "ff02::1".parse().unwrap(),
        );
        assert!(error_for(&build(a, a, ICMPV6, &[1, 0, 0, 0])).is_none());
        assert!(error_for(&build(a, a, ICMPV6, &[])).is_none());
        assert!(error_for(&build(a, all, TCP, &[])).is_none());
        assert!(error_for(&build(a, a, ICMPV6, &[128, 0, 0, 0])).is_some());
    }
}
