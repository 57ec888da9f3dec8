//! Where the time of a start went, as the agent, the monitor and the guest each saw it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tern_guest::message::GuestPhase;

use crate::monitor::control::VmState;

/// Where the time of a Machine's last start went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StartTrace {
    /// When the agent began, or where it has not seen the start, the monitor; microseconds since 1970.
    pub began_unix_us: u64,
    /// From the disk, and not from a snapshot. Unknown if the agent has not seen the start.
    pub cold: Option<bool>,
    /// What ended when, in this order.
    pub phases: Vec<Phase>,
}

/// Something that was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Phase {
    /// Who did it.
    pub side: Side,
    /// What.
    pub name: String,
    /// When it had ended, in microseconds since the start began.
    pub at_us: u64,
}

/// Who does something in a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The host's agent.
    Agent,
    /// The Machine's monitor.
    Monitor,
    /// The guest's kernel and init. Its clock starts with its first instruction, as far as one can see
    /// from outside: when its first processor first ran.
    Guest,
}

/// The agent's own phases, as they happen.
#[derive(Debug, Clone)]
pub(crate) struct Marks {
    began: Instant,
    began_unix_us: u64,
    cold: bool,
    phases: Vec<(&'static str, u64)>,
}

impl Marks {
    /// A start begins now.
    pub(crate) fn new(cold: bool) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            began: Instant::now(),
            began_unix_us: now.map_or(0, |now| u64::try_from(now.as_micros()).unwrap_or(0)),
            cold,
            phases: Vec::with_capacity(8),
        }
    }

    /// Whether it is a start from the disk.
    pub(crate) fn is_cold(&self) -> bool {
        self.cold
    }

    /// Since the start began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// The phase `name` has just ended.
    pub(crate) fn mark(&mut self, name: &'static str) {
        self.mark_at(name, self.elapsed());
    }

    /// The phase `name` ended `at` this time after the start began.
    pub(crate) fn mark_at(&mut self, name: &'static str, at: Duration) {
        let micros = u64::try_from(at.as_micros()).unwrap_or(u64::MAX);
        self.phases.push((name, micros));
    }
}

/// The marks that processor 0's first entry is made by.
const FIRST_RUN: &str = "first_vcpu_run";

impl StartTrace {
    /// Puts what was seen on one axis of time.
    pub(crate) fn new(marks: Option<&Marks>, vm: &VmState, guest: &[GuestPhase]) -> Self {
        let began_unix_us = marks.map_or(vm.started_unix_us, |m| m.began_unix_us);
        // Two clocks of one host; a step between them is not worth a negative time.
        let monitor_began = vm.started_unix_us.saturating_sub(began_unix_us);
        let mut phases = Vec::new();
        for (name, at_us) in marks.iter().flat_map(|m| &m.phases) {
            phases.push(Phase {
                side: Side::Agent,
                name: (*name).to_owned(),
                at_us: *at_us,
            });
        }
        let mut first_run = None;
        for (name, at_us) in vm.boot.as_object().into_iter().flatten() {
            let (Some(name), Some(at_us)) = (name.strip_suffix("_us"), at_us.as_u64()) else {
                continue;
            };
            let at_us = monitor_began.saturating_add(at_us);
            if name == FIRST_RUN {
                first_run = Some(at_us);
            }
            phases.push(Phase {
                side: Side::Monitor,
                name: name.to_owned(),
                at_us,
            });
        }
        // A guest that was restored booted at another time.
        if let (Some(first_run), true) = (first_run, marks.is_none_or(|m| m.cold)) {
            phases.extend(guest.iter().map(|phase| Phase {
                side: Side::Guest,
                name: phase.name.clone(),
                at_us: first_run.saturating_add(phase.uptime_us),
            }));
        }
        phases.sort_by_key(|phase| phase.at_us);
        Self {
            began_unix_us,
            cold: marks.map(|m| m.cold),
            phases,
        }
    }
}

impl std::fmt::Display for StartTrace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, phase) in self.phases.iter().enumerate() {
            let gap = if number == 0 { "" } else { " " };
            write!(f, "{gap}{}:{}={}", phase.side, phase.name, phase.at_us)?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Agent => "agent",
            Self::Monitor => "monitor",
            Self::Guest => "guest",
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn vm(started_unix_us: u64) -> VmState {
        VmState {
            state: "running".into(),
            started_unix_us,
            memory_limit_mib: None,
            boot: json!({"kvm_us": 10, "first_vcpu_run_us": 30, "odd": "x"}),
        }
    }

    fn told(trace: &StartTrace) -> Vec<(Side, &str, u64)> {
        let phases = trace.phases.iter();
        phases.map(|p| (p.side, p.name.as_str(), p.at_us)).collect()
    }

    #[test]
    fn three_clocks_become_one() {
        let mut marks = Marks::new(true);
        marks.phases = vec![("prepared", 5), ("app_started", 300)];
        let guest = [GuestPhase {
            name: "kernel".into(),
            uptime_us: 100,
        }];
        let trace = StartTrace::new(Some(&marks), &vm(marks.began_unix_us + 20), &guest);
        assert_eq!(
            told(&trace),
            [
                (Side::Agent, "prepared", 5),
                (Side::Monitor, "kvm", 30),
                (Side::Monitor, "first_vcpu_run", 50),
                (Side::Guest, "kernel", 150),
                (Side::Agent, "app_started", 300),
            ]
        );
        // A wake has no boot of the guest's in it.
        marks.cold = false;
        let trace = StartTrace::new(Some(&marks), &vm(marks.began_unix_us), &guest);
        assert!(trace.phases.iter().all(|p| p.side != Side::Guest));
        // An agent that was not there tells what the others know.
        let trace = StartTrace::new(None, &vm(7), &[]);
        assert_eq!((trace.began_unix_us, trace.cold), (7, None));
        assert_eq!(told(&trace)[0], (Side::Monitor, "kvm", 10));
    }
}
