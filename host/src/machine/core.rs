//! What happens next: the state machine of one Machine, without I/O.
//!
//! ```text
//!               Boot ──► Up                     Sleep ──► Slept
//!  ┌────────┐  or Wake ► Woken ┌─────────┐            ┌────────────┐
//!  │  rest  │ ─► starting ───► │ started │ ► suspending ──► rest   │
//!  │        │ ◄── BootFailed   │         │ ◄── SleepFailed         │
//!  │created │    WakeRefused:  └─────────┘                         │
//!  │stopped │    Boot instead     │  │ AppExited, MonitorExited     │
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

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tern_catalog::{Desired, DesiredState, Machine, MachineState, MachineStatus};
use tern_guest::message::ExitStatus;
use tern_guest::signal::SIGKILL;

use super::restart::{Restarts, Verdict};
use super::{CommandError, Source, StopRequest};

/// Numbers the monitors of one Machine.
pub(crate) type Epoch = u64;

/// Numbers those who wait for an outcome.
pub(crate) type Waiter = u64;

/// What is told.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    /// The catalog's record is this now.
    Wanted(Arc<Machine>),
    /// The catalog's record is gone.
    Gone,
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
    /// Ask the app to stop.
    Ask {
        epoch: Epoch,
        /// Instead of the one in the run configuration.
        signal: Option<i32>,
        timeout: Duration,
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

/// What an agent that starts has found of a Machine.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    /// A monitor that runs.
    Running { epoch: Epoch },
    /// No monitor, and a snapshot that is good.
    Asleep,
    /// Neither; with why the last monitor ended, if it said.
    Nothing { end: Option<End> },
}

