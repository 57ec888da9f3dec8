//! What the core is told, and what it answers is to be done.
//!
//! Monitors and those who wait are but numbers here ([`Epoch`], [`Waiter`]): the core holds neither a process
//! nor a channel.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tern_catalog::{Machine, MachineState};
use tern_guest::message::ExitStatus;

use crate::machine::{CommandError, Source, StopRequest};

/// Numbers the monitors of one Machine.
pub(crate) type Epoch = u64;

/// Numbers those who wait for an outcome.
pub(crate) type Waiter = u64;

/// What is told.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    /// The catalog's record is this now.
    Wanted(Arc<Machine>),
    /// Somebody on this host asks, and waits for the outcome.
    Command {
        waiter: Waiter,
        source: Source,
        order: Order,
    },
    /// A cold start has come as far as the app.
    Up {
        epoch: Epoch,
        digest: String,
        took: Duration,
    },
    /// It has not; no monitor is left.
    BootFailed { epoch: Epoch, failure: BootFailure },
    /// A suspended Machine runs again.
    Woken { epoch: Epoch, took: Duration },
    /// It does not, and no monitor is left; the snapshot is as it was, for another try.
    WakeNotReady { epoch: Epoch, reason: String },
    /// It does not; no monitor is left, and the snapshot is void.
    WakeRefused { epoch: Epoch, reason: String },
    /// Memory is on disk, and the monitor has ended.
    Slept { epoch: Epoch, took: Duration },
    /// It is not. `alive`: the Machine runs on.
    SleepFailed {
        epoch: Epoch,
        reason: String,
        alive: bool,
    },
    /// A Machine whose suspend another agent began runs on.
    TakenOver { epoch: Epoch },
    /// The guest could not be asked to stop.
    AskFailed { epoch: Epoch },
    /// The app of a running Machine has ended.
    AppExited { epoch: Epoch, exit: ExitStatus },
    /// The monitor of a running Machine has ended.
    MonitorExited { epoch: Epoch, end: End },
    /// Nothing is left of the Machine.
    Removed,
    /// Something is.
    RemoveFailed { reason: String },
    /// Time has passed.
    Tick,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    Start,
    Suspend,
    Stop(StopRequest),
}

/// Why a start has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BootFailure {
    pub(crate) reason: String,
    /// How the app ended, where that was it.
    pub(crate) exit: Option<ExitStatus>,
    /// Trying again cannot help.
    pub(crate) lasting: bool,
    /// It had come past its disk, which is as this start was to have it, or what its guest has made of that.
    pub(crate) disk_ready: bool,
}

impl BootFailure {
    /// One that trying again cannot help.
    pub(crate) fn lasting(reason: String) -> Self {
        Self {
            reason,
            exit: None,
            lasting: true,
            disk_ready: false,
        }
    }

    /// One that may be gone the next time.
    pub(crate) fn passing(reason: String) -> Self {
        Self {
            reason,
            exit: None,
            lasting: false,
            disk_ready: false,
        }
    }
}

/// How a monitor has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    /// The guest ended itself, as it does when its app has.
    pub(crate) by_guest: bool,
    /// For people.
    pub(crate) reason: String,
}

/// What is to be done.
#[derive(Debug, Clone)]
pub(crate) enum Action {
    /// Start cold. A snapshot, if there is one, is void from now on.
    Boot {
        epoch: Epoch,
        machine: Arc<Machine>,
        reset_disk: bool,
    },
    /// Start from the snapshot.
    Wake { epoch: Epoch },
    /// Write the snapshot and end the monitor.
    Sleep { epoch: Epoch },
    /// Wait until a suspend that another agent began is over, and have the Machine run on.
    TakeOver { epoch: Epoch },
    /// Ask the app to stop.
    Ask {
        epoch: Epoch,
        /// Instead of the one in the run configuration.
        signal: Option<i32>,
        timeout: Duration,
        /// How long requests that are under way may take before that.
        drain: Duration,
    },
    /// End the monitor, or the start under way.
    Kill { epoch: Epoch },
    /// Throw the snapshot away.
    Discard,
    /// Remove everything of this Machine.
    Remove,
    /// Remove its records.
    Forget,
    /// Write the status, with one more event if there is one.
    Record(Option<Event>),
    /// Answer somebody who waits.
    Answer {
        waiter: Waiter,
        outcome: Result<(), CommandError>,
    },
}

/// An event to be recorded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Event {
    pub(crate) kind: &'static str,
    pub(crate) status: MachineState,
    pub(crate) source: Source,
    pub(crate) detail: Value,
}
