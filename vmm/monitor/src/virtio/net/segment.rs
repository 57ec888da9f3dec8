//! Which TCP segment a frame is, if it carries something.
//!
//! A pure function over the first bytes of a frame, written by strangers: it reads within them, takes the same few
//! steps for any, and what it does not know is no segment: fragments, second VLAN tags, tunnels, and IPv6
//! extension headers, which TCP of real hosts does not have.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A TCP segment with payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Who sent it.
    pub source: SocketAddr,
    /// Who gets it.
    pub destination: SocketAddr,
}

/// As much of a frame as is looked at: Ethernet with a VLAN tag, the longest IPv4 header, TCP without options.
pub const HEAD_BYTES: usize = 18 + 60 + 20;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// 802.1Q, and 802.1ad for a provider's tag.
const ETHERTYPES_VLAN: [u16; 2] = [0x8100, 0x88a8];
const TCP: u8 = 6;
/// "More fragments", and the offset of all but the first.
const FRAGMENT: u16 = 0x3fff;

impl Segment {
    /// The segment in an Ethernet frame of which `head` is the beginning: at least [`HEAD_BYTES`], or all.
    pub fn parse(head: &[u8]) -> Option<Self> {
        let (_, rest) = head.split_at_checked(12)?; // the two addresses
        let (mut ethertype, mut packet) = split_u16(rest)?;
        if ETHERTYPES_VLAN.contains(&ethertype) {
            let (_, rest) = split_u16(packet)?; // priority and number
            (ethertype, packet) = split_u16(rest)?;
        }
        let (source, destination, bytes, tcp) = match ethertype {
            ETHERTYPE_IPV4 => ipv4(packet)?,
            ETHERTYPE_IPV6 => ipv6(packet)?,
            _ => return None,
        };
        let header = tcp.first_chunk::<20>()?;
        let header_bytes = usize::from(header[12] >> 4) * 4;
        (header_bytes >= header.len() && bytes > header_bytes).then_some(Self {
            source: SocketAddr::new(source, u16_at(header, 0)),
            destination: SocketAddr::new(destination, u16_at(header, 2)),
        })
    }
}

/// Source, destination, the bytes that TCP has according to the header, and the first of them.
type Parts<'a> = (IpAddr, IpAddr, usize, &'a [u8]);

fn ipv4(packet: &[u8]) -> Option<Parts<'_>> {
    let header = packet.first_chunk::<20>()?;
    let header_bytes = usize::from(header[0] & 15) * 4;
    let whole = u16_at(header, 6) & FRAGMENT == 0;
    if header[0] >> 4 != 4 || header_bytes < header.len() || !whole || header[9] != TCP {
        return None;
    }
    let address = |at| Some(Ipv4Addr::from(*header.get(at..)?.first_chunk()?).into());
    let bytes = usize::from(u16_at(header, 2)).checked_sub(header_bytes)?;
    Some((
        address(12)?,
        address(16)?,
        bytes,
        packet.get(header_bytes..)?,
    ))
}

fn ipv6(packet: &[u8]) -> Option<Parts<'_>> {
    let (header, tcp) = packet.split_first_chunk::<40>()?;
    if header[0] >> 4 != 6 || header[6] != TCP {
        return None;
    }
    let address = |at| Some(Ipv6Addr::from(*header.get(at..)?.first_chunk::<16>()?).into());
    Some((address(8)?, address(24)?, u16_at(header, 4).into(), tcp))
}

fn split_u16(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    Some((u16::from_be_bytes(*number), rest))
}

