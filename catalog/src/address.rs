//! The private address plan.
//!
//! `fdaa` (16 bits) | network (32) | host (32) | machine (32) | free (16). A network is a /48, a
//! Machine owns a /112. Network 0 is the hosts' own.

use std::fmt;
use std::net::Ipv6Addr;

use ipnet::Ipv6Net;
use serde::{Deserialize, Serialize};

/// The resolver's address in every Machine.
pub const RESOLVER: Ipv6Addr = Ipv6Addr::new(0xfdaa, 0, 0, 0, 0, 0, 0, 3);

/// The network of the hosts themselves.
pub const INFRASTRUCTURE: NetworkId = NetworkId(0);

const PREFIX: u128 = 0xfdaa << 112;
/// Low 16 bits of the address that a Machine uses in its /112.
const MACHINE_SUFFIX: u128 = 2;
/// Low 16 bits of the address that a peer uses in its /120.
const PEER_SUFFIX: u128 = 2;

/// An organization's network; its 32 bits stand in every address of it. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NetworkId(pub u32);

/// A host; its 32 bits stand in every address on it. Host ids start at 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostId(pub u32);

/// A Machine's or peer's number within its network, unique there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MachineNumber(pub u32);

/// The parts of a private address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrivateAddress {
    /// The network it belongs to.
    pub network: NetworkId,
    /// The host it is reached through.
    pub host: HostId,
    /// The Machine or peer.
    pub machine: MachineNumber,
    /// The low 16 bits.
    pub suffix: u16,
}

impl NetworkId {
    /// The network's /48.
    pub fn prefix(self) -> Ipv6Net {
        net(compose(self.0, 0, 0, 0), 48)
    }

    /// The resolver's address inside this network, `<net>::3`, for WireGuard peers.
    pub fn resolver(self) -> Ipv6Addr {
        Ipv6Addr::from(compose(self.0, 0, 0, 3))
    }

    /// The network an address belongs to; `None` outside `fdaa::/16`.
    pub fn of(address: Ipv6Addr) -> Option<Self> {
        PrivateAddress::parse(address).map(|a| a.network)
    }
}

impl HostId {
    /// The host's own address, from which its gate speaks to Machines.
    pub fn address(self) -> Ipv6Addr {
        Ipv6Addr::from(compose(INFRASTRUCTURE.0, self.0, 0, 1))
    }
}

impl PrivateAddress {
    /// The address a Machine uses.
    pub fn of_machine(network: NetworkId, host: HostId, machine: MachineNumber) -> Ipv6Addr {
        Ipv6Addr::from(compose(network.0, host.0, machine.0, MACHINE_SUFFIX))
    }

    /// The /112 a Machine owns.
    pub fn machine_prefix(network: NetworkId, host: HostId, machine: MachineNumber) -> Ipv6Net {
        net(compose(network.0, host.0, machine.0, 0), 112)
    }

    /// The address a peer uses, within [`Self::peer_prefix`].
    pub fn of_peer(network: NetworkId, host: HostId, peer: MachineNumber) -> Ipv6Addr {
        Ipv6Addr::from(compose(network.0, host.0, peer.0, PEER_SUFFIX))
    }

    /// The /120 a peer owns.
    pub fn peer_prefix(network: NetworkId, host: HostId, peer: MachineNumber) -> Ipv6Net {
        net(compose(network.0, host.0, peer.0, 0), 120)
    }

    /// Takes an address apart; `None` outside `fdaa::/16`.
    pub fn parse(address: Ipv6Addr) -> Option<Self> {
        let bits = u128::from(address);
        (bits >> 112 == PREFIX >> 112).then_some(Self {
            network: NetworkId((bits >> 80) as u32),
            host: HostId((bits >> 48) as u32),
            machine: MachineNumber((bits >> 16) as u32),
            suffix: bits as u16,
        })
    }
}

impl fmt::Display for NetworkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn compose(network: u32, host: u32, machine: u32, suffix: u128) -> u128 {
    PREFIX | u128::from(network) << 80 | u128::from(host) << 48 | u128::from(machine) << 16 | suffix
}

fn net(bits: u128, length: u8) -> Ipv6Net {
    Ipv6Net::new(Ipv6Addr::from(bits), length).expect("the lengths used here are at most 128")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_address_encodes_network_host_and_machine() {
        let (n, h, m) = (
            NetworkId(0x0863_0a7b),
            HostId(0x0bea_0001),
            MachineNumber(0xdead_beef),
        );
        let address = PrivateAddress::of_machine(n, h, m);
        assert_eq!(address.to_string(), "fdaa:863:a7b:bea:1:dead:beef:2");
        assert!(n.prefix().contains(&address));
        assert!(PrivateAddress::machine_prefix(n, h, m).contains(&address));
        let parts = PrivateAddress::parse(address).unwrap();
        assert_eq!(
            (parts.network, parts.host, parts.machine, parts.suffix),
            (n, h, m, 2)
        );
    }

    #[test]
    fn the_resolver_is_in_the_hosts_network() {
        assert_eq!(NetworkId::of(RESOLVER), Some(INFRASTRUCTURE));
        assert_eq!(INFRASTRUCTURE.resolver(), RESOLVER);
        assert_eq!(NetworkId(1).resolver().to_string(), "fdaa:0:1::3");
        assert_eq!(HostId(1).address().to_string(), "fdaa::1:0:0:1");
    }

    #[test]
    fn other_addresses_belong_to_no_network() {
        assert_eq!(NetworkId::of("fdab::1".parse().unwrap()), None);
        assert_eq!(NetworkId::of("::ffff:10.0.0.1".parse().unwrap()), None);
    }
}
