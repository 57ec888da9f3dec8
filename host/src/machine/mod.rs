//! One Machine: what may be asked of it, and the task that owns it.
//!
//! [`core`] decides, [`task`] carries messages, [`hands`] does. The core's module documentation
//! draws the state machine.

pub(crate) mod core;
pub(crate) mod hands;
pub(crate) mod recorder;
mod restart;
pub(crate) mod task;
pub(crate) mod troubles;

use std::fmt;
use std::time::Duration;

use tern_catalog::MachineId;
use thiserror::Error;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// A person, through the API.
    User,
    /// The gate: a request is there, or none has been for a while.
    Proxy,
    /// This agent.
    Host,
    /// The app itself.
    Machine,
}

/// How a Machine is to be stopped; what is `None` is as its config says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StopRequest {
    /// The signal that asks the app.
    pub signal: Option<i32>,
    /// How long it may take before `SIGKILL`.
    pub timeout: Option<Duration>,
}

/// Why something asked of a Machine was not done.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CommandError {
    /// It is not this host's.
    #[error("Machine {0} is not on this host")]
    Unknown(MachineId),
    /// It is destroyed, or about to be.
    #[error("the Machine is being destroyed")]
    Gone,
    /// Its state does not allow that.
    #[error("{0}")]
    Refused(String),
    /// It was tried, and went wrong.
    #[error("{0}")]
    Failed(String),
    /// The agent ends.
    #[error("the host's agent is shutting down")]
    ShuttingDown,
}

impl Source {
    /// Its name in events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Proxy => "proxy",
            Self::Host => "host",
            Self::Machine => "machine",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
