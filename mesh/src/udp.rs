//! The socket that WireGuard's datagrams come and go by.
//!
//! Datagrams are received and sent in batches, with the kernel's segmentation and coalescing where
//! it has them (`quinn-udp`). One socket serves IPv4 and IPv6. An answer leaves from the address
//! that was asked: a host may have several, and a client's firewall lets only one back in.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use crate::engine::Path;

/// A datagram, or several of one sender that the kernel put together.
const SLOT: usize = 1 << 16;
/// Most bytes of one sending call: what an IPv4 packet can hold.
const MOST_BYTES: usize = 65_507;
/// What the kernel may hold for us while this thread is busy: about 30 ms of 1 Gbit/s.
const KERNEL_BUFFER: usize = 4 << 20;

/// The socket, and what waits to be sent.
pub(crate) struct Udp {
    socket: UdpSocket,
    state: UdpSocketState,
    is_ipv6: bool,
    slots: Box<[u8]>,
    metas: [RecvMeta; BATCH_SIZE],
    outbox: Outbox,
    /// Datagrams that the kernel did not take.
    pub(crate) unsent: u64,
}

/// Datagrams of one path, all of the first one's length but the last, which may be shorter.
#[derive(Default)]
struct Outbox {
    bytes: Vec<u8>,
    segment: usize,
    count: usize,
    path: Option<Path>,
}

impl Udp {
    pub(crate) fn bind(listen: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::for_address(listen),
            Type::DGRAM.nonblocking(),
            Some(Protocol::UDP),
        )?;
        let is_ipv6 = listen.is_ipv6();
        if is_ipv6 {
            socket.set_only_v6(false)?;
        }
        set_buffers(&socket);
        socket.bind(&listen.into())?;
        let socket = UdpSocket::from(socket);
        let state = UdpSocketState::new((&socket).into())?;
        allow_fragments(&socket, is_ipv6)?;
        Ok(Self {
            socket,
            state,
            is_ipv6,
            slots: vec![0; SLOT * BATCH_SIZE].into(),
            metas: [RecvMeta::default(); BATCH_SIZE],
            outbox: Outbox::default(),
            unsent: 0,
        })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Receives a batch and shows each datagram. `WouldBlock` when there is none.
    pub(crate) fn receive(
        &mut self,
        mut each: impl FnMut(&mut Self, Path, &[u8]),
    ) -> io::Result<()> {
        let mut slots = std::mem::take(&mut self.slots);
        let mut metas = self.metas;
        let received = {
            let mut chunks = slots.chunks_mut(SLOT);
            let mut buffers: [_; BATCH_SIZE] =
                std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
            (self.state).recv((&self.socket).into(), &mut buffers, &mut metas)
        };
        for (meta, slot) in metas
            .iter()
            .zip(slots.chunks(SLOT))
            .take(*received.as_ref().unwrap_or(&0))
        {
            let path = Path {
                remote: canonical(meta.addr),
                local: meta.dst_ip.map(|ip| ip.to_canonical()),
            };
            for datagram in slot[..meta.len.min(SLOT)].chunks(meta.stride.max(1)) {
                each(self, path, datagram);
            }
        }
        self.slots = slots;
        received.map(drop)
    }

    /// Sends a datagram, at the latest with [`Self::flush`].
    pub(crate) fn send(&mut self, path: Path, datagram: &[u8]) {
        if !self
            .outbox
            .takes(path, datagram, self.state.max_gso_segments())
        {
            self.flush();
        }
        self.outbox.push(path, datagram);
    }

    /// Sends what waits.
    pub(crate) fn flush(&mut self) {
        let Some(path) = self.outbox.path.take() else {
            return;
        };
        let transmit = Transmit {
            destination: self.native(path.remote),
            ecn: None,
            contents: &self.outbox.bytes,
            segment_size: (self.outbox.count > 1).then_some(self.outbox.segment),
            src_ip: path
                .local
                .map(|ip| self.native(SocketAddr::new(ip, 0)).ip()),
        };
        // Datagrams may get lost, here as anywhere: who needs them sends them again.
        if let Err(error) = self.state.try_send((&self.socket).into(), &transmit) {
            tracing::debug!(%error, to = %path.remote, "datagrams were not sent");
            self.unsent += self.outbox.count as u64;
        }
        self.outbox.bytes.clear();
        self.outbox.count = 0;
    }

