//! What connection tracking remembers of a Machine, and how it is made to forget.
//!
//! The packet filter lets replies through by what the kernel remembers of their connection, for minutes or days.
//! An address that comes to mean another Machine must not inherit that: what was on its way to the one before
//! it would be let in.
//!
//! The kernel can be told to forget one connection or all, so the ones that are meant are looked for, as
//! `conntrack -D` does.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::Ipv6Net;

use super::netfilter::{Asking, DELETE_CONNECTION, GET_CONNECTION, Message, attributes, put};

// `enum ctattr_type`, `ctattr_tuple` and `ctattr_ip`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const IP: u16 = 1;
const V4: [u16; 2] = [1, 2];
const V6: [u16; 2] = [3, 4];
const NESTED: u16 = 0x8000;

/// Forgets all connections from and to these addresses. Returns how many. It looks at every connection that
/// the kernel remembers, so it is not for an executor's thread.
pub(super) fn forget(v4: Ipv4Addr, v6: Option<Ipv6Net>) -> io::Result<u64> {
    let concerns = |tuple: &[u8]| {
        let of_ip = attributes(tuple).filter(|(kind, _)| *kind == IP);
        of_ip
            .flat_map(|(_, ip)| attributes(ip))
            .any(|(kind, value)| {
                let is_v4 = V4.contains(&kind) && *value == v4.octets();
                let address = <[u8; 16]>::try_from(value).map(Ipv6Addr::from);
                is_v4
                    || V6.contains(&kind)
                        && address.is_ok_and(|a| v6.is_some_and(|v6| v6.contains(&a)))
            })
    };
    let mut asking = Asking::open()?;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        asking.ask(
            GET_CONNECTION,
            libc::NLM_F_DUMP,
            family as u8,
            &[],
            |message| {
                let ours = |(kind, value): (u16, &[u8])| {
                    [ORIGINAL, REPLY].contains(&kind) && concerns(value)
                };
                if message.attributes().any(ours) {
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
