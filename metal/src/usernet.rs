//! The ports on which QEMU's user network listens.
//!
//! QEMU (libslirp) listens with a backlog of one: of several connections made at the same moment,
//! some wait a second for their SYN to be repeated, and some are reset. So each listening socket is
//! borrowed from the QEMU process and given the backlog of a server.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context, Result};

use crate::forward::{Forward, Protocol};
use crate::process;

/// Connections that may wait to be accepted; the kernel takes no more (net.core.somaxconn).
const BACKLOG: i32 = 4096;

/// A port QEMU listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listening {
    /// Address inside that it leads to.
    pub address: Ipv4Addr,
    /// The ports.
    pub forward: Forward,
    /// Number of the socket in the QEMU process.
    fd: i32,
}

impl Listening {
    /// Lets many connections wait.
    pub fn widen(&self, qemu: &OwnedFd) -> Result<()> {
        if self.forward.protocol == Protocol::Udp {
            return Ok(());
        }
        let what = || format!("cannot prepare port {} of QEMU", self.forward.outer);
        let socket = process::borrow_descriptor(qemu, self.fd).with_context(what)?;
        // SAFETY: listen(2) takes a descriptor, which is open, and a number.
        if unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) } < 0 {
            return Err(io::Error::last_os_error()).with_context(what);
        }
        Ok(())
    }
}

/// Reads the answer to `info usernet`: lines like
/// `TCP[HOST_FORWARD]  12  127.0.0.1 43211  10.0.2.15  7000  0  0`.
pub fn parse(table: &str) -> Vec<Listening> {
    table.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Listening> {
    let mut fields = line.split_whitespace();
    let protocol = match fields.next()? {
        "TCP[HOST_FORWARD]" => Protocol::Tcp,
        "UDP[HOST_FORWARD]" => Protocol::Udp,
        _ => return None,
    };
    let fd = fields.next()?.parse().ok()?;
    let outer = fields.nth(1)?.parse().ok()?;
    let address = fields.next()?.parse().ok()?;
    let inner = fields.next()?.parse().ok()?;
    let forward = Forward {
        protocol,
        outer,
        inner,
    };
    Some(Listening {
        address,
        forward,
        fd,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_list_of_forwarded_ports() {
        let table = "Hub -1 (control):\r\n  \
            Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
            TCP[HOST_FORWARD]  12       127.0.0.1 43211       10.0.3.15  1000     0     0\r\n  \
            UDP[HOST_FORWARD]  13       127.0.0.1  5353       10.0.2.15    53     0     0\r\n  \
            TCP[ESTABLISHED]   14       127.0.0.1  4321       10.0.2.15    80     0     0\r\n";
        let listening = |protocol, outer, address: &str, inner, fd| Listening {
            address: address.parse().unwrap(),
            forward: Forward {
                protocol,
                outer,
                inner,
            },
            fd,
        };
        assert_eq!(
            parse(table),
            [
                listening(Protocol::Tcp, 43211, "10.0.3.15", 1000, 12),
                listening(Protocol::Udp, 5353, "10.0.2.15", 53, 13),
            ]
        );
    }
}
