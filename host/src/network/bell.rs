//! Listens at the TAP of a Machine that sleeps, so that private traffic wakes it as a request at the edge
//! does.
//!
//! No monitor has the device open then. The agent opens it in its place, reads what the host would have
//! given to the guest, and looks for a frame that only a guest could answer: a TCP connection that
//! begins, or one that goes on, or a datagram, to the port of a service that may be started. Keepalives,
//! acknowledgements and ends of connections, neighbours and the network's own chatter let it sleep.
//! The frame that rang is given to the guest once it is awake; what came after it, TCP sends again.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::Ipv6Addr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tern_catalog::{Machine, ServiceProtocol};
use tokio::io::unix::AsyncFd;

use super::slot::Slot;
use super::tap::{self, VNET_HEADER};

nix::ioctl_write_int_bad!(
    tun_set_offload,
    nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>())
);

/// What wakes a Machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Calls {
    pub(super) address: Ipv6Addr,
    pub(super) tcp: BTreeSet<u16>,
    pub(super) udp: BTreeSet<u16>,
}

/// An Ethernet frame, without the header that a TAP puts before it.
pub(crate) type Frame = Vec<u8>;

const ETHERNET_HEADER: usize = 14;
const IPV6_HEADER: usize = 40;
/// Without offloads no frame is longer than the device's MTU and its header.
const LONGEST: usize = VNET_HEADER + ETHERNET_HEADER + 1500;

impl Calls {
    /// The services of this Machine that may be started; `None` if there is none.
    pub(crate) fn of(machine: &Machine) -> Option<Self> {
        let ports = |protocol| {
            let services = machine.config.services.iter();
            let callable = services.filter(|s| s.autostart && s.protocol == protocol);
            callable.map(|s| s.internal_port).collect()
        };
        let calls = Self {
            address: machine.private_ip,
            tcp: ports(ServiceProtocol::Tcp),
            udp: ports(ServiceProtocol::Udp),
        };
        (!calls.tcp.is_empty() || !calls.udp.is_empty()).then_some(calls)
    }

    /// Whether this frame asks for something that only the guest can give.
    pub(super) fn includes(&self, frame: &[u8]) -> bool {
        self.ports_called(frame).is_some()
    }

    /// Looks at Ethernet, IPv6 (RFC 8200) without extension headers, and TCP (RFC 9293) or UDP.
    fn ports_called(&self, frame: &[u8]) -> Option<()> {
        let (ethernet, packet) = frame.split_at_checked(ETHERNET_HEADER)?;
        let (header, rest) = packet.split_at_checked(IPV6_HEADER)?;
        let is_ipv6 = ethernet[12..] == [0x86, 0xdd] && header[0] >> 4 == 6;
        if !is_ipv6 || header[24..] != self.address.octets() {
            return None;
        }
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let segment = rest.get(..length)?;
        let port = |segment: &[u8]| Some(u16::from_be_bytes([*segment.get(2)?, *segment.get(3)?]));
        let called = match i32::from(header[6]) {
            libc::IPPROTO_TCP => self.tcp.contains(&port(segment)?) && wants_answer(segment)?,
            libc::IPPROTO_UDP => segment.len() >= 8 && self.udp.contains(&port(segment)?),
            _ => false,
        };
        called.then_some(())
    }
}

/// Whether a TCP segment begins a connection or carries data.
fn wants_answer(segment: &[u8]) -> Option<bool> {
    const SYN: u8 = 0x02;
    const RST: u8 = 0x04;
    const ACK: u8 = 0x10;
    let header = usize::from(*segment.get(12)? >> 4) * 4;
    let flags = *segment.get(13)?;
    let data = header >= 20 && segment.len() > header;
    Some(flags & RST == 0 && (flags & (SYN | ACK) == SYN || data))
}

