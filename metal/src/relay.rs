//! Ports of a native host: the command listens on this machine itself, so a forwarded port is only
//! something to do when it has another number inside.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::forward::{Forward, Protocol};

/// A UDP peer that has said nothing and heard nothing for so long is forgotten (RFC 4787, REQ-5:
/// two minutes at least).
const UDP_PATIENCE: Duration = Duration::from_secs(120);
/// Largest UDP payload.
const DATAGRAM: usize = 65_535;

/// Starts to forward; returns the forward with its port chosen.
pub fn start(forward: Forward) -> Result<Forward> {
    if forward.outer == forward.inner {
        return Ok(forward);
    }
    let here = (Ipv4Addr::LOCALHOST, forward.outer);
    let there = SocketAddr::from((Ipv4Addr::LOCALHOST, forward.inner));
    let outer = match forward.protocol {
        Protocol::Tcp => {
            let listener =
                TcpListener::bind(here).with_context(|| format!("cannot forward {forward}"))?;
            let port = listener.local_addr()?.port();
            thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    thread::spawn(move || relay_tcp(stream, there));
                }
            });
            port
        }
        Protocol::Udp => {
            let socket =
                UdpSocket::bind(here).with_context(|| format!("cannot forward {forward}"))?;
            let port = socket.local_addr()?.port();
            thread::spawn(move || relay_udp(Arc::new(socket), there));
            port
        }
    };
    Ok(Forward { outer, ..forward })
}

/// Copies both directions until each has ended. Its errors are the two ends' own to see.
fn relay_tcp(outer: TcpStream, there: SocketAddr) -> io::Result<()> {
    let inner = TcpStream::connect(there)?;
    for stream in [&outer, &inner] {
        stream.set_nodelay(true)?;
    }
    thread::scope(|scope| {
        scope.spawn(|| copy(&outer, &inner));
        copy(&inner, &outer)
    })
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    let result = io::copy(&mut from, &mut to);
    match &result {
        Ok(_) => to.shutdown(Shutdown::Write)?,
        // A reset on one side ends both.
        Err(_) => {
            to.shutdown(Shutdown::Both)?;
            from.shutdown(Shutdown::Both)?;
        }
    }
    result.map(drop)
}

/// One socket towards the inside per peer outside, so that answers find their way back.
fn relay_udp(outer: Arc<UdpSocket>, there: SocketAddr) -> io::Result<()> {
    type Peers = HashMap<SocketAddr, Arc<UdpSocket>>;
    let peers: Arc<Mutex<Peers>> = Arc::default();
    let mut datagram = vec![0; DATAGRAM];
    loop {
        let Ok((length, peer)) = outer.recv_from(&mut datagram) else {
            continue;
        };
        let known = peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&peer)
            .cloned();
        let inner = match known {
            Some(inner) => inner,
            None => {
                let inner = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?);
                inner.connect(there)?;
                inner.set_read_timeout(Some(UDP_PATIENCE))?;
                peers
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(peer, inner.clone());
                let (outer, peers, answers) = (outer.clone(), peers.clone(), inner.clone());
                thread::spawn(move || {
                    let mut datagram = vec![0; DATAGRAM];
                    loop {
                        match answers.recv(&mut datagram) {
                            // Datagrams may be lost.
                            Ok(length) => drop(outer.send_to(&datagram[..length], peer)),
                            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                            Err(_) => break,
                        }
                    }
                    peers
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .remove(&peer);
                });
                inner
            }
        };
        // Nobody may listen there yet.
        let _ = inner.send(&datagram[..length]);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn tcp_goes_both_ways_and_ends_both_ways() {
        let inside = TcpListener::bind("127.0.0.1:0").unwrap();
        let inner = inside.local_addr().unwrap().port();
        let forward = start(Forward {
            protocol: Protocol::Tcp,
            outer: 0,
            inner,
        })
        .unwrap();
        assert_ne!(forward.outer, 0);
        let echo = thread::spawn(move || {
            let (mut stream, _) = inside.accept().unwrap();
            let mut said = String::new();
            stream.read_to_string(&mut said).unwrap();
            stream.write_all(said.to_uppercase().as_bytes()).unwrap();
        });
        let mut stream = TcpStream::connect(("127.0.0.1", forward.outer)).unwrap();
        stream.write_all(b"hello").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "HELLO");
        echo.join().unwrap();
    }

    #[test]
    fn udp_answers_find_their_peer() {
        let inside = UdpSocket::bind("127.0.0.1:0").unwrap();
        let inner = inside.local_addr().unwrap().port();
        let forward = start(Forward {
            protocol: Protocol::Udp,
            outer: 0,
            inner,
        })
        .unwrap();
        thread::spawn(move || {
            let mut datagram = [0; 16];
            for _ in 0..2 {
                let (length, from) = inside.recv_from(&mut datagram).unwrap();
                inside.send_to(&datagram[..length], from).unwrap();
            }
        });
        for word in [b"one", b"two"] {
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            client
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            client.send_to(word, ("127.0.0.1", forward.outer)).unwrap();
            let mut answer = [0; 16];
            let length = client.recv(&mut answer).unwrap();
            assert_eq!(&answer[..length], word);
        }
    }

    #[test]
    fn a_taken_port_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let outer = taken.local_addr().unwrap().port();
        let forward = Forward {
            protocol: Protocol::Tcp,
            outer,
            inner: 1,
        };
        let error = format!("{:#}", start(forward).unwrap_err());
        assert!(error.contains(&outer.to_string()), "{error}");
    }
}
