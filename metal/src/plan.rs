//! What a starting host tells its own first process ([`Plan`], a file inside), and what that
//! process reports back while it starts ([`Event`], one JSON object a line).

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Everything that `tern-metal init` needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Who knows this may run commands.
    pub token: String,
    /// Where [`Event`]s go: a serial line, or a pipe.
    pub events: PathBuf,
    /// What kind of host this is.
    pub kind: Kind,
    /// The control group (v2) below which each command gets one of its own.
    pub groups: PathBuf,
    /// Ends the host after so long without a command.
    pub idle_seconds: Option<u64>,
}

/// The two kinds of host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Kind {
    /// Under QEMU: `init` is the kernel's first process and sets everything up.
    Virtual {
        /// Directories of the outer machine, in the order in which to mount them.
        shares: Vec<GuestShare>,
        /// The network card that commands see.
        network: Card,
        /// The card for the agent alone, in a network namespace of its own, so that no address,
        /// route or filter made by a test cuts the connection to it.
        control: Card,
        /// Port of the agent on the control card.
        control_port: u16,
    },
    /// On the machine itself, in namespaces of its own.
    Native {
        /// An empty directory that becomes `/var/lib/tern`.
        data: PathBuf,
    },
}

/// A directory offered by the outer machine over 9p.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestShare {
    /// Name of the 9p export.
    pub tag: String,
    /// Mount point inside.
    pub path: PathBuf,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// A network card and its fixed configuration (QEMU's user network needs no DHCP).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// Which card.
    pub mac: String,
    /// What to call it.
    pub name: String,
    /// Its address, in a /24.
    pub address: Ipv4Addr,
    /// The /24's other end: gateway and nothing else.
    pub gateway: Ipv4Addr,
    /// Where names are asked.
    pub resolver: Ipv4Addr,
}

/// News from a starting host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A step is done.
    Phase {
        /// Which step.
        name: String,
        /// Seconds since the kernel started.
        uptime: f64,
    },
    /// The agent listens.
    Ready {
        /// On this port.
        port: u16,
    },
    /// There was no command for the plan's idle time; the host ends.
    Idle,
    /// The host cannot start or go on, and ends.
    Failed {
        /// Why.
        message: String,
    },
}
