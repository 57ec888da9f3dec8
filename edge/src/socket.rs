//! Listening sockets, one per thread for each address: the kernel spreads connections over them.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Socket, Type};

/// Connections that wait to be accepted; the kernel's own limit may be lower.
const BACKLOG: i32 = 4096;

/// As many listeners at one address as there are threads. Port 0 is one that is free.
pub fn listeners(address: SocketAddr, threads: usize) -> io::Result<Vec<TcpListener>> {
    bind(address, threads).map_err(|e| io::Error::new(e.kind(), format!("{address}: {e}")))
}

fn bind(address: SocketAddr, threads: usize) -> io::Result<Vec<TcpListener>> {
    let listen = |socket: Socket| {
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    let sockets = shared(address, threads, Type::STREAM)?;
    sockets.into_iter().map(listen).collect()
}

/// As many bound sockets at one address as there are threads.
pub fn shared(address: SocketAddr, threads: usize, kind: Type) -> io::Result<Vec<Socket>> {
    // The first is bound without sharing, so that another server's sockets at this address are an error, as
    // they should be, and not half of our connections gone to it.
    let first = socket(address, kind)?;
    first.bind(&address.into())?;
    first.set_reuse_port(true)?;
    let bound = first.local_addr()?;
    let mut sockets = vec![first];
    for _ in 1..threads {
        let next = socket(address, kind)?;
        next.set_reuse_port(true)?;
        next.bind(&bound)?;
        sockets.push(next);
    }
    Ok(sockets)
}

fn socket(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if kind == Type::STREAM {
        // Connections of an earlier server that linger do not keep its address from the next.
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpStream};

    use super::*;

    #[test]
    fn threads_share_an_address_and_strangers_do_not() {
        for any in [
            SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            (Ipv6Addr::LOCALHOST, 0).into(),
        ] {
            let ours = listeners(any, 3).unwrap();
            let address = ours[0].local_addr().unwrap();
            assert!(ours.iter().all(|l| l.local_addr().unwrap() == address));
            let error = listeners(address, 3).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            assert!(error.to_string().contains(&address.to_string()), "{error}");
            // Every one of them takes connections.
            let clients: Vec<_> = (0..64)
                .map(|_| TcpStream::connect(address).unwrap())
                .collect();
            let taken = ours.iter().filter(|l| l.accept().is_ok()).count();
            assert_eq!((taken, clients.len()), (3, 64));
        }
    }
}
