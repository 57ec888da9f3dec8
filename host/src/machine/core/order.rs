//! What is asked for on this host, and the answer to who waits for it.
//!
//! The gate's wish for an end gives way to whatever else is wanted by now; a person's does not.

use tern_catalog::MachineState;

use super::goal::{Goal, Target};
use super::{Action, Core, Order, Phase, Waiter};
use crate::machine::{CommandError, Source};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    Started,
    Suspended,
    Stopped,
}

impl Core {
    pub(super) fn command(
        &mut self,
        waiter: Waiter,
        source: Source,
        order: Order,
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
                // A start that is under way serves everybody, unless something else is to follow. What its owner
                // wants to follow does: a request is served before that.
                let owners_end = |goal: &Goal| {
                    goal.source == Source::User
                        && matches!(goal.to, Target::Suspended | Target::Stopped(_))
                };
                let joins = matches!(self.phase, Phase::Starting { .. })
                    && self
                        .goal
                        .as_ref()
                        .is_none_or(|goal| source == Source::Proxy && owners_end(goal));
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
                self.set_goal(Target::Stopped(request), source);
            }
        }
    }

    pub(super) fn answer_wants(
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
    pub(super) fn answer_overtaken(&mut self, out: &mut Vec<Action>) {
        let state = self.state();
        let reason = self.reason.clone();
        self.answer_all(out, || {
            let why = reason
                .as_deref()
                .unwrap_or("another command came in between");
            CommandError::Failed(format!("the Machine is {state}: {why}"))
        });
    }

    pub(super) fn answer_all(&mut self, out: &mut Vec<Action>, error: impl Fn() -> CommandError) {
        for (waiter, _) in self.waiters.drain(..) {
            out.push(answer(waiter, Err(error())));
        }
    }
}

pub(super) fn answer(waiter: Waiter, outcome: Result<(), CommandError>) -> Action {
    Action::Answer { waiter, outcome }
}
