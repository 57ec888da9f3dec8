//! A Machine: what is wanted of it, and what was seen of it.

use std::net::Ipv6Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{AppName, HostId, MachineConfig, MachineId, MachineNumber, NetworkId, Record};

/// What is wanted of a Machine. Written by the API alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Its id.
    pub id: MachineId,
    /// Its name, for people.
    pub name: String,
    /// The app it belongs to.
    pub app: AppName,
    /// The network it is in.
    pub network: NetworkId,
    /// The host it lives on.
    pub host: HostId,
    /// The region of that host.
    pub region: String,
    /// Its number in the network.
    pub number: MachineNumber,
    /// Its address, made of the three above.
    pub private_ip: Ipv6Addr,
    /// What to run.
    pub config: MachineConfig,
    /// Changes with every new config: a ULID, ordered by time.
    pub instance_id: String,
    /// Counts configs, from 1.
    pub version: u32,
    /// The state asked for.
    pub desired: Desired,
    /// Takes no new work when set.
    #[serde(default)]
    pub cordoned: bool,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last written.
    pub updated_at: Timestamp,
}

/// The state asked for, and the how-manieth wish it is.
///
/// The host's agent acts on a generation once. Between two of them the gate may start and suspend
/// the Machine on its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// The state.
    pub state: DesiredState,
    /// Raised by one with every wish.
    pub generation: u64,
}

/// States that can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DesiredState {
    /// Made ready, never started (`skip_launch`).
    Created,
    /// Running the current config.
    Started,
    /// Running, but as a new process (`restart`).
    Restarted {
        /// Kill at once instead of asking the app to stop.
        force: bool,
    },
    /// Not running; the next start is cold.
    Stopped {
        /// Signal instead of the configured one.
        signal: Option<i32>,
        /// Milliseconds until it is killed, instead of the configured time.
        timeout_ms: Option<u64>,
    },
    /// Memory on disk.
    Suspended,
    /// Gone, with everything it kept. The agent removes both records when done.
    Destroyed {
        /// Even when it is running.
        force: bool,
    },
}

/// States a Machine is seen in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// Made ready, never started.
    Created,
    /// Booting, or resuming.
    Starting,
    /// The app runs.
    Started,
    /// Asked to stop.
    Stopping,
    /// Not running.
    Stopped,
    /// Memory is being written.
    Suspending,
    /// Memory on disk.
    Suspended,
    /// Being removed.
    Destroying,
    /// Gone.
    Destroyed,
    /// A transition went wrong; see the reason. Can be started again like `stopped`.
    Failed,
}

/// What was seen of a Machine. Written by the agent of its host alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// The Machine.
    pub id: MachineId,
    /// Its state.
    pub state: MachineState,
    /// Why, when it failed or stopped by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The last generation of [`Desired`] that was acted on.
    pub generation: u64,
    /// The config that the state speaks of.
    pub instance_id: String,
    /// Digest of the image that runs, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_digest: Option<String>,
    /// The last events, oldest first, [`MachineStatus::MAX_EVENTS`] at most.
    #[serde(default)]
    pub events: Vec<MachineEvent>,
    /// The health checks of a started Machine, in order of name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<CheckStatus>,
    /// When it was last written.
    pub updated_at: Timestamp,
}

/// What a health check last saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckStatus {
    /// Its name in the config; `servicecheck-<n>-<type>-<port>` for the nth service's.
    pub name: String,
    /// How it stands.
    pub status: CheckState,
    /// What was answered, or why not.
    pub output: String,
    /// When `status` or `output` last changed.
    pub updated_at: Timestamp,
}

/// How a health check stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckState {
    /// The last check succeeded.
    Passing,
    /// None has succeeded yet, and its grace period is not over.
    Warning,
    /// The last check failed.
    Critical,
}

/// One transition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineEvent {
    /// Ordered by time: a ULID.
    pub id: String,
    /// `launch`, `start`, `stop`, `suspend`, `exit`, `restart`, `update`, `destroy`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The state it led to.
    pub status: MachineState,
    /// Who caused it: `user`, `proxy`, `host`, or `machine` (the app itself).
    pub source: String,
    /// Milliseconds since 1970.
    pub timestamp: i64,
    /// What else there is to say: exit codes, time taken, reasons.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub request: serde_json::Value,
}

impl MachineStatus {
    /// Events kept: enough to see a crash loop from its beginning.
    pub const MAX_EVENTS: usize = 50;
}

impl MachineState {
    /// A request may wait for this Machine, or start it.
    pub fn can_serve(self) -> bool {
        !matches!(self, Self::Destroying | Self::Destroyed)
    }

    /// Its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Started => "started",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Suspending => "suspending",
            Self::Suspended => "suspended",
            Self::Destroying => "destroying",
            Self::Destroyed => "destroyed",
            Self::Failed => "failed",
        }
    }
}

impl std::fmt::Display for MachineState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl Record for Machine {
    const PREFIX: &'static str = "machines/";
    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl Record for MachineStatus {
    const PREFIX: &'static str = "machine_status/";
    fn id(&self) -> String {
        self.id.to_string()
    }
}
