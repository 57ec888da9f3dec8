//! The header of the PROXY protocol, versions 1 and 2 (HAProxy's `doc/proxy-protocol.txt`). No I/O.

use std::io::Write as _;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use bytes::{BufMut as _, BytesMut};
use tern_catalog::ProxyProtocol;

use super::Ends;

/// Section 2.2.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, PROXY.
const PROXIED: u8 = 0x21;
/// TCP over IPv4 and IPv6.
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// Appends the header that tells an app of a connection's two ends.
pub fn header(out: &mut BytesMut, version: ProxyProtocol, ends: Ends) {
    let (client, local) = (canonical(ends.client), canonical(ends.local));
    // Both are told in one family: what is of IPv4 alone is mapped where the other is not.
    let both = match (client.ip(), local.ip()) {
        (IpAddr::V4(client), IpAddr::V4(local)) => Ok((client, local)),
        (client, local) => Err((six(client), six(local))),
    };
    let (from, to) = (client.port(), local.port());
    match (version, both) {
        (ProxyProtocol::V1, both) => {
            let text = &mut out.writer();
            // Into memory: there is room.
            let _ = match both {
                Ok((client, local)) => {
                    write!(text, "PROXY TCP4 {client} {local} {from} {to}\r\n")
                }
                Err((client, local)) => {
                    write!(text, "PROXY TCP6 {client} {local} {from} {to}\r\n")
                }
            };
        }
        (ProxyProtocol::V2, both) => {
            out.put_slice(SIGNATURE);
            out.put_u8(PROXIED);
            match both {
                Ok((client, local)) => {
                    out.put_u8(TCP4);
                    out.put_u16(12);
                    out.put_slice(&client.octets());
                    out.put_slice(&local.octets());
                }
                Err((client, local)) => {
                    out.put_u8(TCP6);
                    out.put_u16(36);
                    out.put_slice(&client.octets());
                    out.put_slice(&local.octets());
                }
            }
            out.put_u16(from);
            out.put_u16(to);
        }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn six(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(version: ProxyProtocol, client: &str, local: &str) -> Vec<u8> {
        let ends = Ends {
            client: client.parse().unwrap(),
            local: local.parse().unwrap(),
        };
        let mut out = BytesMut::new();
        header(&mut out, version, ends);
        out.to_vec()
    }

    #[test]
    fn a_line_of_text() {
        let line =
            |client, local| String::from_utf8(told(ProxyProtocol::V1, client, local)).unwrap();
        assert_eq!(
            line("192.0.2.7:1000", "[::ffff:198.51.100.1]:5432"),
            "PROXY TCP4 192.0.2.7 198.51.100.1 1000 5432\r\n"
        );
        assert_eq!(
            line("[2001:db8::7]:1000", "[2001:db8::1]:25"),
            "PROXY TCP6 2001:db8::7 2001:db8::1 1000 25\r\n"
        );
    }

    #[test]
    fn binary() {
        let mut four = SIGNATURE.to_vec();
        four.extend([0x21, 0x11, 0, 12, 192, 0, 2, 7, 198, 51, 100, 1]);
        four.extend([0x03, 0xe8, 0x15, 0x38]);
        assert_eq!(
            told(ProxyProtocol::V2, "192.0.2.7:1000", "198.51.100.1:5432"),
            four
        );
        let six = told(ProxyProtocol::V2, "[2001:db8::7]:1000", "[2001:db8::1]:25");
        assert_eq!(
            (six.len(), &six[12..16]),
            (16 + 36, &[0x21, 0x21, 0, 36][..])
        );
        assert_eq!(&six[48..], [0x03, 0xe8, 0, 25]);
    }
}
