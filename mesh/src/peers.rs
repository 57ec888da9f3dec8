//! Who is a peer of this host, as the catalog says.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use tern_catalog::{HostId, INFRASTRUCTURE, MachineNumber, NetworkId, Snapshot};

use crate::PublicKey;
use crate::prefix::Prefix;

/// What the owner of a key may speak for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant {
    /// Another host: everything that lives there, in any network.
    Host {
        /// The host.
        id: HostId,
        /// Where it is.
        endpoint: SocketAddr,
    },
    /// A laptop: its own /120.
    Laptop {
        /// Its network.
        network: NetworkId,
        /// Its number there.
        number: MachineNumber,
    },
}

impl Grant {
    pub(crate) fn prefix(&self, ours: HostId) -> Prefix {
        match *self {
            Self::Host { id, .. } => Prefix::host(id),
            Self::Laptop { network, number } => Prefix::laptop(network, ours, number),
        }
    }
}

/// The peers of host `ours`: all other hosts, and the laptops that connect to this one.
pub fn peers_of(snapshot: &Snapshot, ours: HostId) -> Vec<(PublicKey, Grant)> {
    let hosts = snapshot.hosts.values().filter(|h| h.id != ours);
    let hosts = hosts.filter_map(|h| {
        let (id, endpoint) = (h.id, h.endpoint);
        let key = key_of(&h.public_key, || format!("host {id}"))?;
        Some((key, Grant::Host { id, endpoint }))
    });
    let laptops = snapshot.peers.iter().filter(|(_, p)| p.host == ours);
    let laptops = laptops.filter_map(|(record, p)| {
        let (network, number) = (p.network, p.number);
        let key = key_of(&p.public_key, || format!("peer {record}"))?;
        // Network 0 is the hosts' own; nobody joins it from outside.
        (network != INFRASTRUCTURE).then_some((key, Grant::Laptop { network, number }))
    });
    hosts.chain(laptops).collect()
}

/// The networks that have anything on host `ours`, and so need its resolver.
pub(crate) fn networks_of(snapshot: &Snapshot, ours: HostId) -> BTreeSet<NetworkId> {
    let machines = snapshot.machines.values().filter(|m| m.host == ours);
    let laptops = snapshot.peers.values().filter(|p| p.host == ours);
    machines
        .map(|m| m.network)
        .chain(laptops.map(|p| p.network))
        .filter(|network| *network != INFRASTRUCTURE)
        .collect()
}

/// Whether an address is inside the private network. WireGuard's own datagrams never are: they
/// would go round in the tunnel.
pub(crate) fn is_private(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if NetworkId::of(v6).is_some())
}

fn key_of(text: &str, whose: impl FnOnce() -> String) -> Option<PublicKey> {
    let key = text.parse();
    if key.is_err() {
        tracing::warn!(
            record = whose(),
            "this WireGuard key is malformed, the peer is left out"
        );
    }
    key.ok()
}
