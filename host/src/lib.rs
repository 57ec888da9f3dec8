//! The agent that makes Machines real on one server.
//!
//! Desired state comes in through the catalog's [`View`](tern_catalog::View), observed state goes
//! out as [`MachineStatus`](tern_catalog::MachineStatus), every transition an event. Between two
//! wishes of the API the gate starts, suspends and stops Machines through an [`AgentHandle`].
//!
//! Each Machine is one monitor process (`tern-vmm`) that outlives the agent, one directory, one TAP
//! device, and one task here. What is where:
//!
//! | module | what it does |
//! |---|---|
//! | `agent` | starts, adopts, follows the catalog, cleans up |
//! | `machine` | decides: the state machine (`core`, without I/O) and the task that owns it |
//! | `vm` | does: monitor, guest, disk and snapshot of one Machine |
//! | `dir` | the files of one Machine, and which of them to believe after a crash |
//! | `monitor`, `guest` | speaks to `tern-vmm`, and to init through it |
//! | `network` | TAPs, addresses, routes, the packet filter |
//! | `bundle`, `disk`, `host` | what a Machine boots with |
//! | `capacity` | whether this host has room for one more that runs |
//! | `cgroup`, `oom`, `block_device`, `page_cache` | what it may take of the host |
//! | `activity`, `departures` | when it was last of use to anybody; that it is about to sleep |
//! | `disk_space` | whether there is room for new work |
//! | `presence` | says that this host is there, and what it has |
//! | `quarantine` | Machines on the disk that the catalog does not know |
//! | `checks`, `logs`, `last_words`, `metrics` | what is seen of it |

mod activity;
mod agent;
mod block_device;
mod bundle;
mod capacity;
mod cgroup;
mod checks;
mod config;
mod departures;
mod dir;
mod disk;
mod disk_space;
mod guest;
mod host;
mod images;
mod last_words;
mod logs;
mod machine;
mod metrics;
mod monitor;
mod network;
mod oom;
mod page_cache;
mod presence;
mod quarantine;
mod running;
mod trace;
mod vm;
mod volumes;
mod watched;

pub use agent::{Agent, AgentError, AgentHandle};
pub use capacity::{Overcommit, Room};
pub use config::{ConfigError, CpuTemplate, HostConfig, RateLimits, Registry, SecretOpener};
pub use departures::Departure;
pub use guest::{Exec, ExecInputs, ExecOutput, ExecOutputs, GuestError};
pub use logs::{LogItem, LogLine, LogReader};
pub use machine::{CommandError, Source, StopRequest};
pub use metrics::{Counter, Metrics};
pub use network::{AllowedPrefix, NetworkError, PrefixError, remove_all as remove_network};
pub use oom::protect_this_process;
pub use page_cache::SnapshotCache;
pub use presence::{LEASE as PRESENCE_LEASE, Presence, PresenceError};
pub use quarantine::{Quarantined, purge, quarantined};
pub use trace::{Phase, Side, StartTrace};
pub use vm::MemoryUse;
