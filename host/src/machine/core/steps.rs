//! How a start and a stop begin: from the snapshot or the disk, by asking or by force.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tern_catalog::{Machine, MachineState};
use tern_guest::message::ExitStatus;
use tern_guest::signal::SIGKILL;

use super::{Action, Core, Phase};
use crate::machine::{Source, StopRequest};

/// How long init may take, after the app's end, to flush the disks and reset the Machine.
pub(super) const FLUSH_TIME: Duration = Duration::from_secs(10);
/// How long requests that are under way may take to end before their Machine is put to sleep. What takes longer is
/// answered by the resumed Machine, or lost with one that is stopped; and all that is new waits meanwhile.
pub(crate) const DRAIN_TIME: Duration = Duration::from_secs(5);
/// As on Fly.io.
pub(super) const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// No app may take longer to stop, or a typing error would hold a deploy for ever.
const MAX_STOP_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

impl Core {
    pub(super) fn start(&mut self, kind: &'static str, source: Source, out: &mut Vec<Action>) {
        let Phase::Rest(rest) = &self.phase else {
            return;
        };
        let same = !self.is_outdated();
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

    pub(super) fn boot(&mut self, reset_disk: bool, out: &mut Vec<Action>) {
        self.epoch += 1;
        self.instance = self.wanted.instance_id.clone();
        self.reset_owed |= reset_disk;
        out.push(Action::Boot {
            epoch: self.epoch,
            machine: Arc::clone(&self.wanted),
            reset_disk: self.reset_owed,
        });
    }

    pub(super) fn stop_for(
        &mut self,
        force: bool,
        source: Source,
        exit: Option<ExitStatus>,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let (signal, timeout) = self.end_terms(force);
        self.stop(source, signal, timeout, exit, now, out);
    }

    /// The signal and the time allowed where an end is wanted for what is to follow it.
    pub(super) fn end_terms(&self, force: bool) -> (Option<i32>, Duration) {
        if force {
            (Some(SIGKILL), Duration::ZERO)
        } else {
            stop_terms(&self.wanted, &StopRequest::default())
        }
    }

    /// Makes a stop under way end as soon as these terms want it. The app is asked once more if that is sooner,
    /// or in any case; of several terms that its guest knows the soonest holds. Requests that are under way keep
    /// the time that they were given, as far as these terms give them any.
    pub(super) fn hasten(
        &mut self,
        signal: Option<i32>,
        timeout: Duration,
        in_any_case: bool,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let Phase::Stopping {
            kill_at: Some(kill_at),
            drained_at,
            exit,
            hastened,
            ..
        } = &mut self.phase
        else {
            return; // it is being killed
        };
        let drained = (now + drain_time(signal, timeout))
            .min(*drained_at)
            .max(now);
        let by = drained + timeout + FLUSH_TIME;
        let sooner = by < *kill_at;
        *drained_at = drained;
        *kill_at = by.min(*kill_at);
        if exit.is_none() && (sooner || in_any_case) {
            *hastened = true;
            out.push(Action::Ask {
                epoch: self.epoch,
                signal,
                timeout,
                drain: drained - now,
            });
        }
    }

    pub(super) fn stop(
        &mut self,
        source: Source,
        signal: Option<i32>,
        timeout: Duration,
        exit: Option<ExitStatus>,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let drain = drain_time(signal, timeout);
        self.phase = Phase::Stopping {
            source: asker(source),
            kill_at: Some(now + drain + timeout + FLUSH_TIME),
            drained_at: now + drain,
            exit,
            hastened: false,
        };
        // A Machine whose app has ended is about to end; nobody is left to be asked.
        if exit.is_none() {
            out.push(Action::Ask {
                epoch: self.epoch,
                signal,
                timeout,
                drain,
            });
        }
    }

    pub(super) fn stopping_start(&mut self, source: Source, now: Instant, out: &mut Vec<Action>) {
        self.phase = Phase::killing(asker(source), None, now);
        out.push(Action::Kill { epoch: self.epoch });
        out.push(Action::Record(None));
    }
}

/// How long requests that are under way are given by a stop on these terms. Who allows the app no time allows
/// its requests none.
fn drain_time(signal: Option<i32>, timeout: Duration) -> Duration {
    match signal {
        Some(SIGKILL) => Duration::ZERO,
        _ => DRAIN_TIME.min(timeout),
    }
}

/// Who has asked for a stop. Stopping on the Machine's own account means that it does not follow its app's
/// end, and nobody has asked.
pub(super) fn asker(source: Source) -> Source {
    match source {
        Source::Machine => Source::Host,
        other => other,
    }
}

/// The signal, where one was asked for (the guest knows the configured one), and the time allowed:
/// what was asked for, else what is configured, else a default.
pub(super) fn stop_terms(machine: &Machine, request: &StopRequest) -> (Option<i32>, Duration) {
    let timeout = request
        .timeout
        .or_else(|| machine.config.stop_config.timeout.map(|t| t.0))
        .unwrap_or(STOP_TIMEOUT);
    (request.signal, timeout.min(MAX_STOP_TIMEOUT))
}