/// Waits at a TAP that nobody else has open, until a frame calls for its Machine. Dropping this closes
/// the TAP.
pub(crate) async fn listen(slot: Slot, calls: &Calls) -> io::Result<Frame> {
    let tap = tap::open(&slot.tap(), false)?;
    // The last monitor's guest took frames unfinished; this reader wants them as they go over a wire.
    // SAFETY: the descriptor is open; the argument is a plain number.
    unsafe { tun_set_offload(tap.as_raw_fd(), 0) }?;
    fcntl(&tap, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    // SAFETY: a `File` returns one descriptor, its own, and has it open for as long as it lives.
    let tap: AsyncFd<File> = unsafe { AsyncFd::register(tap) }?;
    let mut buffer = [0; LONGEST];
    loop {
        let mut ready = tap.readable().await?;
        match ready.try_io(|tap| tap.get_ref().read(&mut buffer)) {
            Ok(Ok(len)) => {
                let frame = buffer.get(VNET_HEADER..len).unwrap_or_default();
                if calls.includes(frame) {
                    return Ok(frame.to_vec());
                }
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

/// Gives a frame to whoever has the TAP open now (`packet(7)`).
pub(crate) fn deliver(slot: Slot, frame: &[u8]) -> io::Result<()> {
    let index = nix::net::if_::if_nametoindex(slot.tap().as_str())?;
    // SAFETY: a call by value.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the socket is new, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: `sockaddr_ll` is plain data, of which all zeroes is a value.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = (libc::ETH_P_IPV6 as u16).to_be();
    to.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    // SAFETY: `frame` and `to` live through the call, with the lengths that are given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of_val(&to) as libc::socklen_t,
        )
    };
    match sent {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfdaa, 0, 0, 7, 0, 1, 0, 2);

    fn calls() -> Calls {
        Calls {
            address: ADDRESS,
            tcp: BTreeSet::from([6379]),
            udp: BTreeSet::from([53]),
        }
    }

    fn frame(to: Ipv6Addr, protocol: u8, segment: &[u8]) -> Frame {
        let mut frame = vec![2; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((segment.len() as u16).to_be_bytes());
        frame.extend([protocol, 64]);
        frame.extend(Ipv6Addr::LOCALHOST.octets());
        frame.extend(to.octets());
        frame.extend(segment);
        frame
    }

    fn tcp(port: u16, flags: u8, data: &[u8]) -> Frame {
        let mut segment = vec![0; 20];
        segment[2..4].copy_from_slice(&port.to_be_bytes());
        segment[12] = 5 << 4;
        segment[13] = flags;
        segment.extend(data);
        frame(ADDRESS, 6, &segment)
    }

    fn udp(port: u16) -> Frame {
        let mut datagram = vec![0; 8];
        datagram[2..4].copy_from_slice(&port.to_be_bytes());
        frame(ADDRESS, 17, &datagram)
    }

    #[test]
    fn what_needs_an_answer_calls() {
        let (syn, ack, push_ack) = (0x02, 0x10, 0x18);
        assert!(calls().includes(&tcp(6379, syn, b"")));
        assert!(calls().includes(&tcp(6379, push_ack, b"PING\r\n")));
        assert!(calls().includes(&tcp(6379, ack, b"x")));
        assert!(calls().includes(&udp(53)));
    }

    #[test]
    fn what_needs_none_does_not() {
        let (fin, syn, rst, ack) = (0x01, 0x02, 0x04, 0x10);
        for quiet in [
            tcp(6379, ack, b""),
            tcp(6379, fin | ack, b""),
            tcp(6379, rst, b""),
            tcp(6379, rst | ack, b"reason"),
            tcp(6379, syn | ack, b""),
            tcp(6380, syn, b""),
            tcp(53, syn, b""),
            udp(6379),
            // A neighbour solicitation, another's address, IPv4, a datagram that is cut off.
            frame(ADDRESS, 58, &[135; 24]),
            frame(Ipv6Addr::LOCALHOST, 17, &udp(53)[54..]),
            [&[2; 12][..], &[8, 0, 0x45], &[0; 60]].concat(),
            udp(53)[..60].to_vec(),
            Vec::new(),
        ] {
            assert!(!calls().includes(&quiet), "{quiet:02x?}");
        }
    }

    proptest! {
        /// Whatever arrives is looked at within its bounds.
        #[test]
        fn any_frame_is_looked_at(mut bytes in prop::collection::vec(any::<u8>(), 0..120), like in 0..3_u8) {
            let model = if like == 0 { tcp(6379, 0x02, b"") } else { udp(53) };
            for (to, from) in bytes.iter_mut().zip(&model[..54 + usize::from(like)]) {
                *to = *from;
            }
            let _ = calls().includes(&bytes);
        }
    }
}
