//! The host's side of its Machines' networks: devices, addresses, routes, the packet filter.
//!
//! See "Networks" in `ARCHITECTURE.md`. The mesh (`tern0`, and the route of `fdaa::/16` to it) is
//! another crate's.

pub(crate) mod bell;
mod forwarding;
mod rules;
mod slot;
mod tap;
mod uplinks;

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use tern_catalog::NetworkId;
use thiserror::Error;

use rules::Policy;
pub(crate) use rules::Port;
use slot::Slots;
pub(crate) use slot::{GATEWAY, Slot};

/// The host's side of its Machines' networks.
#[derive(Debug)]
pub(crate) struct Network {
    netlink: rtnetlink::Handle,
    policy: Policy,
    slots: Mutex<Slots>,
    /// What the rules hold. Its lock also puts changes of the rules in order.
    ports: tokio::sync::Mutex<BTreeMap<Slot, Port>>,
    /// The slots whose devices were set up since the agent started.
    plugged: Mutex<BTreeMap<Slot, Ipv6Addr>>,
}

/// What the network is given.
#[derive(Debug)]
pub(crate) struct Setup<'a> {
    /// Whether Machines reach the outside over IPv4.
    pub(crate) nat: bool,
    /// Where the agent keeps what it must not forget.
    pub(crate) data_dir: &'a Path,
    /// This boot of the host's kernel.
    pub(crate) boot_id: &'a str,
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
        let memory = setup.data_dir.join(FORWARDING);
        let policy = Policy {
            nat: setup.nat,
            guard: forwarding::before(&memory, setup.boot_id)?,
            uplinks: uplinks::find(&netlink).await?,
        };
        rules::apply(&rules::table(ports.values(), &policy))
            .await
            .map_err(NetworkError::Rules)?;
        // Only now: nothing is let through without a filter.
        forwarding::switch_on()?;
        let mut slots = Slots::default();
        for &slot in ports.keys() {
            slots.claim(slot);
        }
        Ok(Self {
            netlink,
            policy,
            slots: Mutex::new(slots),
            ports: tokio::sync::Mutex::new(ports),
            plugged: Mutex::default(),
        })
    }

    /// A place for a new Machine.
    pub(crate) fn take_slot(&self) -> Result<Slot, NetworkError> {
        self.slots.lock().take().ok_or(NetworkError::Full)
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
        let mut removed = 0;
        for slot in existing.into_iter().filter(|s| !ports.contains_key(s)) {
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
            rules::apply(&rules::table(next.values(), &self.policy))
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

/// Remembers what forwarding was before the agent came, in the data directory.
const FORWARDING: &str = "forwarding.json";

#[cfg(test)]
mod tests;
