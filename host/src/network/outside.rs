//! What Machines reach beyond the private network: the public Internet over IPv4, what the host's owner allows,
//! and the host's own public ports.
//!
//! What is private or special by the IANA's registry (RFC 6890) is somebody's inside: the owner's network, its
//! router, the provider's services that hand out credentials to whoever asks from this host. A guest is a stranger
//! there. The refusal is told (ICMP, "administratively prohibited"), so that nobody waits for a timeout.

use std::fmt;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use ipnet::Ipv4Net;
use thiserror::Error;

/// An IPv4 prefix that Machines may reach although it is private or special.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllowedPrefix(Ipv4Net);

/// Why a prefix cannot be allowed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PrefixError {
    /// No prefix, or one of IPv6.
    #[error(
        "{0} is no IPv4 prefix, as 10.1.0.0/16 or 10.1.2.3 is; Machines reach the outside over IPv4 alone"
    )]
    Syntax(String),
    /// Machines' own addresses, this host's own, or a group's.
    #[error("{0} has addresses of {1}, which are never outside")]
    Never(Ipv4Net, Ipv4Net),
}

/// What Machines reach beyond the private network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Outside {
    /// Whether they reach it at all.
    pub(crate) nat: bool,
    pub(crate) allowed: Vec<AllowedPrefix>,
    /// Where the edge listens.
    pub(crate) public: Vec<SocketAddr>,
}

/// Nobody's outside, whatever is allowed: Machines' own, the host's own, groups.
const NEVER: [(Ipv4Addr, u8); 3] = [
    (Ipv4Addr::new(172, 19, 0, 0), 16),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
];

/// Private or special. Addresses for documentation are not among them: nobody has them.
const SPECIAL: [(Ipv4Addr, u8); 10] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    // Behind a carrier's NAT; overlay networks, and a cloud's credentials, too.
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    // A cloud's agent and credentials, at an address that looks public.
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    // Link-local: most clouds' credentials.
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    // Between networks under test.
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    // Reserved, and the broadcast address.
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

impl FromStr for AllowedPrefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let host = text.parse::<Ipv4Addr>().map(Ipv4Net::from);
        let prefix = host.or_else(|_| text.parse::<Ipv4Net>());
        let prefix = prefix
            .map_err(|_| PrefixError::Syntax(text.to_owned()))?
            .trunc();
        // What holds one of these allows what is around it: they are refused before.
        let inside = NEVER
            .map(net)
            .into_iter()
            .find(|never| never.contains(&prefix));
        inside.map_or(Ok(Self(prefix)), |never| {
            Err(PrefixError::Never(prefix, never))
        })
    }
}

impl fmt::Display for AllowedPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Outside {
    /// The end of the rules for what comes from a Machine and is to be forwarded, when it is not to its own
    /// network.
    pub(super) fn through(&self) -> String {
        if !self.nat {
            return "counter drop".to_owned();
        }
        let mut text = format!("ip daddr {{ {} }} counter drop\n", list(NEVER.map(net)));
        let allowed: Vec<Ipv4Net> = self.allowed.iter().map(|prefix| prefix.0).collect();
        let allowed = Ipv4Net::aggregate(&allowed);
        if !allowed.is_empty() {
            let _ = writeln!(text, "    ip daddr {{ {} }} accept", list(allowed));
        }
        let _ = writeln!(
            text,
            "    ip daddr {{ {} }} counter reject with icmp admin-prohibited",
            list(SPECIAL.map(net))
        );
        text.push_str("    accept");
        text
    }

    /// Rules that let a Machine call the host's own public addresses where the edge listens, as anybody may: by
    /// them Machines call each other's public names.
    pub(super) fn to_edge(&self) -> String {
        let mut text = String::new();
        for listener in &self.public {
            let to = match listener.ip() {
                ip if ip.is_loopback() => continue,
                // IPv4 too (`ipv6(7)`).
                IpAddr::V6(ip) if ip.is_unspecified() => String::new(),
                IpAddr::V4(ip) if ip.is_unspecified() => "meta nfproto ipv4 ".to_owned(),
                IpAddr::V6(ip) => format!("ip6 daddr {ip} "),
                IpAddr::V4(ip) => format!("ip daddr {ip} "),
            };
            let port = listener.port();
            let _ = writeln!(
                text,
                "    {to}meta l4proto {{ tcp, udp }} th dport {port} accept"
            );
        }
        text
    }

    /// What is not an address for that, although it is the host's own.
    pub(super) fn inner() -> String {
        format!(
            "ip6 daddr {{ fdaa::/16, fe80::/10, ff00::/8 }} counter drop\n    ip daddr {{ {} }} counter drop",
            list(NEVER.map(net))
        )
    }
}

fn net((address, length): (Ipv4Addr, u8)) -> Ipv4Net {
    Ipv4Net::new_assert(address, length)
}

fn list(prefixes: impl IntoIterator<Item = Ipv4Net>) -> String {
    let prefixes: Vec<String> = prefixes.into_iter().map(|p| p.to_string()).collect();
    prefixes.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_read_and_what_is_never_outside_is_refused() {
        let read = |text: &str| text.parse::<AllowedPrefix>().map(|p| p.to_string());
        assert_eq!(read("10.1.2.3/16").unwrap(), "10.1.0.0/16");
        assert_eq!(read("169.254.169.253").unwrap(), "169.254.169.253/32");
        assert_eq!(read("0.0.0.0/0").unwrap(), "0.0.0.0/0");
        for never in ["172.19.4.0/24", "127.0.0.1", "224.0.0.0/4"] {
            assert!(
                matches!(read(never), Err(PrefixError::Never(..))),
                "{never}"
            );
        }
        for bad in ["", "fd00::/8", "10.0.0.0/33", "lan"] {
            assert!(matches!(read(bad), Err(PrefixError::Syntax(_))), "{bad}");
        }
    }
}
