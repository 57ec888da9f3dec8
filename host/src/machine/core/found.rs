//! How an agent that starts takes up what another has left.
//!
//! What was under way is carried on, what was promised is kept, and a run that is over by now has
//! ended without being asked to.

use std::time::Instant;

use serde_json::json;
use tern_catalog::{Desired, DesiredState, MachineState, MachineStatus};

use super::goal::{Goal, Target};
use super::{Action, Core, End, Epoch, Phase, Rest};
use crate::machine::{Source, StopRequest};

/// What an agent that starts has found of a Machine.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    /// A monitor that runs.
    Running { epoch: Epoch },
    /// A monitor that writes a snapshot, and does nothing else before that is done.
    Busy { epoch: Epoch },
    /// No monitor, and a snapshot that is good.
    Asleep,
    /// Neither; with why the last monitor ended, if it said.
    Nothing { end: Option<End> },
}

impl Core {
    /// Finds the phase in which an earlier agent has left the Machine.
    pub(super) fn resume_from(
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
            Found::Busy { epoch } => {
                self.goal = None; // it follows from the phase
                self.phase = Phase::Suspending {
                    source: Source::Host,
                    lost: None,
                    exit: None,
                    killed: false,
                };
                out.push(Action::TakeOver { epoch });
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
    pub(super) fn keep_a_promise(&mut self, status: Option<&MachineStatus>) {
        let Desired { state, generation } = &self.wanted.desired;
        if *generation > self.generation {
            return; // that is a new wish
        }
        let stopping = status.is_some_and(|s| s.state == MachineState::Stopping);
        let to = match *state {
            DesiredState::Destroyed { force } => Target::Destroyed { force },
            DesiredState::Restarted { force } if stopping => Target::Restarted {
                kind: "restart",
                force,
            },
            DesiredState::Started if stopping && self.is_outdated() => Target::Restarted {
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
}

/// The event of a Machine that an agent could not take up.
pub(crate) const REFUSED: &str = "refused";

/// The last generation that was acted on. That of a Machine that could not be taken up is told of, and was not.
pub(crate) fn taken_up(status: &MachineStatus) -> u64 {
    let refused = status.events.last().filter(|event| event.kind == REFUSED);
    let before = refused.and_then(|event| event.request["taken_up"].as_u64());
    before.unwrap_or(status.generation)
}

/// Whether the last thing told of a Machine is that it will be started again.
fn was_restarting(status: &MachineStatus) -> bool {
    status.events.last().is_some_and(|event| {
        event.kind == "restart" || event.request["exit_event"]["restarting"] == true
    })
}
