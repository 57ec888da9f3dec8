//! As much of rtnetlink as it takes to bring interfaces up: links, addresses, default routes.
//!
//! See `rtnetlink(7)`. A request is a header, a fixed part and attributes, all in host byte order and
//! aligned to four bytes; the kernel answers each with an error code, which is 0 for success.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use ipnet::IpNet;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// A conversation with the kernel about the network of this namespace.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sets what is given, and brings the link up.
    pub fn set_link(
        &mut self,
        index: u32,
        mtu: Option<u32>,
        mac: Option<[u8; 6]>,
    ) -> io::Result<()> {
        // The address first: some links take one only while they are down.
        if let Some(mac) = mac {
            let mut message = Message::new(libc::RTM_NEWLINK, 0);
            message.put(&link_header(index, 0));
            message.attribute(libc::IFLA_ADDRESS, &mac);
            self.ask(message)?;
        }
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.put(&link_header(index, libc::IFF_UP as u32));
        if let Some(mtu) = mtu {
            message.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
        }
        self.ask(message)
    }

    /// Gives a link an address. IPv6 does not look for duplicates: the address is ours by
    /// configuration, and the second's wait would come before every first packet.
    pub fn add_address(&mut self, index: u32, address: IpNet) -> io::Result<()> {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        let mut message = Message::new(libc::RTM_NEWADDR, flags);
        // `struct ifaddrmsg`: family, prefix length, flags, scope (0 is global), index.
        let ifa_flags = if address.addr().is_ipv6() {
            libc::IFA_F_NODAD as u8
        } else {
            0
        };
        message.put(&[family(address.addr()), address.prefix_len(), ifa_flags, 0]);
        message.put(&index.to_ne_bytes());
        let octets = octets(address.addr());
        message.attribute(libc::IFA_LOCAL, &octets);
        message.attribute(libc::IFA_ADDRESS, &octets);
        self.ask(message)
    }

    /// Sends all that has no better route through a gateway on this link.
    pub fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        let mut message = Message::new(libc::RTM_NEWROUTE, flags);
        // `struct rtmsg`: family, destination and source prefix lengths, type of service, table,
        // protocol, scope, type, flags. The gateway is a neighbour whatever the addresses say.
        message.put(&[
            family(gateway),
            0,
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_BOOT,
        ]);
        message.put(&[libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST]);
        message.put(&RTNH_F_ONLINK.to_ne_bytes());
        message.attribute(libc::RTA_GATEWAY, &octets(gateway));
        message.attribute(libc::RTA_OIF, &index.to_ne_bytes());
        self.ask(message)
    }

    /// Sends a request and waits for its acknowledgement.
    fn ask(&mut self, message: Message) -> io::Result<()> {
        self.sequence += 1;
        let request = message.finish(self.sequence);
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())?;
        let mut reply = [0; 4096];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut reply, MsgFlags::empty())?;
            if let Some(outcome) = acknowledgement(&reply[..length], self.sequence) {
                return outcome;
            }
        }
    }
}

/// What the kernel says about request `sequence`; none if this is about something else.
fn acknowledgement(reply: &[u8], sequence: u32) -> Option<io::Result<()>> {
    let word = |at: usize| reply.get(at..at + 4).map(|b| [b[0], b[1], b[2], b[3]]);
    let kind = reply.get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]))?;
    if i32::from(kind) != libc::NLMSG_ERROR || u32::from_ne_bytes(word(8)?) != sequence {
        return None;
    }
    match i32::from_ne_bytes(word(HEADER)?) {
        0 => Some(Ok(())),
        error => Some(Err(io::Error::from_raw_os_error(-error))),
    }
}

struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: i32) -> Self {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Self { bytes }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.put(&(4 + value.len() as u16).to_ne_bytes());
        self.put(&kind.to_ne_bytes());
        self.put(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// `struct ifinfomsg`: family, padding, type, index, flags and which of them to change.
fn link_header(index: u32, flags: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    header
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

const HEADER: usize = 16;

/// `linux/rtnetlink.h`: the gateway counts as reachable on the link.
const RTNH_F_ONLINK: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_laid_out_as_the_kernel_reads_them() {
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.put(&link_header(2, 1));
        message.attribute(libc::IFLA_ADDRESS, &[1, 2, 3, 4, 5, 6]);
        let bytes = message.finish(9);
        assert_eq!(bytes.len(), 16 + 16 + 12);
        assert_eq!(
            bytes[..16],
            [44, 0, 0, 0, 16, 0, 5, 0, 9, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(
            bytes[16..32],
            [0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
        );
        assert_eq!(bytes[32..], [10, 0, 1, 0, 1, 2, 3, 4, 5, 6, 0, 0]);
    }

    #[test]
    fn answers_are_matched_to_their_question() {
        let mut reply = vec![0; 36];
        reply[4..6].copy_from_slice(&(libc::NLMSG_ERROR as u16).to_ne_bytes());
        reply[8..12].copy_from_slice(&7u32.to_ne_bytes());
        assert!(acknowledgement(&reply, 7).unwrap().is_ok());
        assert!(acknowledgement(&reply, 8).is_none());
        reply[16..20].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        let error = acknowledgement(&reply, 7).unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        for end in 0..20 {
            assert!(acknowledgement(&reply[..end], 7).is_none());
        }
    }
}
