//! The kernel's `NETLINK_NETFILTER`, as far as this host's network speaks it: which transaction of the packet
//! filter was the last, and what connection tracking remembers.
//!
//! `linux/netlink.h`, `linux/netfilter/nfnetlink.h`, `nf_tables.h` and `nfnetlink_conntrack.h`. Numbers in
//! headers are the host's, those in attributes big-endian.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;

const SUBSYSTEM_CONNTRACK: u16 = 1;
const SUBSYSTEM_TABLES: u16 = 10;

pub(super) const GET_CONNECTION: u16 = SUBSYSTEM_CONNTRACK << 8 | 1;
pub(super) const DELETE_CONNECTION: u16 = SUBSYSTEM_CONNTRACK << 8 | 2;

/// Changes of packet filters (`NFNLGRP_NFTABLES`).
const GROUP_TABLES: u32 = 7;
const NEW_GENERATION: u16 = SUBSYSTEM_TABLES << 8 | 15;
const GET_TABLE: u16 = SUBSYSTEM_TABLES << 8 | 1;
const GET_GENERATION: u16 = SUBSYSTEM_TABLES << 8 | 16;
/// Messages of the packet filter from here on say something else than "this has changed".
const LAST_CHANGE: u16 = SUBSYSTEM_TABLES << 8 | 14;
/// Stateful objects and flow tables, which came later.
const LATER_CHANGES: std::ops::RangeInclusive<u16> =
    SUBSYSTEM_TABLES << 8 | 18..=SUBSYSTEM_TABLES << 8 | 24;
/// `NFTA_GEN_ID`, and the name of the table in messages of all other kinds.
const FIRST: u16 = 1;

/// `NFPROTO_INET`.
const INET: u8 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// `struct nfgenmsg`.
const GENERIC: usize = 4;
/// The longest datagram that the kernel makes of messages.
pub(super) const LONGEST: usize = 64 << 10;
/// What changes of a table with all Machines there can be fit into, and more.
const ROOM: usize = 32 << 20;

/// One message of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    family: u8,
    body: &'a [u8],
}

/// Listens to changes of packet filters.
#[derive(Debug, Default)]
pub(super) struct Listener {
    /// Whether the transaction that is being told of has to do with the table.
    concerned: bool,
}

/// Asks the kernel, and waits for its answers.
#[derive(Debug)]
pub(super) struct Asking {
    socket: Socket,
    sequence: u32,
}

impl Asking {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends a request and gives each message of the answer to `each`. Returns when the kernel has no more to
    /// say.
    pub(super) fn ask(
        &mut self,
        kind: u16,
        flags: libc::c_int,
        family: u8,
        attributes: &[u8],
        mut each: impl FnMut(Message<'_>),
    ) -> io::Result<()> {
        self.sequence += 1;
        let flags = libc::NLM_F_REQUEST | flags;
        let request = request(kind, flags as u16, self.sequence, family, attributes);
        self.socket.send(&request, 0)?;
        let mut buffer = Vec::with_capacity(LONGEST);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            for message in messages(&buffer) {
                match message.kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return outcome(message.body),
                    _ => each(message),
                }
            }
        }
    }

    /// The number of the last transaction, of anybody's.
    pub(super) fn generation(&mut self) -> io::Result<u32> {
        let mut generation = None;
        self.ask(GET_GENERATION, libc::NLM_F_ACK, 0, &[], |message| {
            generation = generation.or(message.generation());
        })?;
        generation.ok_or_else(|| io::Error::other("the kernel does not say which generation it is"))
    }
}

impl Asking {
    /// Whether the table `inet <name>` is there, whatever is in it.
    pub(super) fn has_table(&mut self, name: &str) -> io::Result<bool> {
        let mut attributes = Vec::new();
        put(&mut attributes, FIRST, &[name.as_bytes(), &[0]].concat());
        match self.ask(GET_TABLE, libc::NLM_F_ACK, INET, &attributes, |_| {}) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            other => other.map(|()| true),
        }
    }
}

impl Listener {
    /// The socket to listen at.
    pub(super) fn socket() -> io::Result<Socket> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        // As root the limit for others does not hold; as somebody else there is no packet filter to watch.
        setsockopt(&socket, RcvBufForce, &ROOM)?;
        socket.bind_auto()?;
        socket.add_membership(GROUP_TABLES)?;
        socket.set_non_blocking(true)?;
        Ok(socket)
    }

    /// What a datagram says of the table `inet <name>`: the transactions that ended with it.
    pub(super) fn hear<'a>(
        &'a mut self,
        datagram: &'a [u8],
        name: &'a str,
    ) -> impl Iterator<Item = u32> + 'a {
        messages(datagram).filter_map(move |message| {
            if let Some(generation) = message.generation() {
                return std::mem::take(&mut self.concerned).then_some(generation);
            }
            self.concerned |= message.changes(name);
            None
        })
    }
}

impl<'a> Message<'a> {
    /// Its attributes: type and value.
    pub(super) fn attributes(&self) -> impl Iterator<Item = (u16, &'a [u8])> + use<'a> {
        attributes(self.body)
    }

    pub(super) fn family(&self) -> u8 {
        self.family
    }

    fn generation(&self) -> Option<u32> {
        let is_generation = self.kind == NEW_GENERATION;
        let (_, value) = self.attributes().find(|(kind, _)| *kind == FIRST)?;
        is_generation.then_some(u32::from_be_bytes(value.try_into().ok()?))
    }

    /// Whether it tells of a change in the table `inet <name>`.
    fn changes(&self, name: &str) -> bool {
        let is_change = (SUBSYSTEM_TABLES << 8..=LAST_CHANGE).contains(&self.kind)
            || LATER_CHANGES.contains(&self.kind);
        let named = |value: &[u8]| value.strip_suffix(&[0]) == Some(name.as_bytes());
        is_change
            && self.family == INET
            && self
                .attributes()
                .any(|(kind, value)| kind == FIRST && named(value))
    }
}

/// The attributes in a message, or in another attribute.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (header, _) = bytes.split_first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        // Without the flags for nesting and byte order.
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Appends an attribute.
pub(super) fn put(attributes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    attributes.extend(length.to_ne_bytes());
    attributes.extend(kind.to_ne_bytes());
    attributes.extend(value);
    attributes.resize(attributes.len().next_multiple_of(4), 0);
}

fn request(kind: u16, flags: u16, sequence: u32, family: u8, attributes: &[u8]) -> Vec<u8> {
    let length = HEADER + GENERIC + attributes.len();
    let mut request = Vec::with_capacity(length);
    request.extend((length as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    request.extend(sequence.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    request.extend([family, 0, 0, 0]);
    request.extend(attributes);
    request
}

/// The messages in a datagram. What is cut off is not among them.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.get(..HEADER)?;
        let word = |at: usize| {
            header
                .get(at..at + 4)?
                .try_into()
                .ok()
                .map(u32::from_ne_bytes)
        };
        let length = word(0)? as usize;
        let kind = word(4)? as u16;
        let content = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        let (family, body) = match kind {
            NLMSG_DONE | NLMSG_ERROR => (0, content),
            _ => (*content.first()?, content.get(GENERIC..)?),
        };
        Some(Message { kind, family, body })
    })
}

/// `struct nlmsgerr`: 0 is an acknowledgement.
fn outcome(body: &[u8]) -> io::Result<()> {
    let code = body
        .first_chunk()
        .map_or(-libc::EPROTO, |code| i32::from_ne_bytes(*code));
    match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}
