//! Who serves what on which public port.
//!
//! Where the first bytes of a connection name an app (TLS by its server name, HTTP by its host), apps share a port.
//! Where they do not (raw TCP, UDP), the port is one app's alone.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use jiff::Timestamp;

use crate::{
    AppName, DesiredState, Machine, MachineId, Port, PortKind, ProxyProtocol, Service,
    ServiceProtocol,
};

/// What is claimed of the public ports by a set of Machines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PublicPorts {
    tcp: BTreeMap<u16, PortClaim>,
    udp: BTreeMap<u16, Exclusive>,
}

/// What is claimed of one TCP port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortClaim {
    /// All its connections are one app's.
    Exclusive(Exclusive),
    /// A connection tells by its first bytes which app it is for. Which ways of telling there are:
    Shared {
        /// A TLS handshake's server name.
        tls: bool,
        /// The same after PostgreSQL's request for it.
        pg_tls: bool,
        /// An HTTP request's host.
        http: bool,
    },
}

/// The app that has a port alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exclusive {
    /// The app.
    pub app: AppName,
    /// The port that its Machines listen on.
    pub internal_port: u16,
    /// The header by which they are told who connected.
    pub proxy: Option<ProxyProtocol>,
}

/// Public ports that a configuration may name beside 80 and 443: each takes a socket per thread of every edge. All Machines of
/// an app together may name twice as many, so that they can be moved.
pub const MAX_PORTS_OF_APP: usize = 256;

/// Ports that services may name, beside 80 and 443: `1024-65535`, or `25,465,1024-65535`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRanges(Vec<RangeInclusive<u16>>);

/// Two Machines that want the same port: who came first has it.
type Since<'a> = (Timestamp, &'a MachineId);

impl PublicPorts {
    /// What these Machines claim. Where two claims exclude each other (the API lets none come to that, but for two
    /// that are made in the same moment), that of the Machine made first holds.
    pub fn of<'a>(machines: impl Iterator<Item = &'a Machine>) -> Self {
        let mut tcp: BTreeMap<u16, (Since<'a>, PortClaim)> = BTreeMap::new();
        let mut udp: BTreeMap<u16, (Since<'a>, Exclusive)> = BTreeMap::new();
        for machine in machines {
            if matches!(machine.desired.state, DesiredState::Destroyed { .. }) {
                continue;
            }
            let since = (machine.created_at, &machine.id);
            for (service, port, numbers) in claims(machine) {
                let own = || Exclusive {
                    app: machine.app.clone(),
                    internal_port: service.internal_port,
                    proxy: port.proxy_protocol(),
                };
                for number in numbers {
                    if service.protocol == ServiceProtocol::Udp {
                        let held = udp.entry(number).or_insert_with(|| (since, own()));
                        if since < held.0 {
                            *held = (since, own());
                        }
                        continue;
                    }
                    let Some(kind) = port.kind() else { continue };
                    let claim = match kind {
                        PortKind::Raw => PortClaim::Exclusive(own()),
                        kind => PortClaim::Shared {
                            tls: matches!(kind, PortKind::Tls | PortKind::Https),
                            pg_tls: kind == PortKind::PgTls,
                            http: kind == PortKind::Http,
                        },
                    };
                    let Some((holder, held)) = tcp.get_mut(&number) else {
                        tcp.insert(number, (since, claim));
                        continue;
                    };
                    if held.join(&claim) {
                        *holder = since.min(*holder);
                    } else if since < *holder {
                        (*holder, *held) = (since, claim);
                    }
                }
            }
        }
        Self {
            tcp: tcp.into_iter().map(|(n, (_, claim))| (n, claim)).collect(),
            udp: udp.into_iter().map(|(n, (_, claim))| (n, claim)).collect(),
        }
    }

    /// The TCP ports, in order.
    pub fn tcp(&self) -> impl Iterator<Item = (u16, &PortClaim)> {
        self.tcp.iter().map(|(number, claim)| (*number, claim))
    }

    /// What is claimed of a TCP port.
    pub fn claim(&self, number: u16) -> Option<&PortClaim> {
        self.tcp.get(&number)
    }

    /// The UDP ports, in order.
    pub fn udp(&self) -> impl Iterator<Item = (u16, &Exclusive)> {
        self.udp.iter().map(|(number, claim)| (*number, claim))
    }

    /// Whose all datagrams of a UDP port are.
    pub fn datagrams(&self, number: u16) -> Option<&Exclusive> {
        self.udp.get(&number)
    }

    /// The first port that these services want and, beside the claims here, cannot have. The claims are to be those
    /// of all other apps.
    pub fn taken(&self, services: &[Service]) -> Option<u16> {
        let mut wanted = services.iter().flat_map(|service| {
            let ports = service.ports.iter();
            ports.map(move |port| (service.protocol, port))
        });
        wanted.find_map(|(protocol, port)| {
            port.numbers()?.find(|number| match protocol {
                ServiceProtocol::Udp => self.udp.contains_key(number),
                ServiceProtocol::Tcp => match self.tcp.get(number) {
                    None => false,
                    Some(PortClaim::Exclusive(_)) => true,
                    Some(PortClaim::Shared { .. }) => port.kind() == Some(PortKind::Raw),
                },
            })
        })
    }
}

impl PortRanges {
    /// Whether this port is one of them.
    pub fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|range| range.contains(&port))
    }

    /// The same without these.
    pub fn without(mut self, ports: &[u16]) -> Self {
        for &port in ports {
            let split = |range: RangeInclusive<u16>| {
                let (first, last) = (*range.start(), *range.end());
                if !range.contains(&port) {
                    return [Some(range), None];
                }
                let below = (first < port).then(|| first..=port - 1);
                let above = (port < last).then(|| port + 1..=last);
                [below, above]
            };
            self.0 = self.0.into_iter().flat_map(split).flatten().collect();
        }
        self
    }
}

