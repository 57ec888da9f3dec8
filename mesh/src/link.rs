//! The TUN device's place in the kernel's network: addresses, the route, and forwarding.
//!
//! All of it but the switch for forwarding belongs to the device and vanishes with it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use netlink_packet_route::address::{AddressAttribute, AddressMessage, CacheInfo};
use rtnetlink::{AddressMessageBuilder, Handle, LinkUnspec, RouteMessageBuilder};
use tern_catalog::{HostId, NetworkId, RESOLVER};
use thiserror::Error;
use tokio::task::JoinHandle;

use crate::MTU;

/// Where the kernel keeps its IPv6 switches.
const SWITCHES: &str = "/proc/sys/net/ipv6/conf";
/// Packets that the device may hold: one thread drains it, and a longer queue spares TCP drops.
const QUEUE: u32 = 1000;

/// Why the device cannot be set up.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The kernel refused a request.
    #[error("cannot {what}")]
    Netlink {
        /// What was asked for.
        what: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// There is no speaking to the kernel, or no such device.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A switch cannot be set.
    #[error("cannot write {value} to {}", .path.display())]
    Switch {
        /// The switch.
        path: PathBuf,
        /// The value.
        value: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// A configured device.
pub(crate) struct Link {
    name: String,
    index: u32,
    handle: Handle,
    connection: JoinHandle<()>,
    networks: BTreeSet<NetworkId>,
}

impl Link {
    /// Brings the device up with the host's address, the resolver's, and the route to the private
    /// network, and lets the kernel forward.
    pub(crate) async fn configure(name: &str, host: HostId) -> Result<Self, LinkError> {
        let io = |what| move |source| LinkError::Io { what, source };
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(io("open a netlink socket"))?;
        let index =
            nix::net::if_::if_nametoindex(name).map_err(|e| io("find the TUN device")(e.into()))?;
        let link = Self {
            name: name.to_owned(),
            index,
            handle,
            connection: tokio::spawn(connection),
            networks: BTreeSet::new(),
        };
        // Nobody but us speaks on this link: no link-local address, no advertisements.
        let own = Path::new(SWITCHES).join(name);
        set(&own.join("disable_ipv6"), "0")?;
        set(&own.join("addr_gen_mode"), "1")?;
        set(&own.join("accept_ra"), "0")?;
        let up = LinkUnspec::new_with_index(index)
            .mtu(MTU.into())
            .txqueuelen(QUEUE)
            .up();
        let raised = link.handle.link().set(up.build()).execute().await;
        raised.map_err(|e| link.refused("raise", e))?;
        link.add_address(host.address(), true).await?;
        link.add_address(RESOLVER, false).await?;
        link.add_route().await?;
        forward()?;
        Ok(link)
    }

    /// Gives the device the resolver's address of each of these networks, and takes it away of others.
    pub(crate) async fn set_networks(
        &mut self,
        wanted: &BTreeSet<NetworkId>,
    ) -> Result<(), LinkError> {
        for network in self.networks.clone().difference(wanted) {
            self.remove_address(network.resolver()).await?;
            self.networks.remove(network);
        }
        for network in wanted {
            if !self.networks.contains(network) {
                self.add_address(network.resolver(), false).await?;
                self.networks.insert(*network);
            }
        }
        Ok(())
    }

    /// The host speaks from a preferred address unless it binds another: the resolver's addresses
    /// are for answers alone.
    async fn add_address(&self, address: Ipv6Addr, preferred: bool) -> Result<(), LinkError> {
        let mut request = self
            .handle
            .address()
            .add(self.index, address.into(), 128)
            .replace();
        let mut lifetime = CacheInfo::default();
        lifetime.ifa_valid = u32::MAX;
        lifetime.ifa_preferred = if preferred { u32::MAX } else { 0 };
        let attributes = &mut request.message_mut().attributes;
        attributes.push(AddressAttribute::CacheInfo(lifetime));
        let added = request.execute().await;
        added.map_err(|e| self.refused(&format!("add {address} to"), e))
    }

    async fn remove_address(&self, address: Ipv6Addr) -> Result<(), LinkError> {
        let message: AddressMessage = AddressMessageBuilder::<Ipv6Addr>::new()
            .index(self.index)
            .address(address, 128)
            .build();
        let removed = self.handle.address().del(message).execute().await;
        removed.map_err(|e| self.refused(&format!("remove {address} from"), e))
    }

    async fn add_route(&self) -> Result<(), LinkError> {
        let all = Ipv6Addr::new(0xfdaa, 0, 0, 0, 0, 0, 0, 0);
        let route = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(all, 16)
            .output_interface(self.index)
            .build();
        let added = self.handle.route().add(route).execute().await;
        added.map_err(|e| self.refused("route fdaa::/16 to", e))
    }

    fn refused(&self, what: &str, source: rtnetlink::Error) -> LinkError {
        let what = format!("{what} {}", self.name);
        LinkError::Netlink { what, source }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Lets the kernel forward IPv6. It stays switched on: Machines run on when `tern serve` ends.
///
/// A forwarding kernel stops listening to router advertisements, and a host that has its default
/// route from one would soon be cut off: interfaces that listen are told to go on (2).
fn forward() -> Result<(), LinkError> {
    let switches = Path::new(SWITCHES);
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let forwarding = switches.join("all/forwarding");
    if read(&forwarding).trim() == "1" {
        return Ok(());
    }
    for interface in fs::read_dir(switches).into_iter().flatten().flatten() {
        let accept = interface.path().join("accept_ra");
        if read(&accept).trim() == "1" {
            set(&accept, "2")?;
        }
    }
    set(&forwarding, "1")
}

fn set(path: &Path, value: &'static str) -> Result<(), LinkError> {
    fs::write(path, value).map_err(|source| LinkError::Switch {
        path: path.to_owned(),
        value,
        source,
    })
}
