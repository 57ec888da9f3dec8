//! Where an app listens, as its guest's kernel tells: `/proc/net/tcp` and `/proc/net/tcp6` (`proc_net_tcp.rst` in
//! Linux's documentation).

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The state of a socket that listens.
const LISTEN: &str = "0A";

/// Where an app listens.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listening {
    /// Ports that others reach.
    pub open: BTreeSet<u16>,
    /// Ports that only the Machine itself reaches.
    pub loopback: BTreeSet<u16>,
}

impl Listening {
    /// Reads both files, one after the other; what is no line of theirs is passed over.
    pub fn read(text: &str) -> Self {
        let mut found = Self::default();
        for (address, port) in text.lines().filter_map(listener) {
            let within = match address {
                IpAddr::V4(v4) => v4.is_loopback(),
                IpAddr::V6(v6) => v6
                    .to_ipv4_mapped()
                    .map_or(v6.is_loopback(), |v4| v4.is_loopback()),
            };
            if within {
                found.loopback.insert(port);
            } else {
                found.open.insert(port);
            }
        }
        found
    }

    /// What to say to somebody who expects it at `port`, in vain; nothing where it does not listen at all.
    pub fn instead_of(&self, port: u16) -> Option<String> {
        if self.open.contains(&port) {
            return None;
        }
        if self.loopback.contains(&port) {
            return Some(format!(
                "listens on port {port} of 127.0.0.1 alone, where nobody else reaches it; have it listen on 0.0.0.0 or [::]"
            ));
        }
        let all: BTreeSet<u16> = self.open.union(&self.loopback).copied().collect();
        if all.is_empty() {
            return None;
        }
        let ports: Vec<String> = all.iter().map(u16::to_string).collect();
        Some(format!(
            "listens on {}, fly.toml says {port}; write the app's own port there (internal_port)",
            ports.join(" and ")
        ))
    }
}

/// The address and port of a line of a socket that listens.
fn listener(line: &str) -> Option<(IpAddr, u16)> {
    let mut words = line.split_ascii_whitespace();
    let (_, local, _, state) = (words.next()?, words.next()?, words.next()?, words.next()?);
    if state != LISTEN {
        return None;
    }
    let (address, port) = local.split_once(':')?;
    Some((address_of(address)?, u16::from_str_radix(port, 16).ok()?))
}

/// An address is written as 32-bit words as they lie in memory; guests are little-endian.
fn address_of(hex: &str) -> Option<IpAddr> {
    if !hex.is_ascii() {
        return None;
    }
    let word = |at: usize| {
        let digits = hex.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_le_bytes())
    };
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let mut bytes = [0; 16];
            bytes.copy_from_slice(words.as_flattened());
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    fn line(local: &str, state: &str) -> String {
        format!(
            "   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 1 1 0\n"
        )
    }

    fn read(lines: &[String]) -> Listening {
        Listening::read(&format!("{HEAD}{}", lines.concat()))
    }

    #[test]
    fn listeners_are_found_by_who_reaches_them() {
        let found = read(&[
            line("00000000:0BB8", "0A"),
            line("0100007F:1F90", "0A"),
            // A connection, not a listener.
            line("0100007F:0050", "01"),
            HEAD.to_owned(),
            line("00000000000000000000000000000000:01BB", "0A"),
            line("00000000000000000000000001000000:270F", "0A"),
            line("0000000000000000FFFF00000100007F:270E", "0A"),
            // fdaa:0:1::2
            line("0000AAFD000001000000000002000000:1389", "0A"),
        ]);
        assert_eq!(found.open, [443, 3000, 5001].into());
        assert_eq!(found.loopback, [8080, 9998, 9999].into());
    }

    #[test]
    fn an_app_that_listens_elsewhere_is_told_where() {
        let elsewhere = read(&[line("00000000:0BB8", "0A"), line("0100007F:1F90", "0A")]);
        assert_eq!(elsewhere.instead_of(3000), None);
        let told = elsewhere.instead_of(5000).unwrap();
        assert!(
            told.contains("listens on 3000 and 8080, fly.toml says 5000"),
            "{told}"
        );
        let told = elsewhere.instead_of(8080).unwrap();
        assert!(told.contains("127.0.0.1 alone"), "{told}");
        assert_eq!(read(&[]).instead_of(8080), None);
    }

    #[test]
    fn what_a_guest_may_say_instead_is_no_listener() {
        for nonsense in [
            "",
            "cat: not found",
            "0: zz:zz 0 0A",
            "0: 0100007F 0 0A",
            "0: 0100007F:10000 0 0A",
            "0: ééééé:0050 0 0A",
            "0: 0100007F0100007F:0050 0 0A",
        ] {
            assert_eq!(
                Listening::read(nonsense),
                Listening::default(),
                "{nonsense}"
            );
        }
    }
}
