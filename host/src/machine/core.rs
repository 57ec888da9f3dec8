//! What happens next: the state machine of one Machine, without I/O.
//!
//! ```text
//!               Boot ──► Up                     Sleep ──► Slept
//!  ┌────────┐  or Wake ► Woken ┌─────────┐            ┌────────────┐
//!  │  rest  │ ─► starting ───► │ started │ ► suspending ──► rest   │
//!  │        │ ◄── BootFailed   │         │ ◄── SleepFailed         │
//!  │created │    WakeNotReady  └─────────┘                         │
//!  │stopped │    WakeRefused: Boot│  │ AppExited, MonitorExited     │
//!  │suspended                     │  └──► rest, perhaps with a time │
//!  │ failed │ ◄── stopping ◄──────┘       to start again            │
//!  └────────┘   (Ask, later Kill)
//!      └──► destroying (Remove) ──► destroyed
//! ```
//!
//! Inputs are told to [`Core::step`], which answers with [`Action`]s. An operation on a monitor has
//! an [`Epoch`]; what is told of an older epoch is ignored. A wish that cannot be granted now is
//! kept as the [`Goal`] and taken up when the phase allows it; the last wish wins, save that nothing
//! takes a destruction back. Who waits for a wish is answered when it has come true, when it has
//! failed, or when another wish has overtaken it.
//!
//! Here are the states and where an input goes. The words for it are in `message`. What comes of it:
//!
//! | module | what it knows |
//! |---|---|
//! | `goal` | what is wanted, and the way to it from each phase |
//! | `order` | what is asked for on this host, and who waits for it |
//! | `steps` | how a start and a stop begin |
//! | `news` | what is told of the monitor, and what the clock makes due |
//! | `end` | how a run ends, and whether another follows |
//! | `found` | how an agent takes up what another has left |

mod end;
mod found;
mod goal;
mod message;
mod news;
mod order;
mod steps;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tern_catalog::{Desired, Machine, MachineState, MachineStatus};
use tern_guest::message::ExitStatus;

use self::goal::Goal;
use self::order::{Want, answer};
use super::restart::Restarts;
use super::{CommandError, Source};

pub(crate) use self::found::Found;
pub(crate) use self::message::{Action, BootFailure, End, Epoch, Event, Input, Order, Waiter};
pub(crate) use self::steps::DRAIN_TIME;

/// The state machine of one Machine.
#[derive(Debug)]
pub(crate) struct Core {
    wanted: Arc<Machine>,
    phase: Phase,
    goal: Option<Goal>,
    waiters: Vec<(Waiter, Want)>,
    epoch: Epoch,
    generation: u64,
    /// The config that runs, or ran last, and that the disk belongs to once no reset is owed.
    instance: String,
    /// The disk is still of a run that was to leave it to no other: no start has come past it since.
    reset_owed: bool,
    digest: Option<String>,
    reason: Option<String>,
    restarts: Restarts,
}

#[derive(Debug)]
enum Phase {
    Rest(Rest),
    Starting {
        source: Source,
        /// From its snapshot: it may serve requests before it counts as started.
        wakes: bool,
    },
    Started {
        /// How the app ended, and when the monitor must have followed it.
        exit: Option<(ExitStatus, Instant)>,
    },
    Stopping {
        source: Source,
        /// When it has taken too long.
        kill_at: Option<Instant>,
        /// When requests that are under way have had their time.
        drained_at: Instant,
        exit: Option<ExitStatus>,
        /// Somebody was in a greater hurry than who asked first, and the app was asked once more.
        hastened: bool,
    },
    Suspending {
        source: Source,
        lost: Option<End>,
        exit: Option<ExitStatus>,
        /// Somebody wants its end whatever becomes of its memory.
        killed: bool,
    },
    Destroying {
        retry_at: Option<Instant>,
    },
    Destroyed,
}

#[derive(Debug)]
struct Rest {
    state: MachineState,
    /// When it is started again without anybody asking.
    restart_at: Option<Instant>,
    /// The next start finds the disk as the last run has left it.
    keep_disk: bool,
}

/// Between two attempts to remove what could not be removed.
const REMOVE_RETRY: Duration = Duration::from_secs(5);

impl Core {
    /// Takes a Machine up: a new one, or one that an agent before this one has left.
    pub(crate) fn new(
        wanted: Arc<Machine>,
        status: Option<&MachineStatus>,
        disk_instance: Option<String>,
        found: Found,
        now: Instant,
    ) -> (Self, Vec<Action>) {
        let mut out = Vec::new();
        let mut core = Self {
            phase: Phase::Rest(Rest::at(MachineState::Created)),
            goal: None,
            waiters: Vec::new(),
            epoch: match found {
                Found::Running { epoch } | Found::Busy { epoch } => epoch,
                _ => 0,
            },
            generation: status.map_or(0, |s| s.generation),
            instance: disk_instance
                .or_else(|| status.map(|s| s.instance_id.clone()))
                .unwrap_or_else(|| wanted.instance_id.clone()),
            reset_owed: false,
            digest: status.and_then(|s| s.image_digest.clone()),
            reason: status.and_then(|s| s.reason.clone()),
            restarts: Restarts::default(),
            wanted: Arc::clone(&wanted),
        };
        core.resume_from(status, found, now, &mut out);
        core.keep_a_promise(status);
        core.take(Input::Wanted(wanted), now, &mut out);
        if !out.iter().any(|a| matches!(a, Action::Record(_))) {
            out.push(Action::Record(None));
        }
        core.settle(now, &mut out);
        (core, out)
    }