impl Default for PortRanges {
    /// Those that the host's own services seldom have.
    fn default() -> Self {
        Self(vec![1024..=u16::MAX])
    }
}

impl FromStr for PortRanges {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: u16 = first.trim().parse().ok()?;
            let last: u16 = last.trim().parse().ok()?;
            (first > 0 && first <= last).then_some(first..=last)
        };
        let parts = text.split(',').map(|part| {
            let read = range(part);
            read.ok_or_else(|| {
                format!("{part:?} is no port and no range of them; write 25 or 1024-65535")
            })
        });
        if text.trim() == "none" {
            return Ok(Self(Vec::new()));
        }
        parts.collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for PortRanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (n, range) in self.0.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            let (first, last) = (range.start(), range.end());
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

impl PortClaim {
    /// Takes another claim in, where both can be served.
    fn join(&mut self, other: &Self) -> bool {
        match (self, other) {
            // Machines of one app: a service that two ways lead to.
            (Self::Exclusive(one), Self::Exclusive(two)) => one.app == two.app,
            (
                Self::Shared { tls, pg_tls, http },
                Self::Shared {
                    tls: other_tls,
                    pg_tls: other_pg,
                    http: other_http,
                },
            ) => {
                *tls |= other_tls;
                *pg_tls |= other_pg;
                *http |= other_http;
                true
            }
            _ => false,
        }
    }
}

