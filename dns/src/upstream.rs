//! The resolvers that this host itself uses.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use tern_catalog::NetworkId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

use crate::reply::Transport;
use crate::wire;

/// Resolvers used of those configured, as in glibc.
const MOST: usize = 3;
const PORT: u16 = 53;

/// Asks a resolver. Something that is not the answer to this very question is as good as nothing.
pub(crate) async fn ask(
    resolver: SocketAddr,
    transport: Transport,
    id: u16,
    query: &[u8],
    question: &[u8],
) -> io::Result<Vec<u8>> {
    match transport {
        Transport::Udp => ask_udp(resolver, id, query, question).await,
        Transport::Tcp => ask_tcp(resolver, id, query, question).await,
    }
}

/// The resolvers of a `resolv.conf(5)`. Ours is left out where it is one of them.
pub(crate) fn read(path: &Path) -> io::Result<Vec<SocketAddr>> {
    Ok(parse(&std::fs::read_to_string(path)?))
}

fn parse(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then_some(words.next()?)
    });
    let ours = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if NetworkId::of(*v6).is_some());
    servers
        .filter_map(|address| address.parse::<IpAddr>().ok())
        .filter(|ip| !ours(ip))
        .map(|ip| SocketAddr::new(ip, PORT))
        .take(MOST)
        .collect()
}

/// Every question has a socket, so a port, of its own: with the number that is what a forger has to
/// guess (RFC 5452). A connected socket hears from nobody else, and of closed ports at once.
async fn ask_udp(to: SocketAddr, id: u16, query: &[u8], question: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(to).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; 1 << 12];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if wire::answers(&buffer[..length], id, question) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn ask_tcp(to: SocketAddr, id: u16, query: &[u8], question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(to).await?;
    let length = (query.len() as u16).to_be_bytes();
    stream.write_all(&[&length, query].concat()).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await?;
    match wire::answers(&answer, id, question) {
        true => Ok(answer),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the answer to something else",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_resolv_conf() {
        let text = "# nameserver 192.0.2.9\n; comment\nsearch example.org\n  nameserver\t192.0.2.1 \n\
             nameserver fdaa::3\nnameserver 2001:db8::1\nnameserver nonsense\nnameserver\n\
             nameserver 192.0.2.2\nnameserver 192.0.2.3\noptions edns0\n";
        let expected = ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:53"];
        assert_eq!(parse(text), expected.map(|a| a.parse().unwrap()));
        assert_eq!(parse(""), []);
    }
}
