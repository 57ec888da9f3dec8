//! The host's side of its Machines' networks: devices, addresses, routes, the packet filter.
//!
//! See "Networks" in `ARCHITECTURE.md`. The mesh (`tern0`, and the route of `fdaa::/16` to it) is
//! another crate's.

pub(crate) mod bell;
mod conntrack;
mod filter;
mod forwarding;
pub(crate) mod meter;
mod netfilter;
mod outside;
mod rules;
mod slot;
mod tap;
mod uplinks;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use tern_catalog::NetworkId;
use thiserror::Error;
use tokio::task::JoinHandle;

use filter::Filter;
pub(crate) use outside::Outside;
pub use outside::{AllowedPrefix, PrefixError};
use rules::Policy;
pub(crate) use rules::Port;
use slot::Slots;
pub(crate) use slot::{GATEWAY, Slot};

/// The host's side of its Machines' networks.
#[derive(Debug)]
pub(crate) struct Network {
    netlink: rtnetlink::Handle,
    filter: Arc<Filter>,
    keeper: Mutex<Option<JoinHandle<()>>>,
    slots: Mutex<Slots>,
    /// The slots of Machines that the catalog does not know: nobody else gets them, or their devices.
    reserved: Mutex<BTreeSet<Slot>>,
}

/// What the network is given.
#[derive(Debug)]
pub(crate) struct Setup<'a> {
    /// What Machines reach beyond the private network.
    pub(crate) outside: Outside,
    /// Where the agent keeps what it must not forget.
    pub(crate) data_dir: &'a Path,
    /// This boot of the host's kernel.
    pub(crate) boot_id: &'a str,
    /// The program that changes the packet filter.
    pub(crate) nft: PathBuf,
}

/// Why the network could not be set up.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// No connection to the kernel.
    #[error("netlink cannot be opened: {0}")]
    Open(io::Error),
    /// The kernel said no.
    #[error("{name}: cannot {what}: {source}")]
    Netlink {
        /// The device.
        name: String,
        /// What was tried.
        what: &'static str,
        /// Its answer.
        source: rtnetlink::Error,
    },
    /// A device could not be made.
    #[error("the TAP {0} cannot be made: {1}")]
    Tap(String, io::Error),
    /// A kernel setting could not be changed.
    #[error("{0} cannot be set: {1}")]
    Sysctl(String, io::Error),
    /// What forwarding was before could not be written down.
    #[error("{}: {}", .0.display(), .1)]
    Memory(PathBuf, #[source] io::Error),
    /// The packet filter could not be changed.
    #[error("the packet filter cannot be set: {0}")]
    Rules(io::Error),
    /// Connection tracking could not be told to forget.
    #[error(
        "connections of Machines cannot be forgotten (is there the kernel's module nf_conntrack_netlink?): {0}"
    )]
    Connections(io::Error),
    /// Too many Machines.
    #[error(
        "this host has no room for another Machine: all {} places are taken",
        Slot::COUNT
    )]
    Full,
}

impl Network {
    /// Puts the table in place, with rules for the Machines that are there, and turns forwarding on.
    pub(crate) async fn open(setup: Setup<'_>, ports: Vec<Port>) -> Result<Self, NetworkError> {
        let (connection, netlink, _) = rtnetlink::new_connection().map_err(NetworkError::Open)?;
        tokio::spawn(connection);
        let ports: BTreeMap<_, _> = ports.into_iter().map(|p| (p.slot, p)).collect();
        // Listened for first: what happens to the devices and the table from the first look on is heard.
        let watch = Filter::watch().map_err(NetworkError::Open)?;
        let memory = setup.data_dir.join(FORWARDING);
        let policy = Policy {
            outside: setup.outside,
            guard: forwarding::before(&memory, setup.boot_id)?,
            uplinks: uplinks::find(&netlink).await?,
        };
        let mut slots = Slots::default();
        for &slot in ports.keys() {
            slots.claim(slot);
        }
        let filter = Filter::open(netlink.clone(), setup.nft, policy, ports);
        let filter = Arc::new(filter.await?);
        // Only now: nothing is let through without a filter.
        forwarding::switch_on()?;
        Ok(Self {
            netlink,
            keeper: Mutex::new(Some(tokio::spawn(Arc::clone(&filter).keep(watch)))),
            filter,
            slots: Mutex::new(slots),
            reserved: Mutex::default(),
        })
    }

