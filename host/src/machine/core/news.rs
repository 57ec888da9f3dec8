//! What is told of the monitor, and what the clock makes due, in each phase.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tern_catalog::MachineState;

use super::goal::Target;
use super::order::Want;
use super::steps::FLUSH_TIME;
use super::{Action, Core, End, Input, Phase, Rest};
use crate::machine::{CommandError, Source};

impl Core {
    /// Something is told of the monitor at hand.
    pub(super) fn monitor(&mut self, input: Input, now: Instant, out: &mut Vec<Action>) {
        // Whether or not the start is still wanted.
        self.reset_owed &= match &input {
            Input::Up { .. } => false,
            Input::BootFailed { failure, .. } => !failure.disk_ready,
            _ => true,
        };
        match (&mut self.phase, input) {
            (&mut Phase::Starting { source, .. }, Input::Up { digest, took, .. }) => {
                self.digest = Some(digest);
                self.started(source, json!({"cold": true, "took_ms": millis(took)}), out);
            }
            (&mut Phase::Starting { source, .. }, Input::Woken { took, .. }) => {
                self.started(source, json!({"cold": false, "took_ms": millis(took)}), out);
            }
            (&mut Phase::Starting { source, .. }, Input::WakeNotReady { reason, .. }) => {
                self.rest(Rest::at(MachineState::Suspended));
                let reason = format!("it could not be woken yet: {reason}");
                // Who waits is told, and the next who wants it tries again.
                self.record(out, "start", source, json!({"error": reason}));
                self.reason = Some(reason);
            }
            (Phase::Stopping { .. }, Input::WakeNotReady { .. }) => {
                out.push(Action::Discard);
                self.stopped(now, out);
            }
            (Phase::Starting { source, wakes }, Input::WakeRefused { reason, .. }) => {
                *wakes = false;
                let source = *source;
                // A wish for its end that has waited for the wake needs no start from the disk.
                self.break_off(now, out);
                if matches!(self.phase, Phase::Stopping { .. }) {
                    self.stopped(now, out);
                    return;
                }
                let reason = format!("the snapshot could not be used: {reason}");
                self.boot(self.is_outdated(), out);
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
            (
                Phase::Stopping {
                    kill_at: Some(kill_at),
                    hastened,
                    exit,
                    ..
                },
                Input::AskFailed { .. },
            ) if *hastened || exit.is_some() => {
                // The app may have ended of what was asked before, and init still has the disks to flush.
                *kill_at = (now + FLUSH_TIME).min(*kill_at);
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
                // Whoever has wished for this sleep once more meanwhile has it. Requests that wait go on.
                let awaited = self.waiters.iter().any(|&(_, want)| want == Want::Started);
                if awaited && self.goal.is_none() {
                    self.set_goal(Target::Started { kind: "start" }, Source::Proxy);
                }
            }
            (Phase::Suspending { source, exit, .. }, Input::TakenOver { .. }) => {
                let source = *source;
                self.phase = Phase::Started {
                    exit: exit.map(|status| (status, now + FLUSH_TIME)),
                };
                let detail = json!({"adopted": true, "was": MachineState::Suspending});
                self.record(out, "start", source, detail);
                // That it was to sleep still holds, unless something else is wanted by now.
                if self.goal.is_none() {
                    self.set_goal(Target::Suspended, source);
                }
            }
            (Phase::Suspending { .. }, Input::SleepFailed { reason, alive, .. }) => {
                if !alive && self.sleep_broken_off(now, out) {
                    return;
                }
                let Phase::Suspending {
                    lost, exit, source, ..
                } = &mut self.phase
                else {
                    return;
                };
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

    pub(super) fn tick(&mut self, now: Instant, out: &mut Vec<Action>) {
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
                self.phase = Phase::killing(Source::Machine, Some(*status), now);
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
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
