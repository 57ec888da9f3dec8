//! The little of an inner packet that the mesh looks at (RFC 8200 section 3).

use std::net::Ipv6Addr;

/// Bytes of the fixed header.
pub(crate) const HEADER: usize = 40;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;

/// What a packet says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) source: Ipv6Addr,
    pub(crate) destination: Ipv6Addr,
    /// The header after the fixed one.
    pub(crate) next: u8,
    /// The destination port where the next header is TCP or UDP.
    pub(crate) port: Option<u16>,
}

/// Why a packet has no header that could be judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// The private network is IPv6 only.
    Ipv4,
    /// Shorter or longer than it says, or no IP at all.
    Malformed,
}

impl Header {
    pub(crate) fn parse(packet: &[u8]) -> Result<Self, Unreadable> {
        match packet.first().map(|byte| byte >> 4) {
            Some(6) => {}
            Some(4) => return Err(Unreadable::Ipv4),
            _ => return Err(Unreadable::Malformed),
        }
        let (header, payload) = packet
            .split_first_chunk::<HEADER>()
            .ok_or(Unreadable::Malformed)?;
        if payload.len() != usize::from(u16::from_be_bytes([header[4], header[5]])) {
            return Err(Unreadable::Malformed);
        }
        let next = header[6];
        let port = match (next, payload) {
            (TCP | UDP, [_, _, high, low, ..]) => Some(u16::from_be_bytes([*high, *low])),
            _ => None,
        };
        Ok(Self {
            source: address(&header[8..24]),
            destination: address(&header[24..40]),
            next,
            port,
        })
    }
}

fn address(bytes: &[u8]) -> Ipv6Addr {
    let bytes: [u8; 16] = bytes.try_into().expect("both callers cut 16 bytes");
    Ipv6Addr::from(bytes)
}

/// A packet for tests.
#[cfg(test)]
pub(crate) fn build(source: Ipv6Addr, destination: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_addresses_and_port() {
        let (a, b) = ("fdaa::1".parse().unwrap(), "fdaa::2".parse().unwrap());
        let packet = build(a, b, UDP, &[1, 2, 0, 53, 9]);
        let header = Header::parse(&packet).unwrap();
        assert_eq!((header.source, header.destination), (a, b));
        assert_eq!((header.next, header.port), (UDP, Some(53)));
        assert_eq!(
            Header::parse(&build(a, b, ICMPV6, &[1, 2, 0, 53]))
                .unwrap()
                .port,
            None
        );
        assert_eq!(Header::parse(&build(a, b, TCP, &[1])).unwrap().port, None);
    }

    #[test]
    fn the_length_must_be_what_it_says() {
        let a = "fdaa::1".parse().unwrap();
        let mut packet = build(a, a, UDP, &[0; 8]);
        packet.push(0);
        assert_eq!(Header::parse(&packet), Err(Unreadable::Malformed));
        packet.truncate(HEADER + 7);
        assert_eq!(Header::parse(&packet), Err(Unreadable::Malformed));
        assert_eq!(Header::parse(&[0x45; 60]), Err(Unreadable::Ipv4));
        assert_eq!(Header::parse(&[]), Err(Unreadable::Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Header::parse(&bytes);
        }
    }
}
