//! Hosts: who they are, whether they are there, what they have, and whether they get more Machines.
//!
//! Four keys a host, each with its one writer:
//!
//! | key | writer | what |
//! |---|---|---|
//! | `hosts/<id>` | the host, at its start | who it is and where |
//! | `host_alive/<id>` | the host, under its lease | gone when the host is |
//! | `host_status/<id>` | the host, now and then | what it has, and when it last said so |
//! | `host_cordons/<id>` | the API | it gets no new Machines |

use std::net::SocketAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{HostId, Record, Resources};

/// A server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its 32 bits.
    pub id: HostId,
    /// Its name, for people.
    pub name: String,
    /// Its region, for example `ams`.
    pub region: String,
    /// Its WireGuard public key, base64. What tells this host from every other.
    pub public_key: String,
    /// Where WireGuard reaches it.
    pub endpoint: SocketAddr,
    /// When it last started.
    pub started_at: Timestamp,
}

/// Says that a host's `tern serve` runs. Under the host's lease, so that it goes when the host does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostAlive {
    /// The host.
    pub id: HostId,
    /// One life of `tern serve`, at random.
    pub session: String,
    /// The boot of the server it runs on (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// Since when.
    pub since: Timestamp,
}

/// What a host last said of itself. Stays when the host is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The host.
    pub id: HostId,
    /// The version of its `tern serve`.
    pub version: String,
    /// What it has for Machines that run.
    pub all: Resources,
    /// What Machines that run have of it.
    pub taken: Resources,
    /// When it said so: at each change, some seconds late, and each minute in any case.
    pub seen_at: Timestamp,
}

/// A host gets no new Machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCordon {
    /// The host.
    pub id: HostId,
    /// Since when.
    pub since: Timestamp,
}

/// The one cloud that a catalog is of. Made by the first host, and never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cloud {
    /// At random; data directories remember it.
    pub id: String,
    /// A digest under the cloud's sealing key: a host with another key could not open what the others seal.
    pub seal: String,
    /// When it was made.
    pub created_at: Timestamp,
}

impl Cloud {
    /// The id of the only one there is.
    pub const ONLY: &'static str = "this";
}

impl Record for Host {
    const PREFIX: &'static str = "hosts/";
    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl Record for HostAlive {
    const PREFIX: &'static str = "host_alive/";
    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl Record for HostStatus {
    const PREFIX: &'static str = "host_status/";
    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl Record for HostCordon {
    const PREFIX: &'static str = "host_cordons/";
    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl Record for Cloud {
    const PREFIX: &'static str = "cloud/";
    fn id(&self) -> String {
        Self::ONLY.to_owned()
    }
}