/// The ports of a Machine that are served at all.
fn claims(machine: &Machine) -> impl Iterator<Item = (&Service, &Port, RangeInclusive<u16>)> {
    machine.config.services.iter().flat_map(|service| {
        let ports = service.ports.iter();
        ports.filter_map(move |port| {
            let numbers = port.numbers()?;
            // 80 and 443 are everybody's.
            let alone =
                port.kind() == Some(PortKind::Raw) || service.protocol == ServiceProtocol::Udp;
            let held = alone && (numbers.contains(&80) || numbers.contains(&443));
            (!held).then_some((service, port, numbers))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A Machine of this app, made at this second, with these services.
    fn machine(app: &str, second: i64, services: &str) -> Machine {
        let id = format!("{second:014x}");
        let json = format!(
            r#"{{"id":"{id}","name":"m","app":"{app}","network":1,"host":1,"region":"ams","number":2,
            "private_ip":"fdaa::2","config":{{"image":"x","services":{services}}},"instance_id":"i","version":1,
            "desired":{{"state":"started","generation":1}},
            "created_at":"1970-01-01T00:00:{second:02}Z","updated_at":"1970-01-01T00:00:00Z"}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    const RAW: &str = r#"[{"internal_port":9,"ports":[{"port":2000}]}]"#;
    const TLS: &str = r#"[{"internal_port":9,"ports":[{"port":2000,"handlers":["tls"]}]}]"#;
    const HTTP: &str = r#"[{"internal_port":9,"ports":[{"port":2000,"handlers":["http"]}]}]"#;

    fn services(json: &str) -> Vec<Service> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_port_without_names_is_one_apps_alone_and_others_share() {
        let ours = [machine("a", 2, RAW), machine("a", 3, RAW)];
        let ports = PublicPorts::of(ours.iter());
        let PortClaim::Exclusive(owner) = ports.claim(2000).unwrap() else {
            panic!("{ports:?}");
        };
        assert_eq!((owner.app.as_str(), owner.internal_port), ("a", 9));
        for wanted in [RAW, TLS, HTTP] {
            assert_eq!(ports.taken(&services(wanted)), Some(2000));
        }

        let shared = [machine("a", 2, TLS), machine("b", 3, HTTP)];
        let ports = PublicPorts::of(shared.iter());
        let both = PortClaim::Shared {
            tls: true,
            pg_tls: false,
            http: true,
        };
        assert_eq!(ports.claim(2000), Some(&both));
        assert_eq!(ports.taken(&services(TLS)), None);
        assert_eq!(ports.taken(&services(RAW)), Some(2000));
        // UDP and TCP have their own numbers.
        let udp = r#"[{"protocol":"udp","internal_port":9,"ports":[{"port":2000}]}]"#;
        assert_eq!(ports.taken(&services(udp)), None);
        let ports = PublicPorts::of([machine("a", 2, udp)].iter());
        assert_eq!(ports.taken(&services(udp)), Some(2000));
        assert_eq!(ports.taken(&services(RAW)), None);
    }

    #[test]
    fn of_two_that_exclude_each_other_the_first_holds_in_whatever_order_they_are_seen() {
        let (first, second) = (machine("a", 2, RAW), machine("b", 3, TLS));
        for order in [[&first, &second], [&second, &first]] {
            let ports = PublicPorts::of(order.into_iter());
            assert!(matches!(ports.claim(2000), Some(PortClaim::Exclusive(_))));
        }
        let (first, second) = (machine("a", 2, TLS), machine("b", 3, RAW));
        for order in [[&first, &second], [&second, &first]] {
            let ports = PublicPorts::of(order.into_iter());
            assert!(matches!(ports.claim(2000), Some(PortClaim::Shared { .. })));
        }
    }

    #[test]
    fn ranges_are_read_as_they_are_written() {
        for text in ["1024-65535", "25,465,1024-2000", "none"] {
            assert_eq!(text.parse::<PortRanges>().unwrap().to_string(), text);
        }
        let ports: PortRanges = "25, 100-200".parse().unwrap();
        assert!(ports.contains(25) && ports.contains(100) && ports.contains(200));
        assert!(!ports.contains(26) && !ports.contains(201));
        let left = ports.without(&[25, 100, 150, 200, 7]);
        assert_eq!(left.to_string(), "101-149,151-199");
        for bad in ["", "0", "5-4", "a", "1-2-3", "70000", "1,,2"] {
            assert!(bad.parse::<PortRanges>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_ports_of_all_apps_are_never_one_apps() {
        let range = r#"[{"internal_port":9,"ports":[{"start_port":79,"end_port":81}]}]"#;
        assert_eq!(
            PublicPorts::of([machine("a", 2, range)].iter()),
            PublicPorts::default()
        );
    }
}