    /// An address as this socket's family writes it.
    fn native(&self, address: SocketAddr) -> SocketAddr {
        match address {
            SocketAddr::V4(v4) if self.is_ipv6 => {
                SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into()
            }
            other => other,
        }
    }
}

impl AsFd for Udp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Outbox {
    /// Whether a datagram can go along with those that wait.
    fn takes(&self, path: Path, datagram: &[u8], most: usize) -> bool {
        let Some(waiting) = self.path else {
            return true;
        };
        let all_full = self.bytes.len() == self.segment * self.count;
        waiting == path
            && all_full
            && datagram.len() <= self.segment
            && self.count < most
            && self.bytes.len() + datagram.len() <= MOST_BYTES
    }

    fn push(&mut self, path: Path, datagram: &[u8]) {
        if self.path.replace(path).is_none() {
            self.segment = datagram.len();
        }
        self.bytes.extend_from_slice(datagram);
        self.count += 1;
    }
}

/// An address as people write it: IPv4 is IPv4, also on a socket for both.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(v4) => SocketAddr::new(v4.into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

/// Larger buffers, as far as the kernel allows; as root it does.
fn set_buffers(socket: &Socket) {
    use nix::sys::socket::{setsockopt, sockopt};
    let forced = setsockopt(socket, sockopt::RcvBufForce, &KERNEL_BUFFER)
        .and_then(|()| setsockopt(socket, sockopt::SndBufForce, &KERNEL_BUFFER));
    if forced.is_err() {
        // Then up to the limit of the system, which is no reason not to work.
        let _ = socket.set_recv_buffer_size(KERNEL_BUFFER);
        let _ = socket.set_send_buffer_size(KERNEL_BUFFER);
    }
}

/// `quinn-udp` forbids fragments, as QUIC needs it. A tunnel cannot make its packets smaller: where
/// the path takes less than 1500 bytes, fragments are better than nothing, and what the kernel's own
/// WireGuard does.
fn allow_fragments(socket: &UdpSocket, is_ipv6: bool) -> io::Result<()> {
    let set = |level, option, value: libc::c_int| {
        // SAFETY: the descriptor is open, and pointer and length are those of a live `c_int`.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        nix::errno::Errno::result(result).map(drop)
    };
    set(
        libc::IPPROTO_IP,
        libc::IP_MTU_DISCOVER,
        libc::IP_PMTUDISC_DONT,
    )?;
    if is_ipv6 {
        set(
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_WANT,
        )?;
        set(libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn receive_all(udp: &mut Udp, count: usize) -> Vec<(Path, Vec<u8>)> {
        let mut all = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(10);
        while all.len() < count && Instant::now() < deadline {
            match udp.receive(|_, path, d| all.push((path, d.to_vec()))) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                other => other.unwrap(),
            }
        }
        all
    }

    #[test]
    fn datagrams_arrive_whole_and_in_order_whatever_their_sizes() {
        let mut a = Udp::bind("[::]:0".parse().unwrap()).unwrap();
        let mut b = Udp::bind("[::]:0".parse().unwrap()).unwrap();
        let port = b.local_addr().unwrap().port();
        let sizes = [1452, 1452, 1452, 80, 1452, 32, 148, 148, 92];
        for (host, local) in [("127.0.0.1", "127.0.0.3"), ("[::1]", "::1")] {
            let remote = format!("{host}:{port}").parse().unwrap();
            let local = Some(local.parse().unwrap());
            let sent: Vec<_> = (0u8..).zip(sizes).map(|(n, len)| vec![n; len]).collect();
            sent.iter().for_each(|d| a.send(Path { remote, local }, d));
            a.flush();
            let got = receive_all(&mut b, sent.len());
            let bytes: Vec<_> = got.iter().map(|(_, d)| d.clone()).collect();
            assert_eq!(bytes, sent);
            assert!(got.iter().all(|(p, _)| Some(p.remote.ip()) == local));
            assert!(
                got.iter().all(|(p, _)| p.local == Some(remote.ip())),
                "{got:?}"
            );
        }
        assert_eq!(a.unsent, 0);
    }

    #[test]
    fn what_cannot_be_sent_is_counted_and_forgotten() {
        let mut udp = Udp::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        udp.send(Path::to("[2001:db8::1]:1".parse().unwrap()), &[0; 32]);
        udp.flush();
        assert_eq!(udp.unsent, 1);
        udp.flush();
        assert_eq!(udp.unsent, 1);
    }
}
