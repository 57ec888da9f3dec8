//! Organizations and what they own, and peers.

use std::net::Ipv6Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{AppName, HostId, Hostname, MachineNumber, NetworkId, OrgSlug, PeerName, Record};

/// A group of people that owns apps; the unit of isolation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Organization {
    /// Its slug.
    pub slug: OrgSlug,
    /// Its name, for people.
    pub name: String,
    /// The network its apps are in unless they ask for another.
    pub default_network: NetworkId,
    /// When it was made.
    pub created_at: Timestamp,
}

/// A private network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its 32 bits.
    pub id: NetworkId,
    /// Its owner.
    pub organization: OrgSlug,
    /// Its name, unique in the organization; `default` for the first.
    pub name: String,
}

/// An app: a name, and Machines that answer to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct App {
    /// Its name, unique.
    pub name: AppName,
    /// Its owner.
    pub organization: OrgSlug,
    /// The network its Machines are in. Never changes, and tells it from another owner's app of the same name.
    pub network: NetworkId,
    /// It is being removed: it gets nothing new, and its name is not free while anything of it is left.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleting: bool,
    /// When it was made.
    pub created_at: Timestamp,
}

/// A public host name and the app that answers to it. Written by the API; the router reads it, and
/// `tern-certs` gets a certificate for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostnameRoute {
    /// The host name.
    pub hostname: Hostname,
    /// The app.
    pub app: AppName,
    /// When it was asked for.
    pub created_at: Timestamp,
}

/// A WireGuard peer of a user's: a laptop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name, unique in its network.
    pub name: PeerName,
    /// Its owner.
    pub organization: OrgSlug,
    /// The network it joins.
    pub network: NetworkId,
    /// The host it connects to.
    pub host: HostId,
    /// Its number in the network, from the same count as Machines'.
    pub number: MachineNumber,
    /// Its address, made of the three above.
    pub address: Ipv6Addr,
    /// Its WireGuard public key, base64.
    pub public_key: String,
    /// When it was made.
    pub created_at: Timestamp,
}

impl Record for Organization {
    const PREFIX: &'static str = "organizations/";
    fn id(&self) -> String {
        self.slug.to_string()
    }
}

impl Record for Network {
    const PREFIX: &'static str = "networks/";
    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl Record for App {
    const PREFIX: &'static str = "apps/";
    fn id(&self) -> String {
        self.name.to_string()
    }
}

impl Record for HostnameRoute {
    const PREFIX: &'static str = "hostnames/";
    fn id(&self) -> String {
        self.hostname.to_string()
    }
}

impl Record for Peer {
    const PREFIX: &'static str = "peers/";
    fn id(&self) -> String {
        format!("{}/{}", self.network, self.name)
    }
}
