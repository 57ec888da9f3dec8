//! What is wanted of a Machine, and the way to it from each phase.
//!
//! A wish becomes the goal ([`Core::wish`], and orders by [`Core::set_goal`]), and after every input
//! [`Core::settle`] takes it up as far as the phase allows.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tern_catalog::{DesiredState, MachineState};
use tern_guest::signal::SIGKILL;

use super::order::Want;
use super::steps::{asker, stop_terms};
use super::{Action, Core, Phase, Rest};
use crate::machine::{CommandError, Source, StopRequest};

#[derive(Debug, Clone)]
pub(super) struct Goal {
    pub(super) to: Target,
    pub(super) source: Source,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
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

impl Core {
    /// A new generation.
    pub(super) fn wish(&mut self, state: DesiredState, out: &mut Vec<Action>) {
        let lives = matches!(
            self.phase,
            Phase::Starting { .. } | Phase::Started { .. } | Phase::Suspending { .. }
        );
        let to = match state {
            DesiredState::Created => {
                out.push(Action::Record(None));
                return;
            }
            DesiredState::Started if self.is_outdated() && lives => Target::Restarted {
                kind: "update",
                force: false,
            },
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

    pub(super) fn set_goal(&mut self, to: Target, source: Source) {
        let destroyed = |goal: &Goal| matches!(goal.to, Target::Destroyed { .. });
        let forced = to == Target::Destroyed { force: true };
        if matches!(self.phase, Phase::Destroying { .. } | Phase::Destroyed)
            || (self.goal.as_ref().is_some_and(destroyed) && !forced)
        {
            return;
        }
        self.goal = Some(Goal { to, source });
    }

    /// Takes up the goal as far as the phase allows, and answers who can be answered.
    pub(super) fn settle(&mut self, now: Instant, out: &mut Vec<Action>) {
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
                Phase::Starting { .. } => return self.break_off(now, out),
                Phase::Stopping { .. } => return self.join_stop(now, out),
                Phase::Suspending { .. } => return self.break_off_sleep(out),
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
        let was = rest.state;
        match goal.to {
            Target::Started { kind } | Target::Restarted { kind, .. } => {
                let kind = match was {
                    MachineState::Created => "launch",
                    _ if self.is_outdated() => "update",
                    _ => kind,
                };
                self.start(kind, goal.source, out);
                false
            }
            Target::Suspended => {
                if was != MachineState::Suspended {
                    let error =
                        format!("the Machine is {was}: only a started one can be suspended");
                    self.record(out, "suspend", goal.source, json!({"error": error}));
                }
                true
            }
            Target::Stopped(_) => {
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
                    killed: false,
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

    /// A suspend takes as long as its disk does. By force alone its Machine ends before.
    fn break_off_sleep(&mut self, out: &mut Vec<Action>) {
        let (Phase::Suspending { killed, .. }, Some(goal)) = (&mut self.phase, &self.goal) else {
            return;
        };
        if goal.to == Target::Suspended {
            self.goal = None;
        } else if goal.to.is_forced() && !*killed {
            *killed = true;
            out.push(Action::Kill { epoch: self.epoch });
        }
    }

    /// A suspend was broken off by force: its Machine has stopped. Returns whether that is so.
    pub(super) fn sleep_broken_off(&mut self, now: Instant, out: &mut Vec<Action>) -> bool {
        let (Phase::Suspending { killed, exit, .. }, Some(goal)) = (&self.phase, &self.goal) else {
            return false;
        };
        if !*killed || !goal.to.is_forced() {
            return false;
        }
        let (source, exit) = (goal.source, *exit);
        self.goal = match goal.to.clone() {
            Target::Restarted { kind, .. } => Some(Goal {
                to: Target::Started { kind },
                source,
            }),
            to @ Target::Destroyed { .. } => Some(Goal { to, source }),
            _ => None,
        };
        self.phase = Phase::killing(asker(source), exit, now);
        self.stopped(now, out);
        true
    }

    /// A stop that is under way serves whoever wants an end, and is hastened by who is in a greater hurry.
    fn join_stop(&mut self, now: Instant, out: &mut Vec<Action>) {
        let (Phase::Stopping { source, .. }, Some(goal)) = (&mut self.phase, &self.goal) else {
            return;
        };
        if *source == Source::Machine && matches!(goal.to, Target::Stopped(_)) {
            // From now on somebody has asked: no restart follows.
            *source = asker(goal.source);
            out.push(Action::Record(None));
        }
        match goal.to.clone() {
            Target::Started { .. } => {}
            Target::Suspended => self.goal = None,
            Target::Stopped(request) => {
                self.goal = None;
                let (signal, timeout) = stop_terms(&self.wanted, &request);
                // A signal of one's own is sent, however soon the app is to end anyway.
                self.hasten(signal, timeout, signal.is_some(), now, out);
            }
            Target::Restarted { kind, force } => {
                self.goal = Some(Goal {
                    to: Target::Started { kind },
                    source: goal.source,
                });
                let (signal, timeout) = self.end_terms(force);
                self.hasten(signal, timeout, false, now, out);
            }
            Target::Destroyed { force } => {
                let (signal, timeout) = self.end_terms(force);
                self.hasten(signal, timeout, false, now, out);
            }
        }
    }

    /// A start that is under way is broken off by a wish for its opposite. Not so a wake, unless by force: its guest
    /// may have requests already, and is asked to end once it counts as started.
    pub(super) fn break_off(&mut self, now: Instant, out: &mut Vec<Action>) {
        let Some(goal) = &self.goal else {
            return;
        };
        let source = goal.source;
        let wakes = matches!(self.phase, Phase::Starting { wakes: true, .. });
        if wakes && self.is_outdated() && matches!(goal.to, Target::Started { .. }) {
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
                self.stopping_start(source, now, out);
                None
            }
            Target::Restarted { kind, .. } => {
                self.stopping_start(source, now, out);
                Some(Goal {
                    to: Target::Started { kind },
                    source,
                })
            }
            to @ Target::Destroyed { .. } => {
                self.stopping_start(source, now, out);
                Some(Goal { to, source })
            }
        };
    }
}