    /// A place for a new Machine.
    pub(crate) fn take_slot(&self) -> Result<Slot, NetworkError> {
        self.slots.lock().take().ok_or(NetworkError::Full)
    }

    /// Keeps the place of a Machine that nobody looks after now. Without rules it reaches nobody.
    pub(crate) fn reserve(&self, slot: Slot) {
        self.slots.lock().claim(slot);
        self.reserved.lock().insert(slot);
    }

    /// Takes a Machine off the network of whose record nothing is left: it keeps its place, and reaches nobody.
    pub(crate) async fn cut_off(&self, slot: Slot) -> Result<(), NetworkError> {
        self.reserve(slot);
        let port = self.filter.cut_off(slot).await?;
        forget(slot, port).await
    }

    /// What keeps the packet filter as it should be, for whoever watches it. Once.
    pub(crate) fn keeper(&self) -> Option<JoinHandle<()>> {
        self.keeper.lock().take()
    }

    /// Makes a Machine's device and rules. Costs nothing where that has been done.
    pub(crate) async fn plug(&self, port: Port) -> Result<(), NetworkError> {
        self.filter.plug(port).await
    }

    /// Removes a Machine's device and rules, and what the kernel remembers of its connections. Its place stays
    /// taken until it is given back ([`Network::release`]).
    pub(crate) async fn unplug(&self, slot: Slot) -> Result<(), NetworkError> {
        let port = self.filter.unplug(slot).await?;
        forget(slot, port).await
    }

    /// Gives a Machine's place back, when nothing on this host is left of it.
    pub(crate) fn release(&self, slot: Slot) {
        self.slots.lock().release(slot);
    }

    /// Removes devices that belong to no Machine. Returns how many.
    pub(crate) async fn sweep(&self) -> Result<u64, NetworkError> {
        let existing = tap::existing(&self.netlink).await?;
        let ports = self.filter.ports().await;
        let reserved = self.reserved.lock().clone();
        let owned = |slot: &Slot| ports.contains_key(slot) || reserved.contains(slot);
        let mut removed = 0;
        for slot in existing.into_iter().filter(|slot| !owned(slot)) {
            tracing::warn!(
                tap = slot.tap(),
                "removing a device that belongs to no Machine"
            );
            tap::remove(&self.netlink, &slot.tap()).await?;
            forget(slot, None).await?;
            removed += 1;
        }
        Ok(removed)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.lock().take() {
            keeper.abort();
        }
    }
}

/// Removes everything that an agent has ever set up here: for a host that leaves the cloud. Monitors
/// that run keep running, without a network.
pub async fn remove_all() -> Result<(), NetworkError> {
    let (connection, netlink, _) = rtnetlink::new_connection().map_err(NetworkError::Open)?;
    let connection = tokio::spawn(connection);
    let outcome = async {
        for slot in tap::existing(&netlink).await? {
            tap::remove(&netlink, &slot.tap()).await?;
        }
        rules::apply(Path::new(NFT), rules::NOTHING)
            .await
            .map_err(NetworkError::Rules)
    };
    let outcome = outcome.await;
    connection.abort();
    outcome
}

/// The rule for one Machine, from what the catalog says of it.
pub(crate) fn port(slot: Slot, address: Ipv6Addr, network: NetworkId) -> Port {
    Port {
        slot,
        address,
        network,
    }
}

/// Has the kernel forget the connections of a Machine whose device is gone.
async fn forget(slot: Slot, port: Option<Port>) -> Result<(), NetworkError> {
    let own = port.map(|port| port.prefix());
    forgotten(move || conntrack::forget(slot.guest_v4(), own)).await
}

/// Has the kernel forget connections, and waits for it.
async fn forgotten(
    work: impl FnOnce() -> io::Result<u64> + Send + 'static,
) -> Result<(), NetworkError> {
    let outcome = tokio::task::spawn_blocking(work).await;
    let outcome = outcome.unwrap_or_else(|e| Err(io::Error::other(e)));
    let count = outcome.map_err(NetworkError::Connections)?;
    tracing::debug!(count, "connections are forgotten");
    Ok(())
}

fn exists(slot: Slot) -> bool {
    nix::net::if_::if_nametoindex(slot.tap().as_str()).is_ok()
}

/// The program that changes the packet filter, of the package `nftables`.
pub(crate) const NFT: &str = "nft";
/// Remembers what forwarding was before the agent came, in the data directory.
const FORWARDING: &str = "forwarding.json";

#[cfg(test)]
mod tests;
