//! What a Machine's task can do to the world.
//!
//! The contract between [`task`](super::task), which calls, and [`Vm`](crate::vm), which does it.
//! A test puts a simulation in its place.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tern_catalog::Machine;
use tern_guest::message::ExitStatus;

use super::core::{BootFailure, End, Epoch};

/// What a Machine's task can do to the world.
///
/// The task calls one of [`boot`](Self::boot), [`wake`](Self::wake), [`sleep`](Self::sleep),
/// [`take_over`](Self::take_over) and [`remove`](Self::remove) at a time. [`watch`](Self::watch) runs from a successful start until
/// the monitor's end, beside [`sleep`](Self::sleep) and [`ask`](Self::ask). [`kill`](Self::kill)
/// may come at any time and ends whatever runs. Futures are never dropped half-way, save when the
/// agent shuts down, and that leaves the monitor running.
#[async_trait]
pub(crate) trait Hands: Send + Sync + 'static {
    /// Starts cold, and returns the image's digest once the app runs. On failure no monitor is left; what
    /// became of the disk is told.
    async fn boot(
        &self,
        epoch: Epoch,
        machine: Arc<Machine>,
        reset_disk: bool,
    ) -> Result<String, BootFailure>;

    /// Starts from the snapshot. On failure no monitor is left, and the snapshot is void, or was not touched.
    async fn wake(&self, epoch: Epoch) -> Result<(), WakeFailure>;

    /// Writes the snapshot and ends the monitor. On failure says whether the Machine runs on.
    async fn sleep(&self) -> Result<(), SleepFailure>;

    /// Waits until a monitor that writes a snapshot for another agent has done so, however long that takes, and has
    /// its Machine run on. On failure no monitor is left.
    async fn take_over(&self) -> Result<(), String>;

    /// Tells how the app ends, and returns how the monitor has.
    async fn watch(&self, app_exited: Box<dyn Fn(ExitStatus) + Send + Sync>) -> End;

    /// Asks the app to stop, once the requests that are under way have ended or `drain` is over.
    async fn ask(
        &self,
        signal: Option<i32>,
        timeout: Duration,
        drain: Duration,
    ) -> Result<(), String>;

    /// Ends the monitor of this epoch, or its start, even one that has not begun yet. Returns at
    /// once; the operation under way and [`watch`](Self::watch) tell of the end.
    fn kill(&self, epoch: Epoch);

    /// Waits, while the Machine is suspended, until somebody on its private network calls one of its
    /// services. May be dropped at any time, and is before a start.
    async fn called(&self);

    /// Throws the snapshot away.
    async fn discard(&self);

    /// Removes everything of the Machine but its records.
    async fn remove(&self) -> Result<(), String>;
}

/// Why a Machine was not woken.
#[derive(Debug)]
pub(crate) struct WakeFailure {
    pub(crate) reason: String,
    /// The snapshot is as good as it was: something around it is not ready.
    pub(crate) kept: bool,
}

impl WakeFailure {
    /// There is no snapshot, or none any more.
    pub(crate) fn refused(reason: String) -> Self {
        Self {
            reason,
            kept: false,
        }
    }

    /// It can be tried again.
    pub(crate) fn not_ready(reason: String) -> Self {
        Self { reason, kept: true }
    }
}

/// Why a snapshot could not be written.
#[derive(Debug)]
pub(crate) struct SleepFailure {
    pub(crate) reason: String,
    /// The Machine runs on.
    pub(crate) alive: bool,
}
