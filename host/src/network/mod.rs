//! The host's side of its Machines' networks: devices, addresses, routes, the packet filter.
//!
//! See "Networks" in `ARCHITECTURE.md`. The mesh (`tern0`, and the route of `fdaa::/16` to it) is
//! another crate's.

pub(crate) mod bell;
pub(crate) mod meter;
mod rules;
mod slot;
mod tap;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv6Addr;
use std::path::Path;

use parking_lot::Mutex;
use tern_catalog::NetworkId;
use thiserror::Error;

pub(crate) use rules::Port;
use slot::Slots;
pub(crate) use slot::{GATEWAY, Slot};

/// The host's side of its Machines' networks.
#[derive(Debug)]
pub(crate) struct Network {
    netlink: rtnetlink::Handle,
    nat: bool,
    slots: Mutex<Slots>,
    /// What the rules hold. Its lock also puts changes of the rules in order.
    ports: tokio::sync::Mutex<BTreeMap<Slot, Port>>,
    /// The slots of Machines that the catalog does not know: nobody else gets them, or their devices.
    reserved: Mutex<BTreeSet<Slot>>,
    /// The slots whose devices were set up since the agent started.
    plugged: Mutex<BTreeMap<Slot, Ipv6Addr>>,
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
    /// The packet filter could not be changed.
    #[error("the packet filter cannot be set: {0}")]
    Rules(io::Error),
    /// Too many Machines.
    #[error(
        "this host has no room for another Machine: all {} places are taken",
        Slot::COUNT
    )]
    Full,
}

impl Network {
    /// Turns forwarding on and puts the table in place, with rules for the Machines that are there.
    pub(crate) async fn open(nat: bool, ports: Vec<Port>) -> Result<Self, NetworkError> {
        let (connection, netlink, _) = rtnetlink::new_connection().map_err(NetworkError::Open)?;
        tokio::spawn(connection);
        forward()?;
        let ports: BTreeMap<_, _> = ports.into_iter().map(|p| (p.slot, p)).collect();
        rules::apply(&rules::table(ports.values(), nat))
            .await
            .map_err(NetworkError::Rules)?;
        let mut slots = Slots::default();
        for &slot in ports.keys() {
            slots.claim(slot);
        }
        Ok(Self {
            netlink,
            nat,
            slots: Mutex::new(slots),
            ports: tokio::sync::Mutex::new(ports),
            reserved: Mutex::default(),
            plugged: Mutex::default(),
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

    /// Gives a place back that nothing was plugged in at.
    pub(crate) fn release(&self, slot: Slot) {
        self.slots.lock().release(slot);
    }

    /// Makes a Machine's device and rules. Costs nothing where that has been done.
    pub(crate) async fn plug(&self, port: Port) -> Result<(), NetworkError> {
        if self.plugged.lock().get(&port.slot) == Some(&port.address) && exists(port.slot) {
            return Ok(());
        }
        // The rules first: a device must not be without.
        self.change(|ports| match ports.insert(port.slot, port) {
            Some(old) if old == port => String::new(),
            Some(old) => rules::elements("delete", &old) + &rules::elements("add", &port),
            None => rules::elements("add", &port),
        })
        .await?;
        tap::create(&self.netlink, port.slot, port.address).await?;
        self.plugged.lock().insert(port.slot, port.address);
        Ok(())
    }

    /// Removes a Machine's device and rules, and gives its place back.
    pub(crate) async fn unplug(&self, slot: Slot) -> Result<(), NetworkError> {
        self.plugged.lock().remove(&slot);
        tap::remove(&self.netlink, &slot.tap()).await?;
        self.change(|ports| match ports.remove(&slot) {
            Some(old) => rules::elements("delete", &old),
            None => String::new(),
        })
        .await?;
        self.slots.lock().release(slot);
        Ok(())
    }

    /// Removes devices that belong to no Machine. Returns how many.
    pub(crate) async fn sweep(&self) -> Result<u64, NetworkError> {
        let existing = tap::existing(&self.netlink).await?;
        let ports = self.ports.lock().await;
        let reserved = self.reserved.lock().clone();
        let owned = |slot: &Slot| ports.contains_key(slot) || reserved.contains(slot);
        let mut removed = 0;
        for slot in existing.into_iter().filter(|slot| !owned(slot)) {
            tracing::warn!(
                tap = slot.tap(),
                "removing a device that belongs to no Machine"
            );
            tap::remove(&self.netlink, &slot.tap()).await?;
            removed += 1;
        }
        Ok(removed)
    }

    async fn change(
        &self,
        change: impl FnOnce(&mut BTreeMap<Slot, Port>) -> String,
    ) -> Result<(), NetworkError> {
        let mut ports = self.ports.lock().await;
        let mut next = ports.clone();
        let text = change(&mut next);
        if !text.is_empty()
            && let Err(error) = rules::apply(&text).await
        {
            // Somebody else has touched the table, for example by flushing the whole rule set.
            tracing::warn!(%error, "the packet filter is put in place anew");
            rules::apply(&rules::table(next.values(), self.nat))
                .await
                .map_err(NetworkError::Rules)?;
        }
        *ports = next;
        Ok(())
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
        rules::apply(rules::NOTHING)
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

fn exists(slot: Slot) -> bool {
    nix::net::if_::if_nametoindex(slot.tap().as_str()).is_ok()
}

/// Lets the host forward packets.
fn forward() -> Result<(), NetworkError> {
    // A host that forwards stops believing routers, and would lose its own IPv6 route to the
    // outside, unless it is told to go on (`ip-sysctl.rst`: `accept_ra` 2).
    let conf = Path::new("/proc/sys/net/ipv6/conf");
    for entry in std::fs::read_dir(conf).into_iter().flatten().flatten() {
        let path = entry.path().join("accept_ra");
        let name = entry.file_name();
        let own = name.to_str().is_none_or(|n| Slot::of_tap(n).is_some());
        if !own && std::fs::read_to_string(&path).is_ok_and(|v| v.trim() == "1") {
            set(&path, "2")?;
        }
    }
    set(Path::new("/proc/sys/net/ipv4/ip_forward"), "1")?;
    set(&conf.join("all/forwarding"), "1")
}

fn set(path: &Path, value: &str) -> Result<(), NetworkError> {
    if std::fs::read_to_string(path).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    std::fs::write(path, value).map_err(|e| NetworkError::Sysctl(path.display().to_string(), e))
}

#[cfg(test)]
mod tests;