/// `at` must be within the array.
fn u16_at<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A frame as a sender would make it, without any virtio header.
    #[derive(Debug, Clone)]
    pub struct Frame {
        pub source: SocketAddr,
        pub destination: SocketAddr,
        pub vlan: Option<u16>,
        /// In words of 4 bytes.
        pub ip_options: usize,
        pub tcp_options: usize,
        pub fragment: u16,
        pub payload: usize,
    }

    impl Frame {
        pub fn new(source: &str, destination: &str, payload: usize) -> Self {
            Self {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
                vlan: None,
                ip_options: 0,
                tcp_options: 3,
                fragment: 0x4000, // "do not fragment"
                payload,
            }
        }

        pub fn bytes(&self) -> Vec<u8> {
            let mut bytes = vec![2; 12];
            if let Some(ethertype) = self.vlan {
                bytes.extend(ethertype.to_be_bytes());
                bytes.extend([0x20, 5]);
            }
            let tcp = 20 + self.tcp_options * 4;
            let segment = (tcp + self.payload) as u16;
            match (self.source.ip(), self.destination.ip()) {
                (IpAddr::V4(source), IpAddr::V4(destination)) => {
                    let words = 5 + self.ip_options;
                    bytes.extend(ETHERTYPE_IPV4.to_be_bytes());
                    bytes.extend([0x40 | words as u8, 0]);
                    bytes.extend((words as u16 * 4 + segment).to_be_bytes());
                    bytes.extend([0, 1]);
                    bytes.extend(self.fragment.to_be_bytes());
                    bytes.extend([64, TCP, 0, 0]);
                    bytes.extend(source.octets());
                    bytes.extend(destination.octets());
                    bytes.extend(vec![1; self.ip_options * 4]);
                }
                (IpAddr::V6(source), IpAddr::V6(destination)) => {
                    bytes.extend(ETHERTYPE_IPV6.to_be_bytes());
                    bytes.extend([0x60, 0, 0, 0]);
                    bytes.extend(segment.to_be_bytes());
                    bytes.extend([TCP, 64]);
                    bytes.extend(source.octets());
                    bytes.extend(destination.octets());
                }
                families => panic!("{families:?}"),
            }
            bytes.extend(self.source.port().to_be_bytes());
            bytes.extend(self.destination.port().to_be_bytes());
            bytes.extend([0; 8]);
            bytes.extend([(tcp as u8 / 4) << 4, 0x18]); // PSH, ACK
            bytes.extend([0xff, 0xff, 0, 0, 0, 0]);
            bytes.extend(vec![1; self.tcp_options * 4]);
            bytes.extend(vec![b'x'; self.payload]);
            bytes
        }

        fn segment(&self) -> Segment {
            Segment {
                source: self.source,
                destination: self.destination,
            }
        }
    }

    fn v4() -> Frame {
        Frame::new("192.0.2.1:50000", "192.0.2.2:80", 10)
    }

    fn v6() -> Frame {
        Frame::new("[fdaa::1]:50000", "[fdaa:0:1::2]:8080", 10)
    }

    #[test]
    fn a_real_request_is_known() {
        // `GET` from 10.0.0.1:36410 to 10.0.0.2:80, with timestamps, as a capture shows it.
        let bytes = [
            0x02, 0x00, 0x00, 0x00, 0x00, 0x01, 0x02, 0x00, 0x00, 0x00, 0x00, 0x02, 0x08,
            0x00, //
            0x45, 0x00, 0x00, 0x37, 0x9c, 0x4b, 0x40, 0x00, 0x40, 0x06, 0x8a, 0x73, 0x0a,
            0x00, //
            0x00, 0x01, 0x0a, 0x00, 0x00, 0x02, 0x8e, 0x3a, 0x00, 0x50, 0x1b, 0x2c, 0x3d,
            0x4e, //
            0x5f, 0x60, 0x71, 0x82, 0x80, 0x18, 0x01, 0xf6, 0x14, 0x2d, 0x00, 0x00, 0x01,
            0x01, //
            0x08, 0x0a, 0x0a, 0x0b, 0x0c, 0x0d, 0x01, 0x02, 0x03, 0x04, b'G', b'E', b'T',
        ];
        let segment = Segment::parse(&bytes).unwrap();
        assert_eq!(segment.source, "10.0.0.1:36410".parse().unwrap());
        assert_eq!(segment.destination, "10.0.0.2:80".parse().unwrap());
    }

    #[test]
    fn versions_tags_and_options_make_no_difference() {
        for frame in [v4(), v6()] {
            for vlan in [None, Some(0x8100), Some(0x88a8)] {
                for tcp_options in [0, 3, 10] {
                    for payload in [1, 1400, 60_000] {
                        let frame = Frame {
                            vlan,
                            tcp_options,
                            payload,
                            ..frame.clone()
                        };
                        let found = Segment::parse(&frame.bytes());
                        assert_eq!(found, Some(frame.segment()), "{frame:?}");
                    }
                }
            }
        }
        let options = Frame {
            ip_options: 10,
            vlan: Some(0x8100),
            tcp_options: 0,
            ..v4()
        };
        assert_eq!(
            Segment::parse(&options.bytes()[..HEAD_BYTES]),
            Some(options.segment()),
            "the longest headers lie in what is looked at"
        );
    }

    #[test]
    fn a_segment_without_payload_is_none() {
        for frame in [v4(), v6()] {
            let mut bytes = Frame {
                payload: 0,
                ..frame
            }
            .bytes();
            assert_eq!(Segment::parse(&bytes), None);
            // Ethernet pads what is short.
            bytes.resize(bytes.len() + 18, 0);
            assert_eq!(Segment::parse(&bytes), None);
        }
    }

    #[test]
    fn fragments_are_none() {
        // The first, one in the middle, the last.
        for fragment in [0x2000, 0x2010, 0x0010] {
            let frame = Frame { fragment, ..v4() };
            assert_eq!(Segment::parse(&frame.bytes()), None, "{fragment:#x}");
        }
        let mut v6 = v6().bytes();
        v6[14 + 6] = 44; // a fragment header follows
        assert_eq!(Segment::parse(&v6), None);
    }

    #[test]
    fn other_protocols_are_none() {
        for (frame, at) in [(v4(), 14 + 9), (v6(), 14 + 6)] {
            let mut udp = frame.bytes();
            udp[at] = 17;
            assert_eq!(Segment::parse(&udp), None);
        }
        let mut arp = v4().bytes();
        arp[13] = 6;
        assert_eq!(Segment::parse(&arp), None);
        let twice = Frame {
            vlan: Some(0x88a8),
            ..v4()
        };
        let mut twice = twice.bytes();
        twice.splice(16..16, [0x81, 0, 0, 5]);
        assert_eq!(Segment::parse(&twice), None);
    }

    #[test]
    fn headers_that_make_no_sense_are_none() {
        for (frame, tcp) in [(v4(), 14 + 20), (v6(), 14 + 40)] {
            let spoilt = |at: usize, byte: u8| {
                let mut bytes = frame.bytes();
                bytes[at] = byte;
                bytes
            };
            assert_eq!(Segment::parse(&spoilt(14, 0x55)), None, "version");
            assert_eq!(Segment::parse(&spoilt(tcp + 12, 0x40)), None, "TCP header");
        }
        let mut short = v4().bytes();
        short[14] = 0x44;
        assert_eq!(Segment::parse(&short), None, "IPv4 header");
        short[14] = 0x45;
        short[16..18].copy_from_slice(&19_u16.to_be_bytes());
        assert_eq!(Segment::parse(&short), None, "total length");
    }

    #[test]
    fn what_is_cut_off_within_the_headers_is_none() {
        for (frame, headers) in [(v4(), 14 + 20 + 20), (v6(), 14 + 40 + 20)] {
            let bytes = frame.bytes();
            for len in 0..bytes.len() {
                let found = Segment::parse(&bytes[..len]);
                assert_eq!(found.is_some(), len >= headers, "{len} bytes of {frame:?}");
            }
        }
    }

    proptest! {
        /// Any bytes at all, and real headers with any bytes changed: no panic, and nothing behind the head counts.
        #[test]
        fn only_the_head_is_read(
            start in prop_oneof![Just(v4().bytes()), Just(v6().bytes()), Just(vec![])],
            changes in prop::collection::vec((0..HEAD_BYTES, any::<u8>()), 0..8),
            rest in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut bytes = start;
            bytes.extend(rest);
            for (at, byte) in changes {
                if let Some(changed) = bytes.get_mut(at) {
                    *changed = byte;
                }
            }
            let head = &bytes[..bytes.len().min(HEAD_BYTES)];
            prop_assert_eq!(Segment::parse(&bytes), Segment::parse(head));
        }

        /// What was built is read back.
        #[test]
        fn any_segment_is_known(
            (source, destination) in prop_oneof![
                any::<([u8; 4], [u8; 4])>()
                    .prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b))),
                any::<([u8; 16], [u8; 16])>()
                    .prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b))),
            ],
            ports in any::<(u16, u16)>(),
            vlan in prop_oneof![Just(None), Just(Some(0x8100)), Just(Some(0x88a8))],
            ip_options in 0..11_usize,
            tcp_options in 0..11_usize,
            payload in 0..2000_usize,
        ) {
            let frame = Frame {
                source: SocketAddr::new(source, ports.0),
                destination: SocketAddr::new(destination, ports.1),
                vlan, ip_options, tcp_options, payload,
                fragment: 0,
            };
            let expected = (payload > 0).then_some(frame.segment());
            prop_assert_eq!(Segment::parse(&frame.bytes()), expected);
        }
    }
}