    /// Takes one input in.
    pub(crate) fn step(&mut self, input: Input, now: Instant) -> Vec<Action> {
        let mut out = Vec::new();
        self.take(input, now, &mut out);
        self.settle(now, &mut out);
        out
    }

    /// When [`Input::Tick`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Rest(rest) => rest.restart_at,
            Phase::Started { exit } => exit.map(|(_, by)| by),
            Phase::Stopping { kill_at, .. } => *kill_at,
            Phase::Destroying { retry_at } => *retry_at,
            Phase::Starting { .. } | Phase::Suspending { .. } | Phase::Destroyed => None,
        }
    }

    /// The state to be shown.
    pub(crate) fn state(&self) -> MachineState {
        match &self.phase {
            Phase::Rest(rest) => rest.state,
            Phase::Starting { .. } => MachineState::Starting,
            Phase::Started { .. } => MachineState::Started,
            Phase::Stopping { .. } => MachineState::Stopping,
            Phase::Suspending { .. } => MachineState::Suspending,
            Phase::Destroying { .. } => MachineState::Destroying,
            Phase::Destroyed => MachineState::Destroyed,
        }
    }

    /// Why the state is what it is, where that needs saying.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// The last generation that was taken up.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// The config that the state speaks of.
    pub(crate) fn instance(&self) -> &str {
        &self.instance
    }

    /// The image that runs.
    pub(crate) fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// The monitor of this Machine, if one may be there.
    #[cfg(test)]
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The record as last told.
    pub(crate) fn wanted(&self) -> &Arc<Machine> {
        &self.wanted
    }

    fn take(&mut self, input: Input, now: Instant, out: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Destroyed) {
            if let Input::Command { waiter, .. } = input {
                out.push(answer(waiter, Err(CommandError::Gone)));
            }
            return;
        }
        match input {
            Input::Wanted(machine) => {
                self.wanted = machine;
                let Desired { state, generation } = self.wanted.desired.clone();
                if generation > self.generation {
                    self.generation = generation;
                    self.wish(state, out);
                }
            }
            Input::Command {
                waiter,
                source,
                order,
            } => self.command(waiter, source, order, out),
            Input::Tick => self.tick(now, out),
            Input::Removed => {
                if matches!(self.phase, Phase::Destroying { .. }) {
                    self.phase = Phase::Destroyed;
                    out.push(Action::Forget);
                    self.answer_all(out, || CommandError::Gone);
                }
            }
            Input::RemoveFailed { reason } => {
                if let Phase::Destroying { retry_at } = &mut self.phase {
                    *retry_at = Some(now + REMOVE_RETRY);
                    self.reason = Some(reason);
                    out.push(Action::Record(None));
                }
            }
            Input::Up { epoch, .. }
            | Input::BootFailed { epoch, .. }
            | Input::Woken { epoch, .. }
            | Input::WakeNotReady { epoch, .. }
            | Input::WakeRefused { epoch, .. }
            | Input::Slept { epoch, .. }
            | Input::SleepFailed { epoch, .. }
            | Input::TakenOver { epoch }
            | Input::AskFailed { epoch, .. }
            | Input::AppExited { epoch, .. }
            | Input::MonitorExited { epoch, .. } => {
                if epoch == self.epoch {
                    self.monitor(input, now, out);
                }
            }
        }
    }

    /// Another config is wanted than the one that the Machine last ran, and that its disk belongs to.
    fn is_outdated(&self) -> bool {
        self.instance != self.wanted.instance_id
    }

    fn rest(&mut self, rest: Rest) {
        self.phase = Phase::Rest(rest);
    }

    fn record(&mut self, out: &mut Vec<Action>, kind: &'static str, source: Source, detail: Value) {
        out.push(Action::Record(Some(Event {
            kind,
            status: self.state(),
            source,
            detail,
        })));
    }
}

impl Phase {
    /// Its monitor, or the start under way, is being ended.
    fn killing(source: Source, exit: Option<ExitStatus>, now: Instant) -> Self {
        Self::Stopping {
            source,
            kill_at: None,
            drained_at: now,
            exit,
            hastened: false,
        }
    }
}

impl Rest {
    fn at(state: MachineState) -> Self {
        Self {
            state,
            restart_at: None,
            keep_disk: false,
        }
    }
}

#[cfg(test)]
mod tests;
