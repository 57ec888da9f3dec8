//! The filter, as the kernel runs it, against what would ring the bell.

use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;

use super::*;
use crate::network::bell::Calls;

const ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfdaa, 0, 7, 0, 1, 0, 3, 2);
const PEER: Ipv6Addr = Ipv6Addr::new(0xfdaa, 0, 7, 0, 1, 0, 4, 2);
const HOST: Ipv6Addr = Ipv6Addr::new(0xfdaa, 0, 0, 0, 1, 0, 0, 1);
const ELSEWHERE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PUSH: u8 = 0x08;
const ACK: u8 = 0x10;

fn services() -> Services {
    Services {
        address: ADDRESS,
        tcp: BTreeSet::from([6379, 6380, 8080]),
        udp: BTreeSet::from([53]),
    }
}

/// Sockets that pass frames on as the filter says.
struct Sieve(UnixDatagram, UnixDatagram);

impl Sieve {
    fn new(services: &Services) -> Self {
        let (input, output) = UnixDatagram::pair().unwrap();
        attach(&output, services).unwrap();
        output.set_nonblocking(true).unwrap();
        Self(input, output)
    }

    fn passes(&self, frame: &[u8]) -> bool {
        self.0.send(frame).unwrap();
        match self.1.recv(&mut [0; 2048]) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                false
            }
        }
    }
}

fn frame(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, segment: &[u8]) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((segment.len() as u16).to_be_bytes());
    frame.extend([protocol, 64]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(segment);
    frame
}

/// A TCP segment with a timestamp, as most have.
fn tcp(from: (Ipv6Addr, u16), to: (Ipv6Addr, u16), flags: u8, data: &[u8]) -> Vec<u8> {
    let mut segment = vec![0; 32];
    segment[..2].copy_from_slice(&from.1.to_be_bytes());
    segment[2..4].copy_from_slice(&to.1.to_be_bytes());
    segment[12] = 8 << 4;
    segment[13] = flags;
    segment.extend(data);
    frame(from.0, to.0, 6, &segment)
}

fn udp(from: (Ipv6Addr, u16), to: (Ipv6Addr, u16)) -> Vec<u8> {
    let mut datagram = vec![0; 8];
    datagram[..2].copy_from_slice(&from.1.to_be_bytes());
    datagram[2..4].copy_from_slice(&to.1.to_be_bytes());
    frame(from.0, to.0, 17, &datagram)
}

#[test]
fn calls_pass() {
    let sieve = Sieve::new(&services());
    for port in [6379, 6380, 8080] {
        let (peer, own) = ((PEER, 40_000), (ADDRESS, port));
        assert!(sieve.passes(&tcp(peer, own, SYN, b"")), "{port}");
        assert!(sieve.passes(&tcp(peer, own, PUSH | ACK, b"PING\r\n")));
        // A subscriber says nothing more, and is told.
        assert!(sieve.passes(&tcp(own, peer, ACK, b"message")));
    }
    assert!(sieve.passes(&udp((PEER, 40_000), (ADDRESS, 53))));
}

#[test]
fn what_is_no_call_does_not_pass() {
    let sieve = Sieve::new(&services());
    let (peer, own) = ((PEER, 40_000), (ADDRESS, 6379));
    let own_client = (ADDRESS, 40_000);
    let gate = (HOST, 40_000);
    for quiet in [
        // A connection that is kept alive, and one that ends.
        tcp(peer, own, ACK, b""),
        tcp(own, peer, ACK, b""),
        tcp(peer, own, RST | ACK, b"reason"),
        tcp(own, peer, SYN | ACK, b""),
        tcp(peer, (ADDRESS, 6381), SYN, b""),
        // What it asks of others, and is answered.
        tcp(own_client, (PEER, 6379), SYN, b""),
        tcp(own_client, (PEER, 6379), ACK, b"question"),
        tcp((PEER, 6379), own_client, ACK, b"answer"),
        udp(own_client, (PEER, 53)),
        udp((PEER, 53), own_client),
        udp((ADDRESS, 53), (PEER, 40_000)),
        // The gate and health checks.
        tcp(gate, own, SYN, b""),
        tcp(own, gate, ACK, b"a reply"),
        udp(gate, (ADDRESS, 53)),
        // Another's; neighbours; no more than a head.
        tcp(peer, (PEER, 6379), SYN, b""),
        tcp((ELSEWHERE, 1), own, SYN, b""),
        frame(PEER, ADDRESS, 58, &[135; 24]),
        tcp(peer, own, SYN, b"")[..60].to_vec(),
        vec![0; 14],
    ] {
        assert!(!sieve.passes(&quiet), "{quiet:02x?}");
    }
    let none = Services {
        tcp: BTreeSet::new(),
        udp: BTreeSet::new(),
        ..services()
    };
    assert!(!Sieve::new(&none).passes(&tcp(peer, own, SYN, b"")));
}

#[test]
fn many_services_are_no_more_than_a_filter_holds() {
    let most = filter::MOST_PORTS as u16;
    let up_to = |last| Services {
        tcp: (1..=last).collect(),
        udp: (1..=last).collect(),
        ..services()
    };
    let call = |port| tcp((PEER, 1), (ADDRESS, port), SYN, b"");
    let sieve = Sieve::new(&up_to(most));
    assert!(sieve.passes(&call(1)) && sieve.passes(&call(most)));
    assert!(!sieve.passes(&call(most + 1)));
    let sieve = Sieve::new(&up_to(most + 1));
    assert!(sieve.passes(&call(1)) && sieve.passes(&call(most + 2)));
    let nothing = tcp((PEER, 1), (ADDRESS, 1), ACK, b"");
    assert!(!sieve.passes(&nothing));
}

proptest! {
    /// A frame to the Machine passes if it would wake it: whole ones, at least.
    #[test]
    fn what_would_wake_it_keeps_it_awake(
        port in prop::sample::select(vec![6379, 6380, 8080, 53, 54]),
        is_tcp: bool,
        flags: u8,
        offset in 0..16_u8,
        data in prop::collection::vec(any::<u8>(), 0..50),
    ) {
        let services = services();
        let (peer, own) = ((PEER, 40_000), (ADDRESS, port));
        let mut whole = if is_tcp { tcp(peer, own, flags, &data) } else { udp(peer, own) };
        if is_tcp {
            whole[66] = offset << 4;
        }
        let calls = Calls {
            address: ADDRESS,
            tcp: services.tcp.clone(),
            udp: services.udp.clone(),
        };
        prop_assert_eq!(Sieve::new(&services).passes(&whole), calls.includes(&whole));
    }
}
