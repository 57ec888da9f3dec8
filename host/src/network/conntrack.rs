//! What connection tracking remembers of a Machine, and how it is made to forget.
//!
//! The packet filter lets replies through by what the kernel remembers of their connection, for minutes or days.
//! An address that comes to mean another Machine must not inherit that: what was on its way to the one before
//! it would be let in.
//!
//! The kernel can be told to forget one connection or all, so the ones that are meant are looked for, as
//! `conntrack -D` does.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv6Net;
use tern_catalog::{INFRASTRUCTURE, PrivateAddress};

use super::netfilter::{Asking, DELETE_CONNECTION, GET_CONNECTION, Message, attributes, put};
use super::slot::Slot;

// `enum ctattr_type`, `ctattr_tuple` and `ctattr_ip`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const IP: u16 = 1;
const V4: [u16; 2] = [1, 2];
const V6: [u16; 2] = [3, 4];
const NESTED: u16 = 0x8000;

/// From where to where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    from: IpAddr,
    to: IpAddr,
}

/// A connection: from who began it, and back, each as its packets are when they arrive at this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Connection {
    original: Way,
    reply: Way,
}

/// Forgets all connections from and to these addresses. Returns how many. Like [`forget_unfiltered`] it looks at
/// every connection that the kernel remembers, and is not for an executor's thread.
pub(super) fn forget(v4: Ipv4Addr, v6: Option<Ipv6Net>) -> io::Result<u64> {
    let is_its = |address: IpAddr| match address {
        IpAddr::V4(address) => address == v4,
        IpAddr::V6(address) => v6.is_some_and(|v6| v6.contains(&address)),
    };
    forget_those(|c| {
        [c.original, c.reply]
            .iter()
            .any(|way| is_its(way.from) || is_its(way.to))
    })
}

/// Forgets what may have begun while there was no packet filter, and would go on as something that was let
/// through. Returns how many. The connections that it spares are those that the host began, and those to the outside
/// whose source was translated, which happens by our table alone. What it takes in vain goes on by the rules: they let
/// it through in both directions whether it is remembered or not.
pub(super) fn forget_unfiltered() -> io::Result<u64> {
    forget_those(|connection| {
        let Connection { original, reply } = connection;
        match (is_inside(original.from), is_inside(original.to)) {
            (true, _) => reply.to == original.from,
            (false, true) => !is_hosts(original.from),
            (false, false) => false,
        }
    })
}

/// Whether an address is, or could be, a Machine's or a laptop's.
fn is_inside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => Slot::of_guest_v4(address).is_some(),
        IpAddr::V6(address) => {
            PrivateAddress::parse(address).is_some_and(|a| a.network != INFRASTRUCTURE)
        }
    }
}

/// Whether an address is one from which hosts speak to Machines.
fn is_hosts(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => Slot::of_host_v4(address).is_some(),
        IpAddr::V6(address) => {
            PrivateAddress::parse(address).is_some_and(|a| a.network == INFRASTRUCTURE)
        }
    }
}

fn forget_those(which: impl Fn(Connection) -> bool) -> io::Result<u64> {
    let mut asking = Asking::open()?;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        asking.ask(
            GET_CONNECTION,
            libc::NLM_F_DUMP,
            family as u8,
            &[],
            |message| {
                if connection(message).is_some_and(&which) {
                    found.push((message.family(), its_name(message)));
                }
            },
        )?;
    }
    let mut forgotten = 0;
    for (family, name) in found {
        match asking.ask(DELETE_CONNECTION, libc::NLM_F_ACK, family, &name, |_| {}) {
            Ok(()) => forgotten += 1,
            // It has ended by itself meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}

fn connection(message: Message<'_>) -> Option<Connection> {
    let way = |which| {
        let (_, tuple) = message.attributes().find(|(kind, _)| *kind == which)?;
        let (_, ip) = attributes(tuple).find(|(kind, _)| *kind == IP)?;
        let address = |end: usize| {
            attributes(ip).find_map(|(kind, value)| {
                if kind == V4[end] {
                    <[u8; 4]>::try_from(value).ok().map(IpAddr::from)
                } else if kind == V6[end] {
                    <[u8; 16]>::try_from(value).ok().map(IpAddr::from)
                } else {
                    None
                }
            })
        };
        Some(Way {
            from: address(0)?,
            to: address(1)?,
        })
    };
    Some(Connection {
        original: way(ORIGINAL)?,
        reply: way(REPLY)?,
    })
}

/// What tells a connection from all others, as the kernel said it.
fn its_name(message: Message<'_>) -> Vec<u8> {
    let mut name = Vec::new();
    for (kind, value) in message.attributes() {
        match kind {
            ORIGINAL => put(&mut name, kind | NESTED, value),
            ID | ZONE => put(&mut name, kind, value),
            _ => {}
        }
    }
    name
}
