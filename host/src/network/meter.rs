//! Tells whether a Machine that runs is being called over its private network.
//!
//! A call is what would wake the Machine if it slept ([`bell`](super::bell)), at any of its services, and
//! what it sends over a connection to one: TCP connections that begin, TCP data in either direction, and
//! datagrams to it. Keepalives, bare acknowledgements, neighbours, and what the guest asks of others are none.
//! Nor is what its host says to it: the gate counts its requests itself, and health checks come from there.
//!
//! The kernel looks and counts: a packet socket (`packet(7)`) at the TAP, with a filter that passes such frames
//! and no others. Nobody reads it: its buffer is soon full, and what follows is but counted.

mod filter;

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use tern_catalog::{Machine, ServiceProtocol};

use super::slot::Slot;

/// The services of a Machine, by which it is told whether it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Services {
    pub(super) address: Ipv6Addr,
    pub(super) tcp: BTreeSet<u16>,
    pub(super) udp: BTreeSet<u16>,
}

/// Counts the calls of one Machine.
#[derive(Debug)]
pub(crate) struct Meter {
    /// There until it is dropped.
    socket: Option<OwnedFd>,
}

impl Services {
    /// Those of this Machine, whether or not they may be started.
    pub(crate) fn of(machine: &Machine) -> Self {
        let ports = |protocol| {
            let services = machine.config.services.iter();
            let spoken = services.filter(|s| s.protocol == protocol);
            spoken.map(|s| s.internal_port).collect()
        };
        Self {
            address: machine.private_ip,
            tcp: ports(ServiceProtocol::Tcp),
            udp: ports(ServiceProtocol::Udp),
        }
    }
}

impl Meter {
    /// Begins to count at the TAP of a slot.
    pub(crate) fn open(slot: Slot, services: &Services) -> io::Result<Self> {
        let index = nix::net::if_::if_nametoindex(slot.tap().as_str())?;
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Of no protocol, and so without frames, until it is bound: by then it has its filter.
        // SAFETY: a call by value.
        let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the socket is new, and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        attach(&socket, services)?;
        // As small as the kernel lets it be.
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, &0_i32)?;
        // SAFETY: `sockaddr_ll` is plain data, of which all zeroes is a value.
        let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        at.sll_family = libc::AF_PACKET as u16;
        // What goes to the guest is seen by sockets of all protocols alone.
        at.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        at.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
        let length = size_of_val(&at) as libc::socklen_t;
        // SAFETY: `at` lives through the call, and has the length that is given.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), length) };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = Some(socket);
        Ok(Self { socket })
    }

    /// How many calls there were since this was last asked.
    pub(crate) fn take(&self) -> io::Result<u32> {
        let Some(socket) = &self.socket else {
            return Ok(0);
        };
        // `struct tpacket_stats`: packets, those that found no room among them, and these alone.
        let mut counts = [0_u32; 2];
        let mut length = size_of_val(&counts) as libc::socklen_t;
        // SAFETY: `counts` and `length` live through the call, which writes no more than the length that is given.
        let told = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                counts.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        match told {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(counts[0]),
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let socket = self.socket.take();
        // The kernel waits some milliseconds, for whoever may still look at it: many at once are no more than one.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || drop(socket));
        }
    }
}

/// Has a socket take frames that call one of these services, and no others.
fn attach(socket: &impl AsFd, services: &Services) -> io::Result<()> {
    let mut filter = filter::calls(services.address, &services.tcp, &services.udp);
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(io::Error::other)?,
        filter: filter.as_mut_ptr(),
    };
    set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

fn set_option<T>(socket: &impl AsFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    let socket = socket.as_fd().as_raw_fd();
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: `value` lives through the call and has the length that is given; the options set here take its type.
    match unsafe { libc::setsockopt(socket, level, name, value, length) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
