//! How a run ends: in which state, told by which event, and whether another follows.

use std::time::Instant;

use serde_json::{Value, json};
use tern_catalog::MachineState;
use tern_guest::message::ExitStatus;

use super::goal::Target;
use super::{Action, BootFailure, Core, End, Phase, Rest};
use crate::machine::Source;
use crate::machine::restart::Verdict;

impl Core {
    pub(super) fn boot_failed(
        &mut self,
        failure: BootFailure,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
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
    pub(super) fn ended(
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
            add_exit(&mut event, exit);
            event["guest_exit_code"] = exit.code.into();
            event["guest_signal"] = exit.signal.into();
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
    pub(super) fn stopped(&mut self, now: Instant, out: &mut Vec<Action>) {
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
            add_exit(&mut event, &exit);
        }
        self.record(out, "stop", source, json!({"exit_event": event}));
    }
}

/// How the app ended, in an `exit_event`.
fn add_exit(event: &mut Value, exit: &ExitStatus) {
    event["exit_code"] = exit.code.into();
    event["signal"] = exit.signal.into();
    event["oom_killed"] = exit.oom_killed.into();
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
