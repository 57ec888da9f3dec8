//! One UDP address, many threads: which thread's socket a QUIC packet comes to.
//!
//! The kernel would choose by the client's address, which a connection may outlive (RFC 9000 section 9). So the
//! first byte of each connection id that a thread hands out tells, modulo their number, which thread it was, and a
//! classic BPF program on the sockets' group reads it (socket(7), `SO_ATTACH_REUSEPORT_CBPF`). A client's own
//! first id is random: it leads anywhere, and always to the same.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use quinn::{ConnectionId, ConnectionIdGenerator};

/// Bytes of our connection ids; quinn's own default.
const CID_BYTES: usize = 8;
/// What the kernel keeps for us of datagrams while a thread is busy. The usual default holds some 150 of them.
const BUFFER: usize = 4 << 20;

/// Which of an address's threads this is.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    pub thread: u8,
    pub threads: u8,
}

/// One thread's socket of an address.
#[derive(Debug)]
pub struct Socket {
    pub socket: UdpSocket,
    pub share: Share,
}

/// Makes connection ids that lead to their thread.
#[derive(Debug)]
pub struct CidGenerator {
    share: Share,
}

impl CidGenerator {
    pub fn new(share: Share) -> Self {
        Self { share }
    }
}

impl ConnectionIdGenerator for CidGenerator {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = rand::random::<[u8; CID_BYTES]>();
        let Share { thread, threads } = self.share;
        // The highest multiple may not fit: then the one before it.
        let base = id[0] - id[0] % threads;
        let with_thread = base.checked_add(thread);
        id[0] = with_thread.unwrap_or_else(|| base - threads + thread);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        CID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// As many sockets at one address as there are threads, in the threads' order.
pub fn sockets(address: SocketAddr, threads: u8) -> io::Result<Vec<UdpSocket>> {
    bind(address, threads).map_err(|e| io::Error::new(e.kind(), format!("{address} (UDP): {e}")))
}

fn bind(address: SocketAddr, threads: u8) -> io::Result<Vec<UdpSocket>> {
    let sockets = crate::socket::shared(address, usize::from(threads), socket2::Type::DGRAM)?;
    // One socket is no group, and the kernel takes no program for it.
    if threads > 1 {
        steer(&sockets[0], threads)?;
    }
    let ready = |socket: socket2::Socket| {
        // As much of it as the host's limits allow (net.core.rmem_max).
        let _ = socket.set_recv_buffer_size(BUFFER);
        let _ = socket.set_send_buffer_size(BUFFER);
        socket.into()
    };
    Ok(sockets.into_iter().map(ready).collect())
}

/// Has the kernel choose among a group's sockets by the connection id.
fn steer(socket: &socket2::Socket, threads: u8) -> io::Result<()> {
    use libc::{
        BPF_A, BPF_ABS, BPF_ALU, BPF_B, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_MOD, BPF_RET,
    };
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    // RFC 8999: a long header has its first bit set, and the destination's id after version and length; a short
    // one has it after the first byte.
    let mut program = [
        op(BPF_LD | BPF_B | BPF_ABS, 0, 0, 0),
        op(BPF_JMP | BPF_JSET | BPF_K, 0, 2, 0x80),
        op(BPF_LD | BPF_B | BPF_ABS, 0, 0, 6),
        op(BPF_JMP | libc::BPF_JA, 0, 0, 1),
        op(BPF_LD | BPF_B | BPF_ABS, 0, 0, 1),
        op(BPF_ALU | BPF_MOD | BPF_K, 0, 0, threads.into()),
        op(BPF_RET | BPF_A, 0, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the option takes a `sock_fprog` of this size, whose `filter` points to `len` instructions; the kernel
    // copies and checks them before it returns, and both outlive the call.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_id_leads_to_the_thread_that_made_it() {
        for threads in [1, 2, 3, 7, 64, 255] {
            for thread in [0, threads / 2, threads - 1] {
                let mut ids = CidGenerator::new(Share { thread, threads });
                for _ in 0..1000 {
                    assert_eq!(ids.generate_cid()[0] % threads, thread);
                }
            }
        }
    }

    #[test]
    fn one_thread_is_enough() {
        assert_eq!(sockets("[::1]:0".parse().unwrap(), 1).unwrap().len(), 1);
    }

    #[test]
    fn packets_come_to_the_thread_that_their_id_names() {
        let ours = sockets("127.0.0.1:0".parse().unwrap(), 3).unwrap();
        let address = ours[0].local_addr().unwrap();
        for id in 0..30_u8 {
            // From another address each time, as after a migration.
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            let long = [0xc0, 0, 0, 0, 1, 8, id, 0, 0, 0, 0, 0, 0, 0];
            let short = [0x40, id, 0, 0, 0, 0, 0, 0, 0];
            for packet in [&long[..], &short[..]] {
                client.send_to(packet, address).unwrap();
                let socket = &ours[usize::from(id % 3)];
                socket.set_nonblocking(false).unwrap();
                socket
                    .set_read_timeout(Some(Duration::from_secs(10)))
                    .unwrap();
                let mut received = [0; 32];
                let (length, from) = socket.recv_from(&mut received).unwrap();
                assert_eq!(
                    (&received[..length], from),
                    (packet, client.local_addr().unwrap())
                );
            }
        }
    }
}