/// The state machine of one Machine.
#[derive(Debug)]
pub(crate) struct Core {
    wanted: Arc<Machine>,
    phase: Phase,
    goal: Option<Goal>,
    waiters: Vec<(Waiter, Want)>,
    epoch: Epoch,
    generation: u64,
    /// The config that runs, or ran last, and that the disk belongs to.
    instance: String,
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
        exit: Option<ExitStatus>,
    },
    Suspending {
        source: Source,
        lost: Option<End>,
        exit: Option<ExitStatus>,
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

#[derive(Debug, Clone)]
struct Goal {
    to: Target,
    source: Source,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    Started { kind: &'static str },
    Restarted { kind: &'static str, force: bool },
    Suspended,
    Stopped(StopRequest),
    Destroyed { force: bool },
}

impl Target {
    /// Whether an end is wanted whatever the app says to it.
    fn is_forced(&self) -> bool {
        match self {
            Self::Restarted { force, .. } | Self::Destroyed { force } => *force,
            Self::Stopped(request) => request.signal == Some(SIGKILL),
            Self::Started { .. } | Self::Suspended => false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Started,
    Suspended,
    Stopped,
}

/// How long init may take, after the app's end, to flush the disks and reset the Machine.
const FLUSH_TIME: Duration = Duration::from_secs(10);
/// As on Fly.io.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// No app may take longer to stop, or a typing error would hold a deploy for ever.
const MAX_STOP_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
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
                Found::Running { epoch } => epoch,
                _ => 0,
            },
            generation: status.map_or(0, |s| s.generation),
            instance: disk_instance
                .or_else(|| status.map(|s| s.instance_id.clone()))
                .unwrap_or_else(|| wanted.instance_id.clone()),
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

    /// Finds the phase in which an earlier agent has left the Machine.
    fn resume_from(
        &mut self,
        status: Option<&MachineStatus>,
        found: Found,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let last = status.map_or(MachineState::Created, |s| s.state);
        let goal = |to| {
            Some(Goal {
                to,
                source: Source::Host,
            })
        };
        // What was under way is taken up again: none of it was known to have failed.
        self.goal = match last {
            MachineState::Suspending => goal(Target::Suspended),
            MachineState::Stopping => goal(Target::Stopped(StopRequest::default())),
            MachineState::Destroying => goal(Target::Destroyed { force: true }),
            MachineState::Starting => goal(Target::Started { kind: "restart" }),
            _ => None,
        };
        match found {
            Found::Running { .. } => {
                self.phase = Phase::Started { exit: None };
                self.reason = None;
                if last != MachineState::Started {
                    self.record(
                        out,
                        "start",
                        Source::Host,
                        json!({"adopted": true, "was": last}),
                    );
                }
            }
            Found::Asleep => self.rest(Rest::at(MachineState::Suspended)),
            Found::Nothing { end } => match last {
                MachineState::Started | MachineState::Suspending => {
                    self.goal = None;
                    let end = end.unwrap_or_else(|| End {
                        by_guest: false,
                        reason: "the monitor was gone when the agent came back".to_owned(),
                    });
                    self.ended(None, Some(end), now, out);
                }
                MachineState::Starting => self.rest(Rest {
                    keep_disk: status.is_some_and(was_restarting),
                    ..Rest::at(MachineState::Stopped)
                }),
                MachineState::Stopping => self.rest(Rest::at(MachineState::Stopped)),
                MachineState::Stopped | MachineState::Failed => self.rest(Rest {
                    restart_at: status.is_some_and(was_restarting).then_some(now),
                    keep_disk: last == MachineState::Failed || status.is_some_and(was_restarting),
                    ..Rest::at(last)
                }),
                // Without its snapshot the wake is refused, and a cold start keeps the disk.
                MachineState::Suspended => self.rest(Rest::at(MachineState::Suspended)),
                MachineState::Created | MachineState::Destroying | MachineState::Destroyed => {}
            },
        }
    }

    /// Takes up again what an earlier agent had taken up, and maybe not carried out: nobody will ask for it
    /// once more. A state alone does not say what was to come after it.
    fn keep_a_promise(&mut self, status: Option<&MachineStatus>) {
        let Desired { state, generation } = &self.wanted.desired;
        if *generation > self.generation {
            return; // that is a new wish
        }
        let stopping = status.is_some_and(|s| s.state == MachineState::Stopping);
        let outdated = self.instance != self.wanted.instance_id;
        let to = match *state {
            DesiredState::Destroyed { force } => Target::Destroyed { force },
            DesiredState::Restarted { force } if stopping => Target::Restarted {
                kind: "restart",
                force,
            },
            DesiredState::Started if stopping && outdated => Target::Restarted {
                kind: "update",
                force: false,
            },
            _ => return,
        };
        if let Phase::Rest(rest) = &mut self.phase {
            rest.keep_disk |= matches!(to, Target::Restarted { .. });
        }
        self.goal = Some(Goal {
            to,
            source: Source::User,
        });
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
            Input::Gone => self.set_goal(Target::Destroyed { force: true }, Source::Host),
            Input::Command {
                waiter,
                source,
                order,
            } => self.command(waiter, source, order, now, out),
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
            | Input::WakeRefused { epoch, .. }
            | Input::Slept { epoch, .. }
            | Input::SleepFailed { epoch, .. }
            | Input::AskFailed { epoch, .. }
            | Input::AppExited { epoch, .. }
            | Input::MonitorExited { epoch, .. } => {
                if epoch == self.epoch {
                    self.monitor(input, now, out);
                }
            }
        }
    }

    /// A new generation.
    fn wish(&mut self, state: DesiredState, out: &mut Vec<Action>) {
        let lives = matches!(
            self.phase,
            Phase::Starting { .. } | Phase::Started { .. } | Phase::Suspending { .. }
        );
        let to = match state {
            DesiredState::Created => {
                out.push(Action::Record(None));
                return;
            }
            DesiredState::Started if self.instance != self.wanted.instance_id && lives => {
                Target::Restarted {
                    kind: "update",
                    force: false,
                }
            }
            DesiredState::Started => Target::Started { kind: "start" },
            DesiredState::Restarted { force } => Target::Restarted {
                kind: "restart",
                force,
            },
            DesiredState::Stopped { signal, timeout_ms } => Target::Stopped(StopRequest {
                signal,
                timeout: timeout_ms.map(Duration::from_millis),
            }),
            DesiredState::Suspended => Target::Suspended,
            DesiredState::Destroyed { force } => Target::Destroyed { force },
        };
        self.set_goal(to, Source::User);
        // Whether or not it changes anything, it has been taken up.
        out.push(Action::Record(None));
    }

    fn set_goal(&mut self, to: Target, source: Source) {
        let destroyed = |goal: &Goal| matches!(goal.to, Target::Destroyed { .. });
        let forced = to == Target::Destroyed { force: true };
        if matches!(self.phase, Phase::Destroying { .. } | Phase::Destroyed)
            || (self.goal.as_ref().is_some_and(destroyed) && !forced)
        {
            return;
        }
        self.goal = Some(Goal { to, source });
    }

    fn command(
        &mut self,
        waiter: Waiter,
        source: Source,
        order: Order,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let leaving = matches!(self.phase, Phase::Destroying { .. })
            || matches!(&self.goal, Some(g) if matches!(g.to, Target::Destroyed { .. }));
        if leaving {
            out.push(answer(waiter, Err(CommandError::Gone)));
            return;
        }
        let refuse = |out: &mut Vec<Action>, why: String| {
            out.push(answer(waiter, Err(CommandError::Refused(why))));
        };
        match order {
            Order::Start => {
                self.waiters.push((waiter, Want::Started));
                // A start that is under way serves everybody, unless something else is to follow.
                let joins = matches!(self.phase, Phase::Starting { .. }) && self.goal.is_none();
                if !joins {
                    self.set_goal(Target::Started { kind: "start" }, source);
                }
            }
            Order::Suspend => {
                let state = self.state();
                let busy = self.goal.is_some() || state == MachineState::Starting;
                match state {
                    MachineState::Started
                    | MachineState::Starting
                    | MachineState::Suspending
                    | MachineState::Suspended
                        if !(busy && source == Source::Proxy) =>
                    {
                        self.waiters.push((waiter, Want::Suspended));
                        self.set_goal(Target::Suspended, source);
                    }
                    MachineState::Started
                    | MachineState::Starting
                    | MachineState::Suspending
                    | MachineState::Suspended => {
                        refuse(out, "the Machine is wanted again".to_owned());
                    }
                    other => refuse(
                        out,
                        format!("the Machine is {other}: only a started one can be suspended"),
                    ),
                }
            }
            Order::Stop(request) => {
                let starting = matches!(self.phase, Phase::Starting { .. });
                if source == Source::Proxy && (starting || self.goal.is_some()) {
                    refuse(out, "the Machine is wanted again".to_owned());
                    return;
                }
                self.waiters.push((waiter, Want::Stopped));
                if let Phase::Stopping {
                    kill_at: Some(kill_at),
                    ..
                } = &mut self.phase
                {
                    // Who is in a greater hurry decides.
                    let (_, timeout) = stop_terms(&self.wanted, &request);
                    *kill_at = (*kill_at).min(now + timeout + FLUSH_TIME);
                    self.goal = None;
                } else {
                    self.set_goal(Target::Stopped(request), source);
                }
            }
        }
    }

    fn tick(&mut self, now: Instant, out: &mut Vec<Action>) {
        let due = |at: &Option<Instant>| at.is_some_and(|at| at <= now);
        let epoch = self.epoch;
        match &mut self.phase {
            Phase::Rest(rest) if due(&rest.restart_at) => {
                rest.restart_at = None;
                self.set_goal(Target::Started { kind: "restart" }, Source::Host);
            }
            Phase::Started {
                exit: Some((status, by)),
            } if *by <= now => {
                // The app has ended, and its Machine has not.
                let (source, exit) = (Source::Machine, Some(*status));
                self.phase = Phase::Stopping {
                    source,
                    kill_at: None,
                    exit,
                };
                out.push(Action::Kill { epoch });
            }
            Phase::Stopping { kill_at, .. } if due(kill_at) => {
                *kill_at = None;
                out.push(Action::Kill { epoch });
            }
            Phase::Destroying { retry_at } if due(retry_at) => {
                *retry_at = None;
                out.push(Action::Remove);
            }
            _ => {}
        }
    }

    /// Something is told of the monitor at hand.
    fn monitor(&mut self, input: Input, now: Instant, out: &mut Vec<Action>) {
        match (&mut self.phase, input) {
            (&mut Phase::Starting { source, .. }, Input::Up { digest, took, .. }) => {
                self.digest = Some(digest);
                self.started(source, json!({"cold": true, "took_ms": millis(took)}), out);
            }
            (&mut Phase::Starting { source, .. }, Input::Woken { took, .. }) => {
                self.started(source, json!({"cold": false, "took_ms": millis(took)}), out);
            }
            (Phase::Starting { source, wakes }, Input::WakeRefused { reason, .. }) => {
                *wakes = false;
                let source = *source;
                // A wish for its end that has waited for the wake needs no start from the disk.
                self.break_off(out);
                if matches!(self.phase, Phase::Stopping { .. }) {
                    self.stopped(now, out);
                    return;
                }
                let reason = format!("the snapshot could not be used: {reason}");
                let same = self.instance == self.wanted.instance_id;
                self.boot(!same, out);
                self.record(out, "start", source, json!({"cold_because": reason}));
            }
            (&mut Phase::Starting { .. }, Input::BootFailed { failure, .. }) => {
                self.boot_failed(failure, now, out);
            }
            (Phase::Started { exit }, Input::AppExited { exit: status, .. }) => {
                *exit = Some((status, now + FLUSH_TIME));
            }
            (Phase::Started { exit }, Input::MonitorExited { end, .. }) => {
                let status = exit.map(|(status, _)| status);
                self.ended(status, Some(end), now, out);
            }
            (Phase::Stopping { exit, .. }, Input::AppExited { exit: status, .. }) => {
                *exit = Some(status);
            }
            (Phase::Stopping { kill_at, .. }, Input::AskFailed { .. }) if kill_at.is_some() => {
                *kill_at = None;
                out.push(Action::Kill { epoch: self.epoch });
            }
            (
                Phase::Stopping { .. },
                Input::MonitorExited { .. }
                | Input::BootFailed { .. }
                | Input::WakeRefused { .. }
                | Input::Slept { .. }
                | Input::SleepFailed { alive: false, .. },
            ) => self.stopped(now, out),
            (&mut Phase::Suspending { source, .. }, Input::Slept { took, .. }) => {
                self.rest(Rest::at(MachineState::Suspended));
                self.reason = None;
                self.record(out, "suspend", source, json!({"took_ms": millis(took)}));
            }
            (
                Phase::Suspending { lost, exit, source },
                Input::SleepFailed { reason, alive, .. },
            ) => {
                let (exit, source) = (*exit, *source);
                let lost = lost.take().or_else(|| {
                    (!alive).then(|| End {
                        by_guest: false,
                        reason: format!("the Machine was lost while it was suspended: {reason}"),
                    })
                });
                if let Some(end) = lost {
                    self.ended(exit, Some(end), now, out);
                } else {
                    self.phase = Phase::Started {
                        exit: exit.map(|status| (status, now + FLUSH_TIME)),
                    };
                    self.record(out, "suspend", source, json!({"error": reason}));
                    self.answer_wants(out, Want::Suspended, || {
                        Err(CommandError::Failed(reason.clone()))
                    });
                }
            }
            (Phase::Suspending { exit, .. }, Input::AppExited { exit: status, .. }) => {
                *exit = Some(status);
            }
            (Phase::Suspending { lost, .. }, Input::MonitorExited { end, .. }) => {
                *lost = Some(end);
            }
            _ => {}
        }
    }

    fn started(&mut self, source: Source, detail: Value, out: &mut Vec<Action>) {
        self.phase = Phase::Started { exit: None };
        self.reason = None;
        // The requests that wait for this come before anybody's bookkeeping.
        self.answer_wants(out, Want::Started, || Ok(()));
        self.record(out, "start", source, detail);
    }

    fn boot_failed(&mut self, failure: BootFailure, now: Instant, out: &mut Vec<Action>) {
        if let Some(exit) = failure.exit {
            self.ended(Some(exit), None, now, out);
            if !failure.reason.is_empty() {
                self.reason = Some(failure.reason);
            }
            return;
        }
        let verdict = if failure.lasting {
            Verdict::Leave
        } else {
            self.restarts.decide(&self.wanted.config.restart, true, now)
        };
        self.fall(MachineState::Failed, failure.reason.clone(), verdict, now);
        let restarting = matches!(verdict, Verdict::After(_));
        let error = json!({"error": failure.reason, "restarting": restarting});
        self.record(out, "exit", Source::Host, json!({"exit_event": error}));
    }

    /// The Machine has ended without being asked to.
    fn ended(
        &mut self,
        exit: Option<ExitStatus>,
        end: Option<End>,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let by_app = exit.is_some() || end.as_ref().is_some_and(|e| e.by_guest);
        let failed = exit.is_none_or(|e| e.code != 0);
        let verdict = self
            .restarts
            .decide(&self.wanted.config.restart, failed, now);
        let (state, reason) = match (&exit, end) {
            (Some(exit), _) => (MachineState::Stopped, told(exit)),
            (None, Some(end)) if end.by_guest => (MachineState::Stopped, end.reason),
            (None, end) => (
                MachineState::Failed,
                end.map_or_else(|| "the monitor has ended".to_owned(), |e| e.reason),
            ),
        };
        let restarting = matches!(verdict, Verdict::After(_));
        let mut event = json!({
            "requested_stop": false,
            "restarting": restarting,
            "error": reason,
        });
        if let Some(exit) = &exit {
            event["exit_code"] = exit.code.into();
            event["guest_exit_code"] = exit.code.into();
            event["guest_signal"] = exit.signal.into();
            event["signal"] = exit.signal.into();
            event["oom_killed"] = exit.oom_killed.into();
        }
        self.fall(state, reason, verdict, now);
        let source = if by_app {
            Source::Machine
        } else {
            Source::Host
        };
        self.record(out, "exit", source, json!({"exit_event": event}));
        if by_app && !restarting && self.wanted.config.auto_destroy {
            self.set_goal(Target::Destroyed { force: true }, Source::Machine);
        }
    }

    fn fall(&mut self, state: MachineState, reason: String, verdict: Verdict, now: Instant) {
        let (state, reason, restart_at) = match verdict {
            Verdict::Leave => (state, reason, None),
            Verdict::After(wait) => (state, reason, Some(now + wait)),
            Verdict::GiveUp { restarts } => (
                MachineState::Failed,
                format!("{reason}; given up after {restarts} restarts in 5 minutes"),
                None,
            ),
        };
        self.reason = Some(reason);
        self.rest(Rest {
            state,
            restart_at,
            // Only a start that follows a stop begins with an empty disk.
            keep_disk: restart_at.is_some() || state == MachineState::Failed,
        });
    }

    /// The Machine has ended because it was asked to.
    fn stopped(&mut self, now: Instant, out: &mut Vec<Action>) {
        let Phase::Stopping { source, exit, .. } = &self.phase else {
            return;
        };
        let (source, exit) = (*source, *exit);
        if source == Source::Machine {
            // It was killed because it did not follow its app.
            self.ended(exit, None, now, out);
            return;
        }
        let again = matches!(&self.goal, Some(g) if matches!(g.to, Target::Started { .. }));
        self.reason = None;
        self.rest(Rest {
            keep_disk: again,
            ..Rest::at(MachineState::Stopped)
        });
        let mut event = json!({"requested_stop": true, "restarting": again});
        if let Some(exit) = exit {
            event["exit_code"] = exit.code.into();
            event["signal"] = exit.signal.into();
            event["oom_killed"] = exit.oom_killed.into();
        }
        self.record(out, "stop", source, json!({"exit_event": event}));
    }

    /// Takes up the goal as far as the phase allows, and answers who can be answered.
    fn settle(&mut self, now: Instant, out: &mut Vec<Action>) {
        loop {
            match &self.phase {
                Phase::Rest(rest) => {
                    let state = rest.state;
                    match state {
                        MachineState::Suspended => {
                            self.answer_wants(out, Want::Suspended, || Ok(()));
                        }
                        _ => self.answer_wants(out, Want::Stopped, || Ok(())),
                    }
                    let Some(goal) = self.goal.take() else {
                        return self.answer_overtaken(out);
                    };
                    if !self.leave_rest(goal, out) {
                        return;
                    }
                }
                Phase::Started { .. } => {
                    self.answer_wants(out, Want::Started, || Ok(()));
                    let Some(goal) = self.goal.take() else {
                        return self.answer_overtaken(out);
                    };
                    if !self.leave_started(goal, now, out) {
                        return;
                    }
                }
                Phase::Starting { .. } => return self.break_off(out),
                Phase::Stopping { .. } => {
                    if let Some(goal) = &self.goal
                        && matches!(goal.to, Target::Stopped(_) | Target::Suspended)
                    {
                        self.goal = None;
                    }
                    return;
                }
                Phase::Suspending { .. } => {
                    if let Some(goal) = &self.goal
                        && goal.to == Target::Suspended
                    {
                        self.goal = None;
                    }
                    return;
                }
                Phase::Destroying { .. } | Phase::Destroyed => {
                    return self.answer_all(out, || CommandError::Gone);
                }
            }
        }
    }

    /// Returns whether the phase is still one in which to look for a goal.
    fn leave_rest(&mut self, goal: Goal, out: &mut Vec<Action>) -> bool {
        let Phase::Rest(rest) = &mut self.phase else {
            return false;
        };
        match goal.to {
            Target::Started { kind } | Target::Restarted { kind, .. } => {
                let kind = match rest.state {
                    MachineState::Created => "launch",
                    _ if self.instance != self.wanted.instance_id => "update",
                    _ => kind,
                };
                self.start(kind, goal.source, out);
                false
            }
            Target::Suspended => true,
            Target::Stopped(_) => {
                let was = rest.state;
                rest.restart_at = None;
                if was == MachineState::Suspended {
                    out.push(Action::Discard);
                }
                if was != MachineState::Created && was != MachineState::Stopped {
                    self.rest(Rest::at(MachineState::Stopped));
                    self.reason = None;
                    self.record(out, "stop", goal.source, json!({"was": was}));
                }
                true
            }
            Target::Destroyed { .. } => {
                self.phase = Phase::Destroying { retry_at: None };
                out.push(Action::Remove);
                self.record(out, "destroy", goal.source, Value::Null);
                self.answer_all(out, || CommandError::Gone);
                false
            }
        }
    }

    fn start(&mut self, kind: &'static str, source: Source, out: &mut Vec<Action>) {
        let Phase::Rest(rest) = &self.phase else {
            return;
        };
        let same = self.instance == self.wanted.instance_id;
        let asleep = rest.state == MachineState::Suspended;
        let keep_disk = same && (rest.keep_disk || asleep);
        let wakes = asleep && same;
        self.phase = Phase::Starting { source, wakes };
        self.reason = None;
        if wakes {
            self.epoch += 1;
            out.push(Action::Wake { epoch: self.epoch });
        } else {
            self.boot(!keep_disk, out);
        }
        if kind == "start" {
            // Its event comes when it has started, with the time it took.
            out.push(Action::Record(None));
        } else {
            self.record(out, kind, source, Value::Null);
        }
    }

    fn boot(&mut self, reset_disk: bool, out: &mut Vec<Action>) {
        self.epoch += 1;
        self.instance = self.wanted.instance_id.clone();
        out.push(Action::Boot {
            epoch: self.epoch,
            machine: Arc::clone(&self.wanted),
            reset_disk,
        });
    }

    /// Returns whether the phase is still one in which to look for a goal.
    fn leave_started(&mut self, goal: Goal, now: Instant, out: &mut Vec<Action>) -> bool {
        let epoch = self.epoch;
        let exit = match &self.phase {
            Phase::Started { exit } => exit.map(|(status, _)| status),
            _ => None,
        };
        let source = goal.source;
        match goal.to {
            Target::Started { .. } => return true,
            Target::Suspended => {
                self.phase = Phase::Suspending {
                    source,
                    lost: None,
                    exit,
                };
                out.push(Action::Sleep { epoch });
            }
            Target::Stopped(request) => {
                let (signal, timeout) = stop_terms(&self.wanted, &request);
                self.stop(source, signal, timeout, exit, now, out);
            }
            Target::Restarted { kind, force } => {
                self.goal = Some(Goal {
                    to: Target::Started { kind },
                    source,
                });
                self.stop_for(force, source, exit, now, out);
            }
            Target::Destroyed { force } => {
                self.goal = Some(Goal {
                    to: Target::Destroyed { force },
                    source,
                });
                self.stop_for(force, source, exit, now, out);
            }
        }
        out.push(Action::Record(None));
        false
    }

    fn stop_for(
        &mut self,
        force: bool,
        source: Source,
        exit: Option<ExitStatus>,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let (signal, timeout) = if force {
            (Some(SIGKILL), Duration::ZERO)
        } else {
            stop_terms(&self.wanted, &StopRequest::default())
        };
        self.stop(source, signal, timeout, exit, now, out);
    }

    fn stop(
        &mut self,
        source: Source,
        signal: Option<i32>,
        timeout: Duration,
        exit: Option<ExitStatus>,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        // A Machine whose app has ended is about to end; nobody is left to be asked.
        let source = if source == Source::Machine {
            Source::Host
        } else {
            source
        };
        self.phase = Phase::Stopping {
            source,
            kill_at: Some(now + timeout + FLUSH_TIME),
            exit,
        };
        if exit.is_none() {
            out.push(Action::Ask {
                epoch: self.epoch,
                signal,
                timeout,
            });
        }
    }

    /// A start that is under way is broken off by a wish for its opposite. Not so a wake, unless by force: its guest
    /// may have requests already, and is asked to end once it counts as started.
    fn break_off(&mut self, out: &mut Vec<Action>) {
        let Some(goal) = &self.goal else {
            return;
        };
        let source = goal.source;
        let wakes = matches!(self.phase, Phase::Starting { wakes: true, .. });
        let outdated = self.instance != self.wanted.instance_id;
        if wakes && outdated && matches!(goal.to, Target::Started { .. }) {
            // Of the config that is wanted now, which what wakes is not.
            let to = Target::Restarted {
                kind: "update",
                force: false,
            };
            self.goal = Some(Goal { to, source });
            return;
        }
        if wakes && !goal.to.is_forced() && !matches!(goal.to, Target::Started { .. }) {
            return;
        }
        self.goal = match goal.to.clone() {
            Target::Started { .. } => None,
            Target::Suspended => return,
            Target::Stopped(_) => {
                self.stopping_start(source, out);
                None
            }
            Target::Restarted { kind, .. } => {
                self.stopping_start(source, out);
                Some(Goal {
                    to: Target::Started { kind },
                    source,
                })
            }
            to @ Target::Destroyed { .. } => {
                self.stopping_start(source, out);
                Some(Goal { to, source })
            }
        };
    }

    fn stopping_start(&mut self, source: Source, out: &mut Vec<Action>) {
        let source = if source == Source::Machine {
            Source::Host
        } else {
            source
        };
        self.phase = Phase::Stopping {
            source,
            kill_at: None,
            exit: None,
        };
        out.push(Action::Kill { epoch: self.epoch });
        out.push(Action::Record(None));
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

    fn answer_wants(
        &mut self,
        out: &mut Vec<Action>,
        want: Want,
        outcome: impl Fn() -> Result<(), CommandError>,
    ) {
        self.waiters.retain(|&(waiter, wants)| {
            if wants == want {
                out.push(answer(waiter, outcome()));
            }
            wants != want
        });
    }

    /// At rest, with nothing under way: who still waits does so in vain.
    fn answer_overtaken(&mut self, out: &mut Vec<Action>) {
        let state = self.state();
        let reason = self.reason.clone();
        self.answer_all(out, || {
            let why = reason
                .as_deref()
                .unwrap_or("another command came in between");
            CommandError::Failed(format!("the Machine is {state}: {why}"))
        });
    }

    fn answer_all(&mut self, out: &mut Vec<Action>, error: impl Fn() -> CommandError) {
        for (waiter, _) in self.waiters.drain(..) {
            out.push(answer(waiter, Err(error())));
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

fn answer(waiter: Waiter, outcome: Result<(), CommandError>) -> Action {
    Action::Answer { waiter, outcome }
}

/// The signal, where one was asked for (the guest knows the configured one), and the time allowed:
/// what was asked for, else what is configured, else a default.
fn stop_terms(machine: &Machine, request: &StopRequest) -> (Option<i32>, Duration) {
    let timeout = request
        .timeout
        .or_else(|| machine.config.stop_config.timeout.map(|t| t.0))
        .unwrap_or(STOP_TIMEOUT);
    (request.signal, timeout.min(MAX_STOP_TIMEOUT))
}

/// Whether the last thing told of a Machine is that it will be started again.
fn was_restarting(status: &MachineStatus) -> bool {
    status.events.last().is_some_and(|event| {
        event.kind == "restart" || event.request["exit_event"]["restarting"] == true
    })
}

fn told(exit: &ExitStatus) -> String {
    let mut text = match exit.signal {
        Some(signal) => format!(
            "the app was ended by {}",
            tern_guest::signal::signal_name(signal)
        ),
        None => format!("the app exited with code {}", exit.code),
    };
    if exit.oom_killed {
        text.push_str(": memory had run out");
    }
    text
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
